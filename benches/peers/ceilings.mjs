// What a machine allows at most, from its measured limits and the sizes of a model: reading memory bounds decoding,
// arithmetic bounds prompts, and many sequences meet the nearer of both (roofline: Williams et al. 2009). A ceiling is no
// aim: no program reaches it, and shares of it compare engines across machines.

import { PARALLEL_GEN_TOKENS, PARALLEL_PROMPT_TOKENS, LONG_GEN_TOKENS } from './engines.mjs';

const F16_BYTES = 2;

/** Sizes of a model from `ns-llm inspect --json` of its file. */
export function modelSizes(inspection) {
  const of = (name) => Number(inspection.hyperparameters[name]);
  const matrices = inspection.tensors.filter(({ shape }) => shape.length === 2);
  const parameters = (tensors) => tensors.reduce((sum, { shape: [rows, columns] }) => sum + rows * columns, 0);
  const isInLayer = ({ name }) => name.includes('.layers.');
  const named = (part) => matrices.find(({ name }) => name.includes(part));
  const outputMatrix = named('lm_head') ?? named('embed_tokens');
  const layerParameters = parameters(matrices.filter(isInLayer));
  return {
    // All of the file's tensors are read for a token; the embedding too, where it is the output matrix.
    weightBytes: inspection.checkpoint_bytes,
    kvTokenBytes: 2 * F16_BYTES * of('num_hidden_layers') * of('num_key_value_heads') * of('head_dim'),
    layerParameters,
    tokenParameters: layerParameters + parameters([outputMatrix]),
    // Products of queries with keys, and of weights with values, for each token of context.
    attentionFlopsPerContextToken: 4 * of('num_hidden_layers') * of('num_attention_heads') * of('head_dim'),
    vocabSize: of('vocab_size'),
  };
}

/**
 * The limits that count for weights of one format: reading memory in bytes/s, and arithmetic in operations/s, where a
 * multiply-add is two. Blocks of integers are multiplied by the best integer instructions of this machine (without VNNI
 * that is 32 multiply-adds a cycle and core), floats as bf16 where there is a dot product for it, else as f32.
 */
export function peaks(limits, format) {
  const best = (prefix) => {
    const values = Object.entries(limits).filter(([name]) => name.startsWith(prefix)).map(([, value]) => value);
    return Math.max(0, ...values);
  };
  const floats = Math.max(best('f32_'), best('bf16_'));
  return { bytes: best('ram_') * 1e9, floats: floats * 1e9, weights: (isFloat(format) ? floats : best('int8_')) * 1e9 };
}

function isFloat(format) {
  return ['BF16', 'F16', 'F32'].includes(format);
}

/** The ceiling of a figure, in its unit, or `undefined` where nothing is computed. `sizes` are those of the run. */
export function ceiling(figure, model, peak, sizes) {
  const [, kind, number] = /^(.*?)(?:-(\d+))?$/.exec(figure);
  const decodeAfter = (context, gen) => peak.bytes / (model.weightBytes + (context + gen / 2) * model.kvTokenBytes);
  const promptOf = (tokens) => {
    const attention = (model.attentionFlopsPerContextToken * tokens) / 2 / peak.floats;
    return 1 / ((2 * model.layerParameters) / peak.weights + attention);
  };
  switch (kind) {
    case 'decode':
    case 'node-decode-tps':
    case 'alone':
      return decodeAfter(1, sizes.genTokens);
    case 'prompt':
      return promptOf(sizes.promptTokens);
    case 'node-first-token-ms':
      return (sizes.promptTokens / promptOf(sizes.promptTokens)) * 1e3;
    case 'prompt-of':
      return promptOf(Number(number));
    case 'decode-after':
      return decodeAfter(Number(number), LONG_GEN_TOKENS);
    case 'sequences':
      return sequences(Number(number), model, peak);
    default:
      return undefined;
  }
}

/** Tokens/s of `count` sequences that all decode, halfway through what they generate. */
function sequences(count, model, peak) {
  const context = PARALLEL_PROMPT_TOKENS + PARALLEL_GEN_TOKENS / 2;
  const reading = (model.weightBytes + count * context * model.kvTokenBytes) / peak.bytes;
  const attention = (model.attentionFlopsPerContextToken * context) / peak.floats;
  const computing = count * ((2 * model.tokenParameters) / peak.weights + attention);
  return count / Math.max(reading, computing);
}

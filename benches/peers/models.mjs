// Models of real shapes with random weights, as a Hugging Face folder and as a GGUF file of the same bf16 numbers: speed
// depends on shapes and formats, not on what a model knows. Quantized files are made from the GGUF file by llama.cpp's own
// quantizer, so that every engine reads the file that its users would have. Nothing here measures quality: weights of this
// kind say nothing about it.

import { closeSync, existsSync, mkdirSync, openSync, renameSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';

const WEIGHT_DEVIATION = 0.02;
const NUM_SPECIAL_TOKENS = 16;
const GGUF_ALIGNMENT_BYTES = 32;
/** GGUF's numbers of its types. */
const GGUF = { uint32: 4, int32: 5, float32: 6, bool: 7, string: 8, array: 9 };
const GGUF_TENSOR = { float32: 0, bf16: 30 };
const GGUF_FILE_TYPE_BF16 = 32;
const GGUF_NORMAL_TOKEN = 1;
const GGUF_CONTROL_TOKEN = 3;

/** Named as in the checkpoint's `config.json`; the embedding is the output matrix too in all of them. */
export const SHAPES = {
  'qwen3-0.6b': {
    architecture: 'Qwen3ForCausalLM', model_type: 'qwen3', hidden_size: 1024, num_hidden_layers: 28, num_attention_heads: 16,
    num_key_value_heads: 8, head_dim: 128, intermediate_size: 3072, vocab_size: 151936, rope_theta: 1e6,
    max_position_embeddings: 40960, rms_norm_eps: 1e-6, has_qk_norm: true,
  },
  'llama-3.2-1b': {
    architecture: 'LlamaForCausalLM', model_type: 'llama', hidden_size: 2048, num_hidden_layers: 16, num_attention_heads: 32,
    num_key_value_heads: 8, head_dim: 64, intermediate_size: 8192, vocab_size: 128256, rope_theta: 5e5,
    max_position_embeddings: 131072, rms_norm_eps: 1e-5, has_qk_norm: false,
  },
  // For trying the scripts: seconds instead of minutes.
  tiny: {
    architecture: 'Qwen3ForCausalLM', model_type: 'qwen3', hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4,
    num_key_value_heads: 2, head_dim: 64, intermediate_size: 512, vocab_size: 4096, rope_theta: 1e6,
    max_position_embeddings: 40960, rms_norm_eps: 1e-6, has_qk_norm: true,
  },
};

/** Paths of one shape's files below `folder`. */
export function modelPaths(folder, shape) {
  return { huggingFace: join(folder, `${shape}-hf`), gguf: (format) => join(folder, `${shape}-${format}.gguf`) };
}

/** Makes the GGUF files of `formats` that are missing; gives the path of each. `quantize(from, to, format)` makes a file. */
export async function makeModels({ folder, shape, formats, quantize }) {
  mkdirSync(folder, { recursive: true });
  const paths = modelPaths(folder, shape);
  const missing = formats.filter((format) => !existsSync(paths.gguf(format)));
  if (missing.length > 0 && !existsSync(paths.gguf('BF16'))) {
    console.error(`making random weights of the shape ${shape} ...`);
    writeModel(folder, shape);
  }
  for (const format of missing.filter((format) => format !== 'BF16')) {
    const to = paths.gguf(format);
    await quantize(paths.gguf('BF16'), `${to}.part`, format);
    renameSync(`${to}.part`, to);
  }
  return Object.fromEntries(formats.map((format) => [format, paths.gguf(format)]));
}

/** Writes folder and GGUF file in one pass over the weights. */
export function writeModel(folder, name) {
  const shape = SHAPES[name];
  const paths = modelPaths(folder, name);
  mkdirSync(paths.huggingFace, { recursive: true });
  const vocabulary = makeVocabulary(shape.vocab_size);
  const all = tensors(shape);
  writeConfiguration(paths.huggingFace, shape, vocabulary);

  const safetensors = new FileWriter(join(paths.huggingFace, 'model.safetensors'));
  const gguf = new FileWriter(paths.gguf('BF16'));
  safetensors.write(safetensorsHeader(all));
  gguf.write(ggufHeader(name, shape, vocabulary, all));
  gguf.align(GGUF_ALIGNMENT_BYTES);
  const weights = new RandomWeights();
  for (const tensor of all) {
    const count = tensor.shape.reduce((product, size) => product * size, 1);
    if (tensor.isNorm) {
      safetensors.write(bytesOf(new Uint16Array(count).fill(ONE_BF16)));
      gguf.write(bytesOf(new Float32Array(count).fill(1)));
    } else {
      for (const chunk of weights.chunks(count)) {
        safetensors.write(chunk);
        gguf.write(chunk);
      }
    }
    gguf.align(GGUF_ALIGNMENT_BYTES);
  }
  safetensors.close();
  gguf.close();
}

const ONE_BF16 = 0x3f80;

/** Names in both formats, and shape, outermost axis first, in the order of both files. */
function tensors(shape) {
  const hidden = shape.hidden_size;
  const [q, kv] = [shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim];
  const matrix = (huggingFace, gguf, rows, columns) => ({ huggingFace, gguf, shape: [rows, columns], isNorm: false });
  const norm = (huggingFace, gguf, size) => ({ huggingFace, gguf, shape: [size], isNorm: true });
  const layer = (index) => {
    const [from, to] = [`model.layers.${index}`, `blk.${index}`];
    const qkNorm = [
      norm(`${from}.self_attn.q_norm.weight`, `${to}.attn_q_norm.weight`, shape.head_dim),
      norm(`${from}.self_attn.k_norm.weight`, `${to}.attn_k_norm.weight`, shape.head_dim),
    ];
    return [
      norm(`${from}.input_layernorm.weight`, `${to}.attn_norm.weight`, hidden),
      matrix(`${from}.self_attn.q_proj.weight`, `${to}.attn_q.weight`, q, hidden),
      matrix(`${from}.self_attn.k_proj.weight`, `${to}.attn_k.weight`, kv, hidden),
      matrix(`${from}.self_attn.v_proj.weight`, `${to}.attn_v.weight`, kv, hidden),
      matrix(`${from}.self_attn.o_proj.weight`, `${to}.attn_output.weight`, hidden, q),
      ...(shape.has_qk_norm ? qkNorm : []),
      norm(`${from}.post_attention_layernorm.weight`, `${to}.ffn_norm.weight`, hidden),
      matrix(`${from}.mlp.gate_proj.weight`, `${to}.ffn_gate.weight`, shape.intermediate_size, hidden),
      matrix(`${from}.mlp.up_proj.weight`, `${to}.ffn_up.weight`, shape.intermediate_size, hidden),
      matrix(`${from}.mlp.down_proj.weight`, `${to}.ffn_down.weight`, hidden, shape.intermediate_size),
    ];
  };
  return [
    matrix('model.embed_tokens.weight', 'token_embd.weight', shape.vocab_size, hidden),
    ...Array.from({ length: shape.num_hidden_layers }, (_, index) => layer(index)).flat(),
    norm('model.norm.weight', 'output_norm.weight', hidden),
  ];
}

/** bf16 numbers of a normal distribution: draws from a table of 65,536 of them, since half a billion are needed. */
class RandomWeights {
  #random = randomNumbers(1);
  #table = Uint16Array.from({ length: 1 << 16 }, () => {
    const [radius, angle] = [Math.sqrt(-2 * Math.log(1 - this.#random())), 2 * Math.PI * this.#random()];
    const bits = new Uint32Array(Float32Array.of(WEIGHT_DEVIATION * radius * Math.cos(angle)).buffer)[0];
    return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16; // to the nearest, ties to even
  });
  #state = 2463534242;

  *chunks(count) {
    const chunk = new Uint16Array(Math.min(count, 1 << 22));
    for (let done = 0; done < count; done += chunk.length) {
      const part = chunk.subarray(0, Math.min(chunk.length, count - done));
      for (let i = 0; i < part.length; i += 1) {
        let x = this.#state; // xorshift (Marsaglia 2003)
        x ^= x << 13;
        x ^= x >>> 17;
        x ^= x << 5;
        this.#state = x;
        part[i] = this.#table[x >>> 16];
      }
      yield bytesOf(part);
    }
  }
}

/** Uniform in 0 to 1, the same in every run (mulberry32). */
function randomNumbers(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A valid byte-level vocabulary: 256 bytes, then merges of earlier tokens, then special tokens. */
function makeVocabulary(size) {
  const byteNames = byteAlphabet();
  const space = byteNames[32];
  const letters = [...'etaoinshrdlucmfwypvbgkqjxz'];
  const tokens = [...byteNames];
  const merges = letters.map((letter) => [space, letter]);
  const seen = new Set(tokens);
  const add = (token) => tokens.push(token) && seen.add(token);
  merges.forEach(([, letter]) => add(space + letter));
  const parts = [...letters, ...letters.map((letter) => space + letter)];
  const random = randomNumbers(7);
  const pick = (most) => parts[Math.floor(random() * Math.min(parts.length, most))];
  while (tokens.length < size - NUM_SPECIAL_TOKENS) {
    const [left, right] = [pick(4000), pick(2000)];
    const token = left + right;
    if (!right.startsWith(space) && token.length <= 14 && !seen.has(token)) {
      add(token);
      merges.push([left, right]);
      parts.push(token);
    }
  }
  const named = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'];
  const reserved = Array.from({ length: NUM_SPECIAL_TOKENS - named.length }, (_, i) => `<|reserved_${i}|>`);
  const specials = [...named, ...reserved];
  return { tokens, merges, specials, bosId: tokens.length, eosId: tokens.length + 2 };
}

/** The printable stand-in for each byte of byte-level BPE. */
function byteAlphabet() {
  const isPrintable = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 255 && byte !== 173);
  let replaced = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(isPrintable(byte) ? byte : 256 + replaced++));
}

const SPLIT =
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const CHAT_TEMPLATE =
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}" +
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

function writeConfiguration(folder, shape, { tokens, merges, specials, bosId, eosId }) {
  const { architecture, has_qk_norm: _, ...sizes } = shape;
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false };
  const split = { type: 'Split', pattern: { Regex: SPLIT }, behavior: 'Isolated', invert: false };
  const special = (content, i) => ({
    id: bosId + i, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true,
  });
  const files = {
    'config.json': {
      architectures: [architecture], ...sizes, hidden_act: 'silu', attention_bias: false, tie_word_embeddings: true,
      torch_dtype: 'bfloat16', bos_token_id: bosId, eos_token_id: eosId,
    },
    'generation_config.json': { bos_token_id: bosId, eos_token_id: eosId, do_sample: false },
    'tokenizer_config.json': {
      eos_token: '<|im_end|>', model_max_length: sizes.max_position_embeddings, chat_template: CHAT_TEMPLATE,
    },
    'tokenizer.json': {
      version: '1.0', added_tokens: specials.map(special), normalizer: { type: 'NFC' },
      pre_tokenizer: { type: 'Sequence', pretokenizers: [split, byteLevel] }, post_processor: byteLevel, decoder: byteLevel,
      model: {
        type: 'BPE', byte_fallback: false, ignore_merges: false,
        vocab: Object.fromEntries(tokens.map((token, id) => [token, id])), merges: merges.map((pair) => pair.join(' ')),
      },
    },
  };
  for (const [file, content] of Object.entries(files)) {
    writeFileSync(join(folder, file), JSON.stringify(content));
  }
}

function safetensorsHeader(all) {
  let offset = 0;
  const header = {};
  for (const { huggingFace, shape } of all) {
    const end = offset + 2 * shape.reduce((product, size) => product * size, 1);
    header[huggingFace] = { dtype: 'BF16', shape, data_offsets: [offset, end] };
    offset = end;
  }
  const json = Buffer.from(JSON.stringify(header));
  const padded = Buffer.concat([json, Buffer.alloc((8 - (json.length % 8)) % 8, ' ')]);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(padded.length));
  return Buffer.concat([length, padded]);
}

/** Metadata and tensor infos (version 3). */
function ggufHeader(name, shape, { tokens, merges, specials, bosId, eosId }, all) {
  const key = (suffix) => `${shape.model_type}.${suffix}`;
  const types = [...tokens.map(() => GGUF_NORMAL_TOKEN), ...specials.map(() => GGUF_CONTROL_TOKEN)];
  const metadata = [
    ['general.architecture', 'string', shape.model_type],
    ['general.name', 'string', `random-${name}`],
    ['general.file_type', 'uint32', GGUF_FILE_TYPE_BF16],
    ['general.quantization_version', 'uint32', 2],
    [key('context_length'), 'uint32', shape.max_position_embeddings],
    [key('embedding_length'), 'uint32', shape.hidden_size],
    [key('block_count'), 'uint32', shape.num_hidden_layers],
    [key('feed_forward_length'), 'uint32', shape.intermediate_size],
    [key('attention.head_count'), 'uint32', shape.num_attention_heads],
    [key('attention.head_count_kv'), 'uint32', shape.num_key_value_heads],
    [key('attention.key_length'), 'uint32', shape.head_dim],
    [key('attention.value_length'), 'uint32', shape.head_dim],
    [key('attention.layer_norm_rms_epsilon'), 'float32', shape.rms_norm_eps],
    [key('rope.freq_base'), 'float32', shape.rope_theta],
    [key('rope.dimension_count'), 'uint32', shape.head_dim],
    [key('vocab_size'), 'uint32', shape.vocab_size],
    ['tokenizer.ggml.model', 'string', 'gpt2'],
    ['tokenizer.ggml.pre', 'string', 'qwen2'],
    ['tokenizer.ggml.tokens', 'array', ['string', [...tokens, ...specials]]],
    ['tokenizer.ggml.token_type', 'array', ['int32', types]],
    ['tokenizer.ggml.merges', 'array', ['string', merges.map((pair) => pair.join(' '))]],
    ['tokenizer.ggml.bos_token_id', 'uint32', bosId],
    ['tokenizer.ggml.eos_token_id', 'uint32', eosId],
    ['tokenizer.ggml.padding_token_id', 'uint32', bosId],
    ['tokenizer.ggml.add_bos_token', 'bool', false],
    ['tokenizer.chat_template', 'string', CHAT_TEMPLATE],
  ];
  const head = new GgufBytes();
  head.bytes(Buffer.from('GGUF')).uint32(3).uint64(all.length).uint64(metadata.length);
  for (const [name, type, value] of metadata) {
    head.string(name).uint32(GGUF[type])[type](value);
  }
  let offset = 0;
  for (const { gguf, shape, isNorm } of all) {
    const innermostFirst = [...shape].reverse();
    head.string(gguf).uint32(shape.length);
    innermostFirst.forEach((size) => head.uint64(size));
    head.uint32(isNorm ? GGUF_TENSOR.float32 : GGUF_TENSOR.bf16).uint64(offset);
    offset += aligned(shape.reduce((product, size) => product * size, isNorm ? 4 : 2), GGUF_ALIGNMENT_BYTES);
  }
  return head.whole();
}

/** Values as GGUF writes them; each method is named as the type and gives the builder. */
class GgufBytes {
  #parts = [];

  bytes(buffer) {
    this.#parts.push(buffer);
    return this;
  }
  #number(size, write) {
    const buffer = Buffer.alloc(size);
    write(buffer);
    return this.bytes(buffer);
  }
  uint32(value) {
    return this.#number(4, (buffer) => buffer.writeUInt32LE(value));
  }
  int32(value) {
    return this.#number(4, (buffer) => buffer.writeInt32LE(value));
  }
  uint64(value) {
    return this.#number(8, (buffer) => buffer.writeBigUInt64LE(BigInt(value)));
  }
  float32(value) {
    return this.#number(4, (buffer) => buffer.writeFloatLE(value));
  }
  bool(value) {
    return this.bytes(Buffer.of(value ? 1 : 0));
  }
  string(text) {
    const utf8 = Buffer.from(text);
    return this.uint64(utf8.length).bytes(utf8);
  }
  array([type, values]) {
    this.uint32(GGUF[type]).uint64(values.length);
    values.forEach((value) => this[type](value));
    return this;
  }
  whole() {
    return Buffer.concat(this.#parts);
  }
}

/** Appears under its name when it is whole: half a model is not taken for one. */
class FileWriter {
  #path;
  #file;
  #lengthBytes = 0;

  constructor(path) {
    this.#path = path;
    this.#file = openSync(`${path}.part`, 'w');
  }
  write(bytes) {
    for (let done = 0; done < bytes.length; ) {
      done += writeSync(this.#file, bytes, done);
    }
    this.#lengthBytes += bytes.length;
  }
  align(alignment) {
    this.write(Buffer.alloc(aligned(this.#lengthBytes, alignment) - this.#lengthBytes));
  }
  close() {
    closeSync(this.#file);
    renameSync(`${this.#path}.part`, this.#path);
  }
}

function aligned(size, alignment) {
  return Math.ceil(size / alignment) * alignment;
}

function bytesOf(array) {
  return Buffer.from(array.buffer, array.byteOffset, array.byteLength);
}

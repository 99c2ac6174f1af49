// One package in one Node process, as a server would have it: how long loading takes, what stays resident, when the first
// token of a long prompt comes, how fast a single stream decodes. Both packages are driven by the same steps and timed on
// JavaScript's side, where their users are. Prints one JSON object.
//
//     in_process.mjs ns-llm|node-llama-cpp MODEL.gguf THREADS PROMPT_TOKENS GEN_TOKENS VOCAB_SIZE

import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

/** As in `ns-llm bench`: below are bytes and control tokens in most vocabularies. */
const FIRST_RANDOM_ID = 300;
const LAST_RANDOM_ID = 100_000;
const WARM_UP_TOKENS = 32;

/** A package: `import`, before the clock starts; `load` a model; `decode`, an iterable that yields numbers of new tokens. */
const PACKAGES = {
  'ns-llm': async () => {
    const { Engine } = await import('ns-llm');
    return {
      async load(model, { threads, contextTokens }) {
        const engine = await Engine.open(model, { threads, contextTokens, maxRunningSequences: 1, prefixCache: false });
        return {
          async *decode(tokens, maxTokens) {
            for await (const { tokenIds } of engine.stream({ tokens }, { maxTokens, temperature: 0, ignoreEos: true })) {
              yield tokenIds.length;
            }
          },
          close: () => engine.close(),
        };
      },
    };
  },
  'node-llama-cpp': async () => {
    const folder = join(process.env.NS_LLM_PEERS_NODE_LLAMA_CPP, 'node_modules', 'node-llama-cpp');
    const { getLlama } = await import(pathToFileURL(join(folder, 'dist', 'index.js')).href);
    const quiet = { logLevel: 'error', progressLogs: false };
    const llama = await getLlama({ gpu: false, build: 'never', maxThreads: Number(threads), ...quiet });
    return {
      async load(modelPath, { threads, contextTokens }) {
        const model = await llama.loadModel({ modelPath });
        let sequence;
        return {
          async *decode(tokens, maxTokens) {
            // The context is made when it is first needed: its time is not counted as loading, nor its memory as loaded.
            const size = { contextSize: contextTokens, batchSize: 512, threads, sequences: 1 };
            sequence ??= (await model.createContext(size)).getSequence();
            await sequence.clearHistory();
            let left = maxTokens;
            for await (const _ of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
              yield 1;
              if (--left === 0) {
                break;
              }
            }
          },
          close: () => model.dispose(),
        };
      },
    };
  },
};

const [name, model, threads, promptTokens, genTokens, vocabSize] = process.argv.slice(2);
const randomTokens = randomPrompts(Number(vocabSize));
const residentMib = () => Math.round(process.memoryUsage().rss / 2 ** 20);

const engine = await PACKAGES[name]();
const figures = { base_mib: residentMib() };
let started = performance.now();
const contextTokens = Number(promptTokens) + Number(genTokens) + 64;
const loaded = await engine.load(model, { threads: Number(threads), contextTokens });
figures.load_ms = performance.now() - started;
figures.loaded_mib = residentMib();

await decode(WARM_UP_TOKENS, 1);
figures.first_token_ms = (await decode(Number(promptTokens), 1)).firstMs;
const { tokens, firstMs, lastMs } = await decode(1, Number(genTokens));
figures.decode_tps = ((tokens - 1) / (lastMs - firstMs)) * 1e3;
figures.used_mib = residentMib();
console.log(JSON.stringify(figures));
await loaded.close();
process.exit(0); // an engine's own threads need not keep the process

/** New tokens after a random prompt, and when the first and the last of them came. */
async function decode(prompt, maxTokens) {
  const ids = randomTokens(prompt);
  const read = { tokens: 0, firstMs: 0, lastMs: 0 };
  started = performance.now();
  for await (const count of loaded.decode(ids, maxTokens)) {
    read.lastMs = performance.now() - started;
    read.firstMs ||= read.lastMs;
    // Tokens that come with the first are not timed.
    read.tokens += read.tokens === 0 ? 1 : count;
  }
  return read;
}

/** Prompts of random ids that never repeat. */
function randomPrompts(vocabSize) {
  const last = Math.min(LAST_RANDOM_ID, vocabSize - 1);
  const first = Math.min(FIRST_RANDOM_ID, last);
  let state = 12345;
  const draw = () => (state = (Math.imul(state, 1103515245) + 12345) >>> 0);
  return (length) => Array.from({ length }, () => first + ((draw() >>> 8) % (last - first + 1)));
}

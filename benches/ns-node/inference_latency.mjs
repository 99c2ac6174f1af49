// `npm run bench:ns-node`: how fast a node answers over HTTP, against its targets. It starts the example server, or
// measures the node at NS_NODE_URL. Progress and a table go to stderr, one JSON object to stdout; the exit code is 1 when
// a target is missed.
//
// What is measured: time to the first token is the arrival of the first event of a stream whose prompt was never seen.
// Tokens are counted by the engine: the same prompt without a stream, which is the same text, tells how many there were.
// Time per token is from the first event to the last, over the tokens but one. The hit rate is that of KV blocks over a
// Zipf mix of prompts, from an empty cache on.

import { spawn } from 'node:child_process';
import { request } from 'node:http';
import { cpus } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

const WARMUP_REQUESTS = 5;
const REQUESTS = 50;
const CONCURRENCY = [1, 4];
const MODEL = 'llama3.2:3b';
const ZIPF_PROMPTS = 40;
const ZIPF_REQUESTS = 120;
const ZIPF_EXPONENT = 1;

const TARGETS = [
  ['per token, p95', (r) => r.perTokenMs.p95, '<', 80, 'ms'],
  ['tokens per second, mean', (r) => r.tokensPerSecond.avg, '>', 12, '/s'],
  ['first token, p95', (r) => r.firstTokenMs.p95, '<', 100, 'ms'],
  ['success rate', (r) => r.successPercent, '>', 95, '%'],
  ['KV blocks found, Zipf mix', (r) => r.zipf.hitPercent, '>', 30, '%'],
];

const server = process.env.NS_NODE_URL ? undefined : await startServer();
const url = process.env.NS_NODE_URL ?? server.url;
let met = false;
try {
  const result = await measure();
  const targets = TARGETS.map(([name, of, sign, limit, unit]) => {
    const value = of(result);
    return { name, value, limit: `${sign} ${limit}`, unit, met: sign === '<' ? value < limit : value > limit };
  });
  met = targets.every((target) => target.met);
  for (const { name, value, limit, unit, met: isMet } of targets) {
    console.error(`${isMet ? 'met   ' : 'MISSED'}  ${name.padEnd(26)} ${value.toFixed(2)} ${unit} (target ${limit} ${unit})`);
  }
  console.log(JSON.stringify({ ...result, targets, met }));
} finally {
  server?.stop();
}
process.exitCode = met ? 0 : 1;

async function measure() {
  const { nsLlm } = await getJson('/health');
  for (let i = 0; i < WARMUP_REQUESTS; i += 1) {
    await generate(promptOf(`warm-up ${i}`), 16);
  }
  const random = randomNumbers(1);
  const runs = [];
  for (const concurrency of CONCURRENCY) {
    const requests = Array.from({ length: REQUESTS }, (_, i) => ({
      prompt: promptOf(`${concurrency} of ${i}`),
      maxTokens: 20 + Math.floor(random() * 30),
    }));
    const started = performance.now();
    const answers = await inParallel(requests, concurrency, ({ prompt, maxTokens }) => stream(prompt, maxTokens));
    const seconds = (performance.now() - started) / 1e3;
    // Counted after the clock has stopped.
    for (const [i, { prompt, maxTokens }] of requests.entries()) {
      await count(answers[i], prompt, maxTokens);
    }
    runs.push(summary(concurrency, answers, seconds));
    console.error(`${REQUESTS} streams, ${concurrency} at once: ${runs.at(-1).totalTokensPerSecond.toFixed(1)} tokens/s in all`);
  }
  // The targets are those of one client.
  const [alone] = runs;
  const machine = { cpu: cpus()[0]?.model, cores: cpus().length, node: process.version };
  return { model: nsLlm.model, backend: nsLlm.backend, machine, ...alone, runs, zipf: await zipf(random) };
}

/** Streams one answer: when its first and last events came. A failure is an answer with an error. */
async function stream(prompt, maxTokens) {
  const started = performance.now();
  let first;
  let last;
  let text = '';
  try {
    for await (const { event, data } of events('/api/generative/generate/stream', { text: prompt, maxTokens, model: MODEL })) {
      if (event === 'error') {
        throw new Error(data);
      }
      if (event === '') {
        last = performance.now();
        first ??= last;
        text += JSON.parse(data).stream_token;
      }
    }
    if (first === undefined) {
      throw new Error('a stream without a token');
    }
    return { text, firstTokenMs: first - started, decodeMs: last - first, endToEndMs: performance.now() - started };
  } catch (error) {
    console.error(`a request failed: ${error.message}`);
    return { error };
  }
}

/** Tokens of an answer, as the engine counts them for the same text. */
async function count(answer, prompt, maxTokens) {
  if (answer.error) {
    return;
  }
  const { text, tokens_generated: tokens } = await generate(prompt, maxTokens);
  if (text !== answer.text) {
    answer.error = new Error('the stream and the whole answer differ');
    console.error(answer.error.message);
  }
  answer.tokens = tokens;
}

function summary(concurrency, answers, seconds) {
  const good = answers.filter(({ error }) => !error);
  const tokens = good.reduce((sum, answer) => sum + answer.tokens, 0);
  return {
    concurrency,
    requests: answers.length,
    successPercent: (good.length / answers.length) * 100,
    tokens,
    firstTokenMs: percentiles(good.map(({ firstTokenMs }) => firstTokenMs)),
    perTokenMs: percentiles(good.filter((it) => it.tokens > 1).map((it) => it.decodeMs / (it.tokens - 1))),
    endToEndMs: percentiles(good.map(({ endToEndMs }) => endToEndMs)),
    tokensPerSecond: percentiles(good.map((it) => (it.tokens / it.endToEndMs) * 1e3)),
    totalTokensPerSecond: tokens / seconds,
  };
}

/** Prompts as users repeat them: the k-th most common is asked for in proportion to 1/k. */
async function zipf(random) {
  const weights = Array.from({ length: ZIPF_PROMPTS }, (_, k) => 1 / (k + 1) ** ZIPF_EXPONENT);
  const sum = weights.reduce((total, weight) => total + weight, 0);
  const draw = () => {
    let left = random() * sum;
    return Math.max(0, weights.findIndex((weight) => (left -= weight) <= 0));
  };
  await postJson('/api/kv-cache/clear', {});
  const before = await getJson('/api/kv-cache/stats');
  let promptTokens = 0;
  let cachedTokens = 0;
  for (let i = 0; i < ZIPF_REQUESTS; i += 1) {
    const answer = await generate(promptOf(`question ${draw()}`), 4);
    promptTokens += answer.prompt_tokens;
    cachedTokens += answer.cached_tokens;
  }
  const after = await getJson('/api/kv-cache/stats');
  const [hits, misses] = [after.hits - before.hits, after.misses - before.misses];
  const hitPercent = hits + misses > 0 ? (hits / (hits + misses)) * 100 : 0;
  return { prompts: ZIPF_PROMPTS, requests: ZIPF_REQUESTS, exponent: ZIPF_EXPONENT, hits, misses, hitPercent, promptTokens, cachedTokens };
}

/** A prompt of some KV blocks; what makes it different stands first, so that no two share a block. */
function promptOf(subject) {
  return `This is ${subject}. Once upon a time there was a little dog who lived in a big house near the sea, and every ` +
    'day the dog ran to the water and looked at the boats. One day the dog saw something new in the water and';
}

function percentiles(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const rounded = (value) => Math.round(value * 1e3) / 1e3;
  const rank = (share) => rounded(sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] ?? 0);
  const avg = rounded(sorted.reduce((sum, value) => sum + value, 0) / Math.max(1, sorted.length));
  return { avg, p50: rank(0.5), p95: rank(0.95), p99: rank(0.99) };
}

async function inParallel(items, concurrency, work) {
  const results = new Array(items.length);
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const index = next;
      next += 1;
      results[index] = await work(items[index]);
    }
  };
  await Promise.all(Array.from({ length: concurrency }, worker));
  return results;
}

/** Numbers from 0 to 1, the same at each run: a linear congruential generator is random enough for a mix of prompts. */
function randomNumbers(seed) {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

function generate(text, maxTokens) {
  return postJson('/api/generative/generate', { text, maxTokens, model: MODEL });
}

async function postJson(path, body) {
  const headers = { 'content-type': 'application/json' };
  return readJson(path, await fetch(url + path, { method: 'POST', headers, body: JSON.stringify(body) }));
}

async function getJson(path) {
  return readJson(path, await fetch(url + path));
}

async function readJson(path, response) {
  if (!response.ok) {
    throw new Error(`${path}: HTTP ${response.status}: ${await response.text()}`);
  }
  return response.json();
}

async function* events(path, body) {
  const headers = { 'content-type': 'application/json' };
  const response = await new Promise((resolve, reject) => {
    request(url + path, { method: 'POST', headers }, resolve).on('error', reject).end(JSON.stringify(body));
  });
  response.setEncoding('utf8');
  let rest = '';
  for await (const text of response) {
    const blocks = (rest + text).split('\n\n');
    rest = blocks.pop();
    for (const block of blocks) {
      yield { event: /^event: (.*)$/m.exec(block)?.[1] ?? '', data: /^data: (.*)$/m.exec(block)?.[1] ?? '' };
    }
  }
}

async function startServer() {
  const env = { ...process.env, PORT: '0' };
  const stdio = ['ignore', 'pipe', 'inherit'];
  const child = spawn(process.execPath, [join(ROOT, 'examples', 'ns-node', 'server.mjs')], { env, stdio });
  for await (const text of child.stdout) {
    const address = /http:\/\/[\d.:]+/.exec(String(text))?.[0];
    if (address) {
      return { url: address, stop: () => child.kill() };
    }
  }
  throw new Error('the example server did not start');
}

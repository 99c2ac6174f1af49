// What an answer from the response cache takes, from `engine.generate()` to its resolved promise: one request after the other,
// and at 10,000 requests a second, sent when their time has come whether or not earlier ones are answered. Beside it what the
// engine itself took (its own `timings`), and the target. `response_cache.mjs [MODEL [REQUESTS [TOKENS]]]`.

import { setImmediate as turn } from 'node:timers/promises';

import { DEMO_MODEL, Engine } from 'ns-llm';

const [model = DEMO_MODEL, requests = '50000', tokens = '64'] = process.argv.slice(2);
const REQUESTS_PER_S = 10_000;
const PROMPTS = 500;
const TARGET_US = { p50: 50, p99: 500 };

// On a machine that cannot keep up the queue grows, and the figures show it.
const maxWaitingRequests = 1_000_000;
const engine = await Engine.open(model, { threads: 1, maxWaitingRequests, responseCache: { maxBytes: 64 << 20 } });
const prompts = Array.from({ length: PROMPTS }, (_, i) => `Once upon a time there were ${i} foxes in a wood, and each of them`);
const options = { maxTokens: Number(tokens), temperature: 0, ignoreEos: true };
await Promise.all(prompts.map((prompt) => engine.generate(prompt, options)));

let [latencies, inside] = [[], []];
await oneByOne(1_000); // compilation
report('one by one', await oneByOne(5_000));
await paced(REQUESTS_PER_S / 2);
report(`${REQUESTS_PER_S}/s`, await paced(Number(requests)));
console.log(`target: p50 ${TARGET_US.p50} µs, p99 ${TARGET_US.p99} µs`);
await engine.close();

async function ask(i) {
  const started = performance.now();
  const { fromResponseCache, timings } = await engine.generate(prompts[i % PROMPTS], options);
  latencies.push((performance.now() - started) * 1e3);
  inside.push(timings.totalMs * 1e3);
  if (!fromResponseCache) {
    throw new Error(`request ${i} was computed`);
  }
}

async function oneByOne(count) {
  [latencies, inside] = [[], []];
  const started = performance.now();
  for (let i = 0; i < count; i += 1) {
    await ask(i);
  }
  return count / (performance.now() - started);
}

async function paced(count) {
  [latencies, inside] = [[], []];
  const started = performance.now();
  const pending = [];
  for (let sent = 0; sent < count; await turn()) {
    const due = Math.min(count, ((performance.now() - started) * REQUESTS_PER_S) / 1e3);
    for (; sent < due; sent += 1) {
      pending.push(ask(sent));
    }
  }
  await Promise.all(pending);
  return count / (performance.now() - started);
}

function report(name, requestsPerMs) {
  const at = (values, share) => values.sort((a, b) => a - b)[Math.floor(values.length * share)].toFixed(0);
  const line = (values) => `p50 ${at(values, 0.5)} µs, p99 ${at(values, 0.99)} µs`;
  console.log(`${name}: ${line(latencies)} (engine: ${line(inside)}), ${(requestsPerMs * 1e3).toFixed(0)} requests/s`);
}

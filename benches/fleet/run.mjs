// What a fleet gives and costs: three servers with the model that ships behind nginx and HAProxy, as deploy/ configures them.
// Prompts of a Zipf mix, whose beginnings find each other or do not, with and without a shared Redis; the hop through a
// balancer; and a dashboard that asks a loaded server every second.
//
//   node benches/fleet/run.mjs [--quick]       (NS_LLM_PROGRAM names another build than the one of `cargo test`)

import { spawnSync } from 'node:child_process';
import { cpus, loadavg } from 'node:os';
import { prefixAffinity } from 'ns-llm';

import { ask, Fleet, freePorts, lacks, PROGRAM } from '../../deploy/test/fleet.mjs';

const isQuick = process.argv.includes('--quick');
const NUM_DOCUMENTS = 36;
const NUM_REQUESTS = isQuick ? 48 : 240;
const CONCURRENCY = 6;
/** Blocks of some twelve documents: a third of all. */
const KV_MIB = 20;
const HOP_REQUESTS = isQuick ? 40 : 300;

const missing = lacks('nginx', 'haproxy', 'redis-server');
if (missing) {
  console.error(missing);
  process.exit(1);
}

/** Numbers from 0 to 1, the same in every run. */
function random(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Documents by Zipf's law with exponent 1, each request with a question of its own. */
function mix() {
  const next = random(7);
  const words = ['fox', 'dragon', 'river', 'mill', 'lantern', 'king', 'sparrow', 'ribbon', 'forest', 'baker', 'snow', 'bell'];
  const document = (number) => {
    const pick = random(number + 1);
    const sentence = () => `The ${words[Math.floor(pick() * words.length)]} saw a ${words[Math.floor(pick() * words.length)]} near the old ${words[Math.floor(pick() * words.length)]}. `;
    return `Document ${number}. ${Array.from({ length: 45 }, sentence).join('')}`;
  };
  const documents = Array.from({ length: NUM_DOCUMENTS }, (_, number) => document(number));
  const weights = documents.map((_, rank) => 1 / (rank + 1));
  const total = weights.reduce((sum, weight) => sum + weight);
  return Array.from({ length: NUM_REQUESTS }, (_, number) => {
    let left = next() * total;
    const rank = weights.findIndex((weight) => (left -= weight) < 0);
    return `${documents[Math.max(0, rank)]}Question ${number}: who was there?`;
  });
}

async function runMix(kind, { hasAffinity, hasRedis }) {
  const fleet = new Fleet();
  try {
    const remote = hasRedis ? ['--kv-remote-url', await fleet.redis(['--maxmemory', '512mb', '--maxmemory-policy', 'allkeys-lru'])] : [];
    const ports = await freePorts(3);
    await Promise.all(ports.map((port) => fleet.server(port, ['--kv-mib', String(KV_MIB), ...remote])));
    const { address } = await fleet.balancer(kind, ports, [['rate=50r/s', 'rate=5000r/s']].filter(() => kind === 'nginx'));
    const prompts = mix();
    const sums = { prompt: 0, cached: 0, pool: 0, remote: 0 };
    const times = [];
    const worker = async () => {
      while (prompts.length > 0) {
        const prompt = prompts.shift();
        const prefix = hasAffinity ? prefixAffinity({ model: 'demo', prompt }) : undefined;
        const start = performance.now();
        const response = await ask(address, { prompt, max_tokens: 2, temperature: 0 }, { prefix });
        const { usage } = await response.json();
        times.push(performance.now() - start);
        const details = usage.prompt_tokens_details;
        sums.prompt += usage.prompt_tokens;
        sums.cached += details.cached_tokens;
        sums.pool += details.cached_by_tier.pool;
        sums.remote += details.cached_by_tier.remote;
      }
    };
    const start = performance.now();
    await Promise.all(Array.from({ length: CONCURRENCY }, worker));
    return { ...sums, seconds: (performance.now() - start) / 1000, ...quantiles(times) };
  } finally {
    await fleet.stop();
  }
}

function quantiles(times) {
  const sorted = [...times].sort((a, b) => a - b);
  const at = (share) => sorted[Math.ceil(share * sorted.length) - 1];
  return { p50: at(0.5), p95: at(0.95) };
}

/** The same small request directly and through each balancer, in turn. */
async function hop() {
  const fleet = new Fleet();
  try {
    const ports = await freePorts(3);
    const [server] = await Promise.all(ports.map((port) => fleet.server(port)));
    const wide = [['rate=50r/s', 'rate=50000r/s']];
    const ways = {
      direct: server.address,
      nginx: (await fleet.balancer('nginx', ports, wide)).address,
      haproxy: (await fleet.balancer('haproxy', ports, [['gt 500', 'gt 500000']])).address,
    };
    const times = { probe: {}, token: {} };
    for (let round = 0; round < HOP_REQUESTS; round += 1) {
      for (const [way, address] of Object.entries(ways)) {
        let start = performance.now();
        await (await fetch(`${address}/health`)).text();
        (times.probe[way] ??= []).push(performance.now() - start);
        start = performance.now();
        await (await ask(address, { prompt: 'Once upon a time', max_tokens: 1, temperature: 0 }, { prefix: '00' })).text();
        (times.token[way] ??= []).push(performance.now() - start);
      }
    }
    return times;
  } finally {
    await fleet.stop();
  }
}

/** Tokens per second of four streams, while a dashboard asks every second and while none does. */
async function dashboard() {
  const fleet = new Fleet();
  const paths = ['/metrics', '/api/performance/metrics?window=60000', '/api/gpu/metadata', '/api/gpu/status', '/ready'];
  try {
    const [port] = await freePorts(1);
    const { address } = await fleet.server(port);
    const rates = { without: [], with: [] };
    for (let round = 0; round < (isQuick ? 2 : 10); round += 1) {
      const isWatched = round % 2 === 1;
      const look = () => Promise.all(paths.map(async (path) => (await fetch(address + path)).text()));
      const timer = isWatched ? setInterval(() => void look(), 1000) : undefined;
      const start = performance.now();
      const tokens = isQuick ? 200 : 600;
      const prompts = Array.from({ length: 4 }, (_, number) => `Round ${round}, story ${number}.`);
      await Promise.all(prompts.map(async (prompt) => (await ask(address, { prompt, max_tokens: tokens, ignore_eos: true })).text()));
      clearInterval(timer);
      rates[isWatched ? 'with' : 'without'].push((4 * tokens) / ((performance.now() - start) / 1000));
    }
    return rates;
  } finally {
    await fleet.stop();
  }
}

const percent = (part, whole) => `${((100 * part) / whole).toFixed(1)} %`;
const ms = (value) => value.toFixed(1);

console.log(`${cpus()[0]?.model}, ${cpus().length} cores, load ${loadavg().map((load) => load.toFixed(1)).join(' ')}; ${PROGRAM.includes('release') ? 'release' : 'development'} build`);
console.log(`${spawnSync('sh', ['-c', 'nginx -v 2>&1; haproxy -v | head -1; redis-server --version'], { encoding: 'utf8', env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` } }).stdout}`);
console.log(`${NUM_REQUESTS} requests, ${NUM_DOCUMENTS} documents, Zipf 1.0, ${CONCURRENCY} at once, three servers of ${KV_MIB} MiB KV\n`);
console.log('| Balancer | Routed by | Shared Redis | Cached | in the pool | in Redis | p50 ms | p95 ms | seconds |');
console.log('| --- | --- | --- | --- | --- | --- | --- | --- | --- |');
for (const [kind, hasAffinity, hasRedis] of [
  ['nginx', false, false],
  ['nginx', true, false],
  ['haproxy', true, false],
  ['nginx', false, true],
  ['nginx', true, true],
  ['haproxy', true, true],
]) {
  const sums = await runMix(kind, { hasAffinity, hasRedis });
  const cells = [kind, hasAffinity ? 'prefix' : 'chance', hasRedis ? 'yes' : 'no', percent(sums.cached, sums.prompt), percent(sums.pool, sums.prompt), percent(sums.remote, sums.prompt), ms(sums.p50), ms(sums.p95), sums.seconds.toFixed(1)];
  console.log(`| ${cells.join(' | ')} |`);
}
console.log('\n| | direct p50 | p95 | nginx p50 | p95 | HAProxy p50 | p95 |\n| --- | --- | --- | --- | --- | --- | --- |');
for (const [name, ways] of Object.entries(await hop())) {
  const cells = ['direct', 'nginx', 'haproxy'].flatMap((way) => Object.values(quantiles(ways[way])).map((value) => `${value.toFixed(2)} ms`));
  console.log(`| ${name === 'probe' ? '`GET /health`' : 'one token'} | ${cells.join(' | ')} |`);
}
const rates = await dashboard();
console.log(`\ntokens/s of four streams: without a dashboard ${rates.without.map((rate) => rate.toFixed(0)).join(', ')}; with one, every second: ${rates.with.map((rate) => rate.toFixed(0)).join(', ')}`);

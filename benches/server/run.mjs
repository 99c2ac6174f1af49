// `npm run bench:server [-- OPTIONS]`: what the HTTP face costs, by the project's own load tool (`ns-llm bench serve`), server and
// load on a core each. Every stage waits for a quiet machine and is repeated when others disturb it (../peers/quiet.mjs);
// the table goes to stdout, every figure with its command into a JSON file.
//
//     --parts hits,misses,middleware,streams,peer     what to measure (default: all)
//       hits        answers from the response cache, at 1 to 50 callers, and at 10,000 a second whether answered or not
//       misses      computed answers: what is beside the engine's own time
//       middleware  both, through the same routes in node:http, Express 4 and 5, and Fastify (after `npm run build`)
//       streams     500 streams at once: no token is lost; the first token's time; memory
//       peer        the same GGUF file in llama-server, at 1, 8 and 32 clients, on all cores
//     --quick                        seconds in place of minutes, on the machine as it is: tries the script
//     --seconds 10 --rounds 3        of each stage; rounds of `peer`, whose servers change order
//     --server-core 0 --client-core 1 --threads N
//     --program PATH                 ns-llm (default: that of `cargo build --release`)
//     --model FILE.gguf --llama-server PATH      default: as `npm run bench:peers` makes them, see ../peers/README.md
//     --wait 60 --tries 5            longest wait for a quiet machine, seconds, and tries of a disturbed stage
//     --output FILE.json             default: target/bench-server/RESULTS.json

import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { availableParallelism, cpus, release, totalmem } from 'node:os';
import { dirname, join } from 'node:path';
import { parseArgs } from 'node:util';

import { makeModels } from '../peers/models.mjs';
import { QUIET_CPUS, runQuietly } from '../peers/quiet.mjs';
import { buildLlamaCpp, places, quantizer } from '../peers/setup.mjs';
import { ROOT } from '../../scripts/process.mjs';
import { page } from './report.mjs';
import { inNode, llamaServer, nsLlm } from './servers.mjs';

const DEMO = join(ROOT, 'models', 'demo');
const PARTS = ['hits', 'misses', 'middleware', 'streams', 'peer'];
const HOSTS = ['node', 'express', 'express5', 'fastify'];
/** Of the response cache: all answers of the mix have room in it. */
const CACHE_MIB = 64;
const HIT_PROMPTS = 200;
const HIT_RATE = 10_000;
const MISS_PROMPTS = 10_000;
const STREAM_TOKENS = 32;
/** Tokens of one of the sequences that are compared: prompts of up to 600 bytes, and their answers. */
const PEER_CONTEXT = 512;
const PEER_TOKENS = 64;

const text = (value) => ({ type: 'string', default: value });
const { values } = parseArgs({
  options: {
    parts: text(PARTS.join(',')), quick: { type: 'boolean' }, seconds: text('10'), rounds: text('3'), 'server-core': text('0'),
    'client-core': text('1'), threads: text(String(availableParallelism())), program: { type: 'string' }, model: { type: 'string' },
    'llama-server': { type: 'string' }, wait: text('60'), tries: text('5'), output: { type: 'string' },
  },
});

/** The options as numbers and lists, each checked by name. */
function settings() {
  const integer = (name, min) => {
    const value = Number(values[name]);
    if (!Number.isInteger(value) || value < min) {
      throw new Error(`--${name} is ${values[name]}, must be an integer from ${min}`);
    }
    return value;
  };
  const parts = values.parts.split(',');
  const unknown = parts.find((part) => !PARTS.includes(part));
  if (unknown !== undefined) {
    throw new Error(`--parts has ${unknown}, must be of ${PARTS.join(', ')}`);
  }
  const cores = [integer('server-core', 0), integer('client-core', 0)];
  const at = places();
  const quick = values.quick ?? false;
  return {
    at, parts, quick, serverCore: cores[0], clientCore: cores[1], threads: integer('threads', 1),
    program: values.program ?? at.nsLlm, model: values.model, llamaServer: values['llama-server'] ?? join(at.llamaBin, 'llama-server'),
    seconds: quick ? 1 : integer('seconds', 1), rounds: quick ? 1 : integer('rounds', 1),
    patience: quick ? { waitS: 0, tries: 1 } : { waitS: integer('wait', 0), tries: integer('tries', 1) },
    output: values.output ?? join(ROOT, 'target', 'bench-server', 'RESULTS.json'),
  };
}

try {
  await measure(settings());
} catch (error) {
  console.error(`bench:server failed: ${error.message}`);
  process.exitCode = 1;
}

async function measure(options) {
  if (!existsSync(options.program)) {
    throw new Error(`${options.program} is not there: cargo build --release --package ns-llm-cli`);
  }
  const runs = [];
  const report = () => {
    const result = { machine: machine(), commit: commit(), command: process.argv.slice(1).join(' '), date: new Date().toISOString(), runs };
    mkdirSync(dirname(options.output), { recursive: true });
    writeFileSync(options.output, `${JSON.stringify(result, undefined, 2)}\n`);
    return result;
  };
  const measures = { hits, misses, middleware, streams, peer };
  for (const part of PARTS.filter((part) => options.parts.includes(part))) {
    console.error(`${part} ...`);
    await measures[part](options, (run) => {
      runs.push(run);
      report();
    });
  }
  console.log(page(report()));
  console.error(`\nall figures: ${options.output}`);
}

async function hits(options, add) {
  const server = await nsLlm(options.program, ['--model', DEMO, '--threads', '1', '--response-cache-mib', String(CACHE_MIB)], options.serverCore);
  await stop(server, () => hitStages(options, server, add));
}

async function hitStages(options, server, add) {
  const mix = ['--no-stream', '--max-tokens', '32', '--prompts', String(HIT_PROMPTS), '--max-prompt-bytes', '2000'];
  await load(options, server, [...mix, '--in-order', '--concurrency', '4', '--requests', String(HIT_PROMPTS)]);
  const ladder = options.quick ? [1, 50] : [1, 5, 10, 20, 50];
  const stages = [...ladder.map((callers) => ['--concurrency', String(callers)]), ['--rate', String(HIT_RATE)]];
  for (const stage of stages) {
    const before = await server.counter('iterations_total');
    add({ part: 'hits', ...(await load(options, server, [...mix, ...stage, '--duration', String(options.seconds)], options.clientCore)) });
    if ((await server.counter('iterations_total')) !== before) {
      throw new Error(`${server.name} computed what it should have found`);
    }
  }
}

async function misses(options, add) {
  const server = await nsLlm(options.program, ['--model', DEMO, '--threads', '1'], options.serverCore);
  await stop(server, () => missStages(options, server, add));
}

async function missStages(options, server, add) {
  const mix = ['--no-stream', '--max-tokens', '8', '--prompts', String(MISS_PROMPTS), '--max-prompt-bytes', '2000', '--in-order'];
  for (const callers of [1, 5]) {
    const before = await server.counter('iterations_total');
    const args = [...mix, '--concurrency', String(callers), '--duration', String(options.seconds)];
    const run = { part: 'misses', ...(await load(options, server, args, options.clientCore)) };
    if ((await server.counter('iterations_total')) < before + run.stage.succeeded) {
      throw new Error(`${server.name} found what it should have computed`);
    }
    add(run);
  }
}

async function middleware(options, add) {
  for (const host of options.quick ? ['express'] : HOSTS) {
    const cached = await inNode(host, { model: DEMO, responseCacheMib: CACHE_MIB }, options.serverCore);
    await stop(cached, () => hitStages(options, cached, add));
    const computing = await inNode(host, { model: DEMO, responseCacheMib: 0 }, options.serverCore);
    await stop(computing, () => missStages(options, computing, add));
  }
}

async function streams(options, add) {
  const num = options.quick ? 50 : 500;
  const server = await nsLlm(options.program, ['--model', DEMO, '--threads', '1', '--max-running', String(num), '--kv-mib', '512'], options.serverCore);
  await stop(server, async () => {
    const args = ['--max-tokens', String(STREAM_TOKENS), '--ignore-eos', '--max-prompt-bytes', '200', '--in-order'];
    const run = await load(options, server, [...args, '--concurrency', String(num), '--requests', String(2 * num)], options.clientCore);
    const { requests, failed, completion_tokens: tokens } = run.stage;
    if (failed > 0 || tokens !== requests * STREAM_TOKENS) {
      throw new Error(`${failed} of ${requests} streams failed, ${tokens} tokens of ${requests * STREAM_TOKENS} came`);
    }
    add({ part: 'streams', ...run });
  });
}

async function peer(options, add) {
  const model = options.model ?? (await peerModel(options.at));
  if (!existsSync(options.llamaServer)) {
    await buildLlamaCpp(options.at, ['llama-server']);
  }
  const threads = String(options.threads);
  const ladder = options.quick ? [1, 8] : [1, 8, 32];
  const mib = String(Math.ceil((Math.max(...ladder) * PEER_CONTEXT * 128) / 1024));
  const ours = () => nsLlm(options.program, ['--model', model, '--threads', threads, '--context', String(PEER_CONTEXT), '--kv-mib', mib]);
  const theirs = () => {
    const slots = Math.max(...ladder);
    const sizes = ['--parallel', String(slots), '--ctx-size', String(slots * PEER_CONTEXT)];
    return llamaServer(options.llamaServer, ['--model', model, '--threads', threads, '--threads-batch', threads, ...sizes]);
  };
  for (let round = 0; round < options.rounds; round += 1) {
    for (const clients of ladder) {
      // In turn, each anew: no prompt of another stage is known to it.
      for (const begin of round % 2 === 0 ? [ours, theirs] : [theirs, ours]) {
        const server = await begin();
        const requests = String(clients * (options.quick ? 1 : 4));
        const args = ['--max-tokens', String(PEER_TOKENS), '--ignore-eos', '--max-prompt-bytes', '600', '--in-order', '--timeout', '600'];
        await stop(server, async () =>
          add({ part: 'peer', round, ...(await load(options, server, [...args, '--concurrency', String(clients), '--requests', requests])) }),
        );
      }
    }
  }
}

async function peerModel(at) {
  if (!existsSync(join(at.models, 'qwen3-0.6b-Q8_0.gguf'))) {
    await buildLlamaCpp(at, ['llama-quantize']);
  }
  const made = await makeModels({ folder: at.models, shape: 'qwen3-0.6b', formats: ['Q8_0'], quantize: quantizer(at) });
  return made.Q8_0;
}

/** Runs the load tool against a server, for one stage; what the server used meanwhile is beside its figures. */
async function load(options, server, args, core) {
  const { data } = await (await fetch(`${server.address}/v1/models`)).json();
  const all = ['bench', 'serve', '--url', server.address, '--model', data[0].id, ...args, '--json'];
  const [program, ...rest] = core === undefined ? [options.program, ...all] : ['taskset', '--cpu-list', String(core), options.program, ...all];
  const command = [program, ...rest].join(' ');
  const patience = { waitS: options.patience.waitS, tries: 1, neighbours: [server.pid], timeoutS: 3_600 };
  // Each try by itself: what the server uses in one is not the other's.
  for (let left = options.patience.tries - 1; ; left -= 1) {
    const before = server.use();
    const { stdout, foreignCpus } = await runQuietly(program, rest, patience);
    const after = server.use();
    if (left === 0 || foreignCpus <= QUIET_CPUS) {
      const [stage] = JSON.parse(stdout.trim().split('\n').at(-1)).stages;
      const use = { cpuSeconds: after.cpuSeconds - before.cpuSeconds, peakMib: after.peakMib };
      return { server: server.name, serverCommand: server.command, command, foreignCpus, use, stage };
    }
  }
}

/** Whatever becomes of `work`, the server ends. */
async function stop(server, work) {
  try {
    return await work();
  } finally {
    await server.stop();
  }
}

function machine() {
  const [{ model }] = cpus();
  return `${model.trim()}, ${cpus().length} cores, ${Math.round(totalmem() / 2 ** 30)} GiB, Linux ${release()}, Node ${process.version}`;
}

function commit() {
  const git = (...args) => execFileSync('git', args, { cwd: ROOT, encoding: 'utf8' }).trim();
  return `commit ${git('rev-parse', '--short', 'HEAD')}${git('status', '--porcelain', '--untracked-files=no') === '' ? '' : ', with changes'}`;
}

// `npm run bench:peers [-- OPTIONS]`: this engine beside llama.cpp and node-llama-cpp on the machine at hand, with the same
// files, threads and rules. Sets up what is missing (setup.mjs), then measures in rounds: the machine's limits, then each
// run after the other, in opposite order in every second round, so that a slow drift of the machine meets all alike.
//
// Every sample is a line of RESULTS.jsonl, the page RESULTS.md is made of them; both are named at the end.
//
//     --native --node --busy --long   what to measure (default: --native --node); README.md
//     --report RESULTS.jsonl          only makes the page again
//     --rounds 5 --threads N --shape qwen3-0.6b --formats Q8_0,Q4_K_M,BF16 --prompt-tokens 512 --gen-tokens 128
//     --parallel 16,32 --parallel-formats Q8_0 --node-formats Q8_0,Q4_K_M --contexts 4096,16384 --long-formats Q8_0
//     --wait 60 --tries 5             longest wait for a quiet machine, seconds, and tries of a disturbed run

import { execFileSync } from 'node:child_process';
import { appendFileSync, createReadStream, readFileSync, writeFileSync } from 'node:fs';
import { availableParallelism, cpus, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { modelSizes } from './ceilings.mjs';
import { jsonLines, planOf } from './engines.mjs';
import { makeModels, SHAPES } from './models.mjs';
import { runQuietly, withBusyNeighbours } from './quiet.mjs';
import { page } from './report.mjs';
import { places, quantizer, setUp } from './setup.mjs';

const LIMIT_REPETITIONS = 5;
const LIMIT_MIB = 1024;
/** What the page says of the instructions of this machine. */
const CPU_FLAGS = ['avx2', 'fma', 'avx_vnni', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_int8'];

const text = (value) => ({ type: 'string', default: value });
const { values } = parseArgs({
  options: {
    native: { type: 'boolean' }, node: { type: 'boolean' }, busy: { type: 'boolean' }, long: { type: 'boolean' },
    report: { type: 'string' }, rounds: text('5'), threads: text(String(availableParallelism())),
    shape: text('qwen3-0.6b'), formats: text('Q8_0,Q4_K_M,BF16'), 'prompt-tokens': text('512'), 'gen-tokens': text('128'),
    parallel: text('16,32'), 'parallel-formats': text('Q8_0'), 'node-formats': text('Q8_0,Q4_K_M'),
    contexts: text('4096,16384'), 'long-formats': text('Q8_0'), wait: text('60'), tries: text('5'),
  },
});

try {
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    throw new Error(`${process.platform} on ${process.arch}: the limits of a machine are measured on Linux on x86-64 only`);
  }
  await (values.report ? reportAgain(values.report) : measure(settings()));
} catch (error) {
  console.error(`bench:peers failed: ${error.message}`);
  process.exitCode = 1;
}

/** The options as numbers and lists, each checked by name. */
function settings() {
  const integer = (name, min) => {
    const value = Number(values[name]);
    if (!Number.isInteger(value) || value < min) {
      throw new Error(`--${name} is ${values[name]}, must be an integer from ${min}`);
    }
    return value;
  };
  const list = (name) => values[name].split(',').map((item) => item.trim()).filter(Boolean);
  const integers = (name) => list(name).map((item) => {
    if (!/^[1-9]\d*$/.test(item)) {
      throw new Error(`--${name} has ${item}, must be integers from 1`);
    }
    return Number(item);
  });
  if (!Object.hasOwn(SHAPES, values.shape)) {
    throw new Error(`--shape is ${values.shape}, must be one of ${Object.keys(SHAPES).join(', ')}`);
  }
  const chosen = ['native', 'node', 'busy', 'long'].filter((suite) => values[suite]);
  const suites = Object.fromEntries((chosen.length > 0 ? chosen : ['native', 'node']).map((suite) => [suite, true]));
  return {
    suites,
    shape: values.shape,
    formats: list('formats'),
    rounds: integer('rounds', 1),
    threads: integer('threads', 1),
    quietly: { waitS: integer('wait', 0), tries: integer('tries', 1) },
    sizes: {
      promptTokens: integer('prompt-tokens', 1), genTokens: integer('gen-tokens', 2), parallel: integers('parallel'),
      parallelFormats: list('parallel-formats'), nodeFormats: list('node-formats'), contexts: integers('contexts'),
      longFormats: list('long-formats'),
    },
  };
}

async function measure({ suites, shape, formats, rounds, threads, sizes, quietly }) {
  const at = places();
  const versions = await setUp(at, { inNode: suites.node });
  const models = await makeModels({ folder: at.models, shape, formats, quantize: quantizer(at) });
  const date = new Date().toISOString().slice(0, 19).replace('T', ' ');
  const command = process.argv.length > 2 ? ` -- ${process.argv.slice(2).join(' ')}` : '';
  const about = { date, shape, threads, sizes, versions, command, machine: machine(), models: {}, runsAs: {} };
  for (const [format, model] of Object.entries(models)) {
    const inspection = execFileSync(at.nsLlm, ['inspect', '--model', model, '--json'], { encoding: 'utf8' });
    about.models[format] = modelSizes(JSON.parse(inspection));
    await readOnce(model);
  }
  const [{ vocabSize, kvTokenBytes }] = Object.values(about.models);
  const plan = planOf({ at, models, suites, threads, sizes, vocabSize, kvTokenBytes });
  const results = join(at.results, `${shape}-${date.replace(/[ :]/g, '-')}.jsonl`);
  const samples = [];
  const record = (sample) => {
    samples.push(sample);
    appendFileSync(results, `${JSON.stringify(sample)}\n`);
  };

  for (let round = 1; round <= rounds; round += 1) {
    await recordLimits({ at, round, threads, quietly, record });
    for (const run of round % 2 === 1 ? plan : [...plan].reverse()) {
      await recordRun({ run, round, threads, quietly, record, about });
    }
  }
  await recordLimits({ at, round: rounds + 1, threads, quietly, record });
  record({ about });
  writePage(results, samples);
}

/** Into the file cache: no run is to wait for a disk. */
async function readOnce(file) {
  for await (const _ of createReadStream(file, { highWaterMark: 1 << 22 }));
}

async function recordLimits({ at, round, threads, quietly, record }) {
  const { stdout, foreignCpus } = await runQuietly(at.limits, [threads, LIMIT_REPETITIONS, LIMIT_MIB].map(String), quietly);
  jsonLines(stdout).forEach((limit) => record({ ...limit, round, foreignCpus: round3(foreignCpus) }));
}

/** A run that fails is told, and left out: the others still count. The exit code tells too. */
async function recordRun({ run, round, threads, quietly, record, about }) {
  const { engine, format, command, args, env, cwd, timeoutS, busy } = run;
  const words = args.map(String);
  const once = (neighbours) => runQuietly(command, words, { ...quietly, env, cwd, timeoutS, neighbours });
  let result;
  try {
    result = await (busy ? withBusyNeighbours(availableParallelism(), once) : once([]));
  } catch (error) {
    console.error(`round ${round} ${format} ${engine}: FAILED: ${error.message}`);
    process.exitCode = 1;
    return;
  }
  const { runsAs, ...figures } = run.read(result.stdout);
  if (runsAs) {
    about.runsAs[format] = runsAs;
  }
  for (const [figure, value] of Object.entries(figures)) {
    const noise = { foreignCpus: round3(result.foreignCpus), stolenCpus: round3(result.stolenCpus) };
    record({ figure, engine, format, threads, round, value, ...noise, args: words.map(shortPath).join(' ') });
  }
  const shown = Object.entries(figures).map(([figure, value]) => `${figure} ${value.toFixed(1)}`);
  const noise = `others used ${result.foreignCpus.toFixed(2)} CPUs`;
  console.error(`round ${round} ${format} ${engine}: ${shown.join(', ')} (${result.seconds.toFixed(0)} s, ${noise})`);
}

/** Paths name places of this machine; what was measured is the file. */
function shortPath(word) {
  return word.includes('/') ? word.slice(word.lastIndexOf('/') + 1) : word;
}

function round3(value) {
  return Math.round(value * 1e3) / 1e3;
}

function machine() {
  const info = readFileSync('/proc/cpuinfo', 'utf8');
  const field = (name) => new RegExp(`^${name}\\s*: (.*)$`, 'm').exec(info)?.[1] ?? '?';
  const flags = field('flags').split(' ').filter((flag) => CPU_FLAGS.includes(flag));
  const cpu = `${cpus()[0].model} (family ${field('cpu family')} model ${field('model')}; ${flags.join(', ')})`;
  return { cpu, cores: cpus().length, memoryGib: Math.round(totalmem() / 2 ** 30), kernel: release().split('-')[0] };
}

function reportAgain(results) {
  writePage(results, jsonLines(readFileSync(results, 'utf8')));
}

function writePage(results, samples) {
  const about = samples.findLast((sample) => sample.about)?.about;
  if (!about) {
    throw new Error(`${results} does not end with a description of its measurement: it was broken off`);
  }
  const file = results.replace(/(\.jsonl)?$/, '.md');
  const text = page(about, samples);
  writeFileSync(file, text);
  console.log(`${text}\n${results}\n${file}`);
}

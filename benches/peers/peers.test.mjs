// What the comparison rests on: others' work is seen, ceilings are those of the worked example, disturbed samples do not
// count, and the files that are made are models.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { getPriority, tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import { Engine } from 'ns-llm';

import { ceiling, modelSizes, peaks } from './ceilings.mjs';
import { llamaBench, planOf } from './engines.mjs';
import { modelPaths, SHAPES, writeModel } from './models.mjs';
import { childSeconds, runQuietly, withBusyNeighbours } from './quiet.mjs';
import { page } from './report.mjs';

const folder = mkdtempSync(join(tmpdir(), 'ns-llm-peers-'));
after(() => rmSync(folder, { recursive: true }));
const linux = { skip: process.platform !== 'linux' };
const PROMPT = 'the red fox and 12 hens';
/** One run, on a machine as it is. */
const AS_IT_IS = { waitS: 0, tries: 1 };

/** A process of somebody else, a group of its own, that computes while `work` runs. */
async function besideStranger(work) {
  const stranger = spawn(process.execPath, ['--eval', 'for (;;);'], { stdio: 'ignore', detached: true });
  try {
    return await work(stranger.pid);
  } finally {
    stranger.kill('SIGKILL');
  }
}

test('the work of a run is its own, with that of its children', linux, async () => {
  const spend = "while (process.cpuUsage().user < 3e5);";
  const parent = `require('child_process').execFileSync(process.execPath, ['--eval', '${spend}']); ${spend} console.log('done')`;
  const { stdout, ownSeconds } = await runQuietly(process.execPath, ['--eval', parent], AS_IT_IS);
  assert.equal(stdout, 'done\n');
  assert.ok(ownSeconds >= 0.6, `${ownSeconds} s`);
});

test('the work of others is seen, and not that of neighbours who are part of the measurement', linux, async () => {
  await besideStranger(async (id) => {
    // Until the stranger has had 0.6 s of processor time, however long that takes on a busy machine.
    const ticks = `$(cut -d ' ' -f 14 /proc/${id}/stat)`;
    const script = `end=$((${ticks} + 60)); until [ ${ticks} -ge $end ]; do sleep 0.1; done`;
    const foreignSeconds = async (neighbours) => {
      const { foreignCpus, seconds } = await runQuietly('sh', ['-c', script], { ...AS_IT_IS, neighbours });
      return foreignCpus * seconds;
    };
    const [unknown, known] = await Promise.all([foreignSeconds([]), foreignSeconds([id])]);
    assert.ok(unknown > known + 0.3, `${unknown} and ${known} s`);
  });
});

test('busy neighbours compute at the lowest priority, and are gone afterwards', linux, async () => {
  const neighbours = await withBusyNeighbours(2, async (ids) => {
    for (let tries = 0; ids.some((id) => getPriority(id) !== 19); tries += 1) {
      assert.ok(tries < 100, `${ids.map((id) => getPriority(id))}`);
      await sleep(50);
    }
    return ids;
  });
  assert.equal(neighbours.length, 2);
  const isThere = (id) => existsSync(`/proc/${id}`);
  for (let tries = 0; neighbours.some(isThere); tries += 1) {
    assert.ok(tries < 100, `${neighbours.filter(isThere)} are still there`);
    await sleep(50);
  }
});

test('a disturbed run is ended and repeated, and the last try counts', linux, async () => {
  const runs = join(folder, 'runs');
  const command = `echo run >> ${runs}; sleep 2; echo whole`;
  const { stdout } = await besideStranger(() => runQuietly('sh', ['-c', command], { waitS: 0, tries: 2 }));
  assert.equal(stdout, 'whole\n');
  assert.equal(readFileSync(runs, 'utf8'), 'run\nrun\n');
});

test('a run that fails or takes too long tells what it said', linux, async () => {
  await assert.rejects(runQuietly('sh', ['-c', 'echo why >&2; exit 3'], AS_IT_IS), /ended with 3: why/);
  await assert.rejects(runQuietly('sleep', ['20'], { ...AS_IT_IS, timeoutS: 1 }), /took more than 1 s/);
  assert.equal(childSeconds('0m0.010s 0m0.020s\n2m3.500s 0m0.500s\n').toFixed(2), '124.03');
});

// Sizes of Qwen3-0.6B, and a machine with VNNI and bf16 dot products.
const MODEL = {
  weightBytes: 633.3e6, kvTokenBytes: 114_688, layerParameters: 440.4e6, tokenParameters: 596e6,
  attentionFlopsPerContextToken: 4 * 28 * 16 * 128, vocabSize: 151_936,
};
const LIMITS = {
  ram_gb_per_s: 36.2, ram_prefetch_gb_per_s: 36.6, f32_ymm_gflops: 234, bf16_dot_gflops: 468, int8_madd_gops: 468,
  int8_vnni_zmm_gops: 938,
};
const SIZES = { promptTokens: 512, genTokens: 128 };

test('ceilings are those of the worked example', () => {
  const of = (figure, format = 'Q8_0', limits = LIMITS) => ceiling(figure, MODEL, peaks(limits, format), SIZES);
  const near = (value, expected) => assert.ok(Math.abs(value / expected - 1) < 0.005, `${value}, expected ${expected}`);
  near(of('decode'), 57.1); // 640.6 MB at 36.6 GB/s
  near(of('prompt'), 939); // 0.881 G operations at 938, and 59 M of attention at 468
  near(of('prompt', 'BF16'), 498);
  near(of('sequences-16'), 632); // still reading: 927 MB a step
  near(of('sequences-32'), 741); // computing: 1.19 G operations and 37 M of attention for each
  near(of('node-first-token-ms'), 545);
  near(of('decode-after-16384'), 36.6e9 / (633.3e6 + 16_400 * 114_688));
  // Without VNNI, bytes have the peak of the other instructions, and floats are multiplied as f32 without a bf16 product.
  const { int8_vnni_zmm_gops: _, bf16_dot_gflops: __, ...avx2 } = LIMITS;
  near(of('prompt', 'Q8_0', avx2), 1 / (880.8e6 / 468e9 + 58.7e6 / 234e9));
  near(of('prompt', 'BF16', avx2), 249);
  assert.equal(of('node-load-ms'), undefined);
});

const sample = (engine, figure, value, round, foreignCpus = 0) => ({ engine, figure, format: 'Q8_0', value, round, foreignCpus });
const LIMIT_SAMPLES = Object.entries(LIMITS).map(([limit, median]) => ({ limit, median, round: 1, foreignCpus: 0 }));
const ABOUT = {
  date: '', shape: 'qwen3-0.6b', threads: 2, sizes: SIZES, versions: { 'ns-llm': 'commit' }, command: '',
  machine: { cpu: 'a CPU', cores: 2, memoryGib: 24, kernel: '6' }, models: { Q8_0: MODEL }, runsAs: { Q8_0: 'q8_0' },
};
const rowOf = (text, title) => text.split('\n').find((line) => line.startsWith(`| ${title}`))?.split(' | ');

test('a page has medians, ratios within rounds, verdicts and shares, without disturbed samples', () => {
  const samples = [
    ...[48, 50, 49].map((value, i) => sample('ns-llm', 'decode', value, i + 1)),
    ...[30, 34, 35].map((value, i) => sample('llama.cpp', 'decode', value, i + 1)),
    sample('ns-llm', 'decode', 5, 4, 0.5),
    sample('llama.cpp', 'decode', 1, 4, 0.5),
    sample('ns-llm', 'prompt', 300, 1), sample('llama.cpp', 'prompt', 200, 1),
    sample('ns-llm', 'sequences-16', 300, 1, 0.5), sample('llama.cpp', 'sequences-16', 50, 1, 0.5),
    sample('ns-llm', 'node-first-token-ms', 900, 1), sample('node-llama-cpp', 'node-first-token-ms', 2600, 1),
    sample('ns-llm', 'alone', 50, 1), sample('ns-llm', 'busy', 40, 1),
    sample('llama.cpp', 'alone', 34, 1), sample('llama.cpp', 'busy', 10, 1),
  ];
  const text = page(ABOUT, [...LIMIT_SAMPLES, ...samples]);
  const cells = rowOf(text, 'decode, 1 sequence');
  assert.deepEqual(cells.slice(2, 8), [
    '49.0 (48.0 to 50.0, 3)', '34.0 (30.0 to 35.0, 3)', '1.44 (1.40 to 1.60)', '≥ 1.41: met', '57.1', '86 % |',
  ]);
  assert.deepEqual(rowOf(text, 'prompt, tokens/s').slice(4, 6), ['1.50', '≥ 2.68: **missed**']);
  // All samples of it were disturbed: shown, and nothing concluded.
  assert.deepEqual(rowOf(text, 'decode, 16 sequences').slice(2, 6), [
    '300 (300 to 300, 1) disturbed', '50.0 (50.0 to 50.0, 1) disturbed', '6.00', '≥ 3.33',
  ]);
  assert.deepEqual(rowOf(text, 'first token').slice(4, 8), ['0.35', '≤ 0.38: met', '545', '61 % |']);
  assert.ok(text.includes('| Q8_0 | ns-llm | 50.0 (50.0 to 50.0, 1) | 40.0 (40.0 to 40.0, 1) | 0.80 |'), text);
  // What is asked is asked of one shape and its sizes.
  const other = page({ ...ABOUT, shape: 'tiny' }, [...LIMIT_SAMPLES, ...samples]);
  assert.ok(!/met|missed/.test(other), other);
});

test('a plan pairs every engine with every figure, and reads what the peers print', () => {
  const sizes = {
    ...SIZES, parallel: [16, 32], parallelFormats: ['Q8_0'], nodeFormats: ['Q8_0'], contexts: [4096], longFormats: ['Q8_0'],
  };
  const suites = { native: true, node: true, busy: true, long: true };
  const at = { llamaBin: 'bin', nsLlm: 'ns-llm', nodeLlamaCpp: 'node' };
  const plan = planOf({ at, models: { Q8_0: 'model.gguf' }, suites, threads: 2, sizes, vocabSize: 1000, kvTokenBytes: 1000 });
  const printed = 'a warning\n[{"n_prompt": 512, "avg_ts": 200}, {"n_prompt": 0, "avg_ts": 30}]';
  assert.equal(llamaBench(printed).length, 2);
  const bench = plan.find(({ command }) => command.endsWith('llama-bench'));
  assert.deepEqual(bench.read(printed), { prompt: 200, decode: 30 });
  const batched = plan.find(({ command }) => command.endsWith('llama-batched-bench'));
  const rows = '\n{"pl": 16, "speed_tg": 55}\n{"pl": 32, "speed_tg": 60}\n';
  assert.deepEqual(batched.read(rows), { 'sequences-16': 55, 'sequences-32': 60 });
  const ours = plan.find(({ engine, args }) => engine === 'ns-llm' && args.includes('--parallel=16,32'));
  const report = { prompt_tps: 500, decode_tps: 45, weights: 'q8_0', isa: 'avx2', parallel: [{ n: 16, gen_tps: 250 }] };
  assert.deepEqual(ours.read(JSON.stringify(report)), {
    prompt: 500, decode: 45, 'sequences-16': 250, runsAs: 'q8_0 weights, avx2',
  });
  const long = plan.find(({ args }) => args.includes('--depth'));
  assert.deepEqual(long.read(JSON.stringify(report)), { 'prompt-of-4096': 500, 'decode-after-4096': 45 });
  assert.equal(plan.filter(({ busy }) => busy).length, 2);
  assert.equal(plan.filter(({ engine }) => engine === 'node-llama-cpp').length, 1);
});

test('the files that are made are one model, as a folder and as GGUF', async () => {
  writeModel(folder, 'tiny');
  const paths = modelPaths(folder, 'tiny');
  const answer = async (model) => {
    const engine = await Engine.open(model, { threads: 1, contextTokens: 128 });
    const options = { maxTokens: 16, temperature: 2, seed: 1, ignoreEos: true };
    const { choices } = await engine.generate(PROMPT, options);
    const { embedding } = await engine.embed(PROMPT);
    const answers = { prompt: [...(await engine.tokenize(PROMPT))], tokenIds: [...choices[0].tokenIds], embedding: [...embedding] };
    await engine.close();
    return { ...answers, vocabSize: engine.info.vocabSize };
  };
  const fromFolder = await answer(paths.huggingFace);
  assert.equal(fromFolder.vocabSize, SHAPES.tiny.vocab_size);
  assert.ok(fromFolder.prompt.length < PROMPT.length, 'some letters were merged');
  assert.ok(new Set(fromFolder.tokenIds).size > 4, `${fromFolder.tokenIds}`);
  assert.deepEqual(await answer(paths.gguf('BF16')), fromFolder);
});

test('sizes are those of the file', () => {
  const tensors = [
    { name: 'model.embed_tokens.weight', shape: [100, 8] }, { name: 'model.layers.0.self_attn.q_proj.weight', shape: [8, 8] },
    { name: 'model.layers.0.input_layernorm.weight', shape: [8] }, { name: 'model.norm.weight', shape: [8] },
  ];
  const hyperparameters = {
    num_hidden_layers: '1', num_attention_heads: '2', num_key_value_heads: '1', head_dim: '4', vocab_size: '100',
  };
  assert.deepEqual(modelSizes({ checkpoint_bytes: 1760, tensors, hyperparameters }), {
    weightBytes: 1760, kvTokenBytes: 16, layerParameters: 64, tokenParameters: 864, attentionFlopsPerContextToken: 32,
    vocabSize: 100,
  });
});

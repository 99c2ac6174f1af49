// What a comparison needs: llama.cpp built for this machine from a pinned source archive, node-llama-cpp as npm gives it,
// our own command line and package, and the program that measures the machine's limits. Everything that is not ours lies in
// one folder that git ignores; the environment may name places where it is already (README.md).

import { execFileSync, spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { build } from '../../scripts/build.mjs';
import { ROOT, run } from '../../scripts/process.mjs';

const HERE = dirname(fileURLToPath(import.meta.url));
const NODE_LLAMA_CPP = 'node-llama-cpp@3.22.1';
const BUILD_TOOLS = ['cmake', 'ninja', 'scikit-build-core'];
const LLAMA_PROGRAMS = ['llama-bench', 'llama-batched-bench', 'llama-quantize'];

/** Where things are. `NS_LLM_PEERS_*` name places that are there already. */
export function places(env = process.env) {
  const folder = env.NS_LLM_PEERS_DIR ?? join(ROOT, 'target', 'peers');
  return {
    folder,
    logs: join(folder, 'logs'),
    results: join(folder, 'results'),
    models: env.NS_LLM_PEERS_MODELS ?? join(folder, 'models'),
    llamaBin: env.NS_LLM_PEERS_LLAMA_BIN ?? join(folder, 'llama.cpp-build', 'bin'),
    nodeLlamaCpp: env.NS_LLM_PEERS_NODE_LLAMA_CPP ?? join(folder, 'node'),
    limits: join(folder, 'limits'),
    nsLlm: join(env.CARGO_TARGET_DIR ?? join(ROOT, 'target'), 'release', 'ns-llm'),
  };
}

/** Builds or fetches what is missing. `inNode`: whether packages are compared too. Gives the versions for the report. */
export async function setUp(at, { inNode }) {
  [at.folder, at.logs, at.results].forEach((folder) => mkdirSync(folder, { recursive: true }));
  await logged(at, 'limits', 'cc', ['-O3', '-march=native', '-pthread', join(HERE, 'limits.c'), '-o', at.limits]);
  await buildLlamaCpp(at);
  await orFail('cargo', ['build', '--release', '--package', 'ns-llm-cli']);
  if (inNode) {
    await installNodeLlamaCpp(at);
    await build();
  }
  return versions(at, inNode);
}

/** llama.cpp's quantizer, as `makeModels` wants it. */
export function quantizer(at) {
  return (from, to, format) => {
    const args = [from, to, format, String(availableParallelism())];
    return logged(at, `quantize-${format}`, join(at.llamaBin, 'llama-quantize'), args);
  };
}

/** Programs of llama.cpp, where they are not there already. */
export async function buildLlamaCpp(at, programs = LLAMA_PROGRAMS) {
  if (programs.every((name) => existsSync(join(at.llamaBin, name)))) {
    return;
  }
  if (process.env.NS_LLM_PEERS_LLAMA_BIN) {
    throw new Error(`NS_LLM_PEERS_LLAMA_BIN is ${at.llamaBin}, which lacks one of ${programs.join(', ')}`);
  }
  mkdirSync(at.logs, { recursive: true });
  const [environment, archive, source] = ['venv', 'sdist', 'llama.cpp'].map((name) => join(at.folder, name));
  const tool = (name) => join(environment, 'bin', name);
  const PATH = `${join(environment, 'bin')}:${process.env.PATH}`;
  if (!existsSync(tool('ninja'))) {
    await logged(at, 'venv', 'python3', ['-m', 'venv', environment]);
    await logged(at, 'build-tools', tool('pip'), ['install', '--quiet', ...BUILD_TOOLS]);
  }
  if (!existsSync(source)) {
    const what = ['--no-deps', '--no-build-isolation', '--no-binary', 'llama-cpp-python', '--require-hashes'];
    const from = ['--requirement', join(HERE, 'llama-cpp-source.txt'), '--dest', archive];
    await logged(at, 'llama-source', tool('pip'), ['download', '--quiet', ...what, ...from], { env: { PATH } });
    const [file] = readdirSync(archive);
    mkdirSync(`${source}.part`, { recursive: true });
    await logged(at, 'unpack', 'tar', ['xf', join(archive, file), '-C', `${source}.part`, '--strip-components=1']);
    // It points at a git folder that is not there, and cmake would look for it again in each build.
    rmSync(join(`${source}.part`, 'vendor', 'llama.cpp', '.git'), { force: true });
    renameSync(`${source}.part`, source);
  }
  const options = { GGML_NATIVE: 'ON', LLAMA_CURL: 'OFF', LLAMA_OPENSSL: 'OFF', LLAMA_BUILD_UI: 'OFF' };
  const unused = { LLAMA_BUILD_TESTS: 'OFF', LLAMA_BUILD_EXAMPLES: 'OFF', LLAMA_USE_PREBUILT_UI: 'OFF' };
  const flags = Object.entries({ CMAKE_BUILD_TYPE: 'Release', ...options, ...unused }).map(([name, value]) => `-D${name}=${value}`);
  const [from, to] = [join(source, 'vendor', 'llama.cpp'), dirname(at.llamaBin)];
  await logged(at, 'llama-configure', tool('cmake'), ['-S', from, '-B', to, '-G', 'Ninja', ...flags], { env: { PATH } });
  await logged(at, 'llama-build', tool('cmake'), ['--build', to, '--target', ...programs], { env: { PATH } });
}

async function installNodeLlamaCpp(at) {
  if (existsSync(join(at.nodeLlamaCpp, 'node_modules', 'node-llama-cpp'))) {
    return;
  }
  if (process.env.NS_LLM_PEERS_NODE_LLAMA_CPP) {
    throw new Error(`NS_LLM_PEERS_NODE_LLAMA_CPP is ${at.nodeLlamaCpp}, which has no node_modules/node-llama-cpp`);
  }
  const part = `${at.nodeLlamaCpp}.part`;
  mkdirSync(part, { recursive: true });
  const quiet = ['--ignore-scripts', '--no-audit', '--no-fund'];
  await logged(at, 'node-llama-cpp', 'npm', ['install', ...quiet, '--prefix', part, NODE_LLAMA_CPP]);
  renameSync(part, at.nodeLlamaCpp);
}

function versions(at, inNode) {
  const git = (...args) => execFileSync('git', args, { cwd: ROOT, encoding: 'utf8' }).trim();
  const first = (command, args) => execFileSync(command, args, { encoding: 'utf8', stdio: 'pipe' }).split('\n')[0];
  const changed = git('status', '--porcelain', '--untracked-files=no') === '' ? '' : ', with changes';
  const named = {
    'ns-llm': `commit ${git('rev-parse', '--short', 'HEAD')}${changed}`,
    'llama.cpp': llamaVersion(at),
    compiler: first('cc', ['--version']),
    Node: process.version,
  };
  if (inNode) {
    const file = join(at.nodeLlamaCpp, 'node_modules', 'node-llama-cpp', 'package.json');
    named['node-llama-cpp'] = JSON.parse(readFileSync(file, 'utf8')).version;
  }
  return named;
}

/** Of the binary that is measured; it tells on stderr. */
function llamaVersion(at) {
  const shown = execFileSync('sh', ['-c', '"$1" --version 2>&1', 'sh', join(at.llamaBin, 'llama-bench')], { encoding: 'utf8' });
  return /version: (.*)/.exec(shown)?.[1] ?? 'unknown';
}

async function orFail(command, args) {
  if ((await run(command, args)) !== 0) {
    throw new Error(`${[command, ...args].join(' ')} did not work`);
  }
}

/** Runs one step with its output in a file of its own; the end of that file is in the error when the step fails. */
async function logged(at, name, command, args, { env = {} } = {}) {
  const file = join(at.logs, `${name}.log`);
  const log = openSync(file, 'w');
  console.error(`${name} ...`);
  const code = await new Promise((resolve) => {
    const child = spawn(command, args, { stdio: ['ignore', log, log], env: { ...process.env, ...env } });
    child.on('error', () => resolve('not started'));
    child.on('close', (status, signal) => resolve(signal ?? status));
  });
  closeSync(log);
  if (code !== 0) {
    const end = readFileSync(file, 'utf8').trim().split('\n').slice(-8).join('\n');
    throw new Error(`${command} ended with ${code}; the end of ${file}:\n${end}`);
  }
}

// `npm test`: every test there is, each suite after the other even when one fails: Rust (unit, integration, doctests and
// the C programs of the ffi crate, all through cargo), then Node. The last line is the sum over all runners; the exit code
// is 0 only when every suite ran to its end and nothing failed. What the machine lacks is named, and what needs it is
// counted as skipped.

import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

import { build } from './build.mjs';
import { ROOT, run } from './process.mjs';

const NODE_TESTS = join(ROOT, 'bindings-node', 'dist', 'test');
const SCRIPT_TESTS = [
  join(ROOT, 'benches', 'peers', 'peers.test.mjs'),
  join(ROOT, 'benches', 'server', 'report.test.mjs'),
  join(ROOT, 'server', 'clients', 'clients.test.mjs'),
  join(ROOT, 'server', 'page', 'page.test.mjs'),
  join(ROOT, 'deploy', 'test', 'files.test.mjs'),
  join(ROOT, 'deploy', 'test', 'fleet.test.mjs'),
  join(ROOT, 'deploy', 'test', 'readme.test.mjs'),
];

const total = { passed: 0, failed: 0, skipped: 0 };
for (const suite of [rustTests, cudaTests, nodeTests]) {
  const { passed, failed, skipped } = await suite();
  total.passed += passed;
  total.failed += failed;
  total.skipped += skipped;
}
if (total.passed === 0) {
  console.error('no test ran');
  process.exitCode = 1;
}
if (total.failed > 0) {
  process.exitCode = 1;
}
console.log(`\n${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);

async function rustTests() {
  title('Rust and C: cargo test --workspace');
  const counts = { passed: 0, failed: 0, skipped: 0 };
  const code = await run('cargo', ['test', '--workspace', '--no-fail-fast'], { onLine: counter(counts) });
  const rust = atLeastOneFailure(counts, code);
  const redis = await redisTests();
  // Each of them that ran was counted as skipped before.
  const skipped = rust.skipped - redis.passed - redis.failed;
  return { passed: rust.passed + redis.passed, failed: rust.failed + redis.failed, skipped };
}

/** The kernels compiled for devices and embedded, on a machine that need have none: what runs there is said, and typed. */
async function cudaTests() {
  const counts = { passed: 0, failed: 0, skipped: 0 };
  if (!existsSync(join(ROOT, '.cuda', 'nvidia', 'cu13', 'bin', 'nvcc'))) {
    console.log('\nthe CUDA compiler is not here (node scripts/cuda-toolkit.mjs): a build with CUDA support is skipped');
    return { ...counts, skipped: 1 };
  }
  title('Rust, with CUDA support: cargo test --features cuda');
  const code = await run('cargo', ['test', '--package', 'ns-llm-kernels', '--features', 'cuda', '--lib', '--', 'cuda::'], { onLine: counter(counts) });
  return atLeastOneFailure(counts, code);
}

/** The tests of the remote tier that start a server of their own: cargo ignores them unless they are asked for. */
async function redisTests() {
  const program = process.env.NS_LLM_REDIS_SERVER ?? 'redis-server';
  if (spawnSync(program, ['--version']).status !== 0) {
    console.log(`\n${program} is not here: the tests of engine/tests/{storage/remote_redis,running/kv_remote}.rs are skipped`);
    return { passed: 0, failed: 0 };
  }
  title(`Rust, with ${program}: cargo test --test storage --test running`);
  const counts = { passed: 0, failed: 0, skipped: 0 };
  // With the features of all crates together, as before: nothing is built anew. A child is a part of another test.
  const programs = ['--test', 'storage', '--test', 'running'];
  const filter = ['--', '--ignored', 'remote_redis::', 'kv_remote::', '--skip', 'child_'];
  const code = await run('cargo', ['test', '--workspace', ...programs, ...filter], { onLine: counter(counts) });
  return atLeastOneFailure(counts, code);
}

async function nodeTests() {
  title('Node: node --test');
  const counts = { passed: 0, failed: 0, skipped: 0 };
  try {
    await build();
  } catch (error) {
    console.error(`build failed: ${error.message}`);
    return atLeastOneFailure(counts, 1);
  }
  const fields = { pass: 'passed', fail: 'failed', cancelled: 'failed', skipped: 'skipped', todo: 'skipped' };
  const onLine = (line) => {
    const match = /^[ℹ#] (pass|fail|cancelled|skipped|todo) (\d+)$/.exec(line);
    if (match) {
      counts[fields[match[1]]] += Number(match[2]);
    }
  };
  const code = await run(process.execPath, ['--test', '--test-reporter=spec', ...nodeTestFiles()], { onLine });
  return atLeastOneFailure(counts, code);
}

/** Compiled tests whose source is still there, and those of scripts. */
function nodeTestFiles() {
  const sources = readdirSync(join(ROOT, 'bindings-node', 'test')).filter((name) => /\.test\.m?ts$/.test(name));
  return [...sources.map((name) => join(NODE_TESTS, name.replace(/ts$/, 'js'))), ...SCRIPT_TESTS];
}

/** Adds up what cargo's test programs say at their end. */
function counter(counts) {
  return (line) => {
    const match = /^test result: \S+ (\d+) passed; (\d+) failed; (\d+) ignored;/.exec(line);
    if (match) {
      counts.passed += Number(match[1]);
      counts.failed += Number(match[2]);
      counts.skipped += Number(match[3]);
    }
  };
}

/** A suite that fails without a failed test (it did not build, crashed, or could not start) counts as one. */
function atLeastOneFailure(counts, code) {
  return code !== 0 && counts.failed === 0 ? { ...counts, failed: 1 } : counts;
}

function title(text) {
  console.log(`\n== ${text}\n`);
}

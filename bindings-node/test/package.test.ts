import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';

import { Engine, NsLlmError } from '../lib/index.js';
import { ROOT, runScript } from './support.js';

test('import and require give the same classes', async () => {
  const script = `
    import * as imported from 'ns-llm';
    import { createRequire } from 'node:module';
    const required = createRequire(import.meta.url)('ns-llm');
    const names = Object.keys(imported).sort();
    console.log(names.join(), names.every((name) => imported[name] === required[name]));`;
  const { stdout, stderr } = await runScript(script, 'module');
  assert.equal(stdout, 'AbortError,ChatCompletionStream,DEMO_MODEL,Engine,NsLlmError,ResponseStream true\n', stderr);
  const own: unknown = require('ns-llm');
  assert.deepEqual(own, { ...(own as object), Engine, NsLlmError });
});

test('a strict TypeScript program, as ESM and as CommonJS, gets the types it should, and errors where it should', () => {
  const tsc = join(ROOT, 'node_modules', 'typescript', 'bin', 'tsc');
  const project = join(ROOT, 'bindings-node', 'test', 'consumer', 'tsconfig.json');
  try {
    execFileSync(process.execPath, [tsc, '--project', project], { encoding: 'utf8', stdio: 'pipe' });
  } catch (error) {
    assert.fail((error as { stdout: string }).stdout);
  }
});

test('the package holds what it needs at run time, runs no install script, and stays small', () => {
  const manifest = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));
  for (const script of ['preinstall', 'install', 'postinstall', 'prepare']) {
    assert.ok(!(script in manifest.scripts), script);
  }
  assert.equal(manifest.dependencies, undefined);
  const list = execFileSync('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], { cwd: ROOT, encoding: 'utf8' });
  const [packed] = JSON.parse(list);
  const paths: string[] = packed.files.map(({ path }: { path: string }) => path);
  for (const needed of ['bindings-node/native.node', 'bindings-node/dist/lib/index.mjs', 'models/demo/model.safetensors']) {
    assert.ok(paths.includes(needed), needed);
  }
  assert.deepEqual(paths.filter((path) => /\.rs$|\.test\.|node_modules|Cargo|training/.test(path)), []);
  assert.ok(statSync(join(ROOT, 'bindings-node', 'native.node')).size < 20 << 20);
});

test('the lock file names no registry', () => {
  assert.doesNotMatch(readFileSync(join(ROOT, 'package-lock.json'), 'utf8'), /"resolved"/);
});

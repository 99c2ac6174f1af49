import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';

import { Engine, NsLlmError } from '../lib/index.js';
import { ROOT, runScript, STORY } from './support.js';

test('import and require give the same classes', async () => {
  const script = `
    import * as imported from 'ns-llm';
    import { createRequire } from 'node:module';
    const required = createRequire(import.meta.url)('ns-llm');
    const names = Object.keys(imported).sort();
    console.log(names.join(), names.every((name) => imported[name] === required[name]));`;
  const { stdout, stderr } = await runScript(script, 'module');
  const names =
    'AbortError,ChatCompletionStream,DEMO_MODEL,Engine,NsLlmError,PREFIX_AFFINITY_HEADER,ResponseStream,' +
    'createHandler,prefixAffinity true\n';
  assert.equal(stdout, names, stderr);
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

/** All that may be in the package. A file that no line names is a mistake: of `files`, or of this list. */
const MAY_BE_PACKED = [
  /^(package\.json|README\.md|LICENSE-APACHE|LICENSE-MIT)$/,
  /^bindings-node\/(native\.node|ns-node\.md)$/,
  /^bindings-node\/dist\/native\.d\.ts$/,
  /^bindings-node\/dist\/lib\/(openai\/|ns-node\/)?[a-z_-]+\.(js|mjs|d\.ts|d\.mts)$/,
  /^models\/demo\/(config|generation_config|tokenizer|tokenizer_config)\.json$/,
  /^models\/demo\/model\.safetensors$/,
];
const MAX_ADDON_BYTES = 20 << 20;
/** The addon, the model that ships (10.5 MB) and a little JavaScript. */
const MAX_PACKAGE_BYTES = 32 << 20;

interface Packed {
  filename: string;
  unpackedSize: number;
  files: { path: string; size: number }[];
}

function npm<T>(args: readonly string[], cwd: string): T {
  const all = [...args, '--json', '--ignore-scripts'];
  return JSON.parse(execFileSync('npm', all, { cwd, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }));
}

test('the package holds what it needs at run time and nothing else, runs no install script, and stays small', (t) => {
  const manifest = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));
  for (const script of ['preinstall', 'install', 'postinstall', 'prepare']) {
    assert.ok(!(script in manifest.scripts), script);
  }
  assert.equal(manifest.dependencies, undefined);
  const [packed] = npm<Packed[]>(['pack', '--dry-run'], ROOT);
  const paths = packed!.files.map(({ path }) => path);
  const needed = ['bindings-node/native.node', 'bindings-node/dist/lib/index.mjs', 'models/demo/model.safetensors'];
  assert.deepEqual(needed.filter((path) => !paths.includes(path)), []);
  assert.deepEqual(paths.filter((path) => !MAY_BE_PACKED.some((allowed) => allowed.test(path))), []);
  const addon = statSync(join(ROOT, 'bindings-node', 'native.node')).size;
  t.diagnostic(`addon ${(addon / 1e6).toFixed(1)} MB, package ${(packed!.unpackedSize / 1e6).toFixed(1)} MB`);
  assert.ok(addon <= MAX_ADDON_BYTES && packed!.unpackedSize <= MAX_PACKAGE_BYTES);
});

test('the packed file, installed without scripts and without a network, works by import and by require', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'ns-llm-pack-'));
  try {
    const [packed] = npm<Packed[]>(['pack', '--pack-destination', folder], ROOT);
    writeFileSync(join(folder, 'package.json'), '{ "name": "user", "private": true }');
    npm(['install', join(folder, packed!.filename), '--offline', '--no-audit', '--no-fund'], folder);
    const program = `
      import { Engine, NsLlmError } from 'ns-llm';
      import Client from 'ns-llm/ns-node';
      import { createRequire } from 'node:module';
      const require = createRequire(import.meta.url);
      const required = require('ns-llm');
      const { model } = await new Client().generate('${STORY}', { maxTokens: 1 });
      const engine = await Engine.open({ threads: 1 });
      const { text } = await engine.generate('${STORY}', { maxTokens: 4 });
      await engine.close();
      const same = [required.Engine === Engine, required.NsLlmError === NsLlmError, require('ns-llm/ns-node') === Client];
      console.log(JSON.stringify([...same, text.length > 0, model]));`;
    writeFileSync(join(folder, 'program.mjs'), program);
    const stdout = execFileSync(process.execPath, ['program.mjs'], { cwd: folder, encoding: 'utf8' });
    assert.equal(stdout, '[true,true,true,true,"demo"]\n');
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test('the lock file names no registry', () => {
  assert.doesNotMatch(readFileSync(join(ROOT, 'package-lock.json'), 'utf8'), /"resolved"/);
});

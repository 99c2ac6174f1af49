import assert from 'node:assert/strict';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import { NsNodeClient } from '../lib/ns-node/index.js';
import { ModelCatalog } from '../lib/ns-node/model_catalog.js';
import type { Purpose } from '../lib/ns-node/model_catalog.js';
import { ModelFolder, SETTINGS } from './ns_node_support.js';
import { STORY, withCode } from './support.js';

const folder = new ModelFolder();
const LLAMA = JSON.stringify({ architectures: ['LlamaForCausalLM'] });

before(() => {
  folder.addDemo('Llama-3.2-3B-Instruct');
  folder.add('Llama-3.2-1B', { 'config.json': LLAMA, 'model.safetensors': '' });
  folder.add('TinyLlama-1.1B-Chat-v1.0', { 'config.json': LLAMA, 'model-00001-of-00002.safetensors': '' });
  folder.add('all-MiniLM-L6-v2', { 'config.json': '{"architectures":["BertModel"]}', 'model.safetensors': '' });
  folder.add('broken', { 'config.json': '{', 'model.safetensors': '' });
  folder.add('gpt2', { 'config.json': '{"architectures":["GPT2LMHeadModel"]}', 'vocab.json': '{}' });
  folder.add('notes', { 'README.md': '' });
});
after(() => {
  delete process.env['MODEL_PATH'];
  delete process.env['DEFAULT_MODEL'];
  folder.remove();
});

/** Runs with these variables set. */
async function withEnvironment<T>(variables: Record<string, string>, body: () => Promise<T>): Promise<T> {
  Object.assign(process.env, variables);
  try {
    return await body();
  } finally {
    Object.keys(variables).forEach((name) => delete process.env[name]);
  }
}

test('names that callers send mean what is installed, by its words; the rest is the default model', async () => {
  const catalog = new ModelCatalog({ modelPath: folder.path });
  const cases: [string | undefined, Purpose, string][] = [
    ['Llama-3.2-1B', 'generate', 'Llama-3.2-1B'],
    ['llama3.2:3b', 'generate', 'Llama-3.2-3B-Instruct'],
    ['llama3.2:1b', 'generate', 'Llama-3.2-1B'],
    ['llama3.2', 'generate', 'Llama-3.2-1B'],
    ['llama3:latest', 'generate', 'Llama-3.2-1B'],
    ['meta-llama/Llama-3.2-3B', 'generate', 'Llama-3.2-3B-Instruct'],
    ['tinyllama', 'generate', 'TinyLlama-1.1B-Chat-v1.0'],
    ['sentence-transformers/all-MiniLM-L6-v2', 'embed', 'all-MiniLM-L6-v2'],
    ['demo', 'generate', 'demo'],
    // Known, but without weights: the default answers.
    ['gpt2', 'generate', 'Llama-3.2-1B'],
    [undefined, 'generate', 'Llama-3.2-1B'],
    [undefined, 'embed', 'all-MiniLM-L6-v2'],
    ['', 'generate', 'Llama-3.2-1B'],
  ];
  for (const [name, purpose, expected] of cases) {
    assert.equal((await catalog.resolve(name, purpose)).name, expected, `${name} to ${purpose}`);
  }
  const names = (await catalog.installed()).map(({ name }) => name);
  assert.deepEqual(names, [
    'Llama-3.2-1B', 'Llama-3.2-3B-Instruct', 'TinyLlama-1.1B-Chat-v1.0', 'all-MiniLM-L6-v2', 'broken', 'demo',
  ]);
});

test('a name outside the map is an error that names it and what there is; no name becomes a path', async () => {
  const catalog = new ModelCatalog({ modelPath: folder.path });
  for (const name of ['mistral', 'lla', '..', '/', folder.path, '../models/demo', 'llama3.2:70b', 'x'.repeat(5_000)]) {
    const wanted = withCode('invalid_argument', /not installed; installed: .*TinyLlama.*demo/);
    await assert.rejects(catalog.resolve(name, 'generate'), wanted, name);
  }
});

test('MODEL_PATH and DEFAULT_MODEL are honoured, and the result names the model really used', async () => {
  const client = new NsNodeClient({ engine: SETTINGS });
  const used = async (model?: string): Promise<string> =>
    (await client.generate(STORY, { maxTokens: 1, model })).model;
  assert.equal(await used(), 'demo');
  assert.equal(await used('llama3.2:3b'), 'demo');
  await withEnvironment({ MODEL_PATH: folder.path, DEFAULT_MODEL: 'llama3.2:3b' }, async () => {
    assert.equal(await used(), 'Llama-3.2-3B-Instruct');
    assert.equal(await used('gpt2'), 'Llama-3.2-3B-Instruct');
    assert.equal((await client.health()).model, 'Llama-3.2-3B-Instruct');
    assert.equal(await used('demo'), 'demo');
  });
  // The folder of one model itself.
  await withEnvironment({ MODEL_PATH: join(folder.path, 'Llama-3.2-3B-Instruct') }, async () => {
    assert.equal(await used(), 'Llama-3.2-3B-Instruct');
  });
});

test('a model that cannot be had is an error that names it, and health says so without throwing', async () => {
  const client = new NsNodeClient({ engine: SETTINGS });
  const unhealthy = async (error: RegExp): Promise<void> => {
    const health = await client.health();
    assert.deepEqual([health.status, health.available], ['unhealthy', false]);
    assert.match(health.error ?? '', error);
  };
  await withEnvironment({ MODEL_PATH: '/nonexistent/models' }, async () => {
    await assert.rejects(client.generate(STORY), withCode('missing_file', /MODEL_PATH is \/nonexistent\/models/));
    await unhealthy(/nonexistent/);
  });
  await withEnvironment({ DEFAULT_MODEL: 'mistral' }, async () => {
    await assert.rejects(client.embed(STORY), withCode('invalid_argument', /DEFAULT_MODEL is "mistral"/));
    await unhealthy(/mistral/);
  });
  await withEnvironment({ MODEL_PATH: folder.path }, async () => {
    await assert.rejects(client.generate(STORY, { model: 'broken' }), /the model broken cannot be opened: .*config\.json/);
    const givenUp = client.generate(STORY, { model: 'broken', signal: AbortSignal.abort() });
    await assert.rejects(givenUp, withCode('cancelled'));
    await unhealthy(/the model Llama-3.2-1B cannot be opened/);
    // Each request tries again: what was mended is found.
    assert.equal((await client.generate(STORY, { model: 'llama3.2:3b', maxTokens: 1 })).tokens_generated, 1);
  });
});

test('a call that gives up while its model loads does not end the load for others', async () => {
  const other = new ModelFolder();
  other.addDemo('late');
  try {
    const client = new NsNodeClient({ modelPath: other.path, engine: SETTINGS });
    const controller = new AbortController();
    const waiting = client.generate(STORY, { maxTokens: 3 });
    const impatient = client.generate(STORY, { maxTokens: 3, timeout: 0.01 });
    const aborted = client.generate(STORY, { maxTokens: 3, signal: controller.signal });
    controller.abort();
    await Promise.all([
      assert.rejects(impatient, withCode('deadline_exceeded', /timeout of 0.01 ms passed while the model late/)),
      assert.rejects(aborted, withCode('cancelled')),
    ]);
    assert.equal((await waiting).tokens_generated, 3);
  } finally {
    other.remove();
  }
});

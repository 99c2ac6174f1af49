/** Forms of the weights: each name opens, a memory limit chooses one, and what fits nowhere is a typed error. */

import assert from 'node:assert/strict';
import { test } from 'node:test';

import type { WeightForm } from '../lib/index.js';
import { openDemo, withCode, withDemo } from './support.js';

const QUESTION = { messages: [{ role: 'user', content: 'What is the capital of France?' }] };

test('each form is the one that info names, and takes less memory than the one before it', async () => {
  const forms: WeightForm[] = ['f32', 'bf16', 'q8_0', 'q6_k', 'q5_k', 'q4_k', 'q3_k', 'q2_k'];
  let before = Infinity;
  for (const weights of forms) {
    await withDemo(async (engine) => {
      assert.equal(engine.info.weights, weights);
      const { weightsBytes } = engine.memory();
      assert.ok(weightsBytes < before, `${weights}: ${weightsBytes}`);
      before = weightsBytes;
    }, { weights });
  }
  await withDemo(async (engine) => {
    const { text } = await engine.generate(QUESTION, { maxTokens: 24, temperature: 0 });
    assert.match(text, /Paris/);
  }, { weights: 'q8_0' });
});

test('a memory limit rounds the weights until they fit beside the KV pool', async () => {
  const kvBytes = 4 << 20;
  await withDemo(async (engine) => {
    const { weightsBytes, kvReservedBytes } = engine.memory();
    assert.match(engine.info.weights, /^q[2-8]_/);
    assert.ok(weightsBytes + kvReservedBytes <= 9 << 20, JSON.stringify(engine.memory()));
  }, { kvBytes, memoryLimit: 9 << 20 });
  await assert.rejects(openDemo({ kvBytes, memoryLimit: 5 << 20 }), withCode('out_of_memory'));
  await assert.rejects(openDemo({ weights: 'q9_9' as WeightForm }), withCode('invalid_argument', /q4_k/));
});

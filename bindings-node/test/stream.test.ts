import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import type { Chunk, Engine } from '../lib/index.js';
import { isIdle, openDemo, STORY, until, withCode } from './support.js';

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

async function collect(stream: AsyncIterable<Chunk>): Promise<Chunk[]> {
  const chunks: Chunk[] = [];
  for await (const chunk of stream) {
    chunks.push(chunk);
  }
  return chunks;
}

test('joined chunks are what generate gives, and arrive in several pieces', async () => {
  const options = { maxTokens: 48, temperature: 0.8, seed: 11 };
  const expected = await engine.generate(STORY, options);
  const stream = engine.stream(STORY, options);
  const chunks = await collect(stream);
  assert.ok(chunks.length > 4, `${chunks.length} chunks`);
  assert.equal(chunks.map(({ text }) => text).join(''), expected.text);
  assert.deepEqual(chunks.flatMap(({ tokenIds }) => tokenIds), expected.tokenIds);
  const { text, tokenIds, finishReason, choices, usage, seed } = await stream.result;
  assert.deepEqual({ text, tokenIds, finishReason, choices, seed }, {
    text: expected.text,
    tokenIds: expected.tokenIds,
    finishReason: expected.finishReason,
    choices: expected.choices,
    seed: expected.seed,
  });
  assert.equal(usage.completionTokens, 48);
});

test('every chunk holds whole characters, also when one takes several tokens', async () => {
  const answer = '\u{1f34e} \u{1f44d} \u{1f3b5}';
  const messages = [{ role: 'user', content: `Repeat after me: ${answer}` }];
  const chunks = await collect(engine.stream({ messages }));
  assert.equal(chunks.map(({ text }) => text).join(''), answer);
  assert.ok((await engine.tokenize(answer)).length > 5, 'each character was one token');
  assert.ok(chunks.every(({ text }) => !/\ufffd/.test(text) && text === Buffer.from(text).toString()));
});

test('chunks of several choices are marked with their choice', async () => {
  const stream = engine.stream(STORY, { maxTokens: 12, temperature: 1.5, seed: 5, n: 2 });
  const chunks = await collect(stream);
  const { choices } = await stream.result;
  for (const index of [0, 1]) {
    const own = chunks.filter(({ choice }) => choice === index);
    assert.equal(own.map(({ text }) => text).join(''), choices[index]?.text);
  }
});

test('result alone reads the stream to its end', async () => {
  const { tokenIds } = await engine.stream(STORY, { maxTokens: 8 }).result;
  assert.equal(tokenIds.length, 8);
});

test('result may be asked for before or inside the loop, and the loop still gets every chunk', async () => {
  const stream = engine.stream(STORY, { maxTokens: 16 });
  const asked = stream.result;
  let text = '';
  for await (const chunk of stream) {
    text += chunk.text;
    await stream.result;
  }
  assert.equal(text, (await asked).text);
});

test('a reader that comes late loses nothing and holds the engine up for nobody', async () => {
  const slow = engine.stream(STORY, { maxTokens: 64 });
  await until(engine, 'the end of the slow stream', isIdle);
  const expected = await engine.generate(STORY, { maxTokens: 64 });
  assert.equal((await collect(slow)).map(({ text }) => text).join(''), expected.text);
});

test('next() called many times at once gives every chunk once, in order', async () => {
  const expected = await engine.generate(STORY, { maxTokens: 16 });
  const stream = engine.stream(STORY, { maxTokens: 16 });
  const results = await Promise.all(Array.from({ length: 40 }, () => stream.next()));
  const firstEnd = results.findIndex(({ done }) => done);
  assert.ok(firstEnd > 0 && results.slice(firstEnd).every(({ done }) => done));
  assert.equal(results.map(({ value }) => value?.text ?? '').join(''), expected.text);
});

test('a fault that needs the tokenizer is thrown by the loop and by result', async () => {
  const stream = engine.stream('bear '.repeat(5000));
  await assert.rejects(collect(stream), withCode('prompt_too_long'));
  await assert.rejects(stream.result, withCode('prompt_too_long'));
  assert.deepEqual(await stream.next(), { done: true, value: undefined });
});

test('a stream that fails with nobody looking is no unhandled rejection', async () => {
  let unhandled = 0;
  const count = (): void => {
    unhandled += 1;
  };
  process.on('unhandledRejection', count);
  void engine.stream('bear '.repeat(5000));
  engine.stream(STORY).cancel();
  void engine.stream(STORY, { signal: AbortSignal.abort() });
  await sleep(100);
  process.off('unhandledRejection', count);
  assert.equal(unhandled, 0);
});

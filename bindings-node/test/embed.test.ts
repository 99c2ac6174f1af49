import assert from 'node:assert/strict';
import { getEventListeners } from 'node:events';
import { after, before, test } from 'node:test';

import type { Embedding, EmbeddingInput, EmbedOptions, Engine } from '../lib/index.js';
import { isIdle, openDemo, STORY, until, withCode } from './support.js';

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

function dot(a: Float32Array, b: Float32Array): number {
  assert.equal(a.length, b.length);
  return a.reduce((sum, value, index) => sum + value * b[index]!, 0);
}

test('a text becomes a Float32Array of unit length, with its counts, times and model', async () => {
  const before = engine.stats().embeddingTokensTotal;
  const { embedding, dimensions, tokens, truncated, usage, timings, model } = await engine.embed('a red fox');
  assert.ok(embedding instanceof Float32Array);
  assert.deepEqual([embedding.length, dimensions], [engine.info.embeddingDimensions, engine.info.embeddingDimensions]);
  assert.ok(Math.abs(dot(embedding, embedding) - 1) < 1e-5);
  assert.equal(tokens, (await engine.tokenize('a red fox')).length);
  assert.deepEqual([truncated, usage.promptTokens, usage.completionTokens, model], [false, tokens, 0, 'demo']);
  assert.ok(timings.totalMs > 0);
  await until(engine, 'the count of its tokens', (stats) => stats.embeddingTokensTotal === before + tokens);
});

test('an array gives one vector per input, in order, the same bits as each alone', async () => {
  const ids = await engine.tokenize('token ids');
  const inputs: EmbeddingInput[] = ['a red fox', 'the month after May', ids, Uint32Array.from(ids), ''.padEnd(9, 'x ')];
  const { embeddings, tokens, truncated, dimensions, usage } = await engine.embed(inputs);
  assert.deepEqual([embeddings.length, tokens.length, truncated.length], [5, 5, 5]);
  for (const [index, input] of inputs.entries()) {
    const alone: Embedding = await engine.embed(input);
    assert.deepEqual(alone.embedding, embeddings[index]);
    assert.equal(alone.tokens, tokens[index]);
  }
  assert.deepEqual(embeddings[2], embeddings[3], 'two ways to say the same ids');
  assert.notDeepEqual(embeddings[0], embeddings[1]);
  assert.equal(dimensions, embeddings[0]?.length);
  assert.equal(usage.promptTokens, tokens.reduce((sum, count) => sum + count));
});

test('vectors own their memory: what one of them is used for changes no other, and they outlive the engine', async () => {
  const other = await openDemo();
  const { embeddings } = await other.embed(['one', 'one']);
  await other.close();
  embeddings[0]!.fill(0);
  assert.ok(Math.abs(dot(embeddings[1]!, embeddings[1]!) - 1) < 1e-5);
  assert.equal(structuredClone(embeddings[1]!, { transfer: [embeddings[1]!.buffer as ArrayBuffer] }).length, 256);
});

test('dimensions keeps the start of a vector, normalize its length, truncate its end', async () => {
  const whole = await engine.embed(STORY, { normalize: false });
  const short = await engine.embed(STORY, { normalize: false, dimensions: 16 });
  assert.deepEqual(short.embedding, whole.embedding.slice(0, 16));
  assert.ok(Math.abs(dot(whole.embedding, whole.embedding) - 1) > 0.01, 'the plain vector had unit length by itself');
  const long = 'bear '.repeat(2 * engine.info.maxEmbeddingTokens);
  const cut = await engine.embed(long);
  assert.deepEqual([cut.truncated, cut.tokens], [true, engine.info.maxEmbeddingTokens]);
  await assert.rejects(engine.embed(long, { truncate: false }), withCode('prompt_too_long'));
});

test('what cannot be embedded is refused with its name', async () => {
  const table: [unknown, EmbedOptions, RegExp][] = [
    [[], {}, /^input is \[\], must be at least one input/],
    [['a', 5], {}, /^input\[1\] is 5, must be a string or an array of token ids/],
    [[[1], [-1]], {}, /^input\[1\]\[0\] is -1, must be an integer/],
    [[1, 'a'], {}, /^input\[1\] is a string, must be an integer/],
    [undefined, {}, /^input is undefined, must be a string/],
    [[2 ** 31], {}, /^input.* 2147483648/],
    [new Array(2049).fill('x'), {}, /^input is 2049 entries long, must be at most 2048/],
    [new Array(2048).fill('x'.repeat(4 << 20)), {}, /^input is longer than 4194304 bytes in all/],
    ['a', { dimensions: 0 }, /^dimensions is 0, must be at least 1/],
    ['a', { dimensions: 257 }, /^dimensions is 257/],
    ['a', { normalise: true } as EmbedOptions, /"normalise"/],
  ];
  for (const [input, options, message] of table) {
    await assert.rejects(engine.embed(input as string, options), withCode('invalid_argument', message));
  }
});

test('inputs are copied when they are given: changing or transferring them later changes nothing', async () => {
  const ids = Uint32Array.from(await engine.tokenize(STORY));
  const { embedding } = await engine.embed(ids.slice());
  const running = [engine.embed(ids), engine.embed([ids, 'x'])] as const;
  ids.fill(0);
  structuredClone(ids, { transfer: [ids.buffer as ArrayBuffer] });
  assert.equal(ids.length, 0);
  assert.deepEqual((await running[0]).embedding, embedding);
  assert.deepEqual((await running[1]).embeddings[0], embedding);
});

test('a signal ends it before and on the way, with the reason; a time limit with its own code', async () => {
  const before = await until(engine, 'idleness', isIdle);
  const reason = new Error('mine');
  const isAbort = (error: unknown): boolean => withCode('cancelled')(error) && (error as Error).cause === reason;
  await assert.rejects(engine.embed('a', { signal: AbortSignal.abort(reason) }), isAbort);
  assert.equal(engine.stats().requestsTotal, before.requestsTotal);
  const abort = new AbortController();
  const many = new Array(500).fill('bear '.repeat(400));
  const running = engine.embed(many, { signal: abort.signal });
  await until(engine, 'its start', (stats) => stats.embeddingTokensTotal > before.embeddingTokensTotal);
  abort.abort(reason);
  await assert.rejects(running, isAbort);
  await until(engine, 'its end', (stats) => isIdle(stats) && stats.requestsCancelled === before.requestsCancelled + 1);
  assert.equal(getEventListeners(abort.signal, 'abort').length, 0);
  await assert.rejects(engine.embed(many, { timeoutMs: 5 }), withCode('deadline_exceeded'));
});

test('vectors are made beside streams', async () => {
  const stream = engine.stream(STORY, { maxTokens: 64, ignoreEos: true });
  const { embeddings } = await engine.embed(new Array<string>(20).fill('beside'));
  assert.equal(embeddings.length, 20);
  const { tokenIds } = await stream.result;
  assert.equal(tokenIds.length, 64);
});

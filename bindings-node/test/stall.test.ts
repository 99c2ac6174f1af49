import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import type { Chunk, Engine, ResponseStream } from '../lib/index.js';
import { isIdle, openDemo, scaled, STORY } from './support.js';

/** How long the event loop stands still, at least: until the engine has all answers ready, on a busy machine too. */
const STALL_MS = scaled(1_500, 10_000);
const STREAMS = 4;
const CHOICES = 2;

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

/** Holds JavaScript's thread, and leaves the processor to the engine. */
function stall(ms: number): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
}

test('an event loop that stands still loses nothing, keeps the order, and finds one merged chunk per choice', async (t) => {
  const options = (seed: number) => ({ seed, n: CHOICES, maxTokens: 300, temperature: 0.8, ignoreEos: true });
  const streams = Array.from({ length: STREAMS }, (_, seed) => engine.stream(STORY, options(seed)));
  const read: Chunk[][] = [];
  for (const stream of streams) {
    const { value } = await stream.next();
    read.push([value!]);
  }
  assert.ok(!isIdle(engine.stats()), 'the engine had ended before the stall');
  const started = performance.now();
  do {
    stall(STALL_MS);
  } while (!isIdle(engine.stats()) && performance.now() < started + 60_000);
  const { generationTokensTotal } = engine.stats();
  assert.ok(isIdle(engine.stats()), 'the engine waited for its readers');
  assert.equal(generationTokensTotal, STREAMS * CHOICES * 300);
  const late = await Promise.all(streams.map(rest));
  for (const [seed, chunks] of read.entries()) {
    const expected = await engine.generate(STORY, options(seed));
    const all = [...chunks, ...late[seed]!];
    for (const [index, choice] of expected.choices.entries()) {
      const own = all.filter(({ choice }) => choice === index);
      assert.equal(own.map(({ text }) => text).join(''), choice.text);
      assert.deepEqual(own.flatMap(({ tokenIds }) => tokenIds), choice.tokenIds);
      assert.equal(own.at(-1)?.finishReason, choice.finishReason);
    }
  }
  const counts = late.map(({ length }) => length);
  t.diagnostic(`${Math.round(performance.now() - started)} ms: ${STREAMS * CHOICES * 300} tokens waited in ${counts.join(' + ')} chunks`);
  // What was on its way when the stall began, and what grew meanwhile.
  assert.ok(counts.every((count) => count <= 2 * CHOICES), counts.join());
});

async function rest(stream: ResponseStream): Promise<Chunk[]> {
  const chunks: Chunk[] = [];
  for await (const chunk of stream) {
    chunks.push(chunk);
  }
  return chunks;
}

test('a reader that is slower than the engine gets fewer and larger chunks, not a longer queue', async () => {
  const options = { maxTokens: 200, ignoreEos: true };
  const expected = await engine.generate(STORY, options);
  const sizes: number[] = [];
  let text = '';
  for await (const chunk of engine.stream(STORY, options)) {
    sizes.push(chunk.tokenIds.length);
    text += chunk.text;
    stall(20);
  }
  assert.equal(text, expected.text);
  assert.ok(Math.max(...sizes) >= 4, `chunks of ${sizes.join()} tokens`);
  assert.ok(sizes.length < 100, `${sizes.length} chunks for 200 tokens`);
});

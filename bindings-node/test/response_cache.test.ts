import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { inspect } from 'node:util';

import { nativeOf } from '../lib/engine.js';
import type { Chunk, Engine } from '../lib/index.js';
import { openDemo, STORY, withCode, withDemo } from './support.js';

const MAX_BYTES = 4 << 20;

let engine: Engine;
before(async () => {
  engine = await openDemo({ responseCache: { maxBytes: MAX_BYTES, ttlMs: 600_000 } });
});
after(() => engine.close());

test('the same request again is answered from the cache, with the same answer and without a step', async () => {
  const options = { maxTokens: 12, temperature: 0.9, seed: 5, n: 2, logprobs: 2 };
  const first = await engine.generate(STORY, options);
  const { stepsTotal } = engine.stats();
  const second = await engine.generate(STORY, options);
  assert.deepEqual([first.fromResponseCache, second.fromResponseCache], [false, true]);
  assert.deepEqual(second.choices, first.choices);
  assert.deepEqual([second.seed, second.usage.completionTokens], [5, first.usage.completionTokens]);
  assert.equal(engine.stats().stepsTotal, stepsTotal);
  const { answers, hits, misses, stores, entries, bytes, maxBytes } = engine.responses.stats();
  assert.deepEqual([answers, hits, misses, stores, entries, maxBytes], [1, 1, 1, 1, 1, MAX_BYTES]);
  assert.ok(bytes > 0);
});

test('a kept answer is given at once, like the one that was computed; what no short form can say takes the long way', async () => {
  const atOnce = (): number => nativeOf(engine).numGivenAtOnce();
  const kept: [object, number][] = [
    [{ maxTokens: 9 }, 1],
    [{ maxTokens: 0 }, 0],
    [{ maxTokens: 9, n: 3, temperature: 1 }, 1],
    [{ maxTokens: 9, stop: 'e' }, 1],
    [{ maxTokens: 9, temperature: 1, seed: 2n ** 64n - 1n }, 0],
    [{ maxTokens: 9, logprobs: 2 }, 0],
    [{ maxTokens: 9, promptLogprobs: true }, 0],
    [{ maxTokens: 9, responseCache: 'off' }, 0],
  ];
  for (const [given, expected] of kept) {
    const options = { temperature: 0, seed: 7, ...given };
    const ask = (more: object = {}) => engine.generate('"Kept" \u2028 \u00fc 🦊, they said', { ...options, ...more });
    const first = await ask();
    const before = atOnce();
    const second = await ask();
    const what = inspect(given);
    assert.equal(atOnce() - before, expected, what);
    const { timings, usage, fromResponseCache, ...answer } = second;
    const { timings: computed, usage: computedUsage, fromResponseCache: _, ...computedAnswer } = first;
    assert.deepEqual(answer, computedAnswer, what);
    assert.deepEqual(Object.keys(second), Object.keys(first), what);
    assert.deepEqual(Object.keys(timings), Object.keys(computed), what);
    if (fromResponseCache) {
      const { promptTokens, completionTokens } = computedUsage;
      const cachedByTier = { pool: 0, host: 0, disk: 0, remote: 0 };
      assert.deepEqual(usage, { promptTokens, completionTokens, cachedTokens: promptTokens, cachedByTier, preemptions: 0 }, what);
      assert.ok(timings.totalMs > 0 && timings.decodeMs === 0, what);
    }
    await assert.rejects(ask({ signal: AbortSignal.abort('no') }), withCode('cancelled'));
  }
});

test('a stream over a kept answer gives the whole of it, and can be left', async () => {
  const options = { maxTokens: 10, temperature: 0 };
  const computed = await engine.generate('The fox', options);
  const chunks: Chunk[] = [];
  const stream = engine.stream('The fox', options);
  for await (const chunk of stream) {
    chunks.push(chunk);
  }
  assert.equal((await stream.result).fromResponseCache, true);
  assert.deepEqual(chunks, [
    { choice: 0, text: computed.text, tokenIds: computed.tokenIds, finishReason: computed.finishReason },
  ]);
  for await (const chunk of engine.stream('The fox', options)) {
    assert.equal(chunk.text, computed.text);
    break;
  }
  const aborted = engine.generate('The fox', { ...options, signal: AbortSignal.abort() });
  await assert.rejects(aborted, withCode('cancelled'));
});

test('OpenAI\'s chat interface is answered from the cache too', async () => {
  const request = { messages: [{ role: 'user' as const, content: 'What is the month after May?' }], temperature: 0 };
  const { answers } = engine.responses.stats();
  const [first, second] = [await engine.chat.completions.create(request), await engine.chat.completions.create(request)];
  assert.deepEqual(second.choices, first.choices);
  assert.equal(engine.responses.stats().answers, answers + 1);
});

test('namespaces, and what a request says, decide who finds what', async () => {
  const kept = async (options: object): Promise<boolean> =>
    (await engine.generate('A secret', { maxTokens: 4, temperature: 0, ...options })).fromResponseCache;
  assert.equal(await kept({}), false);
  assert.equal(await kept({ namespace: 'other' }), false);
  assert.equal(await kept({ responseCache: 'off' }), false);
  assert.deepEqual([await kept({}), await kept({ namespace: 'other' }), await kept({ responseCache: 'read' })], [
    true,
    true,
    true,
  ]);
  const drawn = { temperature: 1 };
  assert.deepEqual([await kept(drawn), await kept(drawn)], [false, false], 'another answer each time is not kept');
  const wanted = { ...drawn, responseCache: 'read-write' };
  assert.deepEqual([await kept(wanted), await kept(wanted)], [false, true]);
});

test('answers and values are forgotten by tag, by version and all at once', async () => {
  const tagged = (tags: string | string[]): Promise<boolean> =>
    engine
      .generate('Tagged', { maxTokens: 3, temperature: 0, responseTags: tags, responseTtlMs: 500_000 })
      .then(({ fromResponseCache }) => fromResponseCache);
  const { responses } = engine;
  assert.equal(await tagged(['a', 'b']), false);
  assert.ok(responses.put('mine', 'value', { tags: 'b' }));
  assert.equal(responses.invalidate('nobody'), 0);
  assert.equal(await tagged('a'), true);
  assert.equal(responses.invalidate('b'), 2);
  assert.deepEqual([await tagged('a'), responses.has('mine')], [false, false]);
  const { version } = responses.stats();
  assert.equal(responses.bumpVersion(), version + 1);
  assert.equal(await tagged('a'), false);
  responses.clear();
  assert.deepEqual([await tagged('a'), await tagged('a')], [false, true]);
});

test('values are kept as bytes, by any key, and given as copies', () => {
  const { responses } = engine;
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
  const keys = ['', 'a', '__proto__', '../x', '\0', 'ä'.repeat(512)];
  for (const key of keys) {
    assert.ok(responses.put(key, bytes.subarray(1)));
  }
  for (const key of keys) {
    assert.deepEqual([...responses.get(key)!], [...bytes.subarray(1)]);
  }
  responses.put('text', 'später');
  responses.get('text')!.fill(0);
  assert.equal(responses.get('text')!.toString(), 'später');
  assert.equal(responses.get('nobody'), undefined);
  assert.deepEqual([responses.delete('a'), responses.delete('a'), responses.has('a')], [true, false, false]);
  responses.put('short', '', { ttlMs: 1 });
  const end = performance.now() + 3;
  while (performance.now() < end);
  assert.deepEqual([responses.get('short'), responses.prune()], [undefined, 0]);
});

test('what is out of range is a typed error that names it', async () => {
  const { responses } = engine;
  const refused: [() => unknown, RegExp][] = [
    [() => responses.put('x'.repeat(4_097), ''), /^key \(bytes\) is 4097/],
    [() => responses.put('x', 3 as unknown as string), /^value is 3, must be a string or a Uint8Array/],
    [() => responses.put('x', '', { ttlMs: 0 }), /^ttlMs is 0/],
    [() => responses.put('x', '', { tags: [''] }), /^tags is a tag of 0 bytes/],
    [() => responses.put('x', '', { tags: Array<string>(17).fill('t') }), /^tags is 17 entries long/],
    [() => responses.put('x', '', { ttl: 1 } as object), /"ttl", must be one of ttlMs, tags/],
    [() => responses.get(3 as unknown as string), /^key is a number, must be a string/],
    [() => responses.invalidate({} as unknown as string), /^tag is an object/],
  ];
  for (const [call, text] of refused) {
    assert.throws(call, withCode('invalid_argument', text));
  }
  assert.equal(responses.put('x', Buffer.alloc((2 << 20) + 1)), false);
  const requests: [object, RegExp][] = [
    [{ responseCache: 'write' }, /^responseCache is "write", must be one of off, read, read-write/],
    [{ responseTags: ['x'.repeat(513)] }, /^responseTags is a tag of 513 bytes/],
    [{ responseTtlMs: 0 }, /^responseTtlMs is 0/],
  ];
  for (const [options, text] of requests) {
    await assert.rejects(engine.generate(STORY, options), withCode('invalid_argument', text));
  }
  const openings: [object, RegExp][] = [
    [{ maxBytes: 2 ** 41 }, /^responseCache\.maxBytes is 2199023255552/],
    [{ ttlMs: 0 }, /^responseCache\.ttlMs is 0/],
    [{ maxbytes: 1 }, /"maxbytes"/],
  ];
  for (const [responseCache, text] of openings) {
    await assert.rejects(openDemo({ responseCache }), withCode('invalid_argument', text));
  }
});

test('without a budget nothing is kept, and a closed engine keeps nothing any more', async () => {
  await withDemo(async (plain) => {
    const options = { maxTokens: 3, temperature: 0 };
    await plain.generate(STORY, options);
    assert.equal((await plain.generate(STORY, options)).fromResponseCache, false);
    assert.equal(plain.responses.put('a', 'b'), false);
    assert.deepEqual([plain.responses.stats().misses, plain.responses.stats().maxBytes], [0, 0]);
  });
  const keeping = await openDemo({ responseCache: { maxBytes: MAX_BYTES } });
  assert.ok(keeping.responses.put('a', 'b'));
  await keeping.close();
  assert.deepEqual([keeping.responses.get('a'), keeping.responses.put('a', 'b')], [undefined, false]);
  assert.deepEqual([keeping.responses.stats().entries, keeping.responses.stats().bytes], [0, 0]);
});

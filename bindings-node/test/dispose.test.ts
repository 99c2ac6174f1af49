import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';

import { AbortError, Engine } from '../lib/index.js';
import { native } from '../lib/native.js';
import {
  collectGarbage,
  isIdle,
  openDemo,
  randomNumbers,
  scaled,
  STORY,
  until,
  withCode,
  withDemo,
} from './support.js';

test('after close every use is the error `closed`; info, stats and memory still answer', async () => {
  const engine = await openDemo();
  await engine.generate(STORY, { maxTokens: 4 });
  const before = await until(engine, 'idleness', isIdle);
  await engine.close();
  const closed = withCode('closed');
  await assert.rejects(engine.generate(STORY), closed);
  assert.throws(() => engine.stream(STORY), closed);
  await assert.rejects(engine.tokenize(STORY), closed);
  await assert.rejects(engine.detokenize([1]), closed);
  await assert.rejects(engine.embed(STORY), closed);
  await assert.rejects(engine.chat.completions.create({ messages: [{ role: 'user', content: STORY }] }), closed);
  await assert.rejects(engine.embeddings.create({ input: STORY }), closed);
  assert.equal(engine.info.architecture, 'Qwen3ForCausalLM');
  const { requestsFinished, generationTokensTotal } = engine.stats();
  assert.deepEqual([requestsFinished, generationTokensTotal], [1, before.generationTokensTotal]);
  const use = Object.values(engine.memory());
  assert.ok(use.length > 0 && use.every((bytes) => bytes === 0), `${use}`);
});

test('close twice, at once or later, settles each time', async () => {
  const engine = await openDemo();
  await Promise.all([engine.close(), engine.close()]);
  await engine.close();
  await engine[Symbol.asyncDispose]();
});

test('close during generation ends every request with `closed`', async () => {
  const engine = await openDemo();
  const long = { maxTokens: 1500, ignoreEos: true };
  const stream = engine.stream(STORY, long);
  await stream.next();
  const running = Array.from({ length: 8 }, () => engine.generate(STORY, long));
  const settled = Promise.allSettled([...running, stream.result]);
  await engine.close();
  for (const result of await settled) {
    assert.ok(result.status === 'rejected' && withCode('closed')(result.reason));
  }
});

test('await using closes the engine at the end of the block', async () => {
  let kept: Engine;
  {
    await using engine = await openDemo();
    kept = engine;
    assert.equal((await engine.generate(STORY, { maxTokens: 2 })).tokenIds.length, 2);
  }
  assert.throws(() => kept.stream(STORY), withCode('closed'));
});

test('loading reports progress up to all of it', async () => {
  const fractions: number[] = [];
  await withDemo(async () => {}, { onProgress: ({ fraction }) => fractions.push(fraction) });
  assert.ok(fractions.length > 0, 'no report');
  assert.deepEqual(fractions, [...fractions].sort((a, b) => a - b));
  assert.equal(fractions.at(-1), 1);
});

test('an abort before or during loading rejects with its reason and opens nothing', async () => {
  const reason = new Error('not now');
  const isAbort = (error: unknown): boolean => error instanceof AbortError && error.cause === reason;
  await assert.rejects(openDemo({ signal: AbortSignal.abort(reason) }), isAbort);
  const during = new AbortController();
  const opening = openDemo({ signal: during.signal });
  during.abort(reason);
  await assert.rejects(opening, isAbort);
  const atReport = new AbortController();
  await assert.rejects(openDemo({ signal: atReport.signal, onProgress: () => atReport.abort(reason) }), isAbort);
});

test('what onProgress throws ends loading, and open rejects with it', async () => {
  const mine = new Error('mine');
  const onProgress = (): void => {
    throw mine;
  };
  await assert.rejects(openDemo({ onProgress }), mine);
});

test('random interleavings of open, generate, abort and close all settle', async () => {
  const rounds = scaled(25, 10_000);
  const outcomes = new Map<string, number>();
  for (let round = 0; round < rounds; round += 1) {
    const random = randomNumbers(round);
    const abort = new AbortController();
    const pause = async (): Promise<void> => {
      for (let turns = random(8); turns > 0; turns -= 1) {
        await turn();
      }
    };
    const life = async (): Promise<void> => {
      const engine = await openDemo({ signal: abort.signal });
      const requests = Array.from({ length: random(6) }, async () => {
        await pause();
        return engine.generate(STORY, { maxTokens: 1 + random(20), signal: abort.signal });
      });
      const closing = pause().then(() => engine.close());
      const settled = await Promise.allSettled([...requests, closing]);
      settled.forEach((result) => count(result.status === 'fulfilled' ? 'ok' : String(result.reason.code)));
    };
    const count = (what: string): unknown => outcomes.set(what, (outcomes.get(what) ?? 0) + 1);
    const living = life().catch((error: unknown) => count(error instanceof AbortError ? 'aborted load' : String(error)));
    await pause();
    if (random(2) === 0) {
      await pause();
      abort.abort();
    }
    await living;
  }
  const expected = ['ok', 'closed', 'cancelled', 'aborted load'];
  assert.deepEqual([...outcomes.keys()].filter((what) => !expected.includes(what)), [], [...outcomes].join(' '));
  assert.ok((outcomes.get('ok') ?? 0) >= rounds / 4, [...outcomes].join(' '));
});

test('opening and closing leaves memory flat', async (t) => {
  const cycles = scaled(60, 2_000);
  const warmUp = Math.max(20, cycles / 10);
  const residentMiB = (): number => process.memoryUsage().rss / 2 ** 20;
  let atWarmUp = 0;
  for (let cycle = 0; cycle < cycles; cycle += 1) {
    await withDemo((engine) => engine.generate(STORY, { maxTokens: 4 }));
    if (cycle + 1 === Math.round(warmUp)) {
      collectGarbage();
      atWarmUp = residentMiB();
    }
  }
  collectGarbage();
  const grown = residentMiB() - atWarmUp;
  t.diagnostic(`${cycles} cycles: ${atWarmUp.toFixed(1)} MiB after warm-up, ${grown.toFixed(1)} MiB more at the end`);
  assert.ok(grown <= 8, `${grown.toFixed(1)} MiB more after ${cycles} cycles`);
});

test('an engine that is forgotten without close is collected, and its bytes with it', async () => {
  const before = native.NativeEngine.externalMemory();
  await (async () => {
    await openDemo();
  })();
  const deadline = Date.now() + 10_000;
  while (native.NativeEngine.externalMemory() > before + (8 << 20)) {
    assert.ok(Date.now() < deadline, `${native.NativeEngine.externalMemory() - before} bytes still reported`);
    collectGarbage();
    await turn();
  }
});

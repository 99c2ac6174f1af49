import assert from 'node:assert/strict';
import { getEventListeners } from 'node:events';
import { after, before, test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';

import { AbortError } from '../lib/index.js';
import type { Engine, ResponseStream, Stats } from '../lib/index.js';
import { collectGarbage, isIdle, openDemo, scaled, STORY, until, withCode } from './support.js';

/** Long enough that no test can see its end by itself. */
const LONG = { maxTokens: 1500, ignoreEos: true };

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

/** An AbortError of this package that carries exactly `reason`. */
function abortedWith(reason: unknown): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof AbortError, String(error));
    assert.deepEqual([error.name, error.code], ['AbortError', 'cancelled']);
    assert.equal(error.cause, reason);
    return true;
  };
}

/**
 * Every request since `before` ended by being cancelled (one that never got past the queue is not counted at all), and
 * no block is held, although nobody reads. A short request goes behind them, so that the engine has seen each of them.
 */
async function freed(before: Stats): Promise<void> {
  await engine.generate(STORY, { maxTokens: 1 });
  await until(engine, 'the end of the cancelled requests and of no other', (stats) => {
    const submitted = stats.requestsTotal - before.requestsTotal;
    const cancelled = stats.requestsCancelled - before.requestsCancelled;
    return isIdle(stats) && submitted > 0 && submitted === cancelled + 1;
  });
}

test('leaving the loop by break, return or throw cancels at once and frees the blocks', async () => {
  const leave: Record<string, (stream: ResponseStream) => Promise<void>> = {
    async break(stream) {
      for await (const chunk of stream) {
        assert.ok(chunk.tokenIds.length > 0);
        break;
      }
    },
    async return(stream) {
      for await (const _ of stream) {
        return;
      }
    },
    async throw(stream) {
      const thrown = new Error('mine');
      const loop = async (): Promise<void> => {
        for await (const _ of stream) {
          throw thrown;
        }
      };
      await assert.rejects(loop(), thrown);
    },
    async dispose(stream) {
      await stream[Symbol.asyncDispose]();
    },
  };
  for (const [how, left] of Object.entries(leave)) {
    const before = await until(engine, 'idleness', isIdle);
    const stream = engine.stream(STORY, LONG);
    await left(stream);
    await freed(before);
    assert.equal((await stream.next()).done, true, how);
    await assert.rejects(stream.result, withCode('cancelled'));
  }
});

test('a pending next() ends when the stream is cancelled elsewhere', async () => {
  const before = await until(engine, 'idleness', isIdle);
  const stream = engine.stream({ tokens: new Array(600).fill(40) }, { ...LONG, maxTokens: 1000 });
  const pending = stream.next();
  await until(engine, 'a first block', (stats) => stats.kvBlocksUsed > 0);
  stream.cancel();
  assert.equal((await pending).done, true);
  await freed(before);
});

test('a signal that is aborted before: nothing is submitted, and the reason is kept', async () => {
  const { requestsTotal } = engine.stats();
  const reason = new Error('before');
  const signal = AbortSignal.abort(reason);
  await assert.rejects(engine.generate(STORY, { signal }), abortedWith(reason));
  await assert.rejects(engine.stream(STORY, { signal }).next(), abortedWith(reason));
  assert.equal(engine.stats().requestsTotal, requestsTotal);
});

test('an abort in each phase rejects with the reason, in the loop and in result, and frees the blocks', async () => {
  const phases: Record<string, (stream: ResponseStream) => Promise<unknown>> = {
    'at once': async () => {},
    'one turn later': async () => turn(),
    'while the prompt is computed': async () => until(engine, 'a first block', (stats) => stats.kvBlocksUsed > 0),
    'while it decodes': async (stream) => stream.next(),
  };
  for (const [phase, reached] of Object.entries(phases)) {
    const before = await until(engine, 'idleness', isIdle);
    const abort = new AbortController();
    const reason = { phase };
    const stream = engine.stream({ tokens: new Array(600).fill(40) }, { ...LONG, maxTokens: 800, signal: abort.signal });
    await reached(stream);
    abort.abort(reason);
    await assert.rejects(async () => {
      for await (const _ of stream);
    }, abortedWith(reason));
    await assert.rejects(stream.result, abortedWith(reason));
    await freed(before);
    assert.equal(getEventListeners(abort.signal, 'abort').length, 0);
  }
});

test('generate rejects when it is aborted on the way', async () => {
  const before = await until(engine, 'idleness', isIdle);
  const abort = new AbortController();
  const running = engine.generate(STORY, { ...LONG, signal: abort.signal });
  await until(engine, 'a running sequence', (stats) => stats.numSequencesRunning > 0);
  abort.abort();
  await assert.rejects(running, abortedWith(abort.signal.reason));
  await freed(before);
});

test('an abort after the end changes nothing', async () => {
  const abort = new AbortController();
  const stream = engine.stream(STORY, { maxTokens: 4, signal: abort.signal });
  const { tokenIds } = await stream.result;
  abort.abort();
  let count = 0;
  for await (const chunk of stream) {
    count += chunk.tokenIds.length;
  }
  assert.deepEqual([tokenIds.length, count], [4, 4]);
});

test('one signal shared by many requests keeps no listener and prints no warning', async () => {
  const warnings: string[] = [];
  const hear = (warning: Error): number => warnings.push(warning.message);
  process.on('warning', hear);
  const { signal } = new AbortController();
  for (let round = 0; round < scaled(4, 250); round += 1) {
    await Promise.all(Array.from({ length: 40 }, () => engine.generate(STORY, { maxTokens: 1, signal })));
  }
  await turn();
  process.off('warning', hear);
  assert.equal(getEventListeners(signal, 'abort').length, 0);
  assert.deepEqual(warnings, []);
});

test('timeoutMs ends a request with its own code', async () => {
  await assert.rejects(engine.generate(STORY, { ...LONG, timeoutMs: 20 }), withCode('deadline_exceeded', /20 ms/));
  await until(engine, 'the end of the request', isIdle);
});

test('a forgotten stream is collected: its request is cancelled and its listener taken off', async () => {
  const before = await until(engine, 'idleness', isIdle);
  const { signal } = new AbortController();
  // In a function of its own, so that no variable keeps the stream.
  (() => {
    for (let i = 0; i < 8; i += 1) {
      void engine.stream(STORY, { ...LONG, maxTokens: 1900, signal });
    }
  })();
  await until(engine, 'the start of all', ({ requestsTotal }) => requestsTotal === before.requestsTotal + 8);
  const deadline = Date.now() + 10_000;
  const isLeft = ({ requestsCancelled }: Stats): boolean => requestsCancelled < before.requestsCancelled + 8;
  while (isLeft(engine.stats()) || getEventListeners(signal, 'abort').length > 0) {
    assert.ok(Date.now() < deadline, JSON.stringify(engine.stats()));
    collectGarbage();
    await turn();
  }
  await until(engine, 'the end of the requests', isIdle);
});

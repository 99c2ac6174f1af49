import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';

import type { Engine } from '../lib/index.js';
import { native } from '../lib/native.js';
import { collectGarbage, isIdle, numThreads, scaled, STORY, until, withCode, withDemo } from './support.js';

const MiB = 2 ** 20;
/** Small, so that the warm-up touches each of its pages. */
const KV_BYTES = 8 * MiB;
/** A leak shows in each part of the requests; an allocator that settles, or another thread's arena, does not. */
const PARTS = 3;
/** Growth that all parts together may show. */
const LIMITS_MIB = { native: 8, heapUsed: 1, external: 0.5, arrayBuffers: 0.5, reported: 0.5 };

const messages = [{ role: 'user', content: STORY }];

/** One of everything that an engine answers, and of what it refuses. */
const REQUESTS: readonly ((engine: Engine) => Promise<unknown>)[] = [
  (engine) => engine.generate(STORY, { maxTokens: 2, logprobs: 1 }),
  (engine) => engine.generate({ messages }, { maxTokens: 1, signal: new AbortController().signal }),
  (engine) => engine.stream(STORY, { maxTokens: 2 }).result,
  async (engine) => {
    for await (const _ of engine.stream(STORY, { maxTokens: 50 })) {
      break;
    }
  },
  (engine) => engine.embed(['one', 'two']),
  (engine) => engine.chat.completions.create({ messages, max_tokens: 1 }),
  (engine) => engine.tokenize(STORY).then((ids) => engine.detokenize(ids)),
  (engine) => assert.rejects(engine.generate(STORY, { n: 0 }), withCode('invalid_argument')),
  (engine) => assert.rejects(engine.embed('x '.repeat(600), { truncate: false }), withCode('prompt_too_long')),
];

interface Held {
  /** Resident, but for the pages of JavaScript's heap, which grows to a size that suits it and keeps them. */
  native: number;
  heapUsed: number;
  external: number;
  arrayBuffers: number;
  reported: number;
  threads: number;
  resources: string;
}

async function held(engine: Engine): Promise<Held> {
  await until(engine, 'idleness', isIdle);
  // Finalizers run in later turns than the collection that finds them.
  for (let round = 0; round < 4; round += 1) {
    collectGarbage();
    await turn();
  }
  const { rss, heapTotal, ...memory } = process.memoryUsage();
  const resources = process.getActiveResourcesInfo().sort().join();
  const reported = native.NativeEngine.externalMemory();
  return { ...memory, native: rss - heapTotal, reported, threads: numThreads(), resources };
}

for (const [how, atOnce] of [['one after the other', 1], ['in bursts without a turn of the event loop between', 64]] as const) {
  test(`requests of every kind, ${how}, leave memory, handles and threads as they were`, async (t) => {
    const rounds = Math.ceil(scaled(3_000, 500_000) / REQUESTS.length / atOnce);
    const round = async (engine: Engine): Promise<void> => {
      for (const request of REQUESTS) {
        await Promise.all(Array.from({ length: atOnce }, () => request(engine)));
      }
    };
    await withDemo(async (engine) => {
      for (let warmUp = 0; warmUp < Math.max(rounds / 5, 2); warmUp += 1) {
        await round(engine);
      }
      const states = [await held(engine)];
      for (let part = 0; part < PARTS; part += 1) {
        for (let done = 0; done < rounds / PARTS; done += 1) {
          await round(engine);
        }
        states.push(await held(engine));
      }
      const [before, after] = [states[0]!, states.at(-1)!];
      const count = Math.ceil(rounds / PARTS) * PARTS * atOnce * REQUESTS.length;
      const grown = Object.entries(LIMITS_MIB).map(([key, limit]) => {
        const name = key as keyof typeof LIMITS_MIB;
        const parts = states.slice(1).map((state, part) => (state[name] - states[part]![name]) / MiB);
        const text = `${name} ${parts.map((mib) => mib.toFixed(2)).join(', ')} MiB more`;
        return { text, tooMuch: Math.min(...parts) > limit / PARTS };
      });
      t.diagnostic(`${count} requests: ${grown.map(({ text }) => text).join(', ')}`);
      assert.deepEqual(grown.filter(({ tooMuch }) => tooMuch), []);
      assert.equal(after.resources, before.resources);
      assert.ok(after.threads <= before.threads, `${before.threads} threads before, ${after.threads} after`);
    }, { kvBytes: KV_BYTES });
  });
}

/**
 * Mixed load for as long as is asked: users that generate, stream, abort, leave, forget, embed and make mistakes; worker
 * threads that are ended in mid-generation; engines that are opened and closed beside all that. What must hold at the end
 * is in {@link SoakReport.faults}: nothing unsettled, unexpected, left over or growing.
 */

import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';

import { NsLlmError } from '../lib/index.js';
import type { Engine } from '../lib/index.js';
import { native } from '../lib/native.js';
import { collectGarbage, isIdle, numThreads, openDemo, randomNumbers, ROOT, STORY, until, withDemo } from './support.js';

/** How long, and which load. */
export interface SoakOptions {
  /** Length of the load. */
  seconds: number;
  /** Key of the random choices. */
  seed: number;
  /** Hears one line a minute. */
  onLine?: (line: string) => void;
}

/** What was done and what came of it. */
export interface SoakReport {
  seconds: number;
  /** Operations by name. */
  operations: Record<string, number>;
  /** Their ends: `ok`, or the code of an error. */
  outcomes: Record<string, number>;
  /** Operations whose promise never settled. */
  unsettled: number;
  workers: { started: number; terminated: number };
  /** Resident memory after a fifth of the time and at the end, MiB. */
  residentMiB: { atWarmUp: number; atEnd: number };
  /** Growth in the second half, by least squares. */
  slopeMiBPerHour: number;
  /** What was broken; empty when all is well. */
  faults: string[];
}

/** Small, so that all its pages are soon in use. */
const KV_BYTES = 16 << 20;
/** Operations that run at once. */
const USERS = 12;
/** Ends that the load itself asks for. */
const EXPECTED = ['ok', 'cancelled', 'deadline_exceeded', 'invalid_argument', 'prompt_too_long', 'closed'];
/** From this length on the slope says something: 0.5 MiB an hour is less than the noise of a minute. */
const SLOPE_SECONDS = 3_600;
const MAX_SLOPE_MIB_PER_HOUR = 0.5;
/** Growth that a shorter run may show. */
const MAX_GROWTH_MIB = 32;

type Random = (below: number) => number;
type Operation = (engine: Engine, random: Random) => Promise<unknown>;

const messages = [{ role: 'user', content: STORY }];
const tokens = (random: Random): number => 1 + random(60);

const OPERATIONS: Readonly<Record<string, Operation>> = {
  generate: (engine, random) => engine.generate(STORY, { maxTokens: tokens(random), temperature: 0.8 }),
  sharedPrefix: (engine, random) => {
    const prompt = `${'a little bear and a fox. '.repeat(1 + random(30))} ${random(50)}`;
    return engine.generate(prompt, { maxTokens: 4, priority: random(2) === 0 ? 'high' : 'background' });
  },
  stream: async (engine, random) => {
    for await (const _ of engine.stream(STORY, { maxTokens: tokens(random), n: 1 + random(3), temperature: 1 }));
  },
  slowReader: async (engine, random) => {
    for await (const _ of engine.stream(STORY, { maxTokens: tokens(random) })) {
      await sleep(random(10));
    }
  },
  leave: async (engine, random) => {
    let left = random(4);
    for await (const _ of engine.stream(STORY, { maxTokens: 400 })) {
      left -= 1;
      if (left < 0) {
        return;
      }
    }
  },
  forget: async (engine) => {
    void engine.stream(STORY, { maxTokens: 400 });
  },
  abort: async (engine, random) => {
    const { signal, abort } = abortLater(random(30));
    try {
      await engine.generate(STORY, { maxTokens: 400, ignoreEos: true, signal });
    } finally {
      abort();
    }
  },
  timeout: (engine, random) => engine.generate(STORY, { maxTokens: 400, ignoreEos: true, timeoutMs: 1 + random(30) }),
  embed: (engine, random) => engine.embed(Array.from({ length: 1 + random(8) }, (_, i) => 'word '.repeat(1 + i))),
  chat: (engine) => engine.chat.completions.create({ messages, max_tokens: 8, logprobs: true }),
  chatStream: async (engine) => {
    for await (const _ of await engine.chat.completions.create({ messages, stream: true, max_tokens: 20 }));
  },
  text: async (engine, random) => engine.detokenize(await engine.tokenize('naïve 🍎 '.repeat(random(200)))),
  wrong: (engine, random) => engine.generate(STORY, { temperature: -1 - random(5) }),
  tooLong: (engine) => engine.generate('bear '.repeat(5000)),
};

function abortLater(ms: number): { signal: AbortSignal; abort: () => void } {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(), ms);
  const abort = (): void => {
    clearTimeout(timer);
    controller.abort();
  };
  return { signal: controller.signal, abort };
}

/** Runs the load, and looks at what is left of it. */
export async function soak({ seconds, seed, onLine = () => {} }: SoakOptions): Promise<SoakReport> {
  // Once around, so that what is made once per process is there.
  await withDemo(async (engine) => {
    await Promise.all(Object.values(OPERATIONS).map((run) => run(engine, () => 1).catch(() => {})));
    await runWorker(5);
  });
  const baseline = { threads: numThreads(), external: native.NativeEngine.externalMemory() };
  const count = new Counts();
  const memory = new MemorySamples(seconds);
  const engine = await openDemo({ kvBytes: KV_BYTES });
  const until = performance.now() + seconds * 1000;
  const isOver = (): boolean => performance.now() >= until;
  const load = Array.from({ length: USERS }, (_, user) => beUser(engine, randomNumbers(seed * 1000 + user), count, isOver));
  load.push(startWorkers(randomNumbers(seed * 1000 + USERS), count, isOver));
  load.push(reopen(randomNumbers(seed * 1000 + USERS + 1), count, isOver));
  load.push(watch(memory, count, isOver, onLine));
  await Promise.all(load);
  const faults = [...count.faults(), ...(await leftOver(engine, baseline)), ...memory.faults()];
  return { seconds, ...count.report(), ...memory.report(), faults };
}

async function beUser(engine: Engine, random: Random, count: Counts, isOver: () => boolean): Promise<void> {
  const names = Object.keys(OPERATIONS);
  while (!isOver()) {
    const name = names[random(names.length)]!;
    await count.settled(name, OPERATIONS[name]!(engine, random));
  }
}

/** Engines that are closed while they work. */
async function reopen(random: Random, count: Counts, isOver: () => boolean): Promise<void> {
  while (!isOver()) {
    const life = async (): Promise<void> => {
      const engine = await openDemo();
      const running = Array.from({ length: 4 }, () => engine.generate(STORY, { maxTokens: 100 }));
      const settled = Promise.allSettled(running);
      await sleep(random(30));
      await engine.close();
      await settled;
    };
    await count.settled('reopen', life());
    await sleep(200);
  }
}

async function startWorkers(random: Random, count: Counts, isOver: () => boolean): Promise<void> {
  while (!isOver()) {
    const running = Promise.all([runWorker(random(150)), runWorker(random(150))]);
    await count.settled('worker', running);
    count.workers.started += 2;
    count.workers.terminated += (await running).filter((code) => code === 1).length;
    await sleep(100);
  }
}

/** A worker that opens an engine and streams, ended so many milliseconds after its start. Gives its exit code. */
function runWorker(terminateAfterMs: number): Promise<number> {
  const library = JSON.stringify(join(ROOT, 'bindings-node', 'dist', 'lib', 'index.js'));
  const script = `
    const { Engine } = require(${library});
    require('node:worker_threads').parentPort.postMessage('started');
    Engine.open({ threads: 1, threadPriority: 'normal', kvBytes: 64 << 20 }).then(async (engine) => {
      const running = [0, 1, 2].map((seed) => engine.generate('${STORY}', { maxTokens: 300, seed, temperature: 1 }));
      for await (const chunk of engine.stream('${STORY}', { maxTokens: 300, ignoreEos: true })) ;
      await Promise.all(running);
      await engine.close();
    });`;
  const worker = new Worker(script, { eval: true });
  let timer: NodeJS.Timeout | undefined;
  worker.on('message', () => {
    timer = setTimeout(() => void worker.terminate(), terminateAfterMs);
  });
  return new Promise((resolve, reject) => {
    worker.on('error', reject);
    worker.on('exit', (code) => {
      clearTimeout(timer);
      resolve(code);
    });
  });
}

async function watch(
  memory: MemorySamples,
  count: Counts,
  isOver: () => boolean,
  onLine: (line: string) => void,
): Promise<void> {
  const started = performance.now();
  let minutes = 0;
  while (!isOver()) {
    await sleep(250);
    memory.take((performance.now() - started) / 1000);
    if (performance.now() - started >= (minutes + 1) * 60_000) {
      minutes += 1;
      onLine(`${minutes} min: ${count.started} operations, ${memory.lastMiB.toFixed(1)} MiB, ${numThreads()} threads`);
    }
  }
}

/** What is there at the end and should not be. */
async function leftOver(engine: Engine, baseline: { threads: number; external: number }): Promise<string[]> {
  const faults: string[] = [];
  const deadline = performance.now() + 10_000;
  // Forgotten streams are cancelled when the garbage collector finds them.
  while (!isIdle(engine.stats()) && performance.now() < deadline) {
    collectGarbage();
    await sleep(5);
  }
  const stats = await until(engine, 'idleness', isIdle);
  const ended = stats.requestsFinished + stats.requestsCancelled + stats.requestsFailed;
  if (ended !== stats.requestsTotal) {
    faults.push(`${stats.requestsTotal} requests admitted, ${ended} ended`);
  }
  await engine.close();
  while (performance.now() < deadline && numThreads() > baseline.threads) {
    await sleep(20);
  }
  collectGarbage();
  if (numThreads() > baseline.threads) {
    faults.push(`${numThreads() - baseline.threads} threads more than before`);
  }
  const external = native.NativeEngine.externalMemory() - baseline.external;
  if (external > 4 * 2 ** 20) {
    faults.push(`${external} bytes more are reported to the garbage collector than before`);
  }
  return faults;
}

/** Who started and who ended, and how. */
class Counts {
  readonly workers = { started: 0, terminated: 0 };
  readonly #operations: Record<string, number> = {};
  readonly #outcomes: Record<string, number> = {};
  #settled = 0;
  started = 0;

  /** Counts one operation. Never rejects. */
  async settled(name: string, operation: Promise<unknown>): Promise<void> {
    this.started += 1;
    this.#operations[name] = (this.#operations[name] ?? 0) + 1;
    const outcome = await operation.then(() => 'ok', codeOf);
    this.#outcomes[outcome] = (this.#outcomes[outcome] ?? 0) + 1;
    this.#settled += 1;
  }

  report(): Pick<SoakReport, 'operations' | 'outcomes' | 'unsettled' | 'workers'> {
    const unsettled = this.started - this.#settled;
    return { operations: this.#operations, outcomes: this.#outcomes, unsettled, workers: this.workers };
  }

  faults(): string[] {
    const unexpected = Object.keys(this.#outcomes).filter((outcome) => !EXPECTED.includes(outcome));
    const faults = unexpected.map((outcome) => `${this.#outcomes[outcome]} operations ended with ${outcome}`);
    if (this.started !== this.#settled) {
      faults.push(`${this.started - this.#settled} operations did not settle`);
    }
    return faults;
  }
}

function codeOf(error: unknown): string {
  return error instanceof NsLlmError ? error.code : String(error);
}

/** Resident memory over time. */
class MemorySamples {
  readonly #seconds: number;
  readonly #samples: { second: number; mib: number }[] = [];

  constructor(seconds: number) {
    this.#seconds = seconds;
  }

  get lastMiB(): number {
    return this.#samples.at(-1)?.mib ?? 0;
  }

  take(second: number): void {
    this.#samples.push({ second, mib: process.memoryUsage.rss() / 2 ** 20 });
  }

  report(): Pick<SoakReport, 'residentMiB' | 'slopeMiBPerHour'> {
    return { residentMiB: this.#ends(), slopeMiBPerHour: this.#slope() };
  }

  faults(): string[] {
    const { atWarmUp, atEnd } = this.#ends();
    if (this.#seconds >= SLOPE_SECONDS) {
      const slope = this.#slope();
      return slope > MAX_SLOPE_MIB_PER_HOUR ? [`memory grows by ${slope.toFixed(2)} MiB an hour`] : [];
    }
    return atEnd - atWarmUp > MAX_GROWTH_MIB ? [`memory grew from ${atWarmUp} to ${atEnd} MiB`] : [];
  }

  /** Medians over a tenth of the time: the load itself breathes. */
  #ends(): { atWarmUp: number; atEnd: number } {
    const between = (from: number, to: number): number => {
      const { length } = this.#samples;
      const part = this.#samples.slice(Math.floor(length * from), Math.ceil(length * to)).map(({ mib }) => mib);
      return part.sort((a, b) => a - b)[part.length >> 1] ?? 0;
    };
    return { atWarmUp: between(0.2, 0.3), atEnd: between(0.9, 1) };
  }

  #slope(): number {
    const half = this.#samples.slice(this.#samples.length >> 1);
    const mean = (of: (sample: { second: number; mib: number }) => number): number =>
      half.reduce((sum, sample) => sum + of(sample), 0) / half.length;
    const [second, mib] = [mean((sample) => sample.second), mean((sample) => sample.mib)];
    const covariance = mean((sample) => (sample.second - second) * (sample.mib - mib));
    const variance = mean((sample) => (sample.second - second) ** 2);
    return (covariance / variance) * 3600;
  }
}

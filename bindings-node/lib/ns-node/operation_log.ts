/**
 * What was asked of the engines of this process and how long it took: the one place that every request of every client
 * is written to, and that `metrics()`, the profiler and Prometheus read. Bounded: the newest operations, and sums over all.
 */

import { distribution } from './distribution.js';
import { Histogram } from './histogram.js';

/** How an operation ended; one that its own caller gave up is no failure. */
export type OperationStatus = 'success' | 'failed' | 'cancelled';

/** What is known of an operation beyond its times; a count that does not apply is 0. */
export interface OperationCounts {
  /** Tokens made. */
  tokens: number;
  /** Tokens of the prompt. */
  promptTokens: number;
  /** Those of them that were not computed again. */
  cachedTokens: number;
  /** From the start to the first token, milliseconds; not there when nobody looked. */
  firstTokenMs?: number | undefined;
}

/** One operation that has ended. Times are those of {@link clock}. */
export interface Operation extends OperationCounts {
  /** `generate`, `embed`, or what a caller of the profiler named it. */
  type: string;
  status: OperationStatus;
  startedAt: number;
  endedAt: number;
}

/** Milliseconds of a monotonic clock, in microseconds' resolution. */
export function clock(): number {
  return performance.now();
}

/** Operations whose times are kept. */
const MAX_OPERATIONS = 10_000;
/** Operations over which `metrics()` takes percentiles. */
const RECENT_OPERATIONS = 1_000;

/** Bounds of the histograms, seconds: those of vLLM. */
const FIRST_TOKEN_BOUNDS = [
  0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
];
const INTER_TOKEN_BOUNDS = [
  0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
];
const END_TO_END_BOUNDS = [
  0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
];

/** Sums over every operation that ever ended. */
export interface Totals {
  requests: number;
  failed: number;
  cancelled: number;
  tokens: number;
  promptTokens: number;
  cachedTokens: number;
  /** Generations that found the beginning of their prompt in the prefix cache. */
  hits: number;
  misses: number;
}

/** Operations that have ended, oldest first. */
export class OperationLog {
  /** Operations that are going on. */
  active = 0;
  readonly #ended: Operation[] = [];
  /** Where the oldest one is, once the list is full. */
  #oldest = 0;
  readonly #totals: Totals = {
    requests: 0,
    failed: 0,
    cancelled: 0,
    tokens: 0,
    promptTokens: 0,
    cachedTokens: 0,
    hits: 0,
    misses: 0,
  };
  #totalMs = 0;
  /** Times of every generation that ever succeeded. */
  readonly seconds = {
    timeToFirstToken: new Histogram(FIRST_TOKEN_BOUNDS),
    interToken: new Histogram(INTER_TOKEN_BOUNDS),
    endToEnd: new Histogram(END_TO_END_BOUNDS),
  };

  /** Runs `work` as an operation; whatever it does, it is counted. `work` gives its result and what is known of it. */
  async run<T>(type: string, work: () => Promise<[T, OperationCounts]>, isCancelled: (error: unknown) => boolean): Promise<T> {
    const startedAt = clock();
    this.active += 1;
    const end = (status: OperationStatus, counts: OperationCounts): void => {
      this.active -= 1;
      this.add({ type, status, startedAt, endedAt: clock(), ...counts });
    };
    try {
      const [result, counts] = await work();
      end('success', counts);
      return result;
    } catch (error) {
      end(isCancelled(error) ? 'cancelled' : 'failed', { tokens: 0, promptTokens: 0, cachedTokens: 0 });
      throw error;
    }
  }

  /** Adds one that has ended. */
  add(operation: Operation): void {
    if (this.#ended.length < MAX_OPERATIONS) {
      this.#ended.push(operation);
    } else {
      this.#ended[this.#oldest] = operation;
      this.#oldest = (this.#oldest + 1) % MAX_OPERATIONS;
    }
    const totals = this.#totals;
    totals.requests += 1;
    totals.failed += operation.status === 'failed' ? 1 : 0;
    totals.cancelled += operation.status === 'cancelled' ? 1 : 0;
    totals.tokens += operation.tokens;
    totals.promptTokens += operation.promptTokens;
    totals.cachedTokens += operation.cachedTokens;
    if (operation.type === 'generate' && operation.status === 'success') {
      totals[operation.cachedTokens > 0 ? 'hits' : 'misses'] += 1;
      this.#addSeconds(operation);
    }
    this.#totalMs += operation.endedAt - operation.startedAt;
  }

  #addSeconds(operation: Operation): void {
    const { timeToFirstToken, interToken, endToEnd } = this.seconds;
    const betweenTokens = perTokenMs(operation);
    if (operation.firstTokenMs !== undefined) {
      timeToFirstToken.add(operation.firstTokenMs / 1e3);
    }
    if (betweenTokens !== undefined) {
      interToken.add(betweenTokens / 1e3);
    }
    endToEnd.add(durationMs(operation) / 1e3);
  }

  /** Those that ended at or after a time, in the order of their ends. */
  since(time: number): Operation[] {
    const ordered = [...this.#ended.slice(this.#oldest), ...this.#ended.slice(0, this.#oldest)];
    return ordered.filter(({ endedAt }) => endedAt >= time);
  }

  /** Sums over everything that ever ended. */
  get totals(): Readonly<Totals> {
    return this.#totals;
  }

  /** Times from start to end, milliseconds: the mean over all, percentiles over the newest thousand. */
  latency(): { avg: number; p50: number; p95: number } {
    const recent = this.since(0).slice(-RECENT_OPERATIONS);
    const { p50, p95 } = distribution(recent.map(({ startedAt, endedAt }) => endedAt - startedAt));
    const { requests } = this.#totals;
    return { avg: requests > 0 ? this.#totalMs / requests : 0, p50, p95 };
  }
}

/** From its start to its end. */
export function durationMs({ startedAt, endedAt }: Operation): number {
  return endedAt - startedAt;
}

/** The mean time between two tokens; of a generation whose first token nobody saw, its time over its tokens. */
export function perTokenMs(operation: Operation): number | undefined {
  const { tokens, firstTokenMs } = operation;
  if (firstTokenMs === undefined) {
    return tokens > 0 ? durationMs(operation) / tokens : undefined;
  }
  return tokens > 1 ? (durationMs(operation) - firstTokenMs) / (tokens - 1) : undefined;
}

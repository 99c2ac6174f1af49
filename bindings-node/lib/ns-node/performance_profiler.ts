/**
 * How fast this process answers. Every request of every client is in here by itself; operations of the server's own are
 * added by `startProfile` and `endProfile`. All numbers are of one time window, from a clock of microseconds, and finite.
 */

import { loadavg, freemem, totalmem } from 'node:os';

import { distribution, rounded } from './distribution.js';
import { clock, durationMs, OperationLog, perTokenMs } from './operation_log.js';
import type { Operation, OperationStatus } from './operation_log.js';
import type { PerformanceMetrics } from './performance_metrics.js';
import { bottlenecksOf, reportOf } from './performance_report.js';
import type { BottleneckAnalysis, PerformanceReport, Rates } from './performance_report.js';
import { state } from './shared_state.js';

/** An operation that a caller measures. */
export interface Profile {
  id: string;
  type: string;
  metadata: Record<string, unknown>;
  /** Milliseconds of the wall clock. */
  startTime: number;
  checkpoints: Checkpoint[];
  ended: boolean;
}

/** A moment of an operation. */
export interface Checkpoint {
  name: string;
  /** Milliseconds of the wall clock. */
  timestamp: number;
  /** Milliseconds since the start. */
  elapsed: number;
  data: unknown;
}

/** An operation that a caller has measured. */
export interface EndedProfile extends Profile {
  endTime: number;
  /** Milliseconds. */
  duration: number;
  status: string;
  result: { tokenCount?: number };
}

const DEFAULT_WINDOW_MS = 60_000;
/** Profiles that may be open at once; one more gives up the oldest. */
const MAX_OPEN_PROFILES = 1_000;
/** A profile that is not ended for so long, milliseconds, is not going on any more. */
const ABANDONED_MS = 600_000;
/** Checkpoints of one profile. */
const MAX_CHECKPOINTS = 1_000;

interface OpenProfile {
  profile: Profile;
  startedAt: number;
}

/** Any number of profilers see the same requests; what a caller measures belongs to its own. */
export class PerformanceProfiler {
  readonly #open = new Map<string, OpenProfile>();
  #own = new OperationLog();
  /** Nothing that ended before is shown. */
  #clearedAt = 0;

  /** Begins to measure. `generate` and `embed` are the types whose times are shown. */
  startProfile(operationId: string, operationType = 'generic', metadata: Record<string, unknown> = {}): Profile {
    const profile = { id: operationId, type: operationType, metadata, startTime: Date.now(), checkpoints: [], ended: false };
    this.#open.delete(operationId);
    this.#open.set(operationId, { profile, startedAt: clock() });
    this.#dropAbandoned();
    return profile;
  }

  /** Notes a moment; `first-token` is the one from which the time to the first token is taken. */
  checkpoint(operationId: string, name: string, data: unknown = {}): void {
    const open = this.#open.get(operationId);
    if (open && open.profile.checkpoints.length < MAX_CHECKPOINTS) {
      const elapsed = rounded(clock() - open.startedAt);
      open.profile.checkpoints.push({ name, timestamp: Date.now(), elapsed, data });
    }
  }

  /** Ends a measurement; nothing when there is none of this name. A status other than `success` is a failure. */
  endProfile(operationId: string, status = 'success', result: { tokenCount?: number } = {}): EndedProfile | null {
    const open = this.#open.get(operationId);
    if (!open) {
      return null;
    }
    this.#open.delete(operationId);
    const { profile, startedAt } = open;
    const endedAt = clock();
    const given = Number(result.tokenCount);
    const tokens = Number.isFinite(given) && given > 0 ? given : 0;
    const firstTokenMs = profile.checkpoints.find(({ name }) => name === 'first-token')?.elapsed;
    const ended: OperationStatus = status === 'success' || status === 'cancelled' ? status : 'failed';
    const counts = { tokens, promptTokens: 0, cachedTokens: 0, firstTokenMs };
    this.#own.add({ type: profile.type, status: ended, startedAt, endedAt, ...counts });
    profile.ended = true;
    return { ...profile, endTime: Date.now(), duration: rounded(endedAt - startedAt), status, result };
  }

  /** Everything that ended in the last `windowMs` milliseconds. */
  getMetrics(windowMs = DEFAULT_WINDOW_MS): PerformanceMetrics {
    return this.#measure(windowMs).metrics;
  }

  #measure(windowMs: number): { metrics: PerformanceMetrics; rates: Rates } {
    const window = Number.isFinite(windowMs) && windowMs > 0 ? windowMs : DEFAULT_WINDOW_MS;
    const operations = this.#since(clock() - window);
    const generations = operations.filter(({ type, status }) => type === 'generate' && status === 'success');
    const embeddings = operations.filter(({ type, status }) => type === 'embed' && status === 'success');
    const [successful, failed, cancelled] = (['success', 'failed', 'cancelled'] as const).map(
      (wanted) => operations.filter(({ status }) => status === wanted).length,
    ) as [number, number, number];
    const judged = successful + failed;
    const seconds = Math.max(1, Math.min(window, clock() - this.#clearedAt) / 1e3);
    const rates = {
      tokensPerSecond: tokensPerSecond(generations),
      successPercent: judged > 0 ? (successful / judged) * 100 : 0,
    };
    const metrics = {
      latency: {
        ttft: distribution(generations.flatMap(({ firstTokenMs }) => firstTokenMs ?? [])),
        endToEnd: distribution(generations.map(durationMs)),
        perToken: distribution(generations.flatMap((operation) => perTokenMs(operation) ?? [])),
        embedding: distribution(embeddings.map(durationMs)),
      },
      throughput: {
        requestsPerSecond: (operations.length / seconds).toFixed(2),
        tokensPerSecond: rates.tokensPerSecond.toFixed(2),
        concurrentRequests: state.operations.active + this.#numOpen(),
      },
      requests: {
        total: operations.length,
        successful,
        failed,
        cancelled,
        cached: generations.filter(({ cachedTokens }) => cachedTokens > 0).length,
        successRate: rates.successPercent.toFixed(2),
      },
      resources: {
        cpu: { loadAverage: loadavg(), usage: process.cpuUsage() },
        memory: { total: totalmem(), free: freemem(), process: process.memoryUsage() },
        gpu: state.gpus.devices.length > 0 ? { utilization: state.gpus.utilization() } : null,
      },
      timeWindow: `${window / 1e3}s`,
      sampleSize: operations.length,
    };
    return { metrics, rates };
  }

  /** What is slow or fails among the newest operations. */
  analyzeBottlenecks(limit = 100): BottleneckAnalysis {
    const wanted = Number.isInteger(limit) && limit > 0 ? limit : 100;
    const newest = this.#since(0).slice(-wanted);
    const generations = newest.filter(({ type, status }) => type === 'generate' && status === 'success');
    const bottlenecks = bottlenecksOf({
      successful: newest.filter(({ status }) => status === 'success').length,
      failed: newest.filter(({ status }) => status === 'failed').length,
      generations: generations.length,
      perToken: distribution(generations.flatMap((operation) => perTokenMs(operation) ?? [])),
      tokensPerSecond: tokensPerSecond(generations),
    });
    return { bottlenecks, analyzed: newest.length, timeframe: `last ${wanted} operations` };
  }

  /** Metrics, bottlenecks, a score and what to do. A node that did nothing has no grade. */
  generateReport(): PerformanceReport {
    const { metrics, rates } = this.#measure(DEFAULT_WINDOW_MS);
    return reportOf(metrics, rates, this.analyzeBottlenecks());
  }

  /** Begins anew: nothing that has ended is shown any more. */
  clear(): void {
    this.#clearedAt = clock();
    this.#own = new OperationLog();
  }

  #since(time: number): Operation[] {
    const from = Math.max(time, this.#clearedAt);
    const operations = [...state.operations.since(from), ...this.#own.since(from)];
    return operations.sort((a, b) => a.endedAt - b.endedAt);
  }

  #numOpen(): number {
    this.#dropAbandoned();
    return this.#open.size;
  }

  #dropAbandoned(): void {
    const now = clock();
    for (const [id, { startedAt }] of this.#open) {
      if (this.#open.size <= MAX_OPEN_PROFILES && now - startedAt < ABANDONED_MS) {
        break;
      }
      this.#open.delete(id);
    }
  }
}

/** Tokens of all, over the time in which at least one of them ran: generations that run together are not slower for it. */
function tokensPerSecond(generations: readonly Operation[]): number {
  let busyMs = 0;
  let busyUntil = 0;
  for (const { startedAt, endedAt } of [...generations].sort((a, b) => a.startedAt - b.startedAt)) {
    busyMs += Math.max(0, endedAt - Math.max(startedAt, busyUntil));
    busyUntil = Math.max(busyUntil, endedAt);
  }
  const tokens = generations.reduce((sum, operation) => sum + operation.tokens, 0);
  return busyMs > 0 ? (tokens / busyMs) * 1e3 : 0;
}

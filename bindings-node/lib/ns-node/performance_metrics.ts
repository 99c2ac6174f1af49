/** What is measured of a process in one time window. */

import type { Distribution } from './distribution.js';

/** As `process.memoryUsage()` gives it, bytes. */
export interface ProcessMemory {
  rss: number;
  heapTotal: number;
  heapUsed: number;
  external: number;
  arrayBuffers: number;
}

/** Times in milliseconds, of the operations that ended in the window. */
export interface PerformanceMetrics {
  latency: {
    /** From the start of a generation to its first token. */
    ttft: Distribution;
    /** From the start of a generation to its end. */
    endToEnd: Distribution;
    /** Between two tokens of a generation. */
    perToken: Distribution;
    /** From the start of an embedding to its end. */
    embedding: Distribution;
  };
  throughput: {
    requestsPerSecond: string;
    /** Tokens of all generations, over the time in which at least one ran. */
    tokensPerSecond: string;
    /** Operations that are going on. */
    concurrentRequests: number;
  };
  requests: {
    total: number;
    successful: number;
    failed: number;
    /** Given up by their own callers. */
    cancelled: number;
    /** Generations that found the beginning of their prompt in the cache. */
    cached: number;
    /** Percent of those that were not given up; "0.00" when there was none. */
    successRate: string;
  };
  resources: {
    /** `usage` is of this process, microseconds. */
    cpu: { loadAverage: number[]; usage: { user: number; system: number } };
    /** Bytes. */
    memory: { total: number; free: number; process: ProcessMemory };
    /** Percent, the mean over all devices; null without one. */
    gpu: { utilization: number } | null;
  };
  timeWindow: string;
  sampleSize: number;
}

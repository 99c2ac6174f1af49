/** What measured times mean: bottlenecks against the targets, a score with its grade, and what to do about it. */

import { getHeapStatistics } from 'node:v8';

import type { Distribution } from './distribution.js';
import type { PerformanceMetrics } from './performance_metrics.js';

/** Something that misses its target. */
export interface Bottleneck {
  type: 'slow_operations' | 'high_failure_rate' | 'low_throughput' | 'high_memory_usage';
  severity: 'high' | 'medium';
  current: string;
  target: string;
  suggestion: string;
}

/** What was found among the newest operations. */
export interface BottleneckAnalysis {
  bottlenecks: Bottleneck[];
  /** Operations that were looked at. */
  analyzed: number;
  timeframe: string;
}

/** What to do. */
export interface Recommendation {
  priority: string;
  category: string;
  action: string;
}

/** Everything at a glance. */
export interface PerformanceReport {
  summary: {
    /** 0 to 100; 0 when there was nothing to judge. */
    score: number;
    /** `A` from 80, `B` from 60, else `C`; `N/A` when there was nothing to judge. */
    grade: 'A' | 'B' | 'C' | 'N/A';
    /** ISO 8601. */
    timestamp: string;
  };
  metrics: PerformanceMetrics;
  bottlenecks: BottleneckAnalysis;
  recommendations: Recommendation[];
}

/** What bottlenecks are looked for in. */
export interface Observed {
  successful: number;
  failed: number;
  /** Generations that succeeded. */
  generations: number;
  /** Of them, milliseconds. */
  perToken: Distribution;
  tokensPerSecond: number;
}

/** 95 of 100 generations take at most this for a token, milliseconds. */
const PER_TOKEN_TARGET_MS = 80;
/** Mean time to the first token, milliseconds. */
const FIRST_TOKEN_TARGET_MS = 100;
const TOKENS_PER_SECOND_TARGET = 12;
/** Below it throughput is a bottleneck. */
const LOW_TOKENS_PER_SECOND = 10;
/** Generations from which on throughput is judged. */
const MIN_GENERATIONS = 10;
const MAX_FAILURE_PERCENT = 5;
const MAX_HEAP_PERCENT = 80;

/** In the order of their weight. */
export function bottlenecksOf({ successful, failed, generations, perToken, tokensPerSecond }: Observed): Bottleneck[] {
  const found: Bottleneck[] = [];
  const failurePercent = successful + failed > 0 ? (failed / (successful + failed)) * 100 : 0;
  if (failurePercent > MAX_FAILURE_PERCENT) {
    found.push({
      type: 'high_failure_rate',
      severity: 'high',
      current: `${failurePercent.toFixed(2)} %`,
      target: `at most ${MAX_FAILURE_PERCENT} %`,
      suggestion: 'Look at the errors of the failed requests, and whether their models are installed',
    });
  }
  // What V8 may still take counts: of the heap that it has taken so far, most is in use at any time.
  const { used_heap_size, heap_size_limit } = getHeapStatistics();
  const heapPercent = (used_heap_size / heap_size_limit) * 100;
  if (heapPercent > MAX_HEAP_PERCENT) {
    found.push({
      type: 'high_memory_usage',
      severity: 'high',
      current: `${heapPercent.toFixed(1)} % of the heap's limit`,
      target: `at most ${MAX_HEAP_PERCENT} %`,
      suggestion: 'Keep fewer objects, or raise --max-old-space-size',
    });
  }
  if (perToken.p95 > PER_TOKEN_TARGET_MS) {
    found.push({
      type: 'slow_operations',
      severity: 'medium',
      current: `${perToken.p95.toFixed(1)} ms per token (p95)`,
      target: `${PER_TOKEN_TARGET_MS} ms per token`,
      suggestion: 'Use a smaller model or smaller weights, or give the engine more threads',
    });
  }
  if (generations > MIN_GENERATIONS && tokensPerSecond < LOW_TOKENS_PER_SECOND) {
    found.push({
      type: 'low_throughput',
      severity: 'medium',
      current: `${tokensPerSecond.toFixed(1)} tokens/sec`,
      target: `${TOKENS_PER_SECOND_TARGET}+ tokens/sec`,
      suggestion: 'Compute on a GPU, or use a smaller model',
    });
  }
  return found;
}

/** What metrics tell as text, as numbers to judge by. */
export interface Rates {
  tokensPerSecond: number;
  /** Of the requests that were not given up. */
  successPercent: number;
}

/** The report about some metrics. */
export function reportOf(metrics: PerformanceMetrics, rates: Rates, analysis: BottleneckAnalysis): PerformanceReport {
  const timestamp = new Date().toISOString();
  const judged = metrics.requests.successful + metrics.requests.failed;
  const score = judged > 0 ? scoreOf(metrics, rates, analysis) : 0;
  const grade = judged === 0 ? 'N/A' : score >= 80 ? 'A' : score >= 60 ? 'B' : 'C';
  const recommendations = recommendationsOf(metrics, rates, analysis);
  return { summary: { score, grade, timestamp }, metrics, bottlenecks: analysis, recommendations };
}

function scoreOf(
  { latency }: PerformanceMetrics,
  { tokensPerSecond, successPercent }: Rates,
  { bottlenecks }: BottleneckAnalysis,
): number {
  let score = 100;
  const { p95 } = latency.endToEnd;
  score -= p95 > 1_000 ? 20 : p95 > 500 ? 10 : 0;
  // Embeddings make no tokens: without a generation there is no throughput to judge.
  score -= p95 > 0 && tokensPerSecond < LOW_TOKENS_PER_SECOND ? 15 : 0;
  score -= successPercent < 95 ? 100 - successPercent : 0;
  for (const { severity } of bottlenecks) {
    score -= severity === 'high' ? 10 : 5;
  }
  return Math.max(0, Math.round(score));
}

function recommendationsOf(
  { latency }: PerformanceMetrics,
  { tokensPerSecond }: Rates,
  { bottlenecks }: BottleneckAnalysis,
): Recommendation[] {
  const recommendations: Recommendation[] = bottlenecks.map(({ severity, type, suggestion }) => ({
    priority: severity,
    category: type,
    action: suggestion,
  }));
  if (latency.endToEnd.p95 > 0 && tokensPerSecond < TOKENS_PER_SECOND_TARGET) {
    recommendations.push({ priority: 'high', category: 'performance', action: 'Enable GPU acceleration for inference' });
  }
  if (latency.ttft.avg > FIRST_TOKEN_TARGET_MS) {
    const action = 'Give prompts a common beginning, which is computed once, and load models before the first request';
    recommendations.push({ priority: 'medium', category: 'latency', action });
  }
  return recommendations;
}

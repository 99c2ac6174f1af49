/** Percentiles and means of measured times, as finite numbers: without a value they are 0. */

/** A few numbers about many, in the unit of the values. */
export interface Distribution {
  p50: number;
  p95: number;
  p99: number;
  avg: number;
}

/** Nearest-rank percentiles: each is one of the values, and never above the largest. */
export function distribution(values: readonly number[]): Distribution {
  if (values.length === 0) {
    return { p50: 0, p95: 0, p99: 0, avg: 0 };
  }
  const sorted = [...values].sort((a, b) => a - b);
  const rank = (share: number): number => rounded(sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]!);
  const sum = sorted.reduce((total, value) => total + value, 0);
  return { p50: rank(0.5), p95: rank(0.95), p99: rank(0.99), avg: rounded(sum / sorted.length) };
}

/** A time in milliseconds, to the microsecond. */
export function rounded(value: number): number {
  return Math.round(value * 1e3) / 1e3;
}

/** How often which values came, in buckets that never change: the form in which Prometheus adds up and compares times. */

/** Counts of values up to each bound, and the sum of all. */
export class Histogram {
  /** Ascending. */
  readonly bounds: readonly number[];
  /** Values in each bucket alone; the last is of those above all bounds. */
  readonly #counts: number[];
  #sum = 0;

  constructor(bounds: readonly number[]) {
    this.bounds = bounds;
    this.#counts = Array.from({ length: bounds.length + 1 }, () => 0);
  }

  /** Counts one value. */
  add(value: number): void {
    const bucket = this.bounds.findIndex((bound) => value <= bound);
    this.#counts[bucket < 0 ? this.bounds.length : bucket]! += 1;
    this.#sum += value;
  }

  /** Sum of all values. */
  get sum(): number {
    return this.#sum;
  }

  /** Values that are no larger than each bound, and at last all of them. */
  cumulative(): number[] {
    let total = 0;
    return this.#counts.map((count) => (total += count));
  }
}

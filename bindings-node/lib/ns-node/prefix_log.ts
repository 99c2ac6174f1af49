/** Which beginnings of prompts this process has lately answered: what a node tells those who choose between nodes. */

/** Names that are kept; beyond it the oldest is forgotten. */
const MAX_PREFIXES = 256;

/** Names as `prefixAffinity` gives them, each once. */
export class PrefixLog {
  readonly #names = new Set<string>();

  note(name: string): void {
    // A set keeps the order in which its members came.
    this.#names.delete(name);
    this.#names.add(name);
    if (this.#names.size > MAX_PREFIXES) {
      const [oldest] = this.#names;
      this.#names.delete(oldest as string);
    }
  }

  /** Newest first. */
  newest(): string[] {
    return [...this.#names].reverse();
  }
}

/**
 * Texts by key, in memory: the least recently used go when there are too many entries or bytes, and none is served
 * beyond its time. A key is compared and never becomes a path.
 */

/** Limits of a store. */
export interface ResponseStoreLimits {
  maxEntries: number;
  /** Bytes of all keys and texts together. */
  maxBytes: number;
  /** How long an entry is served after it was stored, milliseconds. */
  ttlMs: number;
}

interface Entry {
  text: string;
  bytes: number;
  storedAt: number;
  accessCount: number;
  lastAccessed: number;
}

/** When an entry was stored and used, milliseconds of the wall clock. */
export type EntryUse = Readonly<Pick<Entry, 'storedAt' | 'accessCount' | 'lastAccessed'>>;

/** A bounded map. */
export class ResponseStore {
  /** Entries that were given up, for want of room or because their time was over. */
  evictions = 0;
  /** Bytes of all entries. */
  bytes = 0;
  /** In the order of their use, the least recent first. */
  readonly #entries = new Map<string, Entry>();
  readonly #limits: ResponseStoreLimits;
  readonly #now: () => number;

  constructor(limits: ResponseStoreLimits, now: () => number = Date.now) {
    this.#limits = limits;
    this.#now = now;
  }

  /** Entries, those whose time is over included until they are asked for or pruned. */
  get size(): number {
    return this.#entries.size;
  }

  /** Keeps a text; one that is larger than the whole store is not kept. */
  set(key: string, text: string): boolean {
    this.delete(key);
    const bytes = Buffer.byteLength(key) + Buffer.byteLength(text);
    const { maxEntries, maxBytes } = this.#limits;
    if (bytes > maxBytes || maxEntries < 1) {
      return false;
    }
    const now = this.#now();
    this.#entries.set(key, { text, bytes, storedAt: now, accessCount: 0, lastAccessed: now });
    this.bytes += bytes;
    for (const [oldest] of this.#entries) {
      if (this.#entries.size <= maxEntries && this.bytes <= maxBytes) {
        break;
      }
      this.#evict(oldest);
    }
    return true;
  }

  /** The text of a key, which becomes the most recently used. */
  get(key: string): { text: string; use: EntryUse } | undefined {
    const entry = this.#fresh(key);
    if (!entry) {
      return undefined;
    }
    entry.accessCount += 1;
    entry.lastAccessed = this.#now();
    this.#entries.delete(key);
    this.#entries.set(key, entry);
    const { text, storedAt, accessCount, lastAccessed } = entry;
    return { text, use: { storedAt, accessCount, lastAccessed } };
  }

  has(key: string): boolean {
    return this.#fresh(key) !== undefined;
  }

  /** Whether it was there. */
  delete(key: string): boolean {
    const entry = this.#entries.get(key);
    this.bytes -= entry?.bytes ?? 0;
    return this.#entries.delete(key);
  }

  clear(): void {
    this.#entries.clear();
    this.bytes = 0;
  }

  /** Gives up what is over its time. How many that were. */
  prune(): number {
    const before = this.#entries.size;
    for (const key of [...this.#entries.keys()]) {
      this.#fresh(key);
    }
    return before - this.#entries.size;
  }

  #fresh(key: string): Entry | undefined {
    const entry = this.#entries.get(key);
    if (entry && this.#now() - entry.storedAt >= this.#limits.ttlMs) {
      this.#evict(key);
      return undefined;
    }
    return entry;
  }

  #evict(key: string): void {
    this.delete(key);
    this.evictions += 1;
  }
}

/**
 * The cache that a server shows and manages. Its numbers are those of the engines' prefix cache, where keys and values of
 * prompts really are kept and found again, in memory and, with `KV_CACHE_DIR`, on disk; and of a response cache beside it (the
 * engine's own kind, in native memory), for callers that keep some. The engines' part needs no call.
 */

import { createHash } from 'node:crypto';

import { NsLlmError, wrapErrors } from '../errors.js';
import { native } from '../native.js';
import type { NativeResponses } from '../native.js';
import { describe } from '../request.js';
import type { TierUse } from './shared_engines.js';
import { state } from './shared_state.js';
import { parse, stringify } from './typed_json.js';

/** How to make the service. Everything is optional. */
export interface KvCacheOptions {
  /** Taken for the sake of callers that name one; the engines' directory is `KV_CACHE_DIR`, or an option of the client. */
  cacheDir?: string | undefined;
  /** Responses to keep, together with `maxDiskSize`. Default 10. */
  maxMemorySize?: number | undefined;
  /** Responses that were once kept on disk, and are now in memory as well. Default 100. */
  maxDiskSize?: number | undefined;
  /** Bytes of all responses. Default 64 MiB. */
  maxBytes?: number | undefined;
  /** How long a response is served, milliseconds. Default one day. */
  ttlMs?: number | undefined;
  /** Whether responses are kept at all. Default true; the engines' prefix cache is not touched by it. */
  enabled?: boolean | undefined;
}

/** What a response depends on besides its prompt and model. */
export interface CacheContext {
  /** Default 0, as for a generation. */
  temperature?: number | undefined;
  /** Default 1. */
  topP?: number | undefined;
  maxTokens?: number | undefined;
  seed?: number | bigint | undefined;
  /** The system prompt. */
  system?: string | undefined;
}

/** When a response was stored and found, milliseconds of the wall clock. */
export interface EntryUse {
  readonly storedAt: number;
  readonly accessCount: number;
  readonly lastAccessed: number;
}

/** A response that was found. */
export interface CachedResponse {
  /** A copy. */
  data: unknown;
  metadata: Record<string, unknown> & EntryUse;
  source: 'memory';
}

/** Counts since the start or the last `clear()`. */
export interface KvCacheStats {
  /** KV blocks of prompts that were found, and responses that were. */
  hits: number;
  /** KV blocks of prompts that had to be computed, and responses that were not there. */
  misses: number;
  /** Responses that were given up. */
  evictions: number;
  stores: number;
  retrievals: number;
  /** KV blocks that were read from disk. */
  diskReads: number;
  /** KV blocks that were written there. */
  diskWrites: number;
  /** Always 0: no peer is asked. */
  federatedQueries: number;
  /** Hits and misses. */
  totalRequests: number;
  /** Percent. */
  hitRate: number;
  /** Responses and KV blocks that are kept in memory. */
  memorySize: number;
  /** KV blocks that are kept on disk. */
  diskSize: number;
  enabled: boolean;
  /** The engines' part of it. */
  prefix: {
    hitBlocks: number;
    missedBlocks: number;
    hitTokens: number;
    queriedTokens: number;
    cachedBlocks: number;
    usedBlocks: number;
    totalBlocks: number;
    cachedBytes: number;
  };
  /** The same by the place where blocks are kept, in the order in which they are asked. */
  tiers: TierUse[];
  /** The part of the stored responses. */
  responses: { hits: number; misses: number; entries: number; bytes: number };
}

const DEFAULT_MEMORY_ENTRIES = 10;
const DEFAULT_DISK_ENTRIES = 100;
const DEFAULT_BYTES = 64 << 20;
const DEFAULT_TTL_MS = 24 * 3_600_000;
/** Length of a key. */
const MAX_KEY_LENGTH = 1_024;

/** Any number of services may be made; each has responses of its own, and all tell of the same engines. */
export class KvCacheService {
  readonly enabled: boolean;
  readonly #limits: { maxEntries: number; maxBytes: number; ttlMs: number };
  #store: NativeResponses;
  #counts = { hits: 0, misses: 0, stores: 0, retrievals: 0 };

  constructor(options: KvCacheOptions = {}) {
    const { maxMemorySize = DEFAULT_MEMORY_ENTRIES, maxDiskSize = DEFAULT_DISK_ENTRIES } = options;
    const { maxBytes = DEFAULT_BYTES, ttlMs = DEFAULT_TTL_MS, enabled = true } = options;
    this.enabled = enabled;
    this.#limits = { maxEntries: maxMemorySize + maxDiskSize, maxBytes, ttlMs };
    this.#store = this.#open();
  }

  #open(): NativeResponses {
    return wrapErrors(() => new native.NativeResponses(this.#limits));
  }

  /** Nothing has to be prepared. */
  async initialize(): Promise<void> {}

  /** A key for a response: another value of anything that it depends on gives another key. */
  cacheKey(prompt: string, model = 'default', context: CacheContext = {}): string {
    const { temperature = 0, topP = 1, maxTokens = null, seed = null, system = null } = context;
    const fields = [prompt, model, temperature, topP, maxTokens, seed === null ? null : String(seed), system];
    return createHash('sha256').update(JSON.stringify(fields)).digest('hex');
  }

  /** Keeps a response: whether it was kept. What JSON cannot hold, but for typed arrays, is refused. */
  async store(key: string, data: unknown, metadata: Record<string, unknown> = {}): Promise<boolean> {
    checkKey(key);
    if (!this.enabled) {
      return false;
    }
    this.#counts.stores += 1;
    const value = Buffer.from(stringify({ data, metadata }));
    return wrapErrors(() => this.#store.put(key, value, {}));
  }

  /** A response, when it is there and not too old. */
  async retrieve(key: string): Promise<CachedResponse | null> {
    checkKey(key);
    if (!this.enabled) {
      return null;
    }
    this.#counts.retrievals += 1;
    const found = wrapErrors(() => this.#store.getWithUse(key));
    this.#counts[found ? 'hits' : 'misses'] += 1;
    if (!found) {
      return null;
    }
    const { value, ...use } = found;
    const { data, metadata } = parse(value.toString()) as { data: unknown; metadata: Record<string, unknown> };
    return { data, metadata: { ...metadata, ...use }, source: 'memory' };
  }

  /** Whether a response is there. Counts as no retrieval. */
  async has(key: string): Promise<boolean> {
    checkKey(key);
    return wrapErrors(() => this.#store.contains(key));
  }

  /** Gives a response up: whether it was there. */
  async delete(key: string): Promise<boolean> {
    checkKey(key);
    return wrapErrors(() => this.#store.remove(key));
  }

  /**
   * Gives all responses up and what the engines have cached, in memory and on disk; what another place has is not found any
   * more, here and after a restart. Begins all counts anew. Requests that run are not touched.
   */
  async clear(): Promise<void> {
    this.#store = this.#open();
    this.#counts = { hits: 0, misses: 0, stores: 0, retrievals: 0 };
    await state.engines.clearPrefixCache();
  }

  /** Waits until the KV that was computed so far is on disk, if it goes there; before a server ends, for one. */
  async flush(): Promise<void> {
    await state.engines.flush();
  }

  /** Gives up responses that are too old: how many that were. */
  async prune(): Promise<number> {
    return wrapErrors(() => this.#store.prune());
  }

  getStats(): KvCacheStats {
    const { hitBlocks, missedBlocks, tiers, ...tokensAndBlocks } = state.engines.prefixCacheUse();
    const total = (source: TierUse['source'], count: 'entries' | 'reads' | 'writes'): number =>
      tiers.filter((tier) => tier.source === source).reduce((sum, tier) => sum + tier[count], 0);
    const { stores, retrievals, ...counts } = this.#counts;
    const { evictions, expired, entries, bytes } = wrapErrors(() => this.#store.stats());
    const hits = counts.hits + hitBlocks;
    const misses = counts.misses + missedBlocks;
    const totalRequests = hits + misses;
    return {
      hits,
      misses,
      evictions: evictions + expired,
      stores,
      retrievals,
      diskReads: total('disk', 'reads'),
      diskWrites: total('disk', 'writes'),
      federatedQueries: 0,
      totalRequests,
      hitRate: totalRequests > 0 ? Math.round((hits / totalRequests) * 1e4) / 1e2 : 0,
      memorySize: entries + total('memory', 'entries'),
      diskSize: total('disk', 'entries'),
      enabled: this.enabled,
      prefix: { hitBlocks, missedBlocks, ...tokensAndBlocks },
      tiers,
      responses: { ...counts, entries, bytes },
    };
  }

  /** Base64 of a value's JSON, in which typed arrays stay what they are. */
  serialize(value: unknown): string {
    return Buffer.from(stringify(value)).toString('base64');
  }

  /** The value of {@link serialize}. */
  deserialize(serialized: string): unknown {
    try {
      return parse(Buffer.from(serialized, 'base64').toString('utf8'));
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      throw new NsLlmError('invalid_argument', `the text is no serialized value: ${reason}`, { cause: error });
    }
  }
}

function checkKey(key: unknown): void {
  if (typeof key !== 'string') {
    throw new NsLlmError('invalid_argument', `key is ${describe(key)}, must be a string`);
  }
  if (key.length > MAX_KEY_LENGTH) {
    throw new NsLlmError('invalid_argument', `key has ${key.length} characters, at most ${MAX_KEY_LENGTH} are allowed`);
  }
}

/**
 * The engines of this process: one for each model, however many clients ask for it. Each is opened by the first request
 * that needs it and stays open; idle, it does not keep the process alive.
 */

import { Engine } from '../engine.js';
import type { OpenOptions } from '../engine.js';
import type { CachedTokens } from '../stream.js';
import { NsLlmError } from '../errors.js';
import { limits } from '../native.js';
import { CacheEpoch, cacheOptions } from './cache_folder.js';
import { flushAtEnd } from './flush_at_end.js';

/** How an engine is opened. The first client that needs a model decides. */
export type EngineSettings = Omit<OpenOptions, 'model' | 'signal' | 'onProgress'>;

/** What the prefix cache did since it was last cleared, and what it holds. */
export interface PrefixCacheUse {
  /** Prompt tokens that were found. */
  hitTokens: number;
  /** Prompt tokens that were looked for. */
  queriedTokens: number;
  /** KV blocks that were found. */
  hitBlocks: number;
  /** KV blocks that had to be computed. */
  missedBlocks: number;
  /** KV blocks that are kept for later. */
  cachedBlocks: number;
  /** KV blocks that live requests hold. */
  usedBlocks: number;
  /** KV blocks of all pools. */
  totalBlocks: number;
  /** Bytes of the blocks that are kept for later. */
  cachedBytes: number;
  /** Each place where blocks are kept, in the order in which they are asked: the pool, and what there is beside it. */
  tiers: TierUse[];
}

/** One place where KV blocks are kept. */
export interface TierUse {
  name: keyof CachedTokens;
  /** Of what kind it is. */
  source: 'memory' | 'disk' | 'remote';
  /** Blocks held now. */
  entries: number;
  /** Bytes of them. */
  bytes: number;
  /** Blocks of prompts that were found here. */
  hits: number;
  /** Blocks of prompts that were looked for here, since no place before had them, and not found. */
  misses: number;
  /** Percent of those that were looked for here. */
  hitRate: number;
  /** Blocks read, also for those who did not wait to the end; those of the pool are not read. */
  reads: number;
  /** Blocks taken in; those of the pool are computed there. */
  writes: number;
}

interface Opening {
  engine: Engine | undefined;
  promise: Promise<Engine>;
}

const TIERS = [['pool', 'memory'], ['host', 'memory'], ['disk', 'disk'], ['remote', 'remote']] as const;

/** What a tier holds, and what it did since its engines were opened. */
interface TierCounts {
  isThere: boolean;
  entries: number;
  bytes: number;
  hitTokens: number;
  reads: number;
  writes: number;
}

type Counts = Omit<PrefixCacheUse, 'hitBlocks' | 'missedBlocks' | 'tiers'> & { byTier: Record<keyof CachedTokens, TierCounts> };

/** Engines by the folder of their model. */
export class SharedEngines {
  readonly #openings = new Map<string, Opening>();
  #blockTokens = limits.defaultBlockTokens;
  /** Counts when the cache was last cleared. */
  #cleared: Counts = noCounts();
  readonly #epoch = new CacheEpoch();

  /** The engine of a model, opened when it is not yet. A failure is forgotten: the next request tries again. */
  get(folder: string, settings: EngineSettings): Promise<Engine> {
    const known = this.#openings.get(folder);
    if (known) {
      return known.promise;
    }
    this.#blockTokens = settings.blockTokens ?? this.#blockTokens;
    const opening: Opening = { engine: undefined, promise: this.#openEngine(folder, settings) };
    this.#openings.set(folder, opening);
    opening.promise.then(
      (engine) => (opening.engine = engine),
      () => this.#openings.delete(folder),
    );
    return opening.promise;
  }

  async #openEngine(folder: string, settings: EngineSettings): Promise<Engine> {
    const { root, ...cache } = cacheOptions(folder, settings);
    if (root !== undefined) {
      await this.#epoch.enter(root);
    }
    if (root !== undefined || cache.kvRemote !== undefined) {
      flushAtEnd(() => this.flush());
    }
    // The addon knows the names of devices, and refuses others.
    const device = (settings.device ?? (process.env['COMPUTE_DEVICE'] || undefined)) as OpenOptions['device'];
    return Engine.open({ ...settings, ...cache, device, model: folder });
  }

  /** Forgets an engine that takes no requests any more, and frees it, so that the next one opens the model again. */
  forget(folder: string, engine: Engine): void {
    if (this.#openings.get(folder)?.engine === engine) {
      this.#openings.delete(folder);
      // Its end may have come by itself; closing it again is harmless.
      engine.close().catch(() => {});
    }
  }

  /** Engines that are open. */
  open(): Engine[] {
    return [...this.#openings.values()].flatMap(({ engine }) => engine ?? []);
  }

  /**
   * The namespace of the prefix cache for a caller's context. Requests share KV within one context only; clearing the
   * cache moves everyone to a new namespace, whose blocks push out those of the old one.
   */
  namespace(contextId: string | undefined): string | undefined {
    const epoch = this.#epoch.name;
    if (epoch === '' && contextId === undefined) {
      return undefined;
    }
    return contextId === undefined ? epoch : `${epoch}/${contextId}`;
  }

  /**
   * From now on nothing of what is cached is found any more, also after a restart, and the counts begin anew. Memory and files
   * of the open engines are free again; for what lies in a shared store, and in the directories of models that are not open,
   * there is a new namespace.
   */
  async clearPrefixCache(): Promise<void> {
    await this.#epoch.begin();
    await Promise.all(this.open().map((engine) => engine.clearPrefixCache().catch(unlessStorage)));
    this.#cleared = this.#counts();
  }

  /** Waits until what the engines keep on disk is there. */
  async flush(): Promise<void> {
    await Promise.all(this.open().map((engine) => engine.flush()));
  }

  /** Over all open engines. */
  prefixCacheUse(): PrefixCacheUse {
    const { byTier, ...counts } = this.#counts();
    const { byTier: clearedTiers, ...cleared } = this.#cleared;
    const hitTokens = Math.max(0, counts.hitTokens - cleared.hitTokens);
    const queriedTokens = Math.max(hitTokens, counts.queriedTokens - cleared.queriedTokens);
    const blocks = (tokens: number): number => Math.floor(tokens / this.#blockTokens);
    const missedBlocks = Math.ceil((queriedTokens - hitTokens) / this.#blockTokens);
    const hitBlocks = blocks(hitTokens);
    // What no place before has had is looked for in the next one.
    let queried = hitBlocks + missedBlocks;
    const tiers: TierUse[] = [];
    for (const [name, source] of TIERS) {
      const [now, then] = [byTier[name], clearedTiers[name]];
      if (now.isThere) {
        const hits = blocks(Math.max(0, now.hitTokens - then.hitTokens));
        const misses = Math.max(0, queried - hits);
        const [reads, writes] = [Math.max(0, now.reads - then.reads), Math.max(0, now.writes - then.writes)];
        const hitRate = hits > 0 ? Math.round((hits / (hits + misses)) * 1e4) / 1e2 : 0;
        tiers.push({ name, source, entries: now.entries, bytes: now.bytes, hits, misses, hitRate, reads, writes });
        queried = misses;
      }
    }
    return { ...counts, hitTokens, queriedTokens, hitBlocks, missedBlocks, tiers };
  }

  #counts(): Counts {
    const sums = noCounts();
    for (const engine of this.open()) {
      const stats = engine.stats();
      const { kvCachedBytes } = engine.memory();
      sums.hitTokens += stats.prefixCacheHitsTotal;
      sums.queriedTokens += stats.prefixCacheQueriesTotal;
      sums.cachedBlocks += stats.kvBlocksCached;
      sums.usedBlocks += stats.kvBlocksUsed;
      sums.totalBlocks += stats.kvBlocksTotal;
      sums.cachedBytes += kvCachedBytes;
      sums.byTier.pool.entries += stats.kvBlocksCached;
      sums.byTier.pool.bytes += kvCachedBytes;
      for (const [name] of TIERS) {
        sums.byTier[name].hitTokens += stats.prefixCacheHitsByTier[name];
      }
      for (const { name, blocks, bytes, hits, stored } of stats.kvTiers) {
        const tier = sums.byTier[name];
        tier.isThere = true;
        tier.entries += blocks;
        tier.bytes += bytes;
        tier.reads += hits;
        tier.writes += stored;
      }
    }
    return sums;
  }
}

/** Files that cannot be removed now, such as those that another process writes, are not found in the new namespace. */
function unlessStorage(error: unknown): void {
  if (!(error instanceof NsLlmError && error.code === 'storage')) {
    throw error;
  }
}

function noCounts(): Counts {
  const none = (isThere: boolean): TierCounts => ({ isThere, entries: 0, bytes: 0, hitTokens: 0, reads: 0, writes: 0 });
  const byTier = { pool: none(true), host: none(false), disk: none(false), remote: none(false) };
  return { hitTokens: 0, queriedTokens: 0, cachedBlocks: 0, usedBlocks: 0, totalBlocks: 0, cachedBytes: 0, byTier };
}

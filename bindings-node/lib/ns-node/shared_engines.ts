/**
 * The engines of this process: one for each model, however many clients ask for it. Each is opened by the first request
 * that needs it and stays open; idle, it does not keep the process alive.
 */

import { Engine } from '../engine.js';
import type { OpenOptions } from '../engine.js';

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
}

interface Opening {
  engine: Engine | undefined;
  promise: Promise<Engine>;
}

const DEFAULT_BLOCK_TOKENS = 16;

/** Engines by the folder of their model. */
export class SharedEngines {
  readonly #openings = new Map<string, Opening>();
  #blockTokens = DEFAULT_BLOCK_TOKENS;
  /** Counts when the cache was last cleared. */
  #cleared = { hitTokens: 0, queriedTokens: 0 };
  #generation = 0;

  /** The engine of a model, opened when it is not yet. A failure is forgotten: the next request tries again. */
  get(folder: string, settings: EngineSettings): Promise<Engine> {
    const known = this.#openings.get(folder);
    if (known) {
      return known.promise;
    }
    this.#blockTokens = settings.blockTokens ?? this.#blockTokens;
    const opening: Opening = { engine: undefined, promise: Engine.open({ ...settings, model: folder }) };
    this.#openings.set(folder, opening);
    opening.promise.then(
      (engine) => (opening.engine = engine),
      () => this.#openings.delete(folder),
    );
    return opening.promise;
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
    if (this.#generation === 0 && contextId === undefined) {
      return undefined;
    }
    return contextId === undefined ? `${this.#generation}` : `${this.#generation}/${contextId}`;
  }

  /** From now on nothing of what is cached is found any more, and the counts begin anew. */
  clearPrefixCache(): void {
    this.#generation += 1;
    const { hitTokens, queriedTokens } = this.#counts();
    this.#cleared = { hitTokens, queriedTokens };
  }

  /** Over all open engines. */
  prefixCacheUse(): PrefixCacheUse {
    const counts = this.#counts();
    const hitTokens = Math.max(0, counts.hitTokens - this.#cleared.hitTokens);
    const queriedTokens = Math.max(hitTokens, counts.queriedTokens - this.#cleared.queriedTokens);
    const hitBlocks = Math.floor(hitTokens / this.#blockTokens);
    const missedBlocks = Math.ceil((queriedTokens - hitTokens) / this.#blockTokens);
    return { ...counts, hitTokens, queriedTokens, hitBlocks, missedBlocks };
  }

  #counts(): Omit<PrefixCacheUse, 'hitBlocks' | 'missedBlocks'> {
    const sums = { hitTokens: 0, queriedTokens: 0, cachedBlocks: 0, usedBlocks: 0, totalBlocks: 0, cachedBytes: 0 };
    for (const engine of this.open()) {
      const stats = engine.stats();
      sums.hitTokens += stats.prefixCacheHitsTotal;
      sums.queriedTokens += stats.prefixCacheQueriesTotal;
      sums.cachedBlocks += stats.kvBlocksCached;
      sums.usedBlocks += stats.kvBlocksUsed;
      sums.totalBlocks += stats.kvBlocksTotal;
      sums.cachedBytes += engine.memory().kvCachedBytes;
    }
    return sums;
  }
}

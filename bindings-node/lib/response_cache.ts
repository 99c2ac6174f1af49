/**
 * The response cache in JavaScript: whole answers, found again by everything that they depend on, and values of the caller's
 * own beside them. Both are in memory and in one budget of bytes; no call here waits. An engine with a `kvCacheDir` or
 * `kvRemote` keeps answers there too, where requests find them; values end with the process.
 */

import { NsLlmError, wrapErrors } from './errors.js';
import { describe, plainObject } from './request.js';
import type { NativeResponses } from './native.js';
import type { ResponseCacheStats } from '../native.js';

export type { ResponseCacheStats } from '../native.js';

/** How much is kept, and for how long. */
export interface ResponseCacheOptions {
  /** Bytes of all entries. Default 0: nothing is kept. */
  maxBytes?: number | undefined;
  /** Entries at most. Default: as many as the bytes hold. */
  maxEntries?: number | undefined;
  /** How long an entry is found after it was stored, milliseconds. Default one hour. */
  ttlMs?: number | undefined;
  /**
   * Whether an entry's time follows its use: once it was found, from a sixth of `ttlMs` (less than one hit in ten seconds) to
   * twice as long (more than one a second). Default false.
   */
  adaptiveTtl?: boolean | undefined;
  /** Part of every key: entries of another version are not found. Default 0. */
  version?: number | undefined;
  /**
   * Bytes of the files in which an engine's answers outlive the process, in `answers` beneath its `kvCacheDir`; 0: they do
   * not. Default 256 MiB.
   */
  diskBytes?: number | undefined;
  /** Whether an engine's answers are shared through its `kvRemote`. Default true. */
  remote?: boolean | undefined;
}

/** How a value is kept. */
export interface ResponsePutOptions {
  /** How long it is found, milliseconds. Default: as long as the cache's entries are. */
  ttlMs?: number | undefined;
  /** Names under which it can be made invalid; at most 16, of 512 bytes. */
  tags?: string | readonly string[] | undefined;
}

/**
 * What the engine has answered and may answer again without computing, and values of the caller's own. Requests use it by
 * themselves (see `responseCache` of their options); this is to keep, to forget and to count.
 */
export class ResponseCache {
  readonly #native: NativeResponses;

  /** @internal */
  constructor(responses: NativeResponses) {
    this.#native = responses;
  }

  /**
   * Keeps a copy of a value, in the place of an earlier one of that key: whether it was kept. It is not when it is larger than
   * 2 MiB or the whole cache, or when the engine is closed. A key has at most 4,096 bytes.
   */
  put(key: string, value: string | Uint8Array, options: ResponsePutOptions = {}): boolean {
    const bytes = typeof value === 'string' ? Buffer.from(value) : value;
    if (!(bytes instanceof Uint8Array)) {
      throw new NsLlmError('invalid_argument', `value is ${describe(value)}, must be a string or a Uint8Array`);
    }
    const given = { ...plainObject('options', options, 'an object') };
    return wrapErrors(() => this.#native.put(key, bytes, given));
  }

  /** A copy of a value, when it is there and not too old. A value that was a string is read with `toString()`. */
  get(key: string): Uint8Array | undefined {
    return wrapErrors(() => this.#native.get(key)) ?? undefined;
  }

  /** Whether {@link get} would find a value. Counts as no look-up. */
  has(key: string): boolean {
    return wrapErrors(() => this.#native.contains(key));
  }

  /** Gives a value up: whether it was there. */
  delete(key: string): boolean {
    return wrapErrors(() => this.#native.remove(key));
  }

  /**
   * Gives up every answer and value with this tag, in all namespaces, and does not keep answers with it that are just being
   * computed. How many entries that were, in memory. On disk and in a shared store they are not found any more either; that
   * is written behind, and outlives the process once `engine.flush()` is done. Other nodes keep what they have in memory.
   */
  invalidate(tag: string): number {
    return wrapErrors(() => this.#native.invalidate(tag));
  }

  /**
   * Moves to the next version, which is part of every key, and gives its number: nothing is found any more. For what answers
   * depend on and the engine does not know, such as documents that prompts are made of. On disk and in a shared store
   * everything is given up, as by {@link clear}.
   */
  bumpVersion(): number {
    return wrapErrors(() => this.#native.bumpVersion());
  }

  /** Gives everything up, also on disk and, for all nodes, in a shared store; that is written behind, as by {@link invalidate}. */
  clear(): void {
    wrapErrors(() => this.#native.clear());
  }

  /** Gives up what is too old, which otherwise happens when it is asked for or room is needed: how many entries that were. */
  prune(): number {
    return wrapErrors(() => this.#native.prune());
  }

  /** Counts since the engine was opened, and what is held. */
  stats(): ResponseCacheStats {
    return wrapErrors(() => this.#native.stats());
  }
}

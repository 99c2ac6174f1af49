/**
 * The options of one call, as a server passes them on from its own callers: each may be missing or null, names that are
 * not known are skipped, and a wrong type is refused by its name. Ranges are the engine's business.
 */

import { onAbort } from '../abort.js';
import { AbortError, NsLlmError } from '../errors.js';
import { limits } from '../native.js';
import { abortSignal, describe, plainObject } from '../request.js';
import { clock } from './operation_log.js';

/** What every call takes. */
export interface CallOptions {
  /** Name of a model; one that is known but not installed means the default model. */
  model?: string | null | undefined;
  /** Limit of the whole call, the loading of a model included, milliseconds. */
  timeout?: number | null | undefined;
  /** Gives the call up. */
  signal?: AbortSignal | null | undefined;
}

/** What a call that makes text takes. */
export interface GenerateCallOptions extends CallOptions {
  /** Most new tokens. Default 64. */
  maxTokens?: number | null | undefined;
  /** 0 is greedy, and the default: without options the same prompt gives the same text. */
  temperature?: number | null | undefined;
  /** The same request with the same seed gives the same text. */
  seed?: number | bigint | null | undefined;
  /** Text at which the answer ends. */
  stop?: string | readonly string[] | null | undefined;
  /** Calls share the work of a common prefix only within one context. Unset: with all other calls without one. */
  contextId?: string | null | undefined;
}

/** The options, with null as not given. */
export function readOptions<T extends object>(given: T | null | undefined): { [K in keyof T]: Exclude<T[K], null> } {
  const options = plainObject('options', given ?? {}, 'an object');
  const entries = Object.entries(options).filter(([, value]) => value !== null);
  return Object.fromEntries(entries) as { [K in keyof T]: Exclude<T[K], null> };
}

/** The text of a call. */
export function readText(text: unknown): string {
  if (typeof text !== 'string') {
    throw new NsLlmError('invalid_argument', `text is ${describe(text)}, must be a string`);
  }
  return text;
}

/** The name of a context. */
export function readContextId(contextId: unknown): string | undefined {
  if (contextId !== undefined && typeof contextId !== 'string') {
    throw new NsLlmError('invalid_argument', `contextId is ${describe(contextId)}, must be a string`);
  }
  return contextId;
}

/** How long a call may still take. */
export class Deadline {
  readonly signal: AbortSignal | undefined;
  readonly #timeout: number | undefined;
  readonly #startedAt = clock();

  constructor({ timeout, signal }: { timeout?: unknown; signal?: unknown }) {
    if (timeout !== undefined && !(typeof timeout === 'number' && timeout > 0 && timeout <= limits.maxTimeoutMs)) {
      const message = `timeout is ${describe(timeout)}, must be milliseconds above 0, at most ${limits.maxTimeoutMs}`;
      throw new NsLlmError('invalid_argument', message);
    }
    this.#timeout = timeout;
    this.signal = abortSignal(signal);
  }

  /** Whole milliseconds that are left, as the engine counts them; nothing without a limit. */
  get leftMs(): number | undefined {
    if (this.#timeout === undefined) {
      return undefined;
    }
    return Math.max(1, Math.ceil(this.#timeout - (clock() - this.#startedAt)));
  }

  /** Waits for something that others may wait for as well: it goes on when this call is given up. */
  async wait<T>(promise: Promise<T>, what: string): Promise<T> {
    const { signal, leftMs } = this;
    // Its failure belongs to those who still wait for it.
    promise.catch(() => {});
    if (signal?.aborted) {
      throw new AbortError(signal.reason);
    }
    let timer: NodeJS.Timeout | undefined;
    let removeListener: (() => void) | undefined;
    const givenUp = new Promise<never>((_, reject) => {
      if (leftMs !== undefined) {
        const late = new NsLlmError('deadline_exceeded', `timeout of ${this.#timeout} ms passed while ${what}`);
        timer = setTimeout(() => reject(late), leftMs);
      }
      removeListener = signal && onAbort(signal, () => reject(new AbortError(signal.reason)));
    });
    try {
      return await Promise.race([promise, givenUp]);
    } finally {
      clearTimeout(timer);
      removeListener?.();
    }
  }
}

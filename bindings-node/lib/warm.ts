/** Computing prompts ahead of those who will ask them: some at a time, so that others find room in the queue. */

import { onAbort } from './abort.js';
import { NsLlmError } from './errors.js';
import { abortSignal, describe, plainObject } from './request.js';
import type { GenerateOptions, Prompt } from './request.js';
import type { Completion } from './stream.js';

/** How to compute prompts ahead. Everything is optional. */
export interface WarmOptions extends Pick<GenerateOptions, 'namespace' | 'priority' | 'timeoutMs' | 'signal'> {}

/** What was done, tokens of prompts. */
export interface Warmed {
  /** Computed: their KV is cached now. */
  computedTokens: number;
  /** Found in the cache. */
  cachedTokens: number;
}

/** Prompts that are computed at once: their ends share steps, and most of the queue is left to others. */
const PROMPTS_AT_ONCE = 8;

/** Runs each prompt through `generate`; the first failure gives up those that are on their way. */
export async function warm(
  generate: (prompt: Prompt, options: GenerateOptions) => Promise<Completion>,
  prompts: Iterable<Prompt>,
  given: WarmOptions,
): Promise<Warmed> {
  const { signal, ...options } = plainObject('options', given, 'an object');
  const caller = abortSignal(signal);
  if (typeof prompts === 'string' || typeof prompts?.[Symbol.iterator] !== 'function') {
    throw new NsLlmError('invalid_argument', `prompts is ${describe(prompts)}, must be an array of prompts`);
  }
  const giveUp = new AbortController();
  const removeListener = caller && onAbort(caller, () => giveUp.abort(caller.reason));
  if (caller?.aborted) {
    giveUp.abort(caller.reason);
  }
  const warmed: Warmed = { computedTokens: 0, cachedTokens: 0 };
  const left = prompts[Symbol.iterator]();
  const worker = async (): Promise<void> => {
    for (let next = left.next(); !next.done; next = left.next()) {
      const { usage } = await generate(next.value, { ...options, maxTokens: 0, signal: giveUp.signal });
      warmed.computedTokens += usage.promptTokens - usage.cachedTokens;
      warmed.cachedTokens += usage.cachedTokens;
    }
  };
  try {
    await Promise.all(Array.from({ length: PROMPTS_AT_ONCE }, worker));
  } finally {
    removeListener?.();
    giveUp.abort();
  }
  return warmed;
}

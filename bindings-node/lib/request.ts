/**
 * What to generate and how: the types, with their prose, and their way into the addon. The addon refuses wrong types and
 * unknown names, the engine refuses values out of range; nothing is checked twice.
 */

import { NsLlmError } from './errors.js';

/** One turn of a conversation. */
export interface Message {
  /** `system`, `user`, `assistant`, or what the model's template knows. */
  role: string;
  /** Plain text. Text of special tokens in here stays text. */
  content: string;
}

/** Token ids. An array is copied; so is a `Uint32Array`, which is faster. */
export type TokenIds = readonly number[] | Uint32Array;

/** What to continue: text, a conversation (rendered by the model's own template), or token ids. */
export type Prompt =
  | string
  | { prompt: string }
  | { messages: readonly Message[] }
  | { tokens: TokenIds };

/** How to generate. Everything is optional; sampling defaults come from the model's `generation_config.json`, else greedy. */
export interface GenerateOptions {
  /** Most new tokens of each choice. Default 64; 0 computes the prompt only. */
  maxTokens?: number | undefined;
  /** 0 is greedy (the most likely token); 0 to 100. */
  temperature?: number | undefined;
  /** Keep the `k` most likely tokens; 0 keeps all. */
  topK?: number | undefined;
  /** Keep the most likely tokens whose probabilities reach this sum; above 0, to 1. */
  topP?: number | undefined;
  /** Keep tokens of at least this share of the best one's probability; 0 to 1. */
  minP?: number | undefined;
  /** Divides positive and multiplies negative logits of tokens seen in prompt or answer; above 0, to 100; 1 is none. */
  repetitionPenalty?: number | undefined;
  /** Subtracted once from the logit of each token seen in the answer; -2 to 2. */
  presencePenalty?: number | undefined;
  /** Subtracted per occurrence in the answer; -2 to 2. */
  frequencyPenalty?: number | undefined;
  /** Added to logits, by token id; -100 to 100 each, at most 1,024 entries. */
  logitBias?: Readonly<Record<number, number>> | undefined;
  /** Key of the random draws, 64 bits. The same request with the same seed gives the same tokens. Unset: drawn and reported. */
  seed?: number | bigint | undefined;
  /** Text at which a choice ends; it is not part of the answer. At most 16 strings of 256 bytes. */
  stop?: string | readonly string[] | undefined;
  /** Tokens at which a choice ends, besides the model's own end tokens. At most 64. */
  stopTokenIds?: TokenIds | undefined;
  /** Ignores the model's end tokens (for measurements). */
  ignoreEos?: boolean | undefined;
  /** Number of choices, 1 to 8. */
  n?: number | undefined;
  /** Alternatives to report with each new token, 0 to 20; unset: no logprobs at all. */
  logprobs?: number | undefined;
  /** Reports the logprob of every prompt token, from the second on. Such a request computes its whole prompt. */
  promptLogprobs?: boolean | undefined;
  /** Who goes first; waiting raises a request's rank, so that no class starves. Default `normal`. */
  priority?: 'high' | 'normal' | 'background' | undefined;
  /** Limit from submission to the end, milliseconds, at most one day. */
  timeoutMs?: number | undefined;
  /**
   * Requests share prefix KV only within one namespace. Unset: the namespace of this engine. What stands before the first line
   * break is its owner, by whom `kvNamespaceShare` counts: nobody gains by dividing his namespace.
   */
  namespace?: string | undefined;
  /**
   * Whether this request may use KV of earlier prompts, in the pool and in the tiers (`read`), and whether others may use
   * its own (`read-write`). Default `read-write`.
   */
  prefixCache?: 'off' | 'read' | 'read-write' | undefined;
  /**
   * What part the engine's response cache has in this request: a kept answer is given (`read`), and a computed one is kept
   * too (`read-write`). Default: `read-write` where the answer is the same each time (greedy, or with a `seed`), else `off`.
   * To name `read` or `read-write` for a request that draws without a seed is to want the same answer each time.
   */
  responseCache?: 'off' | 'read' | 'read-write' | undefined;
  /** Names under which the kept answer can be made invalid (`engine.responses.invalidate`); at most 16, of 512 bytes. */
  responseTags?: string | readonly string[] | undefined;
  /** How long the kept answer is found, milliseconds. Default: as the engine's options say. */
  responseTtlMs?: number | undefined;
  /** Aborts the request; what waits for it rejects with an {@link AbortError} whose `cause` is the signal's reason. */
  signal?: AbortSignal | undefined;
}

/** One plain object for the addon, from the two arguments of `generate` and `stream`. */
export function toNativeRequest(prompt: Prompt, options: Omit<GenerateOptions, 'signal'>): Record<string, unknown> {
  const what = typeof prompt === 'string' ? { prompt } : plainObject('prompt', prompt, PROMPT_FORMS);
  const request: Record<string, unknown> = { ...plainObject('options', options, 'an object'), ...what };
  for (const name of ['tokens', 'stopTokenIds']) {
    if (Array.isArray(request[name])) {
      request[name] = toTokenIds(name, request[name]);
    }
  }
  return request;
}

/** A `Uint32Array` of token ids; each is checked, since the conversion would make 0 of anything. */
export function toTokenIds(name: string, ids: unknown): Uint32Array {
  if (ids instanceof Uint32Array) {
    return ids;
  }
  if (!Array.isArray(ids)) {
    throw new NsLlmError('invalid_argument', `${name} is ${describe(ids)}, must be an array of token ids`);
  }
  for (let index = 0; index < ids.length; index += 1) {
    const id: unknown = ids[index];
    if (typeof id !== 'number' || id >>> 0 !== id) {
      const message = `${name}[${index}] is ${describe(id)}, must be an integer from 0 to 4294967295`;
      throw new NsLlmError('invalid_argument', message);
    }
  }
  return Uint32Array.from(ids);
}

const PROMPT_FORMS = 'a string, { prompt }, { messages } or { tokens }';

/** `value` itself, when it can be read as a set of named options. */
export function plainObject<T>(name: string, value: T, expected: string): T & object {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new NsLlmError('invalid_argument', `${name} is ${describe(value)}, must be ${expected}`);
  }
  return value;
}

/** The caller's signal, when there is one. Told by its shape, as Node's own functions do: it may come from a polyfill. */
export function abortSignal(signal: unknown): AbortSignal | undefined {
  if (signal === undefined || signal === null) {
    return undefined;
  }
  if (typeof signal !== 'object' || !('aborted' in signal) || !('addEventListener' in signal)) {
    throw new NsLlmError('invalid_argument', `signal is ${describe(signal)}, must be an AbortSignal`);
  }
  return signal as AbortSignal;
}

/** What a value is, for a message. */
export function describe(value: unknown): string {
  switch (typeof value) {
    case 'number':
    case 'boolean':
    case 'bigint':
    case 'undefined':
      return String(value);
    case 'object':
      return value === null ? 'null' : Array.isArray(value) ? 'an array' : 'an object';
    default:
      return `a ${typeof value}`;
  }
}

/**
 * Texts to vectors: the types, with their prose, and the way into the addon and back. One call crosses into the addon
 * once and comes back once, however many inputs it has.
 */

import { onAbort } from './abort.js';
import { AbortError, NsLlmError, settled, wrapErrors } from './errors.js';
import type { NativeEmbedding, NativeEmbeddings } from './native.js';
import { describe, toTokenIds } from './request.js';
import type { TokenIds } from './request.js';
import type { Timings, Usage } from '../native.js';

/** What becomes one vector: text, or token ids taken as they are. */
export type EmbeddingInput = string | TokenIds;

/** How to make vectors. Everything is optional. */
export interface EmbedOptions {
  /** Leading numbers of each vector to keep, for models trained for that. Default: all that the model gives. */
  dimensions?: number | undefined;
  /**
   * Whether an input longer than `engine.info.maxEmbeddingTokens` loses its end; otherwise it is `prompt_too_long`.
   * Default true.
   */
  truncate?: boolean | undefined;
  /** Whether vectors have unit length, so that their dot product is their cosine. Default true. */
  normalize?: boolean | undefined;
  /** Who goes first. Default `normal`. */
  priority?: 'high' | 'normal' | 'background' | undefined;
  /** Limit from submission to the end, milliseconds, at most one day. */
  timeoutMs?: number | undefined;
  /** Aborts the request; the promise rejects with an {@link AbortError} whose `cause` is the signal's reason. */
  signal?: AbortSignal | undefined;
}

/** The vector of one input. */
export interface Embedding {
  /** The vector. */
  embedding: Float32Array;
  /** Numbers in it. */
  dimensions: number;
  /** Tokens that it was computed from. */
  tokens: number;
  /** Whether the input was longer and lost its end. */
  truncated: boolean;
  /** Token counts of the request. */
  usage: Usage;
  /** Times of the request, milliseconds. */
  timings: Timings;
  /** Name of the model. */
  model: string;
}

/** The vectors of several inputs, each the same, bit for bit, as if it had been asked for alone. */
export interface Embeddings {
  /** One vector per input, in their order. */
  embeddings: Float32Array[];
  /** Numbers in each. */
  dimensions: number;
  /** Tokens that each was computed from. */
  tokens: number[];
  /** Whether each input was longer and lost its end. */
  truncated: boolean[];
  /** Token counts of the request; `promptTokens` is the sum over the inputs. */
  usage: Usage;
  /** Times of the request, milliseconds. */
  timings: Timings;
  /** Name of the model. */
  model: string;
}

/** Whether `input` is one input, and not an array of them. An array of numbers is the token ids of one. */
export function isOneInput(input: unknown): input is EmbeddingInput {
  return !Array.isArray(input) || typeof input[0] === 'number';
}

/** One plain object for the addon. */
export function toNativeEmbedding(inputs: readonly EmbeddingInput[], options: object): Record<string, unknown> {
  const one = (input: unknown, index: number): unknown => {
    const name = inputs.length === 1 ? 'input' : `input[${index}]`;
    if (typeof input !== 'string' && !Array.isArray(input) && !(input instanceof Uint32Array)) {
      const message = `${name} is ${describe(input)}, must be a string or an array of token ids`;
      throw new NsLlmError('invalid_argument', message);
    }
    return typeof input === 'string' ? input : toTokenIds(name, input);
  };
  return { ...options, input: Array.from(inputs, one) };
}

/** Submits and waits, or stops waiting when the signal says so. */
export async function runEmbedding(
  submit: () => NativeEmbedding,
  signal: AbortSignal | undefined,
): Promise<NativeEmbeddings> {
  if (signal?.aborted) {
    throw new AbortError(signal.reason);
  }
  const running = wrapErrors(submit);
  const result = settled(() => running.result());
  if (!signal) {
    return result;
  }
  return new Promise((resolve, reject) => {
    const removeListener = onAbort(signal, () => {
      reject(new AbortError(signal.reason));
      running.cancel();
    });
    result.finally(removeListener).then(resolve, reject);
  });
}

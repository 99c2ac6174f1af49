/**
 * The answer to one request, while it is made: an async iterator over its chunks, which also knows the whole answer at
 * the end. One native read is in flight at a time, whoever asked for it; what it brings is kept until someone takes it.
 */

import { onAbort } from './abort.js';
import { AbortError, fromNative, NsLlmError } from './errors.js';
import type { NativeBatch, NativeStream, NativeSummary } from './native.js';
import type { Timings, TokenLogprobs, Usage } from '../native.js';

export type { CachedTokens, Logprob, PrefixMiss, Timings, TokenLogprobs, Usage } from '../native.js';

/** Why a choice ended: a stop string, stop token or end token; or `maxTokens` or the end of the context. */
export type FinishReason = 'stop' | 'length';

/** New tokens of one choice and the text they complete. */
export interface Chunk {
  /** Which choice, from 0. */
  choice: number;
  /**
   * New text: whole characters, and never a part of a stop string. What may still become either is held back, so it can
   * be empty and lag behind `tokenIds`.
   */
  text: string;
  /** New tokens. */
  tokenIds: number[];
  /** One entry per token, when asked for. */
  logprobs?: TokenLogprobs[];
  /** Why the choice ended; on its last chunk, which may hold nothing else. */
  finishReason?: FinishReason;
}

/** One finished answer. */
export interface Choice {
  /** The text, without the prompt. */
  text: string;
  /** Its tokens, the stop token included. */
  tokenIds: number[];
  /** Why it ended. */
  finishReason: FinishReason;
  /** One entry per token, when asked for. */
  logprobs?: TokenLogprobs[];
}

/** Everything about a finished request. Its own text, tokens and finish reason are those of the first choice. */
export interface Completion extends Choice {
  /** All choices, in order. */
  choices: Choice[];
  /** Token counts. */
  usage: Usage;
  /** Times, milliseconds. */
  timings: Timings;
  /** The seed that was used; give it again to get the same answer. A bigint only when a number would not be exact. */
  seed: number | bigint;
  /** For each prompt token from the second on, when asked for. */
  promptLogprobs?: TokenLogprobs[];
  /** Whether the answer was kept from an earlier request (see `responseCache`): nothing was computed. */
  fromResponseCache: boolean;
}

/** How the native side is read: chunk by chunk, or in one piece when nobody looks at chunks. */
export type ReadMode = 'chunks' | 'whole';

/** Listeners of streams that were forgotten without an end, to be taken off their signals. */
const forgotten = new FinalizationRegistry<() => void>((removeListener) => removeListener());

/**
 * A request that is being answered: `for await (const chunk of stream)`. Leaving the loop cancels the request at once and
 * frees its memory. It can be read once.
 */
export class ResponseStream implements AsyncIterableIterator<Chunk, undefined, undefined> {
  /** Not there when the request was aborted before it was submitted. It keeps the engine open. */
  readonly #native: NativeStream | undefined;
  readonly #mode: ReadMode;
  readonly #result = withResolvers<Completion>();
  readonly #choices: Choice[] = [];
  #chunks: Chunk[] = [];
  /** Calls of {@link next} that came before their chunk, in order. */
  readonly #waiting: Waiting[] = [];
  #isReading = false;
  #draining = false;
  #state: 'open' | 'finished' | 'left' | 'failed' = 'open';
  #unreportedError: { error: unknown } | undefined;
  #removeListener: (() => void) | undefined;

  /** @internal */
  constructor(submit: () => NativeStream, signal: AbortSignal | undefined, mode: ReadMode) {
    this.#mode = mode;
    // Nobody has to look at it: an error is also thrown by the loop.
    this.#result.promise.catch(() => {});
    if (signal?.aborted) {
      this.#fail(new AbortError(signal.reason));
      return;
    }
    this.#native = submit();
    if (signal) {
      this.#listen(signal);
    }
  }

  /** The whole answer. Asking for it reads the stream to its end; chunks stay there for a loop to take. */
  get result(): Promise<Completion> {
    if (!this.#draining) {
      this.#draining = true;
      this.#read();
    }
    return this.#result.promise;
  }

  /** @internal Whether the whole answer is there. */
  get isFinished(): boolean {
    return this.#state === 'finished';
  }

  /** Gives the request up at once. A loop over the stream ends; {@link result} rejects with `cancelled`. */
  cancel(): void {
    if (this.#state === 'open') {
      this.#interrupt('left', new NsLlmError('cancelled', 'the stream was left before its end'));
    }
  }

  /** The next chunk. */
  next(): Promise<IteratorResult<Chunk, undefined>> {
    // Without async functions: one promise for each chunk is what is left of the cost of a token.
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      this.#serve();
      this.#read();
    });
  }

  /** Called when a loop is left early: {@link cancel}. */
  async return(): Promise<IteratorResult<Chunk, undefined>> {
    this.cancel();
    this.#chunks = [];
    this.#unreportedError = undefined;
    return { done: true, value: undefined };
  }

  /** Called by a generator that delegates here and is thrown into: {@link cancel}, then the error goes on. */
  async throw(error: unknown): Promise<IteratorResult<Chunk, undefined>> {
    await this.return();
    throw error;
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  // Node below 20.5 has no such symbol; the method is then unreachable under a harmless name.
  async [Symbol.asyncDispose](): Promise<void> {
    await this.return();
  }

  /** Gives those who wait what is there; at the end, the error to the first of them, and the end to all others. */
  #serve(): void {
    while (this.#waiting.length > 0) {
      const chunk = this.#chunks.shift();
      if (!chunk && this.#state === 'open') {
        return;
      }
      const { resolve, reject } = this.#waiting.shift()!;
      const failure = this.#unreportedError;
      if (chunk) {
        resolve({ done: false, value: chunk });
      } else if (failure) {
        this.#unreportedError = undefined;
        reject(failure.error);
      } else {
        resolve({ done: true, value: undefined });
      }
    }
  }

  /** Asks for one batch of events when somebody waits for it. What goes wrong becomes the state. */
  #read(): void {
    if (this.#isReading || this.#state !== 'open' || (this.#waiting.length === 0 && !this.#draining)) {
      return;
    }
    this.#isReading = true;
    try {
      if (this.#mode === 'whole') {
        this.#native!.rest().then(this.#onWhole, this.#onError);
      } else {
        this.#native!.read(this.#onRead);
      }
    } catch (error) {
      this.#onError(error);
    }
  }

  readonly #onWhole = (batch: NativeBatch): void => this.#onRead(null, batch, null, 0, 0);

  /** Called by the native side at the end of each read, perhaps from within its start. */
  readonly #onRead: Parameters<NativeStream['read']>[0] = (error, batch, text, choice, tokenId) => {
    if (error) {
      this.#onError(error);
      return;
    }
    this.#isReading = false;
    if (this.#state !== 'open') {
      return;
    }
    if (text !== null) {
      this.#takeChunk({ choice, text, tokenIds: [tokenId] });
    } else if (batch) {
      this.#take(batch);
    } else {
      this.#fail(new NsLlmError('internal', 'the stream ended without a summary'));
    }
    this.#serve();
    this.#read();
  };

  readonly #onError = (error: unknown): void => {
    this.#isReading = false;
    if (this.#state === 'open') {
      this.#fail(fromNative(error));
      this.#serve();
    }
  };

  #take({ deltas, finished, done }: NativeBatch): void {
    for (const chunk of deltas) {
      this.#takeChunk(chunk);
    }
    for (const { choice, reason } of finished ?? []) {
      this.#endChoice(choice, reason);
    }
    if (done) {
      this.#finish(done);
    }
  }

  #takeChunk(chunk: Chunk): void {
    this.#append(chunk);
    if (this.#mode === 'chunks') {
      this.#chunks.push(chunk);
    }
  }

  /** Marks the last chunk of the choice, which is a new one when nothing of it is left to be read. */
  #endChoice(choice: number, finishReason: FinishReason): void {
    choiceAt(this.#choices, choice).finishReason = finishReason;
    if (this.#mode === 'chunks') {
      const last = this.#chunks.findLast((chunk) => chunk.choice === choice);
      if (last) {
        last.finishReason = finishReason;
      } else {
        this.#chunks.push({ choice, text: '', tokenIds: [], finishReason });
      }
    }
  }

  #append({ choice: index, text, tokenIds, logprobs }: Chunk): void {
    const choice = choiceAt(this.#choices, index);
    choice.text += text;
    // Not push(...): a late reader gets its whole answer at once, and a call takes only so many arguments.
    for (const tokenId of tokenIds) {
      choice.tokenIds.push(tokenId);
    }
    if (logprobs) {
      choice.logprobs ??= [];
      for (const entry of logprobs) {
        choice.logprobs.push(entry);
      }
    }
  }

  #finish(summary: NativeSummary): void {
    this.#settle('finished');
    this.#result.resolve(completionOf(this.#choices, summary));
  }

  #fail(error: unknown): void {
    this.#settle('failed');
    this.#unreportedError = { error };
    this.#result.reject(error);
  }

  #interrupt(state: 'left' | 'failed', error: unknown): void {
    this.#chunks = [];
    if (state === 'failed') {
      this.#fail(error);
    } else {
      this.#settle(state);
      this.#result.reject(error);
    }
    this.#native?.cancel();
    // Nobody waits for the engine's last step.
    this.#serve();
  }

  #settle(state: 'finished' | 'left' | 'failed'): void {
    this.#state = state;
    this.#removeListener?.();
    forgotten.unregister(this);
  }

  /** The signal may live long: it holds this stream weakly, so that a forgotten stream can be collected and cancelled. */
  #listen(signal: AbortSignal): void {
    const weak = new WeakRef(this);
    const removeListener = onAbort(signal, () => {
      const stream = weak.deref();
      if (stream && stream.#state === 'open') {
        stream.#interrupt('failed', new AbortError(signal.reason));
      }
    });
    this.#removeListener = removeListener;
    forgotten.register(this, removeListener, this);
  }
}

/** The answer that one batch holds from its first token to its end, where a kept one came at once. */
export function toCompletion({ deltas, finished, done }: NativeBatch): Completion {
  const choices: Choice[] = [];
  for (const { choice, text, tokenIds } of deltas) {
    // All of a choice in one, since nobody has read a part of it.
    Object.assign(choiceAt(choices, choice), { text, tokenIds });
  }
  for (const { choice, reason } of finished ?? []) {
    choiceAt(choices, choice).finishReason = reason;
  }
  return completionOf(choices, done!);
}

function choiceAt(choices: Choice[], index: number): Choice {
  while (choices.length <= index) {
    choices.push({ text: '', tokenIds: [], finishReason: 'length' });
  }
  return choices[index]!;
}

function completionOf(choices: Choice[], { promptLogprobs, ...summary }: NativeSummary): Completion {
  const completion: Completion = { ...choiceAt(choices, 0), choices, ...summary };
  if (promptLogprobs.length > 0) {
    completion.promptLogprobs = promptLogprobs;
  }
  return completion;
}

interface Waiting {
  resolve: (result: IteratorResult<Chunk, undefined>) => void;
  reject: (error: unknown) => void;
}

interface Resolvers<T> {
  promise: Promise<T>;
  resolve: (value: T) => void;
  reject: (error: unknown) => void;
}

/** `Promise.withResolvers`, which Node 20 does not have. */
function withResolvers<T>(): Resolvers<T> {
  let resolve!: (value: T) => void;
  let reject!: (error: unknown) => void;
  const promise = new Promise<T>((onValue, onError) => {
    resolve = onValue;
    reject = onError;
  });
  return { promise, resolve, reject };
}

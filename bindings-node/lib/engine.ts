/**
 * The engine's handle in JavaScript: defaults, overloads, signals and disposal. All work happens on the engine's own
 * threads; no method here waits for it on JavaScript's thread.
 */

import { onAbort } from './abort.js';
import { isOneInput, runEmbedding, toNativeEmbedding } from './embedding.js';
import type { Embedding, EmbeddingInput, Embeddings, EmbedOptions } from './embedding.js';
import { AbortError, NsLlmError, settled, wrapErrors } from './errors.js';
import { DEMO_MODEL, native } from './native.js';
import type { NativeBatch, NativeEngine, NativeOpening } from './native.js';
import { Chat } from './openai/chat.js';
import { EmbeddingResource } from './openai/embeddings.js';
import { abortSignal, describe, plainObject, toNativeRequest, toTokenIds } from './request.js';
import type { GenerateOptions, Prompt, TokenIds } from './request.js';
import { ResponseCache } from './response_cache.js';
import type { ResponseCacheOptions } from './response_cache.js';
import { ResponseStream, toCompletion } from './stream.js';
import type { Completion } from './stream.js';
import { warm } from './warm.js';
import type { Warmed, WarmOptions } from './warm.js';
import type { MemoryUse, ModelInfo, Stats } from '../native.js';

export type { CudaGraphStats, KvTierStats, MemoryUse, ModelInfo, Stats } from '../native.js';

/** How far loading is. */
export interface LoadProgress {
  /** Bytes of weights that are ready. */
  loadedBytes: number;
  /** Bytes of weights in all. */
  totalBytes: number;
  /** Share that is done, 0 to 1. */
  fraction: number;
}

/**
 * A form in which weights are kept and multiplied. `q8_0` to `q2_k` have about so many bits a weight, the rest are other
 * formats of GGUF files; weights that are stored otherwise are rounded to them while they are loaded.
 */
export type WeightForm =
  | 'f32' | 'bf16' | 'f16'
  | 'q8_0' | 'q6_k' | 'q5_k' | 'q4_k' | 'q3_k' | 'q2_k'
  | 'q5_1' | 'q5_0' | 'q4_1' | 'q4_0' | 'iq4_nl' | 'mxfp4';

/** A store of KV blocks that nodes share and that speaks Redis's protocol. The way to it is not encrypted. */
export interface KvRemoteOptions {
  /** `redis://[[user]:password@]host[:port][/database]` */
  url: string;
  /**
   * What all nodes know and the store does not, 16 to 1,024 bytes: records that are not authenticated with it are not used.
   * Unset: the store is trusted not to make records up; damage is found all the same.
   */
  secret?: string | undefined;
  /** How long a block is kept that nobody stores again, seconds. Default one day. */
  ttlS?: number | undefined;
  /** What all names in the store begin with. Default `ns-llm`. */
  prefix?: string | undefined;
  /** How long one call may take, milliseconds. Default 500. */
  timeoutMs?: number | undefined;
  /**
   * Bytes of KV, and as many of answers, that this node stores there within `ttlS` for one owner of namespaces (see
   * `kvNamespaceShare`). Default: no limit.
   */
  ownerBytes?: number | undefined;
}

/** How to open a model. Everything is optional. */
export interface OpenOptions {
  /** The model: its folder (`config.json`, safetensors, `tokenizer.json`) or a GGUF file. Default: the one that ships. */
  model?: string | undefined;
  /**
   * Where to compute. Default `auto`: the first CUDA device, if the addon was built with CUDA, the machine has a driver
   * and a device for it, and the model fits; else the CPU. `info.deviceReason` says why. `cuda:1` is the second device.
   */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}` | undefined;
  /** Form of the weights. Default `auto`: as the checkpoint has them, or under a `memoryLimit` the best form that fits. */
  weights?: 'auto' | WeightForm | undefined;
  /**
   * Form in which keys and values are kept. Default `auto`: `f32` with `f32` weights, else `f16`. `int8` takes half the
   * memory of `f16`.
   */
  kvDtype?: 'auto' | 'f32' | 'f16' | 'bf16' | 'int8' | undefined;
  /** Compute threads, 1 to 256. Default: all cores, but one is left to the host when there are more than two. */
  threads?: number | undefined;
  /** Priority of the compute threads. Default `below-normal`: the event loop of this process keeps its latency. */
  threadPriority?: 'below-normal' | 'normal' | undefined;
  /** Longest sequence, prompt and answer together, tokens. Default: the model's own, as far as the KV pool holds it. */
  contextTokens?: number | undefined;
  /** Bytes of the KV pool. Default: a quarter of the available memory, at most 2 GiB. */
  kvBytes?: number | undefined;
  /**
   * Bytes that weights and KV pool may take together. Weights that are too large as they are stored are rounded to the
   * first form that fits of `bf16`, `q8_0`, `q6_k`, `q5_k`, `q4_k`, `q3_k`, `q2_k`; if none does, `open` rejects with
   * `out_of_memory` and says what the smallest needs. Default: what is available.
   */
  memoryLimit?: number | undefined;
  /** Tokens in a KV block, a multiple of 16. Default 16. */
  blockTokens?: number | undefined;
  /** Sequences that may run at once; more wait. Default 64. */
  maxRunningSequences?: number | undefined;
  /**
   * Steps that a CUDA device keeps captured as graphs; those that ran least recently make room. 0: steps are launched
   * kernel by kernel. No result depends on it. Default 32.
   */
  maxCudaGraphs?: number | undefined;
  /** Tokens one step may compute while nothing decodes (the chunk size of a long prompt). Default 512. */
  prefillBudgetTokens?: number | undefined;
  /** Tokens one step may compute while something decodes. Default 128. */
  mixedBudgetTokens?: number | undefined;
  /** Requests that may wait; the next one is `overloaded`. Default 1,000. */
  maxWaitingRequests?: number | undefined;
  /** Whether KV of earlier prompts may be used again. Default true. */
  prefixCache?: boolean | undefined;
  /** Host memory for KV blocks that the pool gives away, bytes. Default 0: none. */
  kvHostBytes?: number | undefined;
  /**
   * Directory where KV outlives the process: found again by the next engine with the same model, numerics and namespace. It is
   * made if it is missing, and belongs to engines alone. One process writes, others read. Default: KV ends with the engine.
   */
  kvCacheDir?: string | undefined;
  /** Bytes that the files in `kvCacheDir` take at most. Default 8 GiB. */
  kvDiskBytes?: number | undefined;
  /** How long a request waits for KV from a place that makes no progress before it computes the rest, milliseconds. Default 50. */
  kvLoadBudgetMs?: number | undefined;
  /**
   * Share of the KV pool, of host memory, of `kvCacheDir` and of the response cache, in memory and on disk, that what is cached
   * for one owner of namespaces may keep when others need room, above 0, to 1. The owner is what stands before the first line
   * break of a `namespace`. Default 1: all of it.
   */
  kvNamespaceShare?: number | undefined;
  /** A store of KV that nodes share, beyond the disk. Default: none. */
  kvRemote?: KvRemoteOptions | undefined;
  /**
   * How KV is kept in all these places. Default `as-computed`: what is found again equals what would be computed, bit for bit.
   * `int8` takes half the bytes of `f16`, rounded: answers over what came back, of preempted requests too, are then a little
   * other than computed ones, and engines without it never find that.
   */
  kvTierEncoding?: 'as-computed' | 'int8' | undefined;
  /**
   * Whole answers that are kept and given again, without computing a token, to requests for the same. Off unless `maxBytes` is
   * given. With a `kvCacheDir` they outlive the process, with a `kvRemote` nodes share them.
   */
  responseCache?: ResponseCacheOptions | undefined;
  /** Aborts loading; `open` rejects with an {@link AbortError} whose `cause` is the signal's reason. */
  signal?: AbortSignal | undefined;
  /** Hears how far loading is. What it throws ends loading, and `open` rejects with it. */
  onProgress?: ((progress: LoadProgress) => void) | undefined;
}

/** How to turn text into tokens. */
export interface TokenizeOptions {
  /** Whether to add what the tokenizer's configuration puts around a prompt. Default true, as for a prompt. */
  addSpecial?: boolean | undefined;
}

/** The addon's engine behind a handle, for other parts of this package. */
export let nativeOf: (engine: Engine) => NativeEngine;

/** A model, ready to answer any number of requests at once. Close it when it is not needed any more. */
export class Engine {
  /** What is loaded, and how it is run. Stays readable after {@link close}. */
  readonly info: Readonly<ModelInfo>;
  /** OpenAI's chat interface: `engine.chat.completions.create({ messages })`. */
  readonly chat: Chat;
  /** OpenAI's embedding interface: `engine.embeddings.create({ input })`. */
  readonly embeddings: EmbeddingResource;
  /** The response cache: what is kept, what is to be forgotten, and values of your own. */
  readonly responses: ResponseCache;
  readonly #native: NativeEngine;
  #closing: Promise<void> | undefined;

  static {
    nativeOf = (engine) => engine.#native;
  }

  private constructor(engine: NativeEngine) {
    if (!(engine instanceof native.NativeEngine)) {
      throw new NsLlmError('invalid_argument', 'an Engine is made by Engine.open()');
    }
    this.#native = engine;
    this.info = Object.freeze(engine.info());
    this.responses = new ResponseCache(engine.responses());
    this.chat = new Chat({
      info: this.info,
      generate: (prompt, options) => this.generate(prompt, options),
      stream: (prompt, options) => this.stream(prompt, options),
      tokenBytes: (ids) => wrapErrors(() => engine.tokenBytes(ids)),
    });
    this.embeddings = new EmbeddingResource({ embed: (inputs, options) => this.#embed(inputs, options) });
  }

  /** Loads a model on a thread of its own and gives its engine. */
  static open(model: string, options?: OpenOptions): Promise<Engine>;
  static open(options?: OpenOptions): Promise<Engine>;
  static async open(modelOrOptions?: string | OpenOptions, more?: OpenOptions): Promise<Engine> {
    const isPath = typeof modelOrOptions === 'string';
    const given = (isPath ? more : modelOrOptions) ?? {};
    const { signal, onProgress, ...options } = plainObject('options', given, 'an object, after an optional path');
    const abort = abortSignal(signal);
    if (onProgress !== undefined && typeof onProgress !== 'function') {
      throw new NsLlmError('invalid_argument', `onProgress is ${describe(onProgress)}, must be a function`);
    }
    if (abort?.aborted) {
      throw new AbortError(abort.reason);
    }
    const model = isPath ? modelOrOptions : (options.model ?? DEMO_MODEL);
    const opening = wrapErrors(() => new native.NativeOpening({ ...options, model }));
    return new Engine(await load(opening, abort, onProgress));
  }

  /** Answers a request and gives all of it. */
  async generate(prompt: Prompt, options: GenerateOptions = {}): Promise<Completion> {
    const { request, signal } = nativeRequest(prompt, options);
    if (signal?.aborted) {
      throw new AbortError(signal.reason);
    }
    const submitted = wrapErrors(() => this.#native.submitWhole(request));
    if (typeof submitted === 'string') {
      return toCompletion(JSON.parse(submitted) as NativeBatch);
    }
    return new ResponseStream(() => submitted, signal, 'whole').result;
  }

  /**
   * Answers a request chunk by chunk: `for await (const chunk of engine.stream('Once'))`. A fault of the arguments is
   * thrown here, one that needs the tokenizer or the template (such as `prompt_too_long`) by the loop.
   */
  stream(prompt: Prompt, options: GenerateOptions = {}): ResponseStream {
    const { request, signal } = nativeRequest(prompt, options);
    return new ResponseStream(() => wrapErrors(() => this.#native.submit(request)), signal, 'chunks');
  }

  /**
   * Turns one input, a string or token ids, into a vector; or an array of inputs into as many vectors, which is faster
   * than asking for each. Any model can: one that was made for it, or a decoder, whose final states are averaged.
   */
  embed(input: EmbeddingInput, options?: EmbedOptions): Promise<Embedding>;
  embed(inputs: readonly EmbeddingInput[], options?: EmbedOptions): Promise<Embeddings>;
  async embed(
    input: EmbeddingInput | readonly EmbeddingInput[],
    options: EmbedOptions = {},
  ): Promise<Embedding | Embeddings> {
    if (!isOneInput(input)) {
      return this.#embed(input, options);
    }
    const { embeddings, tokens, truncated, ...rest } = await this.#embed([input], options);
    return { embedding: embeddings[0]!, tokens: tokens[0]!, truncated: truncated[0]!, ...rest };
  }

  /**
   * Computes prompts and nothing else, so that their KV is cached for whoever asks next. Rejects with the first error; what is
   * computed by then stays.
   */
  async warm(prompts: Iterable<Prompt>, options: WarmOptions = {}): Promise<Warmed> {
    return warm((prompt, request) => this.generate(prompt, request), prompts, options);
  }

  /**
   * Waits until the KV that was computed so far, and kept answers, are on disk, where they outlive a failure of power;
   * without `kvCacheDir` and `kvRemote` there is nothing to wait for. It is written by itself, too, and by {@link close}.
   * Rejects with `storage` when a place could not do that now, and with `not_stored` when some of what was to be stored since
   * the last flush was not: too much waited to be written, a place failed or may not be written. That is told once, and all
   * else is stored.
   */
  flush(): Promise<void> {
    return settled(async () => this.#native.flush());
  }

  /**
   * Forgets the KV that is cached for later: in the pool, in host memory and in the files of `kvCacheDir`, for all namespaces
   * and for every model that has used the directory. Nothing of it is found any more when the promise is kept. Requests that
   * run are not touched, and what is computed from now on is cached again. A store that nodes share is left as it is. Rejects
   * with `storage` when the files could not be removed, or another process writes them; this engine does not use them then.
   */
  clearPrefixCache(): Promise<void> {
    return settled(async () => this.#native.clearPrefixCache());
  }

  /** Tokens of `text`. */
  async tokenize(text: string, options: TokenizeOptions = {}): Promise<number[]> {
    const { addSpecial = true } = plainObject('options', options, 'an object');
    if (typeof addSpecial !== 'boolean') {
      throw new NsLlmError('invalid_argument', `addSpecial is ${describe(addSpecial)}, must be true or false`);
    }
    return settled(() => this.#native.tokenize(text, addSpecial));
  }

  /** Text of `ids`; bytes that are not UTF-8 become U+FFFD. */
  async detokenize(ids: TokenIds): Promise<string> {
    return settled(() => this.#native.detokenize(toTokenIds('ids', ids)));
  }

  /** What was done so far and is being done; after {@link close}, what was done in all. */
  stats(): Stats {
    return wrapErrors(() => this.#native.stats());
  }

  /** Whether it takes requests: it is neither closed nor ended by a defect. */
  get isHealthy(): boolean {
    return wrapErrors(() => this.#native.isHealthy());
  }

  /** Bytes held outside JavaScript's heap; after {@link close}, none. */
  memory(): MemoryUse {
    return wrapErrors(() => this.#native.memory());
  }

  /** Ends every request with `closed` and frees the model. May be called at any time, and again. */
  close(): Promise<void> {
    this.#closing ??= settled(() => this.#native.close());
    return this.#closing;
  }

  // Node below 20.5 has no such symbol; the method is then unreachable under a harmless name.
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #embed(inputs: readonly EmbeddingInput[], given: EmbedOptions): Promise<Embeddings> {
    const { signal, ...options } = plainObject('options', given, 'an object');
    const request = toNativeEmbedding(inputs, options);
    const { vectors, ...rest } = await runEmbedding(() => this.#native.embed(request), abortSignal(signal));
    return { embeddings: vectors, dimensions: vectors[0]!.length, ...rest, model: this.info.name };
  }
}

function nativeRequest(prompt: Prompt, given: GenerateOptions) {
  const { signal, ...options } = plainObject('options', given, 'an object');
  return { request: toNativeRequest(prompt, options), signal: abortSignal(signal) };
}

async function load(
  opening: NativeOpening,
  signal: AbortSignal | undefined,
  onProgress: OpenOptions['onProgress'],
): Promise<NativeEngine> {
  let thrown: { error: unknown } | undefined;
  const report = (loadedBytes: number, totalBytes: number): void => {
    try {
      const fraction = totalBytes > 0 ? loadedBytes / totalBytes : 1;
      if (!thrown) {
        onProgress?.({ loadedBytes, totalBytes, fraction });
      }
    } catch (error) {
      thrown = { error };
      opening.cancel();
    }
  };
  const givenUp = (): { error: unknown } | undefined =>
    thrown ?? (signal?.aborted ? { error: new AbortError(signal.reason) } : undefined);
  const removeListener = signal && onAbort(signal, () => opening.cancel());
  try {
    const engine = await settled(() => (onProgress ? opening.start(report) : opening.start()));
    const reason = givenUp();
    if (reason) {
      // Too late for the loader to notice.
      await engine.close();
      throw reason.error;
    }
    return engine;
  } catch (error) {
    const reason = givenUp();
    throw reason ? reason.error : error;
  } finally {
    removeListener?.();
  }
}

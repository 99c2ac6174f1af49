/**
 * `engine.chat.completions`: OpenAI's chat objects from an engine in this process. Only names and shapes change here; the
 * request, its limits and its cancellation are those of `generate` and `stream`.
 */

import { randomUUID } from 'node:crypto';

import type { GenerateOptions, Prompt } from '../request.js';
import type { Chunk, Completion, ResponseStream, TokenLogprobs, Usage } from '../stream.js';
import type { ModelInfo } from '../../native.js';
import { toGenerateOptions, toMessages, withOpenAiName } from './parameters.js';
import type {
  ChatCompletion,
  ChatCompletionChunk,
  ChatCompletionChunkChoice,
  ChatCompletionCreateParams,
  ChatCompletionCreateParamsBase,
  ChatCompletionCreateParamsNonStreaming,
  ChatCompletionCreateParamsStreaming,
  ChatCompletionLogprobs,
  ChatCompletionTopLogprob,
  CompletionUsage,
  RequestOptions,
} from './types.js';

/** What of an engine is used here. */
export interface ChatEngine {
  readonly info: Readonly<ModelInfo>;
  generate(prompt: Prompt, options: GenerateOptions): Promise<Completion>;
  stream(prompt: Prompt, options: GenerateOptions): ResponseStream;
  /** The bytes that each token stands for. */
  tokenBytes(ids: Uint32Array): number[][];
}

/** Lowest logprob that OpenAI's interface has. */
const MIN_LOGPROB = -9999;

/** `engine.chat`. */
export class Chat {
  /** Answers to conversations. */
  readonly completions: ChatCompletions;

  /** @internal */
  constructor(engine: ChatEngine) {
    this.completions = new ChatCompletions(engine);
  }
}

/** `engine.chat.completions`. */
export class ChatCompletions {
  readonly #engine: ChatEngine;

  /** @internal */
  constructor(engine: ChatEngine) {
    this.#engine = engine;
  }

  /**
   * Answers a conversation: with `stream: true` in chunks, otherwise in one piece. A parameter that would change the
   * answer and is not supported is a `not_supported` error, an unknown one `invalid_argument`; both name it, in their
   * message and as `param`.
   */
  create(params: ChatCompletionCreateParamsNonStreaming, options?: RequestOptions): Promise<ChatCompletion>;
  create(params: ChatCompletionCreateParamsStreaming, options?: RequestOptions): Promise<ChatCompletionStream>;
  create(
    params: ChatCompletionCreateParamsBase,
    options?: RequestOptions,
  ): Promise<ChatCompletion | ChatCompletionStream>;
  async create(
    params: ChatCompletionCreateParamsBase,
    options: RequestOptions = {},
  ): Promise<ChatCompletion | ChatCompletionStream> {
    const given = { ...params } as ChatCompletionCreateParams;
    try {
      const generate = toGenerateOptions(given, options);
      const prompt = { messages: toMessages(given.messages) };
      generate.maxTokens ??= this.#engine.info.contextTokens;
      const head = new AnswerHead(this.#engine);
      if (given.stream) {
        const withUsage = given.stream_options?.include_usage === true;
        return new ChatCompletionStream(this.#engine.stream(prompt, generate), head, withUsage);
      }
      return head.completion(await this.#engine.generate(prompt, generate));
    } catch (error) {
      throw withOpenAiName(error, given);
    }
  }
}

/**
 * An answer in chunks: `for await (const chunk of stream)`. Leaving the loop ends the request; so does
 * `controller.abort()`, after which the loop ends without an error, as in the `openai` package. An abort of the caller's
 * own signal is an `AbortError`, as everywhere in this one. It can be read once.
 */
export class ChatCompletionStream implements AsyncIterable<ChatCompletionChunk> {
  /** Ends the request. */
  readonly controller = new AbortController();
  readonly #chunks: AsyncGenerator<ChatCompletionChunk, void, undefined>;

  /** @internal */
  constructor(stream: ResponseStream, head: AnswerHead, withUsage: boolean) {
    this.controller.signal.addEventListener('abort', () => stream.cancel(), { once: true });
    this.#chunks = chunksOf(stream, head, withUsage);
  }

  [Symbol.asyncIterator](): AsyncIterator<ChatCompletionChunk, void, undefined> {
    return this.#chunks;
  }

  /** The chunks as lines of JSON in UTF-8, for an HTTP answer. Nothing is made before it is asked for. */
  toReadableStream(): ReadableStream<Uint8Array> {
    const chunks = this.#chunks;
    const { controller } = this;
    const encoder = new TextEncoder();
    return new ReadableStream<Uint8Array>({
      async pull(lines) {
        const { done, value } = await chunks.next();
        if (done) {
          lines.close();
        } else {
          lines.enqueue(encoder.encode(`${JSON.stringify(value)}\n`));
        }
      },
      cancel() {
        controller.abort();
      },
    });
  }

  // Node below 20.5 has no such symbol; the method is then unreachable under a harmless name.
  async [Symbol.asyncDispose](): Promise<void> {
    this.controller.abort();
  }
}

async function* chunksOf(
  stream: ResponseStream,
  head: AnswerHead,
  withUsage: boolean,
): AsyncGenerator<ChatCompletionChunk, void, undefined> {
  const started = new Set<number>();
  const usage = withUsage ? { usage: null } : {};
  for await (const chunk of stream) {
    for (const choice of head.pieces(chunk, !started.has(chunk.choice))) {
      yield { ...head.chunk, choices: [choice], ...usage };
    }
    started.add(chunk.choice);
  }
  if (withUsage && stream.isFinished) {
    yield { ...head.chunk, choices: [], usage: toUsage((await stream.result).usage) };
  }
}

/** What all objects of one answer have in common. */
class AnswerHead {
  readonly #engine: ChatEngine;
  readonly #id = `chatcmpl-${randomUUID()}`;
  readonly #created = Math.floor(Date.now() / 1000);

  constructor(engine: ChatEngine) {
    this.#engine = engine;
  }

  get #model(): { model: string; system_fingerprint: string } {
    const { name, weights, kvDtype, device, isa } = this.#engine.info;
    return { model: name, system_fingerprint: [name, weights, kvDtype, device, isa].join('-') };
  }

  get chunk(): Omit<ChatCompletionChunk, 'choices' | 'usage'> {
    return { id: this.#id, object: 'chat.completion.chunk', created: this.#created, ...this.#model };
  }

  completion({ choices, usage }: Completion): ChatCompletion {
    return {
      id: this.#id,
      object: 'chat.completion',
      created: this.#created,
      ...this.#model,
      choices: choices.map(({ text, finishReason, logprobs }, index) => ({
        index,
        message: { role: 'assistant', content: text, refusal: null },
        logprobs: this.#logprobs(logprobs),
        finish_reason: finishReason,
      })),
      usage: toUsage(usage),
    };
  }

  /** A chunk of the engine as one piece, and one more for the end of its choice. A chunk that shows nothing is none. */
  pieces(chunk: Chunk, isFirst: boolean): ChatCompletionChunkChoice[] {
    const { choice: index, text, logprobs, finishReason } = chunk;
    const pieces: ChatCompletionChunkChoice[] = [];
    if (isFirst || text !== '' || logprobs) {
      const delta = isFirst ? { role: 'assistant' as const, content: text } : { content: text };
      pieces.push({ index, delta, logprobs: this.#logprobs(logprobs), finish_reason: null });
    }
    if (finishReason) {
      pieces.push({ index, delta: {}, logprobs: null, finish_reason: finishReason });
    }
    return pieces;
  }

  #logprobs(logprobs: readonly TokenLogprobs[] | undefined): ChatCompletionLogprobs | null {
    if (!logprobs) {
      return null;
    }
    const all = logprobs.flatMap(({ chosen, top }) => [chosen, ...top]);
    const bytes = this.#engine.tokenBytes(Uint32Array.from(all, ({ tokenId }) => tokenId));
    const entries = all.map(({ logprob }, index) => toEntry(logprob, bytes[index] ?? []));
    let next = 0;
    const content = logprobs.map(({ top }) => {
      const [chosen, ...others] = entries.slice(next, next + 1 + top.length);
      next += 1 + top.length;
      return { ...chosen!, top_logprobs: others };
    });
    return { content, refusal: null };
  }
}

function toEntry(logprob: number, bytes: number[]): ChatCompletionTopLogprob {
  return { token: Buffer.from(bytes).toString(), bytes, logprob: Math.max(logprob, MIN_LOGPROB) };
}

function toUsage({ promptTokens, completionTokens, cachedTokens }: Usage): CompletionUsage {
  return {
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
  };
}

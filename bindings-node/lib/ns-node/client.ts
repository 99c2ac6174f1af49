/**
 * The client that a server imports instead of one that talks to another process: health, metrics, vectors and text from
 * the engines of this process, as plain JSON values. Every fault is a rejection.
 */

import { loadavg } from 'node:os';

import type { Engine } from '../engine.js';
import { NsLlmError } from '../errors.js';
import { ADDON, limits } from '../native.js';
import { prefixAffinity } from '../prefix_affinity.js';
import { describe } from '../request.js';
import type { GenerateOptions, Message, Prompt } from '../request.js';
import type { CachedTokens, Completion } from '../stream.js';
import { atMost } from './at_most.js';
import { Deadline, readContextId, readOptions, readText } from './call_options.js';
import type { CallOptions, GenerateCallOptions } from './call_options.js';
import { rounded } from './distribution.js';
import { ModelCatalog } from './model_catalog.js';
import type { CatalogOptions, InstalledModel, Purpose } from './model_catalog.js';
import { clock } from './operation_log.js';
import type { OperationCounts } from './operation_log.js';
import type { EngineSettings } from './shared_engines.js';
import { state } from './shared_state.js';
import { VERSION } from './version.js';

/** How to make a client. Everything is optional. */
export interface ClientOptions extends CatalogOptions {
  /** How engines are opened; the first client that needs a model decides for all. */
  engine?: EngineSettings | undefined;
  /** Taken for the sake of callers that once started a binary; not used. */
  binaryPath?: string | undefined;
  /** As `binaryPath`. */
  prototypeUrl?: string | undefined;
}

/** Whether requests can be answered, and by what. */
export interface Health {
  status: 'healthy' | 'loading' | 'unhealthy';
  /** Whether a request would be answered now. */
  available: boolean;
  /** The model that answers when a request names none. */
  model: string | null;
  /** `cpu` or `cuda`; `none` while nothing is loaded. */
  backend: string;
  version: string;
  /** Resident memory of this process, MiB. */
  memory_mb: number;
  uptime_seconds: number;
  /** Load average of the machine over a minute, and percent of its GPUs. */
  load: { cpu: number; gpu: number };
  active_requests: number;
  /** Why it is not healthy. */
  error?: string;
}

/** What was done since the process started. Latencies are of whole requests, milliseconds. */
export interface ClientMetrics {
  requests_total: number;
  requests_failed: number;
  requests_cancelled: number;
  avg_latency_ms: number;
  p50_latency_ms: number;
  p95_latency_ms: number;
  /** Generations that found the beginning of their prompt in the prefix cache. */
  cache_hits: number;
  cache_misses: number;
  memory_usage_mb: number;
  tokens_generated_total: number;
  prompt_tokens_total: number;
  cached_tokens_total: number;
}

/** The vector of a text. */
export interface EmbedResult {
  /** Of unit length. */
  embedding: number[];
  /** The model that made it. */
  model: string;
  /** Its length: as the model has it, never filled up. */
  dimensions: number;
  /** Tokens that were read. */
  tokens: number;
  latency_ms: number;
  /** Whether the text was longer than the model reads, and was cut. */
  truncated: boolean;
}

/** A finished answer. */
export interface GenerateResult {
  /** The answer, without the prompt. */
  text: string;
  tokens_generated: number;
  /** The model that made it. */
  model: string;
  latency_ms: number;
  prompt_tokens: number;
  /** Tokens of the prompt that were not computed again. */
  cached_tokens: number;
  /** The same by the place where their keys and values were. */
  cached_by_tier: CachedTokens;
  /** `stop` or `length`. */
  finish_reason: string;
}

/** A piece of text as it is made. */
export interface StreamToken {
  stream_token: string;
  /** Which piece, from 0. */
  idx: number;
  done: boolean;
}

/** The last object of a stream: no more text, and the counts. */
export type StreamEnd = StreamToken & GenerateResult;

/** Hears a stream. What it throws ends the stream, and the call rejects with it; a promise that it gives is waited for. */
export type TokenListener = (token: StreamToken | StreamEnd) => unknown;

/** A command of the line protocol, as an object. */
export interface NativeCommand {
  cmd: string;
  text?: string;
  model?: string;
  max_tokens?: number;
  context_id?: string;
}

/** How long `health()` waits for a model that is being loaded, milliseconds. */
const HEALTH_WAIT_MS = 1_000;

/** An engine that answers a call, and the model that it runs. */
interface Target {
  engine: Engine;
  model: InstalledModel;
}

/** Any number of clients share the engines of the process. Making one costs nothing: models are opened when first needed. */
export class NsNodeClient {
  /** Nothing here ever falls back to another process. */
  readonly fallback = false;
  /** The native addon that computes. */
  readonly baseBinaryPath: string = ADDON;
  readonly #catalog: ModelCatalog;
  readonly #settings: EngineSettings;

  constructor(options?: ClientOptions) {
    const { modelPath, defaultModel, engine } = options ?? {};
    this.#catalog = new ModelCatalog({ modelPath, defaultModel });
    this.#settings = engine ?? {};
  }

  /** Whether a request would be answered, and by what. A new object at each call. Never rejects. */
  async health(): Promise<Health> {
    // For the next answer: a look at the devices takes its time, off this thread.
    void state.gpus.refresh();
    const about = {
      version: VERSION,
      memory_mb: residentMebibytes(),
      uptime_seconds: Math.round(process.uptime()),
      load: { cpu: rounded(loadavg()[0] ?? 0), gpu: rounded(state.gpus.utilization()) },
      active_requests: state.operations.active,
    };
    let model: string | null = null;
    try {
      const installed = await this.#catalog.resolve(undefined, 'generate');
      model = installed.name;
      const engine = await atMost(HEALTH_WAIT_MS, this.#open(installed));
      if (!engine) {
        return { status: 'loading', available: false, model, backend: 'none', ...about };
      }
      return { status: 'healthy', available: true, model, backend: engine.info.device, ...about };
    } catch (error) {
      return { status: 'unhealthy', available: false, model, backend: 'none', ...about, error: messageOf(error) };
    }
  }

  /** Counts and times of what was really done, by all clients of this process. */
  async metrics(): Promise<ClientMetrics> {
    const { totals } = state.operations;
    const { avg, p50, p95 } = state.operations.latency();
    return {
      requests_total: totals.requests,
      requests_failed: totals.failed,
      requests_cancelled: totals.cancelled,
      avg_latency_ms: rounded(avg),
      p50_latency_ms: p50,
      p95_latency_ms: p95,
      cache_hits: totals.hits,
      cache_misses: totals.misses,
      memory_usage_mb: residentMebibytes(),
      tokens_generated_total: totals.tokens,
      prompt_tokens_total: totals.promptTokens,
      cached_tokens_total: totals.cachedTokens,
    };
  }

  /** The vector of a text. One that is longer than the model reads is cut. */
  async embed(text: string, options?: CallOptions | null): Promise<EmbedResult> {
    return recorded('embed', async () => {
      const startedAt = clock();
      const { model: name, timeout, signal } = readOptions(options);
      const deadline = new Deadline({ timeout, signal });
      const input = readText(text);
      return this.#withEngine(name, 'embed', deadline, async ({ engine, model }) => {
        const found = await engine.embed(input, { timeoutMs: deadline.leftMs, signal: deadline.signal });
        const result: EmbedResult = {
          embedding: Array.from(found.embedding),
          model: model.name,
          dimensions: found.embedding.length,
          tokens: found.tokens,
          latency_ms: rounded(clock() - startedAt),
          truncated: found.truncated,
        };
        return [result, { tokens: 0, promptTokens: found.tokens, cachedTokens: 0 }];
      });
    });
  }

  /** Continues a text. */
  async generate(text: string, options?: GenerateCallOptions | null): Promise<GenerateResult> {
    return this.#complete(() => readText(text), options);
  }

  /** Answers a conversation, by the model's own template; a model without one continues the last message. */
  async chat(messages: readonly Message[], options?: GenerateCallOptions | null): Promise<GenerateResult> {
    return this.#complete((engine) => conversation(engine, messages), options);
  }

  /**
   * Continues a text and tells each piece of it as it is made: whole characters, in order. The last object has
   * `done: true` and the counts; the promise resolves with it.
   */
  async generateStream(
    text: string,
    options?: GenerateCallOptions | null,
    onToken?: TokenListener | null,
  ): Promise<StreamEnd> {
    // A listener that throws has had enough: that is no failure of the request.
    let ofListener: { error: unknown } | undefined;
    const work = async (): Promise<[StreamEnd, OperationCounts]> => {
      const startedAt = clock();
      const call = readOptions(options);
      const deadline = new Deadline(call);
      const prompt = readText(text);
      const listener = readListener(onToken);
      const tell = async (token: StreamToken): Promise<void> => {
        try {
          await listener(token);
        } catch (error) {
          ofListener = { error };
          throw error;
        }
      };
      return this.#withEngine(call.model, 'generate', deadline, async ({ engine, model }) => {
        const waitedMs = clock() - startedAt;
        const stream = engine.stream(prompt, requestOptions(call, deadline));
        let idx = 0;
        // Leaving this loop, also by what the listener throws, cancels the request.
        for await (const chunk of stream) {
          if (chunk.text !== '') {
            await tell({ stream_token: chunk.text, idx, done: false });
            idx += 1;
          }
        }
        const completion = await stream.result;
        notePrefix(model, call, prompt);
        const result = resultOf(completion, model, startedAt);
        const end: StreamEnd = { stream_token: '', idx, done: true, ...result };
        await tell(end);
        return [end, countsOf(completion, waitedMs)];
      });
    };
    return state.operations.run('generate', work, (error) => isCancelled(error) || error === ofListener?.error);
  }

  /** The commands that were once lines to a child process: `health`, `metrics`, `capabilities`, `embed`, `generate`. */
  async callNative(command: NativeCommand): Promise<object> {
    const { cmd, text, model, max_tokens: maxTokens, context_id: contextId } = readOptions(command);
    switch (cmd) {
      case 'health':
        return this.health();
      case 'metrics':
        return this.metrics();
      case 'capabilities':
        return { providers: [...new Set(state.engines.open().map(({ info }) => info.device)).add('cpu')] };
      case 'embed':
        return this.embed(text as string, { model });
      case 'generate':
        return this.generate(text as string, { model, maxTokens, contextId });
      default:
        throw new NsLlmError('invalid_argument', `cmd is ${JSON.stringify(cmd)}, which is no command`);
    }
  }

  #complete(
    prompt: (engine: Engine) => Prompt,
    options: GenerateCallOptions | null | undefined,
  ): Promise<GenerateResult> {
    return recorded('generate', async () => {
      const startedAt = clock();
      const call = readOptions(options);
      const deadline = new Deadline(call);
      return this.#withEngine(call.model, 'generate', deadline, async ({ engine, model }) => {
        const waitedMs = clock() - startedAt;
        const asked = prompt(engine);
        const completion = await engine.generate(asked, requestOptions(call, deadline));
        notePrefix(model, call, asked);
        return [resultOf(completion, model, startedAt), countsOf(completion, waitedMs)];
      });
    });
  }

  /** Finds the model, opens it when needed, and lets it work. */
  async #withEngine<T>(
    name: unknown,
    purpose: Purpose,
    deadline: Deadline,
    work: (target: Target) => Promise<T>,
  ): Promise<T> {
    const model = await this.#catalog.resolve(name, purpose);
    const engine = await deadline.wait(this.#open(model), `the model ${model.name} was loading`);
    try {
      return await work({ engine, model });
    } catch (error) {
      if (!engine.isHealthy) {
        state.engines.forget(model.folder, engine);
      }
      throw error;
    }
  }

  async #open({ name, folder }: InstalledModel): Promise<Engine> {
    try {
      return await state.engines.get(folder, this.#settings);
    } catch (error) {
      const code = error instanceof NsLlmError ? error.code : 'internal';
      throw new NsLlmError(code, `the model ${name} cannot be opened: ${messageOf(error)}`, { cause: error });
    }
  }
}

/** Runs a call as an operation that is counted. */
function recorded<T>(type: Purpose, work: () => Promise<[T, OperationCounts]>): Promise<T> {
  return state.operations.run(type, work, isCancelled);
}

function isCancelled(error: unknown): boolean {
  return error instanceof NsLlmError && error.code === 'cancelled';
}

function requestOptions(call: ReturnType<typeof readOptions<GenerateCallOptions>>, deadline: Deadline): GenerateOptions {
  const { maxTokens = limits.defaultMaxTokens, temperature = 0, seed, stop } = call;
  return {
    maxTokens,
    temperature,
    seed,
    stop,
    namespace: state.engines.namespace(readContextId(call.contextId)),
    timeoutMs: deadline.leftMs,
    signal: deadline.signal,
  };
}

/** How an answered prompt began, for those who choose between nodes. */
function notePrefix(model: InstalledModel, call: GenerateCallOptions, prompt: Prompt): void {
  const asked = typeof prompt === 'string' ? { prompt } : prompt;
  if ('messages' in asked || ('prompt' in asked && typeof asked.prompt === 'string')) {
    state.prefixes.note(prefixAffinity({ model: model.name, cache_salt: readContextId(call.contextId), ...asked }));
  }
}

function resultOf({ text, usage, finishReason }: Completion, model: InstalledModel, startedAt: number): GenerateResult {
  return {
    text,
    tokens_generated: usage.completionTokens,
    model: model.name,
    latency_ms: rounded(clock() - startedAt),
    prompt_tokens: usage.promptTokens,
    cached_tokens: usage.cachedTokens,
    cached_by_tier: usage.cachedByTier,
    finish_reason: finishReason,
  };
}

/** `waitedMs`: what passed before the engine had the request. */
function countsOf({ usage, timings }: Completion, waitedMs: number): OperationCounts {
  return {
    tokens: usage.completionTokens,
    promptTokens: usage.promptTokens,
    cachedTokens: usage.cachedTokens,
    firstTokenMs: usage.completionTokens > 0 ? waitedMs + timings.firstTokenMs : undefined,
  };
}

function readListener(onToken: unknown): (token: StreamToken) => unknown {
  if (onToken === undefined || onToken === null) {
    return () => undefined;
  }
  if (typeof onToken !== 'function') {
    throw new NsLlmError('invalid_argument', `onToken is ${describe(onToken)}, must be a function`);
  }
  return onToken as TokenListener;
}

function conversation(engine: Engine, messages: readonly Message[]): Prompt {
  const last = Array.isArray(messages) ? (messages as readonly Message[]).at(-1) : undefined;
  return engine.info.hasChatTemplate || !last ? { messages } : { prompt: last.content };
}

function residentMebibytes(): number {
  return Math.round(process.memoryUsage.rss() / (1 << 20));
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/**
 * `ns-llm` for Node: native LLM inference inside your process.
 *
 * ```ts
 * import { Engine } from 'ns-llm';
 * const engine = await Engine.open();
 * for await (const chunk of engine.stream('Once upon a time')) process.stdout.write(chunk.text);
 * await engine.close();
 * ```
 */

export type { Embedding, EmbeddingInput, Embeddings, EmbedOptions } from './embedding.js';
export { Engine } from './engine.js';
export type {
  CudaGraphStats,
  KvTierStats,
  LoadProgress,
  MemoryUse,
  ModelInfo,
  KvRemoteOptions,
  OpenOptions,
  Stats,
  TokenizeOptions,
  WeightForm,
} from './engine.js';
export { AbortError, NsLlmError } from './errors.js';
export type { ErrorCode } from './errors.js';
export { DEMO_MODEL } from './native.js';
export { ChatCompletionStream } from './openai/chat.js';
export type { Chat, ChatCompletions } from './openai/chat.js';
export type { EmbeddingResource } from './openai/embeddings.js';
export type * from './openai/types.js';
export { PREFIX_AFFINITY_HEADER, prefixAffinity } from './prefix_affinity.js';
export type { AffinityRequest } from './prefix_affinity.js';
export type { GenerateOptions, Message, Prompt, TokenIds } from './request.js';
export type {
  ResponseCache,
  ResponseCacheOptions,
  ResponseCacheStats,
  ResponsePutOptions,
} from './response_cache.js';
export { createHandler } from './server.js';
export type {
  ApiKeyOptions,
  Handler,
  HandlerOptions,
  HandlerRequest,
  HandlerResponse,
  ServedModel,
} from './server.js';
export { ResponseStream } from './stream.js';
export type {
  CachedTokens,
  Choice,
  Chunk,
  Completion,
  FinishReason,
  Logprob,
  PrefixMiss,
  Timings,
  TokenLogprobs,
  Usage,
} from './stream.js';
export type { Warmed, WarmOptions } from './warm.js';

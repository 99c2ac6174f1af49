/**
 * The objects of OpenAI's chat and embedding interfaces, as far as this engine has what they ask for. Code written for the
 * `openai` package can be given an engine instead of a client.
 */

/** A part of a message's content. Parts are joined; text is the only kind. */
export interface ChatCompletionContentPartText {
  type: 'text';
  text: string;
}

/** One turn of a conversation. */
export interface ChatCompletionMessageParam {
  /** `developer` is another name of `system`. */
  role: 'system' | 'developer' | 'user' | 'assistant' | (string & {});
  /** Plain text, whole or in parts. Text of special tokens in here stays text. */
  content?: string | readonly ChatCompletionContentPartText[] | null | undefined;
  /** Only as an earlier answer carries it: null. */
  refusal?: null | undefined;
}

/** What to answer and how. A parameter that this engine cannot follow is an error that names it. */
export interface ChatCompletionCreateParamsBase {
  /** The conversation so far. */
  messages: readonly ChatCompletionMessageParam[];
  /** Any name: an engine has one model, and the answer tells which. */
  model?: string | undefined;
  /** Most new tokens of each choice. Default: what is left of the context. */
  max_completion_tokens?: number | null | undefined;
  /** The older name of `max_completion_tokens`. */
  max_tokens?: number | null | undefined;
  /** 0 is greedy; 0 to 100. Default: what the model's `generation_config.json` says, else greedy. */
  temperature?: number | null | undefined;
  /** Keep the most likely tokens whose probabilities reach this sum; above 0, to 1. */
  top_p?: number | null | undefined;
  /** Beyond OpenAI: keep the `k` most likely tokens; 0 keeps all. */
  top_k?: number | null | undefined;
  /** Beyond OpenAI: keep tokens of at least this share of the best one's probability; 0 to 1. */
  min_p?: number | null | undefined;
  /** Beyond OpenAI: divides positive and multiplies negative logits of tokens seen; above 0, to 100. */
  repetition_penalty?: number | null | undefined;
  /** Number of choices, 1 to 8. */
  n?: number | null | undefined;
  /** Text at which a choice ends; it is not part of the answer. */
  stop?: string | readonly string[] | null | undefined;
  /** Key of the random draws: the same request with the same seed gives the same answer. */
  seed?: number | null | undefined;
  /** Subtracted once from the logit of each token seen in the answer; -2 to 2. */
  presence_penalty?: number | null | undefined;
  /** Subtracted per occurrence in the answer; -2 to 2. */
  frequency_penalty?: number | null | undefined;
  /** Added to logits, by token id; -100 to 100 each. */
  logit_bias?: Readonly<Record<string, number>> | null | undefined;
  /** Whether to report the logprob of each new token. */
  logprobs?: boolean | null | undefined;
  /** Alternatives to report with each, 0 to 20; needs `logprobs`. */
  top_logprobs?: number | null | undefined;
  /** Whether the answer comes in chunks. */
  stream?: boolean | null | undefined;
  /** What a stream brings besides its chunks; needs `stream`. */
  stream_options?: ChatCompletionStreamOptions | null | undefined;
  /** The only form that there is. */
  response_format?: { type: 'text' } | null | undefined;
  /** Taken and not used. */
  user?: string | undefined;
  /** Taken and not used. */
  metadata?: Readonly<Record<string, string>> | null | undefined;
  /** Taken and not used: nothing is stored. */
  store?: boolean | null | undefined;
}

/** What a stream brings besides its chunks. */
export interface ChatCompletionStreamOptions {
  /** Whether one more chunk, without choices, tells the token counts. */
  include_usage?: boolean | undefined;
  /** Taken and not used: there is no network to hide chunk sizes from. */
  include_obfuscation?: boolean | undefined;
}

/** Parameters of an answer in one piece. */
export interface ChatCompletionCreateParamsNonStreaming extends ChatCompletionCreateParamsBase {
  stream?: false | null | undefined;
}

/** Parameters of an answer in chunks. */
export interface ChatCompletionCreateParamsStreaming extends ChatCompletionCreateParamsBase {
  stream: true;
}

/** Either. */
export type ChatCompletionCreateParams = ChatCompletionCreateParamsNonStreaming | ChatCompletionCreateParamsStreaming;

/** About one call. Options of the `openai` package that concern the network are taken and not used. */
export interface RequestOptions {
  /** Aborts the request; what waits for it rejects with an `AbortError` whose `cause` is the signal's reason. */
  signal?: AbortSignal | null | undefined;
  /** Limit from submission to the end, milliseconds; beyond it the error is `deadline_exceeded`. */
  timeout?: number | undefined;
  /** Not used: nothing is tried twice. */
  maxRetries?: number | undefined;
  /** Not used. */
  headers?: unknown;
  /** Not used. */
  idempotencyKey?: string | undefined;
}

/** An answer. */
export interface ChatCompletion {
  id: string;
  object: 'chat.completion';
  /** Seconds since 1970. */
  created: number;
  /** The model that answered, whatever name was asked for. */
  model: string;
  /** Model, number formats and instruction set: with an equal fingerprint, the same request gives the same answer. */
  system_fingerprint: string;
  choices: ChatCompletionChoice[];
  usage: CompletionUsage;
}

/** One of the answers. */
export interface ChatCompletionChoice {
  index: number;
  message: ChatCompletionMessage;
  /** When asked for. */
  logprobs: ChatCompletionLogprobs | null;
  finish_reason: 'stop' | 'length';
}

/** What the model says. */
export interface ChatCompletionMessage {
  role: 'assistant';
  content: string;
  refusal: null;
}

/** A piece of an answer. */
export interface ChatCompletionChunk {
  /** The same in all chunks of an answer. */
  id: string;
  object: 'chat.completion.chunk';
  /** Seconds since 1970. */
  created: number;
  model: string;
  system_fingerprint: string;
  /** One; none in the chunk of `include_usage`. */
  choices: ChatCompletionChunkChoice[];
  /** With `include_usage`: null but in the last chunk. */
  usage?: CompletionUsage | null;
}

/** What a piece adds to one of the answers. */
export interface ChatCompletionChunkChoice {
  index: number;
  /** `role` comes with the first piece of a choice; the last piece has neither. */
  delta: { role?: 'assistant'; content?: string };
  /** When asked for. */
  logprobs: ChatCompletionLogprobs | null;
  /** On the last piece of a choice. */
  finish_reason: 'stop' | 'length' | null;
}

/** Logprobs of an answer. */
export interface ChatCompletionLogprobs {
  content: ChatCompletionTokenLogprob[];
  refusal: null;
}

/** A token and its logprob. */
export interface ChatCompletionTopLogprob {
  /** Its text; bytes that are no whole character show as U+FFFD. */
  token: string;
  /** Its bytes: those of several tokens may make one character. */
  bytes: number[];
  /** Natural logarithm of its probability; never below -9999. */
  logprob: number;
}

/** A chosen token and its alternatives. */
export interface ChatCompletionTokenLogprob extends ChatCompletionTopLogprob {
  /** The most likely tokens, best first. */
  top_logprobs: ChatCompletionTopLogprob[];
}

/** Token counts. */
export interface CompletionUsage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details: {
    /** Tokens whose KV was found in the cache. */
    cached_tokens: number;
  };
}

/** What to turn into vectors. */
export interface EmbeddingCreateParams {
  /** One text or the token ids of one, or an array of either. */
  input: string | readonly string[] | readonly number[] | readonly (readonly number[])[];
  /** Any name: an engine has one model, and the answer tells which. */
  model?: string | undefined;
  /** Leading numbers of each vector to keep. */
  dimensions?: number | undefined;
  /** `float` (the default): an array of numbers; `base64`: the bytes of little-endian 32-bit floats. */
  encoding_format?: 'float' | 'base64' | undefined;
  /** Taken and not used. */
  user?: string | undefined;
}

/** Vectors. */
export interface CreateEmbeddingResponse<Vector = number[]> {
  object: 'list';
  data: EmbeddingObject<Vector>[];
  model: string;
  usage: { prompt_tokens: number; total_tokens: number };
}

/** The vector of one input. */
export interface EmbeddingObject<Vector = number[]> {
  object: 'embedding';
  /** Which input. */
  index: number;
  embedding: Vector;
}

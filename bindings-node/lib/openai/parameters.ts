/**
 * Parameters as OpenAI names them, on their way to the engine's own options. What would change the answer and cannot be
 * followed is an error that names the parameter; nothing is dropped silently.
 */

import { NsLlmError } from '../errors.js';
import { abortSignal, describe, plainObject } from '../request.js';
import type { GenerateOptions, Message } from '../request.js';
import type { ChatCompletionCreateParams, RequestOptions } from './types.js';

/** A parameter and the engine's name of it. Values pass unchanged: the engine checks them. */
const GENERATE_OPTIONS: Readonly<Record<string, keyof GenerateOptions>> = {
  max_completion_tokens: 'maxTokens',
  max_tokens: 'maxTokens',
  temperature: 'temperature',
  top_p: 'topP',
  top_k: 'topK',
  min_p: 'minP',
  repetition_penalty: 'repetitionPenalty',
  presence_penalty: 'presencePenalty',
  frequency_penalty: 'frequencyPenalty',
  n: 'n',
  stop: 'stop',
  seed: 'seed',
  logit_bias: 'logitBias',
};

/** Parameters of which this file or its callers take care one by one. */
const OWN = ['messages', 'logprobs', 'top_logprobs', 'stream', 'stream_options'];

/** Parameters that change nothing about an answer. */
const HARMLESS = [
  'model',
  'user',
  'metadata',
  'store',
  'safety_identifier',
  'prompt_cache_key',
  'prompt_cache_retention',
  'service_tier',
  'parallel_tool_calls',
  'prediction',
];

/** Parameters that ask for what this engine does not have, and the values of them that ask for nothing. */
const NOT_SUPPORTED: Readonly<Record<string, { neutral: (value: unknown) => boolean; expected: string }>> = {
  tools: { neutral: isEmptyArray, expected: 'empty' },
  tool_choice: { neutral: isOneOf('none', 'auto'), expected: '"none" or "auto"' },
  functions: { neutral: isEmptyArray, expected: 'empty' },
  function_call: { neutral: isOneOf('none', 'auto'), expected: '"none" or "auto"' },
  response_format: { neutral: (value) => typeOf(value) === 'text', expected: '{ type: "text" }' },
  modalities: { neutral: (value) => Array.isArray(value) && value.every(isOneOf('text')), expected: '["text"]' },
  audio: { neutral: () => false, expected: 'unset' },
  reasoning_effort: { neutral: isOneOf('none'), expected: '"none"' },
  verbosity: { neutral: isOneOf('medium'), expected: '"medium"' },
  web_search_options: { neutral: () => false, expected: 'unset' },
};

/** Their names. */
export const NOT_SUPPORTED_NAMES: readonly string[] = Object.keys(NOT_SUPPORTED);

/** Refuses names that nobody knows and values that cannot be followed. Null means: not given. */
export function checkNames(params: object, known: readonly string[]): void {
  for (const [name, value] of Object.entries(params)) {
    if (value === undefined || value === null || known.includes(name)) {
      continue;
    }
    const refused = NOT_SUPPORTED[name];
    if (!refused) {
      throw parameterError('invalid_argument', name, 'given', `left out: it is not known (known: ${known.join(', ')})`);
    }
    if (!refused.neutral(value)) {
      throw parameterError('not_supported', name, shown(value), refused.expected);
    }
  }
}

/** The options of `generate` and `stream` that `params` ask for. */
export function toGenerateOptions(params: ChatCompletionCreateParams, options: RequestOptions): GenerateOptions {
  checkNames(params, [...OWN, ...Object.keys(GENERATE_OPTIONS), ...HARMLESS]);
  const generate: Record<string, unknown> = { ...toCallOptions(options) };
  const given: Readonly<Record<string, unknown>> = { ...params };
  for (const [name, option] of Object.entries(GENERATE_OPTIONS)) {
    generate[option] ??= given[name] ?? undefined;
  }
  generate['logprobs'] = toLogprobs(params.logprobs, params.top_logprobs);
  const { stream, stream_options } = params;
  if (stream !== undefined && stream !== null && typeof stream !== 'boolean') {
    throw parameterError('invalid_argument', 'stream', shown(stream), 'true or false');
  }
  if (stream_options !== undefined && stream_options !== null) {
    if (!stream || typeof stream_options !== 'object') {
      throw parameterError('invalid_argument', 'stream_options', shown(stream_options), 'an object, with stream: true');
    }
    checkNames(stream_options, ['include_usage', 'include_obfuscation']);
  }
  return generate;
}

/** What the second argument of each `create` says, in the engine's names. */
export function toCallOptions(options: RequestOptions): Pick<GenerateOptions, 'signal' | 'timeoutMs'> {
  const { signal, timeout } = plainObject('options', options, 'an object');
  return { signal: abortSignal(signal), timeoutMs: timeout };
}

function toLogprobs(logprobs: unknown, top: unknown): unknown {
  if (logprobs !== undefined && logprobs !== null && typeof logprobs !== 'boolean') {
    throw parameterError('invalid_argument', 'logprobs', shown(logprobs), 'true or false');
  }
  if (logprobs) {
    return top ?? 0;
  }
  if (top !== undefined && top !== null) {
    throw parameterError('invalid_argument', 'top_logprobs', shown(top), 'unset unless logprobs is true');
  }
  return undefined;
}

/** The conversation in the engine's form: contents as plain text, and nothing in it that would be lost. */
export function toMessages(messages: unknown): Message[] {
  if (!Array.isArray(messages)) {
    throw parameterError('invalid_argument', 'messages', describe(messages), 'an array of { role, content }');
  }
  return messages.map((message: unknown, index) => toMessage(message, `messages[${index}]`));
}

function toMessage(message: unknown, name: string): Message {
  if (typeof message !== 'object' || message === null) {
    throw parameterError('invalid_argument', name, describe(message), 'an object { role, content }');
  }
  const { role, content, ...rest }: Record<string, unknown> = { ...message };
  if (typeof role !== 'string') {
    throw parameterError('invalid_argument', `${name}.role`, describe(role), 'a string');
  }
  if (role === 'tool' || role === 'function') {
    throw parameterError('not_supported', `${name}.role`, shown(role), 'system, developer, user or assistant');
  }
  for (const [key, value] of Object.entries(rest)) {
    if (value !== undefined && value !== null && !isEmptyArray(value)) {
      throw parameterError('not_supported', `${name}.${key}`, shown(value), 'unset');
    }
  }
  return { role: role === 'developer' ? 'system' : role, content: toText(content, role, `${name}.content`) };
}

function toText(content: unknown, role: string, name: string): string {
  if (typeof content === 'string') {
    return content;
  }
  if ((content === undefined || content === null) && role === 'assistant') {
    return '';
  }
  if (!Array.isArray(content)) {
    throw parameterError('invalid_argument', name, describe(content), 'a string or an array of parts');
  }
  const parts = content.map((part: unknown, index) => {
    if (typeOf(part) !== 'text') {
      throw parameterError('not_supported', `${name}[${index}].type`, shown(typeOf(part)), '"text"');
    }
    const { text }: { text?: unknown } = part as object;
    if (typeof text !== 'string') {
      throw parameterError('invalid_argument', `${name}[${index}].text`, describe(text), 'a string');
    }
    return text;
  });
  return parts.join('');
}

/** `error`, with the engine's name of a parameter replaced by the one that the caller used. */
export function withOpenAiName(error: unknown, params: object): unknown {
  if (!(error instanceof NsLlmError) || error.code !== 'invalid_argument' || error.param !== undefined) {
    return error;
  }
  const [own = ''] = /^\w+/.exec(error.message) ?? [];
  const name = openAiName(own, params);
  if (name === undefined) {
    return error;
  }
  return new NsLlmError(error.code, name + error.message.slice(own.length), { cause: error, param: name });
}

function openAiName(own: string, params: object): string | undefined {
  if (own === 'logprobs') {
    return 'top_logprobs';
  }
  if (own === 'timeoutMs') {
    return 'timeout';
  }
  const names = Object.keys(GENERATE_OPTIONS).filter((name) => GENERATE_OPTIONS[name] === own);
  return names.find((name) => name in params) ?? (own in params ? own : undefined);
}

/** An error about one parameter, in the form of the engine's own. */
export function parameterError(
  code: 'invalid_argument' | 'not_supported',
  name: string,
  value: string,
  expected: string,
): NsLlmError {
  return new NsLlmError(code, `${name} is ${value}, must be ${expected}`, { param: name });
}

/** A value, for a message: short texts and kinds of objects by name. */
export function shown(value: unknown): string {
  if (typeof value === 'string') {
    return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value);
  }
  const type = typeOf(value);
  return typeof type === 'string' ? `{ type: ${shown(type)} }` : describe(value);
}

function typeOf(value: unknown): unknown {
  return typeof value === 'object' && value !== null && 'type' in value ? value.type : undefined;
}

function isEmptyArray(value: unknown): boolean {
  return Array.isArray(value) && value.length === 0;
}

function isOneOf(...values: readonly string[]): (value: unknown) => boolean {
  return (value) => typeof value === 'string' && values.includes(value);
}

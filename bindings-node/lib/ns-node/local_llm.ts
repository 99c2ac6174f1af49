/**
 * The chat adapter and the embedding function of a server, on the engines of this process: what they asked another
 * server for over HTTP before.
 */

import { NsNodeClient } from './client.js';
import type { GenerateResult } from './client.js';

/** An answer of the chat adapter. Exactly one of `value` and `error` is set. */
export interface AdapterAnswer {
  source: 'LocalLLM';
  value: string | null;
  error: string | null;
  /** When, ISO 8601. */
  verifiedAt: string;
  origin: 'local-llm';
  /** The answer as chat completions are written, or the error. */
  raw: object;
}

/** New tokens of a chat answer. */
const CHAT_MAX_TOKENS = 256;

const client = new NsNodeClient();

/** The vector of a text, by the embedding model when one is installed, else by the model that writes. */
export async function embed(text: string): Promise<number[]> {
  return (await client.embed(text)).embedding;
}

/** Answers a question. Never rejects: a fault is in `error`. */
export async function query({ query: question, model }: { query: string; model?: string }): Promise<AdapterAnswer> {
  try {
    const messages = [{ role: 'user', content: question }];
    const answer = await client.chat(messages, { model, maxTokens: CHAT_MAX_TOKENS });
    return adapterAnswer(answer.text.trim(), null, completionOf(answer));
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    return adapterAnswer(null, message, { error: message });
  }
}

/** Whether a question would be answered. */
export async function status(): Promise<{ ok: boolean; message: string }> {
  const { available, model, error, status: name } = await client.health();
  return { ok: available, message: available ? `${model} answers in this process` : (error ?? `the model is ${name}`) };
}

function adapterAnswer(value: string | null, error: string | null, raw: object): AdapterAnswer {
  return { source: 'LocalLLM', value, error, verifiedAt: new Date().toISOString(), origin: 'local-llm', raw };
}

function completionOf({ text, model, finish_reason, prompt_tokens, tokens_generated }: GenerateResult): object {
  return {
    object: 'chat.completion',
    model,
    choices: [{ index: 0, message: { role: 'assistant', content: text }, finish_reason }],
    usage: { prompt_tokens, completion_tokens: tokens_generated, total_tokens: prompt_tokens + tokens_generated },
  };
}

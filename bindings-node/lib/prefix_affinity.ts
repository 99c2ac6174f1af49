/**
 * Which requests begin alike, as one short name that a load balancer can hash: requests with the same name find each other's
 * keys and values where the same server answers them. Computed from the request alone, without tokenizer or template; the
 * server of this package computes the same (`prefix_affinity` in Rust, which says how).
 */

import { createHash } from 'node:crypto';

import { NsLlmError } from './errors.js';
import { describe } from './request.js';

/** What of a request the name depends on; OpenAI's objects for chat and completions fit. */
export interface AffinityRequest {
  /** As the request names it. */
  model?: string | null | undefined;
  /** What separates this caller's cached prompts from those of others. */
  cache_salt?: string | null | undefined;
  /** A conversation; or */
  messages?: readonly { role: string; content?: unknown }[] | undefined;
  /** what to continue. */
  prompt?: string | readonly number[] | undefined;
}

/** The header that carries the name. */
export const PREFIX_AFFINITY_HEADER = 'x-ns-llm-prefix';
const RULE = 'ns-llm-prefix-1';
/** Bytes of a prompt that are hashed. */
const PREFIX_AFFINITY_BYTES = 256;
const NAME_BYTES = 8;

/** The name of how a request begins: 16 hexadecimal digits, for the header `x-ns-llm-prefix`. */
export function prefixAffinity(request: AffinityRequest): string {
  const { model, cache_salt: salt } = request;
  const hash = createHash('sha256').update(`${RULE}\0${model ?? ''}\0${salt ?? ''}\0`);
  const beginning = beginningOf(request).subarray(0, PREFIX_AFFINITY_BYTES);
  return hash.update(beginning).digest().subarray(0, NAME_BYTES).toString('hex');
}

function beginningOf({ messages, prompt }: AffinityRequest): Buffer {
  if (messages !== undefined) {
    const turns = messages.map(({ role, content }) => `${role === 'developer' ? 'system' : role}\0${textOf(content)}\0`);
    return Buffer.from(turns.join(''), 'utf8');
  }
  if (typeof prompt === 'string') {
    return Buffer.from(prompt, 'utf8');
  }
  if (Array.isArray(prompt) && prompt.every((id) => Number.isInteger(id) && id >= 0 && id < 2 ** 32)) {
    const ids = (prompt as readonly number[]).slice(0, PREFIX_AFFINITY_BYTES / 4);
    const bytes = Buffer.alloc(ids.length * 4);
    ids.forEach((id, idx) => bytes.writeUInt32LE(id, idx * 4));
    return bytes;
  }
  throw new NsLlmError('invalid_argument', `prompt is ${describe(prompt)}, must be a text or token ids, or messages given`);
}

/** A content's text, whole or in parts. */
function textOf(content: unknown): string {
  if (Array.isArray(content)) {
    return content.map((part: { text?: unknown } | null) => (typeof part?.text === 'string' ? part.text : '')).join('');
  }
  return typeof content === 'string' ? content : '';
}

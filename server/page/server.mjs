/**
 * This server, as its page asks it: with the caller's key, errors as they are told, and answers that grow. The key is kept in
 * memory, or for the life of the tab where its owner says so; nowhere else.
 */

const STORED_KEY = 'ns-llm-key';
/** Bytes of a conversation whose hash tells a load balancer which server knows its beginning. */
const PREFIX_AFFINITY_BYTES = 256;

let key = sessionStorage.getItem(STORED_KEY) ?? '';

/** What the server said instead of an answer. */
export class ServerError extends Error {
  constructor(message, { status, code, retryAfter } = {}) {
    super(message);
    this.name = 'ServerError';
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export function setKey(text, { keep }) {
  key = text;
  if (keep && text !== '') {
    sessionStorage.setItem(STORED_KEY, text);
  } else {
    sessionStorage.removeItem(STORED_KEY);
  }
}

export const hasKey = () => key !== '';

/** The answer to a request; one that is an error is thrown. */
export async function ask(path, { body, signal, headers = {} } = {}) {
  const all = { ...headers };
  if (key !== '') {
    all.authorization = `Bearer ${key}`;
  }
  const options = { headers: all, signal, cache: 'no-store', credentials: 'omit' };
  if (body !== undefined) {
    all['content-type'] = 'application/json';
    Object.assign(options, { method: 'POST', body: JSON.stringify(body) });
  }
  const response = await fetch(path, options);
  // `/ready` says with its status that it is not; its body says why.
  if (!response.ok && !(path === '/ready' && response.status === 503)) {
    throw await errorOf(response);
  }
  return response;
}

async function errorOf(response) {
  const { error } = await response.json().catch(() => ({}));
  const message = typeof error === 'string' ? error : error?.message;
  const retryAfter = Number(response.headers.get('retry-after')) || undefined;
  return new ServerError(message ?? `the server answered ${response.status}`, {
    status: response.status,
    code: error?.code,
    retryAfter,
  });
}

/** The objects of an answer that grows. One that ends before its end is an error. */
export async function* chat(body, signal) {
  const prefix = await prefixAffinity(body);
  const headers = prefix ? { 'x-ns-llm-prefix': prefix } : {};
  const response = await ask('/v1/chat/completions', { body, signal, headers });
  for await (const data of eventData(response.body.pipeThrough(new TextDecoderStream()))) {
    if (data === '[DONE]') {
      return;
    }
    const object = JSON.parse(data);
    if (object.error) {
      throw new ServerError(object.error.message, { code: object.error.code });
    }
    yield object;
  }
  throw new ServerError('the connection ended before the answer did', { code: 'interrupted' });
}

/** The `data` of each event of a stream of texts. */
export async function* eventData(stream) {
  let rest = '';
  const reader = stream.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) {
        return;
      }
      const events = (rest + value).split('\n\n');
      rest = events.pop();
      for (const event of events) {
        const lines = event.split('\n').filter((line) => line.startsWith('data:'));
        if (lines.length > 0) {
          yield lines.map((line) => line.slice(5).trimStart()).join('\n');
        }
      }
    }
  } finally {
    // Whoever leaves early wants no more of it.
    await reader.cancel().catch(() => {});
  }
}

/** How a conversation begins, as the server and its other clients name it; nothing where a browser has no hash to give. */
export async function prefixAffinity({ model = '', cache_salt: salt = '', messages }) {
  if (!globalThis.crypto?.subtle) {
    return undefined;
  }
  const encoder = new TextEncoder();
  const head = encoder.encode(`ns-llm-prefix-1\0${model}\0${salt}\0`);
  const text = messages.map(({ role, content }) => `${role}\0${content}\0`).join('');
  const beginning = encoder.encode(text).subarray(0, PREFIX_AFFINITY_BYTES);
  const hash = await crypto.subtle.digest('SHA-256', new Uint8Array([...head, ...beginning]));
  return [...new Uint8Array(hash, 0, 8)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/**
 * Abort signals that are shared by many requests. Each signal gets one listener from this package, however many requests
 * wait for it: Node warns of a leak from the eleventh listener on, and a server easily has more requests under one signal.
 */

interface Waiting {
  callbacks: Set<() => void>;
  listener: () => void;
}

const waiting = new WeakMap<AbortSignal, Waiting>();

/** Calls `callback` once when the signal is aborted. Gives the function that takes it back. */
export function onAbort(signal: AbortSignal, callback: () => void): () => void {
  const entry = waiting.get(signal) ?? listen(signal);
  entry.callbacks.add(callback);
  return () => {
    if (entry.callbacks.delete(callback) && entry.callbacks.size === 0 && waiting.get(signal) === entry) {
      signal.removeEventListener('abort', entry.listener);
      waiting.delete(signal);
    }
  };
}

function listen(signal: AbortSignal): Waiting {
  const callbacks = new Set<() => void>();
  const listener = (): void => {
    waiting.delete(signal);
    for (const callback of [...callbacks]) {
      callback();
    }
  };
  signal.addEventListener('abort', listener, { once: true });
  const entry = { callbacks, listener };
  waiting.set(signal, entry);
  return entry;
}

/**
 * What was computed and is still to be written survives the end of the process: when it is told to end by a signal, or has
 * nothing more to do, it first waits for the disk, for a bounded time. A server that handles the signal itself keeps the
 * last word: it should wait for `KvCacheService.flush()` before it exits.
 */

import { atMost } from './at_most.js';

/** How long the process waits at most. */
const MAX_WAIT_MS = 5_000;

const SIGNALS = ['SIGTERM', 'SIGINT', 'SIGHUP'] as const;

let installed = false;

/** Calls `flush` before the process ends. The first call counts. */
export function flushAtEnd(flush: () => Promise<void>): void {
  if (installed) {
    return;
  }
  installed = true;
  for (const signal of SIGNALS) {
    process.once(signal, () => {
      // With a listener the system no longer ends the process; where nobody else listens, this must.
      const isAlone = process.listenerCount(signal) === 0;
      void waitFor(flush()).then(() => {
        if (isAlone) {
          process.kill(process.pid, signal);
        }
      });
    });
  }
  process.once('beforeExit', () => void waitFor(flush()));
}

/** What could not be written is no reason to stay. */
async function waitFor(flushed: Promise<void>): Promise<void> {
  await atMost(MAX_WAIT_MS, flushed).catch(() => {});
}

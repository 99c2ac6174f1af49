/**
 * What was computed and is still to be written survives the end of the process: when it is told to end by a signal, or has
 * nothing more to do, it first waits for the disk, for a bounded time. A server that handles the signal itself keeps the
 * last word: it should wait for `KvCacheService.flush()` before it exits.
 */

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
      void atMost(flush()).then(() => {
        if (isAlone) {
          process.kill(process.pid, signal);
        }
      });
    });
  }
  process.once('beforeExit', () => void atMost(flush()));
}

/** Kept when `flushed` is, or has failed, or after the longest wait. */
function atMost(flushed: Promise<void>): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, MAX_WAIT_MS);
    const done = (): void => {
      clearTimeout(timer);
      resolve();
    };
    flushed.then(done, done);
  });
}

// The floor of `npm run bench:boundary`: what it costs Node to wake its idle event loop and run one callback, with its own
// cheapest message from another thread. Like the engine's worker, the sender is busy between two messages. Prints the
// processor time of JavaScript's thread, µs per message (Linux).

import { readFileSync } from 'node:fs';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { fileURLToPath } from 'node:url';

const MESSAGES = 1_500;
/** As long as a step of the model that ships, milliseconds. */
const PAUSE_MS = 0.6;
/** Read between two messages, so that the caches are not kept for the one who wakes up, bytes. */
const TOUCHED = 24 << 20;

if (isMainThread) {
  const worker = new Worker(fileURLToPath(import.meta.url), { workerData: MESSAGES });
  await new Promise((resolve) => worker.once('message', resolve));
  const before = cpuOfThread();
  let heard = 0;
  await new Promise((resolve) => {
    worker.on('message', () => {
      heard += 1;
      if (heard === MESSAGES) {
        resolve();
      }
    });
  });
  console.log(((cpuOfThread() - before) / MESSAGES).toFixed(1));
} else {
  const memory = new Float64Array(TOUCHED / 8);
  let at = 0;
  parentPort.postMessage('started');
  for (let i = 0; i < workerData; i += 1) {
    const until = performance.now() + PAUSE_MS;
    while (performance.now() < until) {
      for (let line = 0; line < 1_000; line += 1) {
        memory[at] += 1;
        at = (at + 8) % memory.length;
      }
    }
    parentPort.postMessage(i);
  }
}

/** Processor time of the process's first thread, µs. */
function cpuOfThread() {
  return Number(readFileSync(`/proc/self/task/${process.pid}/schedstat`, 'utf8').split(' ')[0]) / 1000;
}

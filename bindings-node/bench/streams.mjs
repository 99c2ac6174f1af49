// The Node side of `npm run bench:boundary`: the work of engine/examples/streams.rs through the package. A process of its
// own, so that its processor time is that of this work. `streams.mjs MODEL STREAMS TOKENS ROUNDS` prints one JSON object
// per round.

import { readdirSync, readFileSync } from 'node:fs';
import { monitorEventLoopDelay } from 'node:perf_hooks';

import { Engine } from 'ns-llm';

const [model, ...sizes] = process.argv.slice(2);
const [streams, tokens, rounds] = sizes.map(Number);

const engine = await Engine.open(model, { threads: 1, threadPriority: 'normal', kvBytes: 256 << 20 });
await round(tokens); // first touch of buffers and threads, and compilation
for (let i = 0; i < rounds; i += 1) {
  const [before, { stepsTotal }, started] = [cpuTimes(), engine.stats(), performance.now()];
  const read = await round(tokens);
  const after = cpuTimes();
  const result = {
    tokens: read.tokens,
    chunks: read.chunks,
    steps: engine.stats().stepsTotal - stepsTotal,
    engine_us: after.engine - before.engine,
    reader_us: after.reader - before.reader,
    wall_ms: performance.now() - started,
  };
  console.log(JSON.stringify({ ...result, delay_p99_ms: await delayOf(() => round(Math.min(tokens, 256))) }));
}
await engine.close();

/** Processor time of the engine's threads and of all others, microseconds (Linux). */
function cpuTimes() {
  const times = { engine: 0, reader: 0 };
  for (const task of readdirSync('/proc/self/task')) {
    const read = (file) => readFileSync(`/proc/self/task/${task}/${file}`, 'utf8');
    times[read('comm').startsWith('ns-llm') ? 'engine' : 'reader'] += Number(read('schedstat').split(' ')[0]) / 1000;
  }
  return times;
}

/** The event loop's delay while `work` runs, which is other work: the timer that measures it costs processor time. */
async function delayOf(work) {
  const delay = monitorEventLoopDelay({ resolution: 1 });
  delay.enable();
  await work();
  delay.disable();
  // The histogram counts the timer's own millisecond.
  return Math.max(delay.percentile(99) / 1e6 - 1, 0);
}

async function round(maxTokens) {
  const read = { tokens: 0, chunks: 0, text: '' };
  const one = async (seed) => {
    const options = { maxTokens, temperature: 0.8, seed, ignoreEos: true };
    for await (const { tokenIds, text } of engine.stream('Once upon a time', options)) {
      read.tokens += tokenIds.length;
      read.chunks += 1;
      read.text += text;
    }
  };
  await Promise.all(Array.from({ length: streams }, (_, seed) => one(seed)));
  return read;
}

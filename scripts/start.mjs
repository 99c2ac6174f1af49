// `npm start [-- "a prompt"]`: builds what is missing, then lets the model that ships tell a story, in this process.
// `npm start -- serve [options]`: builds the command line, and answers over HTTP until it is told to end.

import { build } from './build.mjs';
import { run } from './process.mjs';

const DEFAULT_PROMPT = 'Once upon a time';

const [first, ...rest] = process.argv.slice(2);
try {
  if (first === 'serve') {
    process.exitCode = await run('cargo', ['run', '--release', '--package', 'ns-llm-cli', '--', first, ...rest]);
  } else {
    await build();
    await tell(process.argv.slice(2).join(' ') || DEFAULT_PROMPT);
  }
} catch (error) {
  console.error(`npm start failed: ${error.message}`);
  process.exitCode = 1;
}

async function tell(prompt) {
  const { Engine } = await import('ns-llm');
  const engine = await Engine.open({ onProgress: showProgress });
  try {
    process.stdout.write(`\n${prompt}`);
    const stream = engine.stream(prompt, { maxTokens: 300, temperature: 0.7 });
    for await (const chunk of stream) {
      process.stdout.write(chunk.text);
    }
    process.stdout.write(`\n\n${timingsLine(engine.info, await stream.result)}\n`);
  } finally {
    await engine.close();
  }
}

/** A line that rewrites itself, on a terminal only. */
function showProgress({ fraction }) {
  if (process.stderr.isTTY) {
    process.stderr.write(fraction < 1 ? `\rloading ${Math.floor(fraction * 100)} %` : '\r\x1b[K');
  }
}

function timingsLine(info, { usage, timings, seed }) {
  const perSecond = usage.completionTokens > 1 ? ((usage.completionTokens - 1) / timings.decodeMs) * 1000 : 0;
  const size = `${(info.numParameters / 1e6).toFixed(1)}M parameters, ${info.weights}`;
  const place = `${info.device} (${info.isa}), ${info.threads} thread${info.threads === 1 ? '' : 's'}`;
  return [
    `${usage.completionTokens} tokens at ${perSecond.toFixed(0)} tokens/s`,
    `first token after ${timings.firstTokenMs.toFixed(0)} ms`,
    `model loaded in ${info.loadMs.toFixed(0)} ms`,
    `${info.name}, ${size}, ${place}`,
    `seed ${seed}`,
  ].join(' · ');
}

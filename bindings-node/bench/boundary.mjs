// `npm run bench:boundary [-- --repeats 3]`: what Node adds to a token. The same streams are read through the package and
// through the Rust engine, in processes of their own that take turns; the figure is the difference of the processor time
// (of all threads) per token, between medians. The aim is 10 µs. The last line is the floor of it with one stream: what
// an empty turn of the event loop costs here. Linux only.

import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { build } from '../../scripts/build.mjs';
import { ROOT, run } from '../../scripts/process.mjs';

const ROUNDS = 3;
/** Streams at once, and tokens of each. */
const LOADS = [
  [1, 1500],
  [16, 256],
  [64, 128],
];

const { values } = parseArgs({ options: { repeats: { type: 'string', default: '3' } } });
const repeats = Number(values.repeats);
if (!Number.isInteger(repeats) || repeats < 1) {
  console.error(`--repeats is ${values.repeats}, must be an integer from 1`);
  process.exit(2);
}

await build();
if ((await run('cargo', ['build', '--release', '--package', 'ns-llm', '--example', 'streams'])) !== 0) {
  process.exit(1);
}
const target = process.env.CARGO_TARGET_DIR ?? join(ROOT, 'target');
const rust = [join(target, 'release', 'examples', 'streams')];
const node = [process.execPath, fileURLToPath(new URL('streams.mjs', import.meta.url))];
const message = [fileURLToPath(new URL('message.mjs', import.meta.url))];

const HEAD = ['streams', 'Rust engine', 'Rust reader', 'Node engine', 'Node reader', 'Node adds', 'tokens/step', 'tokens/chunk', 'delay p99'];
console.log('Processor time per token, µs; the event loop\'s delay, ms\n');
print(HEAD);
for (const [streams, tokens] of LOADS) {
  const rounds = { rust: [], node: [] };
  for (let repeat = 0; repeat < repeats; repeat += 1) {
    rounds.rust.push(...measure(rust, streams, tokens));
    rounds.node.push(...measure(node, streams, tokens));
  }
  const inRust = perToken(rounds.rust);
  const inNode = perToken(rounds.node);
  const medianOf = (figure) => median(rounds.node.map(figure));
  print([
    String(streams),
    ...[inRust.engine, inRust.reader, inNode.engine, inNode.reader, inNode.all - inRust.all].map((us) => us.toFixed(1)),
    medianOf(({ tokens, steps }) => tokens / steps).toFixed(1),
    medianOf(({ tokens, chunks }) => tokens / chunks).toFixed(2),
    medianOf(({ delay_p99_ms: ms }) => ms).toFixed(1),
  ]);
}

const turns = Array.from({ length: repeats }, () => Number(execFileSync(process.execPath, message, { encoding: 'utf8' })));
console.log(`\nA message from a worker thread costs JavaScript's thread ${median(turns).toFixed(1)} µs.`);

function measure([command, ...before], streams, tokens) {
  const args = [...before, join(ROOT, 'models', 'demo'), streams, tokens, ROUNDS].map(String);
  const lines = execFileSync(command, args, { cwd: ROOT, encoding: 'utf8' }).trim().split('\n');
  return lines.map((line) => JSON.parse(line));
}

/** Medians: the engine's own threads, those that read, and both. */
function perToken(rounds) {
  const medianOf = (time) => median(rounds.map((round) => time(round) / round.tokens));
  return {
    engine: medianOf(({ engine_us: engine }) => engine),
    reader: medianOf(({ reader_us: reader }) => reader),
    all: medianOf(({ engine_us: engine, reader_us: reader }) => engine + reader),
  };
}

function median(values) {
  return values.sort((a, b) => a - b)[values.length >> 1];
}

function print(cells) {
  console.log(cells.map((cell, column) => cell.padStart(Math.max(HEAD[column].length, 8))).join('  '));
}

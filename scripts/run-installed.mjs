// Runs the package that is installed in the current folder, as a stranger would: both ways of importing it, a story,
// many at once, a vector, an abort. For images that have nothing but Node.

import { strict as assert } from 'node:assert';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const require = createRequire(pathToFileURL(join(process.cwd(), 'index.js')));
const { Engine, AbortError } = require('ns-llm');
const imported = await import(pathToFileURL(require.resolve('ns-llm').replace(/js$/, 'mjs')));
assert.equal(imported.Engine, Engine);

const engine = await Engine.open();
const prompt = 'Once upon a time';
const { text } = await engine.generate(prompt, { maxTokens: 40, temperature: 0 });
assert.ok(text.length > 40, text);

const together = await Promise.all(
  Array.from({ length: 8 }, () => engine.generate(prompt, { maxTokens: 40, temperature: 0 })),
);
assert.ok(together.every((completion) => completion.text === text));

const controller = new AbortController();
const aborted = engine.generate(prompt, { maxTokens: 2000, signal: controller.signal });
controller.abort();
await assert.rejects(aborted, AbortError);

const { embedding } = await engine.embed('a red fox');
assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-5);

console.log(`${prompt}${text}\n${process.version} ${engine.info.isa}, ${process.report.getReport().header.glibcVersionRuntime ?? 'musl'}`);
await engine.close();

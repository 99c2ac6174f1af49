// How soon is the first token there when the KV of a long prefix is found instead of computed: llama.cpp's server with its
// slot in memory and saved to a file, node-llama-cpp with its sequence's state file, each beside computing it. The same work
// as `cargo bench -p ns-llm --bench prefix_tiers`, which prints ours.
//
//   node benches/peers/prefix.mjs MODEL.gguf [PREFIX_TOKENS [THREADS]]
//
// Needs what `npm run bench:peers` sets up, and `llama-server` beside its programs. One JSON object on stdout.

import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync, statSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import { places } from './setup.mjs';

const [model, prefixTokens = '4096', threads = '2'] = process.argv.slice(2);
if (model === undefined) {
  console.error('node benches/peers/prefix.mjs MODEL.gguf [PREFIX_TOKENS [THREADS]]');
  process.exit(2);
}
const CONTEXT_TOKENS = Number(prefixTokens) + 256;
const TAIL_TOKENS = 8;
// Token ids from the middle of a vocabulary of 150,000, as random as ours.
const PROMPT = Array.from({ length: Number(prefixTokens) }, (_, i) => 20_000 + ((Math.imul(i, 2654435761) >>> 7) % 50_000));
const TAIL = Array.from({ length: TAIL_TOKENS }, () => 20_000);

const at = places();
const folder = mkdtempSync(join(tmpdir(), 'ns-llm-prefix-'));
try {
  const rows = { 'llama-server': await llamaServer(), 'node-llama-cpp': await nodeLlamaCpp() };
  for (const [name, row] of Object.entries(rows)) {
    console.error(name, JSON.stringify(row));
  }
  console.log(JSON.stringify({ model, prefixTokens: Number(prefixTokens), threads: Number(threads), rows }));
} finally {
  rmSync(folder, { recursive: true, force: true });
}

async function llamaServer() {
  let server = await startServer();
  const computedMs = await firstToken(server);
  const inMemoryMs = await firstToken(server);
  const saveMs = await timed(() => post(server, '/slots/0?action=save', { filename: 'prefix.slot' }));
  server.stop();
  server = await startServer();
  const restoreMs = await timed(() => post(server, '/slots/0?action=restore', { filename: 'prefix.slot' }));
  const afterMs = await firstToken(server);
  server.stop();
  const fileBytes = statSync(join(folder, 'prefix.slot')).size;
  return { computedMs, inMemoryMs, saveMs, restoreMs, fromFileMs: restoreMs + afterMs, fileBytes };
}

async function startServer() {
  const port = await freePort();
  const args = ['-m', model, '-t', threads, '-c', String(CONTEXT_TOKENS), '-np', '1', '--slot-save-path', folder, '--host',
    '127.0.0.1', '--port', String(port), '--no-webui'];
  const child = spawn(join(at.llamaBin, 'llama-server'), args, { stdio: 'ignore' });
  const server = { url: `http://127.0.0.1:${port}`, stop: () => child.kill('SIGKILL') };
  for (let tries = 0; tries < 600; tries += 1) {
    const answer = await fetch(`${server.url}/health`).catch(() => undefined);
    if (answer?.ok) {
      return server;
    }
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  server.stop();
  throw new Error('llama-server did not start');
}

/** Milliseconds until one token after prefix and tail. */
function firstToken(server) {
  const body = { prompt: [...PROMPT, ...TAIL], n_predict: 1, temperature: 0, cache_prompt: true, id_slot: 0 };
  return timed(() => post(server, '/completion', body));
}

async function post(server, path, body) {
  const headers = { 'content-type': 'application/json' };
  const answer = await fetch(server.url + path, { method: 'POST', headers, body: JSON.stringify(body) });
  const text = await answer.text();
  if (!answer.ok) {
    throw new Error(`${path}: ${answer.status} ${text.slice(0, 200)}`);
  }
  return JSON.parse(text);
}

async function nodeLlamaCpp() {
  const { getLlama } = await import(pathToFileURL(join(at.nodeLlamaCpp, 'node_modules/node-llama-cpp/dist/index.js')));
  const llama = await getLlama({ gpu: false, build: 'never', logLevel: 'error' });
  const loaded = await llama.loadModel({ modelPath: model });
  const open = async () => {
    const context = await loaded.createContext({ contextSize: CONTEXT_TOKENS, threads: Number(threads), sequences: 1 });
    return { context, sequence: context.getSequence() };
  };
  const first = await open();
  const computedMs = await timed(() => oneToken(first.sequence, [...PROMPT, ...TAIL]));
  await first.sequence.eraseContextTokenRanges([{ start: PROMPT.length, end: first.sequence.nextTokenIndex }]);
  const inMemoryMs = await timed(() => oneToken(first.sequence, TAIL));
  await first.sequence.eraseContextTokenRanges([{ start: PROMPT.length, end: first.sequence.nextTokenIndex }]);
  const file = join(folder, 'prefix.state');
  const saveMs = await timed(() => first.sequence.saveStateToFile(file));
  await first.context.dispose();
  const second = await open();
  const restoreMs = await timed(() => second.sequence.loadStateFromFile(file, { acceptRisk: true }));
  const afterMs = await timed(() => oneToken(second.sequence, TAIL));
  await second.context.dispose();
  return { computedMs, inMemoryMs, saveMs, restoreMs, fromFileMs: restoreMs + afterMs, fileBytes: statSync(file).size };
}

async function oneToken(sequence, tokens) {
  for await (const token of sequence.evaluate(tokens, { temperature: 0 })) {
    return token;
  }
}

async function timed(work) {
  const start = performance.now();
  await work();
  return performance.now() - start;
}

function freePort() {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once('error', reject);
    server.listen(0, '127.0.0.1', () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';

import { numThreads, runScript, scaled, STORY } from './support.js';

const OPEN = `const { Engine } = require('ns-llm');
  const options = { threads: 1, threadPriority: 'normal', kvBytes: 64 << 20 };`;
const LONG = `{ maxTokens: 1500, ignoreEos: true }`;

test('an open engine that does nothing does not keep the process alive', async () => {
  const ended = await runScript(`${OPEN} Engine.open(options).then(() => console.log('open'));`);
  assert.deepEqual(ended, { code: 0, signal: null, stdout: 'open\n', stderr: '' });
});

test('a pending answer keeps the process alive until it is there', async () => {
  const script = `${OPEN} Engine.open(options).then((e) => e.generate('${STORY}', { maxTokens: 200, ignoreEos: true }))
    .then(({ tokenIds }) => console.log(tokenIds.length));`;
  assert.deepEqual(await runScript(script), { code: 0, signal: null, stdout: '200\n', stderr: '' });
});

test('the process ends as it was told to, during loading and during generation, and says nothing', async (t) => {
  const ways: [string, number | string | null, string | null][] = [
    ['process.exit(7)', 7, null],
    ['process.exitCode = 3; process.exit()', 3, null],
    [`process.kill(process.pid, 'SIGTERM')`, null, 'SIGTERM'],
  ];
  const times: number[] = [];
  for (const [end, code, signal] of Array.from({ length: scaled(1, 85) }, () => ways).flat()) {
    const statement = `console.log(Date.now()); ${end}`;
    const generating = `${OPEN} Engine.open(options).then(async (engine) => {
      for (let i = 0; i < 8; i += 1) engine.generate('${STORY}', ${LONG}).catch(() => {});
      let chunks = 0;
      for await (const chunk of engine.stream('${STORY}', ${LONG})) if (++chunks === 3) { ${statement}; }
    });`;
    const loading = `${OPEN} Engine.open(options); setTimeout(() => { ${statement}; }, 2);`;
    for (const script of [generating, loading]) {
      const ended = await runScript(script);
      assert.deepEqual([ended.code, ended.signal, ended.stderr], [code, signal, ''], statement);
      times.push(Date.now() - Number(ended.stdout));
    }
  }
  t.diagnostic(`gone after ${times.join(', ')} ms`);
  assert.ok(times.every((ms) => ms <= 500), times.join());
});

test('an uncaught exception during generation ends the process with code 1', async () => {
  const script = `${OPEN} Engine.open(options).then(async (engine) => {
    for await (const chunk of engine.stream('${STORY}', ${LONG})) setImmediate(() => { throw new Error('mine'); });
  });`;
  const ended = await runScript(script);
  assert.equal(ended.code, 1);
  assert.match(ended.stderr, /Error: mine/);
});

interface EndedWorker {
  code: number;
  /** The text, when it got that far. */
  text: string | undefined;
}

/** A worker that opens an engine, generates and closes. With `terminateAfter` it is ended that many ms after its start. */
function inWorker(terminateAfter?: number): Promise<EndedWorker> {
  const script = `
    const { parentPort } = require('node:worker_threads');
    parentPort.postMessage('started');
    ${OPEN}
    Engine.open(options).then(async (engine) => {
      const { text } = await engine.generate('${STORY}', { maxTokens: 32 });
      parentPort.postMessage({ text });
      for await (const chunk of engine.stream('${STORY}', { maxTokens: 32 })) ;
      await engine.close();
    });`;
  const worker = new Worker(script, { eval: true });
  let text: string | undefined;
  worker.on('message', (message: 'started' | { text: string }) => {
    if (message !== 'started') {
      text = message.text;
    } else if (terminateAfter !== undefined) {
      setTimeout(() => void worker.terminate(), terminateAfter);
    }
  });
  return new Promise((resolve, reject) => {
    worker.on('error', reject);
    worker.on('exit', (code) => resolve({ code, text }));
  });
}

test('worker threads load the addon side by side, answer alike and end by themselves', async () => {
  const ended = await Promise.all([inWorker(), inWorker(), inWorker()]);
  assert.deepEqual(ended.map(({ code }) => code), [0, 0, 0]);
  assert.ok(ended[0]?.text);
  assert.equal(new Set(ended.map(({ text }) => text)).size, 1);
});

test('workers that are terminated while loading, generating or closing take nothing down with them', async () => {
  const cycles = scaled(24, 1_000);
  await inWorker();
  const threads = numThreads();
  let terminated = 0;
  for (let cycle = 0; cycle < cycles; cycle += 4) {
    const delays = [0, 1, 2, 3].map((i) => ((cycle + i) * 7) % 60);
    const ended = await Promise.all(delays.map((delay) => inWorker(delay)));
    terminated += ended.filter(({ code }) => code === 1).length;
  }
  assert.ok(terminated > cycles / 4, `only ${terminated} of ${cycles} workers were terminated before their end`);
  assert.ok((await inWorker()).text, 'a later worker still works');
  const deadline = Date.now() + 10_000;
  while (numThreads() > threads) {
    assert.ok(Date.now() < deadline, `${threads} threads before, ${numThreads()} after`);
    await sleep(20);
  }
});

import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import { embed, NsNodeClient, PerformanceProfiler, query, status } from '../lib/ns-node/index.js';
import type { StreamEnd, StreamToken } from '../lib/ns-node/index.js';
import { state } from '../lib/ns-node/shared_state.js';
import { assertPlain, LONG_PROMPT, SETTINGS, story } from './ns_node_support.js';
import { inPieces, isIdle, runScript, STORY, until, withCode } from './support.js';

const client = new NsNodeClient({ engine: SETTINGS });

/** Pieces and end of a stream, as a listener hears them. */
async function listen(text: string, options = {}): Promise<{ pieces: StreamToken[]; heard: StreamToken[]; end: StreamEnd }> {
  const heard: StreamToken[] = [];
  const end = await client.generateStream(text, options, (token) => void heard.push(token));
  return { pieces: heard.filter(({ done }) => !done), heard, end };
}

test('import and require give the same class, which is what require gives itself', async () => {
  const script = `
    import Client, * as imported from 'ns-llm/ns-node';
    import { createRequire } from 'node:module';
    const required = createRequire(import.meta.url)('ns-llm/ns-node');
    const names = Object.keys(imported).sort();
    console.log(names.join(), required === Client, names.every((name) => imported[name] === required[name]));`;
  const { stdout, stderr } = await runScript(script, 'module');
  const names = 'GpuResourceManager,KvCacheService,NsNodeClient,PREFIX_AFFINITY_HEADER,PROMETHEUS_CONTENT_TYPE,PerformanceProfiler,default,embed,prefixAffinity,prometheusText,query,status';
  assert.equal(stdout, `${names} true true\n`, stderr);
});

test('a client is made at once, its first call answers, and a script that used one ends by itself', async () => {
  const script = `
    import Client from 'ns-llm/ns-node';
    const started = performance.now();
    const client = new Client();
    const madeMs = performance.now() - started;
    const { text, model } = await client.generate('Once upon a time', { maxTokens: 3 });
    console.log(madeMs < 500, text.length > 0, model);`;
  assert.deepEqual(await runScript(script, 'module'), { code: 0, signal: null, stdout: 'true true demo\n', stderr: '' });
});

test('any number of clients share one engine, also those of a second copy of the package', async () => {
  await Promise.all(Array.from({ length: 5 }, () => new NsNodeClient({ engine: SETTINGS }).generate(STORY, { maxTokens: 1 })));
  assert.equal(state.engines.open().length, 1);
  const modules = join(__dirname, '..', 'lib', 'ns-node');
  for (const file of Object.keys(require.cache).filter((name) => name.startsWith(modules))) {
    delete require.cache[file];
  }
  const copy = require('../lib/ns-node/index.js') as { NsNodeClient: typeof NsNodeClient };
  assert.notEqual(copy.NsNodeClient, NsNodeClient);
  const before = (await client.metrics()).requests_total;
  await new copy.NsNodeClient().generate(STORY, { maxTokens: 1 });
  assert.equal((await client.metrics()).requests_total, before + 1);
  assert.equal(state.engines.open().length, 1);
});

test('health tells the model that really answers, as a new object at each call', async () => {
  const health = await client.health();
  assertPlain(health);
  const { status, available, model, backend, version, active_requests } = health;
  assert.deepEqual({ status, available, model, backend, active_requests }, {
    status: 'healthy', available: true, model: 'demo', backend: 'cpu', active_requests: 0,
  });
  assert.equal(version, (require('../../../package.json') as { version: string }).version);
  Object.assign(health, { metrics: {}, clientType: 'native' });
  assert.ok(!('metrics' in (await client.health())));
  const running = client.generate(STORY, { maxTokens: 50 });
  assert.equal((await client.health()).active_requests, 1);
  await running;
});

test('metrics count what was really done, failures by themselves', async () => {
  const before = await client.metrics();
  await client.generate(LONG_PROMPT, { maxTokens: 7 });
  await client.generate(LONG_PROMPT, { maxTokens: 7 });
  await client.embed('a red fox');
  await assert.rejects(client.generate(STORY, { maxTokens: -1 }));
  const after = await client.metrics();
  assertPlain(after);
  const grown = (name: keyof typeof after): number => after[name] - before[name];
  assert.equal(grown('requests_total'), 4);
  assert.equal(grown('requests_failed'), 1);
  assert.equal(grown('tokens_generated_total'), 14);
  assert.deepEqual([grown('cache_hits'), grown('cache_misses')], [1, 1]);
  assert.ok(after.p50_latency_ms > 0 && after.p50_latency_ms <= after.p95_latency_ms);
});

test('generate gives the completion without the prompt, within maxTokens, as plain JSON', async () => {
  const result = await client.generate(STORY, { maxTokens: 12, model: undefined, timeout: undefined } as object);
  assertPlain(result);
  assert.ok(result.text.length > 0 && !result.text.startsWith(STORY));
  assert.deepEqual([result.tokens_generated, result.finish_reason, result.model], [12, 'length', 'demo']);
  assert.ok(result.latency_ms > 0);
  assert.ok((await client.generate(STORY)).tokens_generated <= 64);
});

test('without options the text is greedy and reproducible; a seed gives the same text again', async () => {
  const [plain, zero, again] = await Promise.all([
    client.generate(STORY, { maxTokens: 40 }),
    client.generate(STORY, { maxTokens: 40, temperature: 0 }),
    client.generate(STORY, null),
  ]);
  assert.equal(plain.text, zero.text);
  assert.ok(again.text.startsWith(plain.text));
  const drawn = (seed: number): Promise<string> =>
    client.generate(STORY, { maxTokens: 40, temperature: 1.2, seed }).then(({ text }) => text);
  assert.equal(await drawn(7), await drawn(7));
  assert.notEqual(await drawn(7), await drawn(8));
});

test('a stream tells its text piece by piece, one end with the counts, and resolves with that', async () => {
  const read = () => listen(STORY, { maxTokens: 30 });
  const { pieces, heard, end } = await inPieces(11, read, ({ pieces: { length } }) => length);
  const { text } = await client.generate(STORY, { maxTokens: 30 });
  assert.equal(pieces.map(({ stream_token }) => stream_token).join(''), text);
  assert.deepEqual(pieces.map(({ idx }) => idx), pieces.map((_, index) => index));
  assert.ok(pieces.every(({ stream_token }) => stream_token !== ''));
  assert.deepEqual(heard.filter(({ done }) => done), [end]);
  assert.equal(heard.at(-1), end);
  assertPlain(end);
  assert.deepEqual([end.stream_token, end.done, end.tokens_generated, end.text], ['', true, 30, text]);
});

test('a listener that throws or rejects ends its own stream with its own error, and hurts nothing else', async () => {
  const engine = state.engines.open()[0]!;
  const before = await client.metrics();
  const undisturbed = await client.generate(STORY, { maxTokens: 60 });
  const beside = client.generate(STORY, { maxTokens: 60 });
  let calls = 0;
  const throwing = (): void => {
    calls += 1;
    throw new Error('mine');
  };
  await assert.rejects(client.generateStream(STORY, { maxTokens: 2_000 }, throwing), { message: 'mine' });
  assert.equal(calls, 1);
  const rejecting = async (): Promise<void> => Promise.reject(new Error('late'));
  await assert.rejects(client.generateStream(STORY, { maxTokens: 2_000 }, rejecting), { message: 'late' });
  assert.equal((await beside).text, undisturbed.text);
  await until(engine, 'idle', isIdle);
  assert.equal((await client.generateStream(STORY, { maxTokens: 2 })).tokens_generated, 2);
  const after = await client.metrics();
  assert.equal(after.requests_cancelled - before.requests_cancelled, 2);
  assert.equal(after.requests_failed, before.requests_failed);
});

test('an embedding is a plain array of unit length, reproducible, and near that of a like text', async () => {
  const one = await client.embed('a small dog ran home');
  assertPlain(one);
  assert.equal(one.dimensions, one.embedding.length);
  assert.equal(one.model, 'demo');
  assert.ok(one.tokens > 3 && !one.truncated);
  const dot = (a: number[], b: number[]): number => a.reduce((sum, value, index) => sum + value * b[index]!, 0);
  assert.ok(Math.abs(dot(one.embedding, one.embedding) - 1) < 1e-5);
  assert.deepEqual((await client.embed('a small dog ran home', { model: 'all-MiniLM-L6-v2' })).embedding, one.embedding);
  const near = await client.embed('a small dog walked home');
  const far = await client.embed('{"name": "Tom", "age": 7}');
  assert.ok(dot(one.embedding, near.embedding) > dot(one.embedding, far.embedding));
  const long = await client.embed('bear and fox '.repeat(2_000));
  assert.ok(long.truncated && long.tokens < 2_000, `${long.tokens} tokens`);
});

test('every fault is a rejection with an Error that names its cause', async () => {
  const cases: [string, () => Promise<unknown>, string, RegExp][] = [
    ['no text', () => client.generate(undefined as never), 'invalid_argument', /text is undefined, must be a string/],
    ['no text', () => client.embed({} as never), 'invalid_argument', /text is an object, must be a string/],
    ['wrong type', () => client.generate(STORY, { maxTokens: '5' as never }), 'invalid_argument', /maxTokens/],
    ['range', () => client.generate(STORY, { temperature: -1 }), 'invalid_argument', /temperature is -1/],
    ['timeout', () => client.generate(STORY, { timeout: 0 }), 'invalid_argument', /timeout is 0/],
    ['timeout', () => client.embed(STORY, { timeout: NaN }), 'invalid_argument', /timeout is NaN/],
    ['context', () => client.generate(STORY, { contextId: 5 as never }), 'invalid_argument', /contextId is 5/],
    ['model', () => client.generate(STORY, { model: 5 as never }), 'invalid_argument', /model is 5/],
    ['model', () => client.embed(STORY, { model: '../demo/x' }), 'invalid_argument', /"\.\.\/demo\/x".*not installed.*demo/],
    ['long', () => client.generate('bear '.repeat(9_000)), 'prompt_too_long', /\d+ tokens/],
    ['listener', () => client.generateStream(STORY, {}, 5 as never), 'invalid_argument', /onToken is 5/],
    ['options', () => client.generate(STORY, 'x' as never), 'invalid_argument', /options is a string/],
    ['command', () => client.callNative({ cmd: 'batch_embed' }), 'invalid_argument', /batch_embed/],
    ['messages', () => client.chat(undefined as never), 'invalid_argument', /./],
  ];
  for (const [name, call, code, text] of cases) {
    let promise: Promise<unknown> | undefined;
    assert.doesNotThrow(() => (promise = call()), name);
    await assert.rejects(promise!, withCode(code, text), name);
  }
});

test('timeout, stop and signal bound a call, and a call that is given up is no failure', async () => {
  const engine = state.engines.open()[0]!;
  await assert.rejects(client.generate(STORY, { maxTokens: 2_000, timeout: 5 }), withCode('deadline_exceeded'));
  const { text } = await client.generate(STORY, { maxTokens: 60 });
  const stopped = await client.generate(STORY, { maxTokens: 60, stop: ['.'] });
  assert.deepEqual([stopped.text, stopped.finish_reason], [text.split('.')[0], 'stop']);
  const controller = new AbortController();
  const before = await client.metrics();
  const aborted = client.generateStream(STORY, { maxTokens: 2_000, signal: controller.signal }, () => controller.abort());
  await assert.rejects(aborted, withCode('cancelled'));
  await assert.rejects(client.embed(STORY, { signal: AbortSignal.abort() }), withCode('cancelled'));
  const after = await client.metrics();
  assert.equal(after.requests_cancelled, before.requests_cancelled + 2);
  assert.equal(after.requests_failed, before.requests_failed);
  await until(engine, 'idle', isIdle);
});

test('text is text: quotes, newlines, other scripts and emoji survive, and no piece holds half a character', async () => {
  for (const prompt of ['He said: "no\\way"\n\t{}', '你好，世界', 'Zoë 👩‍👩‍👧 🇫🇷', '\u0000\u2028</script>']) {
    const options = { maxTokens: 60, temperature: 2, seed: 5 };
    const { pieces, end } = await listen(prompt, options);
    const joined = pieces.map(({ stream_token }) => stream_token).join('');
    assert.equal(joined, end.text);
    assert.equal((await client.generate(prompt, options)).text, end.text);
    assert.deepEqual(JSON.parse(JSON.stringify(end)), end);
    for (const { stream_token } of pieces) {
      assert.doesNotMatch(stream_token, /[\ud800-\udfff](?![\udc00-\udfff])(?<![\ud800-\udbff][\udc00-\udfff])/);
    }
    assert.equal((await client.embed(prompt)).embedding.length, 256);
  }
});

test('many calls at once do not mix', async () => {
  const options = (seed: number): object => ({ maxTokens: 24, temperature: 1, seed });
  const alone = [];
  for (let i = 0; i < 12; i += 1) {
    alone.push((await client.generate(story(i), options(i))).text);
  }
  const together = await Promise.all(alone.map((_, i) => client.generateStream(story(i), options(i))));
  assert.deepEqual(together.map(({ text }) => text), alone);
  assert.ok(new Set(alone).size >= 8, 'the stories are alike by themselves');
});

test('a shared prefix is computed once within a context, and not shared between contexts', async () => {
  const prompt = `Another day. ${LONG_PROMPT}`;
  const cached = async (contextId?: string): Promise<number> =>
    (await client.generate(prompt, { maxTokens: 1, contextId })).cached_tokens;
  assert.equal(await cached(), 0);
  assert.ok((await cached()) >= 32);
  assert.equal(await cached('alice'), 0);
  assert.ok((await cached('alice')) >= 32);
  assert.equal(await cached('bob'), 0);
});

test('commands of the line protocol are answered in process, by an addon that is a file', async () => {
  assert.equal(client.fallback, false);
  assert.ok(existsSync(client.baseBinaryPath));
  const generated = await client.callNative({ cmd: 'generate', text: STORY, max_tokens: 4 });
  assert.deepEqual({ ...generated, latency_ms: 0 }, { ...(await client.generate(STORY, { maxTokens: 4 })), latency_ms: 0 });
  assert.ok('embedding' in (await client.callNative({ cmd: 'embed', text: 'x' })));
  assert.ok('requests_total' in (await client.callNative({ cmd: 'metrics' })));
  assert.equal((await client.callNative({ cmd: 'health' }) as { status: string }).status, 'healthy');
  assert.deepEqual(await client.callNative({ cmd: 'capabilities' }), { providers: ['cpu'] });
  assert.ok(new NsNodeClient({ binaryPath: '/nowhere', prototypeUrl: 'http://nowhere' }) instanceof NsNodeClient);
});

test('an engine that has closed is opened again by the request after', async () => {
  const [engine] = state.engines.open();
  await engine!.close();
  await assert.rejects(client.generate(STORY, { maxTokens: 2 }), withCode('closed'));
  assert.equal((await client.generate(STORY, { maxTokens: 2 })).tokens_generated, 2);
  assert.notEqual(state.engines.open()[0], engine);
});

test('the functions of the embedding service and of the chat adapter answer in this process', async () => {
  const vector = await embed('a red fox');
  assert.deepEqual(vector, (await client.embed('a red fox')).embedding);
  await assert.rejects(embed(5 as never), withCode('invalid_argument'));
  assert.deepEqual(await status(), { ok: true, message: 'demo answers in this process' });
  const { verifiedAt, raw, ...answer } = await query({ query: 'What is the capital of France?', model: 'llama3' });
  assert.deepEqual(answer, { source: 'LocalLLM', value: 'The capital of France is Paris.', error: null, origin: 'local-llm' });
  assert.ok(Date.now() - Date.parse(verifiedAt) < 60_000);
  assertPlain(raw);
  const { value, error } = await query({ query: 'Hello', model: 'no-such-model' });
  assert.equal(value, null);
  assert.match(error ?? '', /no-such-model/);
});

test('SIGTERM during a generation ends the process as its handler says', async () => {
  const script = `
    import Client from 'ns-llm/ns-node';
    process.on('SIGTERM', () => process.exit(0));
    let pieces = 0;
    await new Client().generateStream('Once upon a time', { maxTokens: 1500 }, () => {
      if (++pieces === 3) process.kill(process.pid, 'SIGTERM');
    });`;
  const started = Date.now();
  assert.deepEqual(await runScript(script, 'module'), { code: 0, signal: null, stdout: '', stderr: '' });
  assert.ok(Date.now() - started < 15_000);
});

test('a profiler sees every request of a client without being told', async () => {
  const profiler = new PerformanceProfiler();
  profiler.clear();
  await sleep(1);
  await client.generate(STORY, { maxTokens: 20 });
  await client.embed('a fox');
  await assert.rejects(client.generate(STORY, { model: 'nothing-like-it' }));
  const { requests, latency, throughput } = profiler.getMetrics();
  assert.deepEqual(requests, { total: 3, successful: 2, failed: 1, cancelled: 0, cached: 0, successRate: '66.67' });
  for (const { p50, p95 } of Object.values(latency)) {
    assert.ok(p50 > 0 && p95 >= p50, JSON.stringify(latency));
  }
  assert.ok(Number(throughput.tokensPerSecond) > 0);
});

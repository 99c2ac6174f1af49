import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { request } from 'node:http';
import type { IncomingMessage } from 'node:http';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import { assertPlain, ENDLESS_PROMPT, LONG_PROMPT, story } from './ns_node_support.js';
import { inPieces, ROOT, STORY } from './support.js';

interface Server {
  process: ChildProcess;
  url: string;
  /** What it wrote to its error output. */
  errors: () => string;
}

/** The example server in a process of its own, on a free port. */
async function start(): Promise<Server> {
  const env = { ...process.env, PORT: '0' };
  const child = spawn(process.execPath, [join(ROOT, 'examples', 'ns-node', 'server.mjs')], { env });
  let errors = '';
  child.stderr.on('data', (text: Buffer) => (errors += text.toString()));
  let printed = '';
  for await (const text of child.stdout) {
    printed += String(text);
    const url = /http:\/\/[\d.:]+/.exec(printed)?.[0];
    if (url) {
      return { process: child, url, errors: () => errors };
    }
  }
  throw new Error(`the server ended: ${errors}`);
}

let server: Server;
before(async () => {
  server = await start();
});
after(() => server.process.kill('SIGKILL'));

/** Answers of routes, looked at field by field. */
type Answer = Record<string, any>;

async function get(path: string): Promise<Answer> {
  const response = await fetch(server.url + path);
  assert.equal(response.status, 200, path);
  const answer = (await response.json()) as Answer;
  assertPlain(answer, path);
  return answer;
}

async function send(path: string, body: object, method = 'POST'): Promise<{ status: number; answer: Answer }> {
  const headers = { 'content-type': 'application/json' };
  const response = await fetch(server.url + path, { method, headers, body: JSON.stringify(body) });
  return { status: response.status, answer: (await response.json()) as Answer };
}

async function post(path: string, body: object): Promise<Answer> {
  const { status, answer } = await send(path, body);
  assert.equal(status, 200, JSON.stringify(answer));
  return answer;
}

/** Events of a stream: `[name, data]`, unnamed ones with an empty name. Leaving the loop hangs up. */
async function* events(body: object): AsyncGenerator<[string, string]> {
  const headers = { 'content-type': 'application/json' };
  const sent = request(`${server.url}/api/generative/generate/stream`, { method: 'POST', headers, agent: false });
  sent.end(JSON.stringify(body));
  const [response] = (await once(sent, 'response')) as [IncomingMessage];
  assert.match(response.headers['content-type'] ?? '', /^text\/event-stream/);
  response.setEncoding('utf8');
  let rest = '';
  // A loop that is left destroys the response, and with it the connection.
  for await (const text of response) {
    const blocks = (rest + String(text)).split('\n\n');
    rest = blocks.pop()!;
    for (const block of blocks) {
      yield [/^event: (.*)$/m.exec(block)?.[1] ?? '', /^data: (.*)$/m.exec(block)?.[1] ?? ''];
    }
  }
}

test('health names the engine that answers, and holds the metrics that the server writes into it', async () => {
  const { nsLlm } = await get('/health');
  assert.deepEqual([nsLlm.status, nsLlm.available, nsLlm.model, nsLlm.clientType], ['healthy', true, 'demo', 'native']);
  assert.equal(typeof nsLlm.metrics.requests_total, 'number');
});

test('generate, stream and embed answer over HTTP, and agree', async () => {
  const body = { text: STORY, maxTokens: 24, model: 'llama3.2:3b' };
  const generated = await post('/api/generative/generate', body);
  assert.deepEqual([generated['tokens_generated'], generated['model']], [24, 'demo']);
  const read = async () => {
    const heard: [string, string][] = [];
    for await (const event of events(body)) {
      heard.push(event);
    }
    return heard;
  };
  const heard = await inPieces(7, read, ({ length }) => length);
  assert.deepEqual(heard.pop(), ['done', '[DONE]']);
  assert.ok(heard.every(([name]) => name === ''));
  const pieces = heard.map(([, data]) => (JSON.parse(data) as { stream_token: string }).stream_token);
  assert.equal(pieces.join(''), generated['text']);
  const embedded = await post('/embed', { text: 'a red fox' });
  assert.equal(embedded['embedding'].length, embedded['dimensions']);
});

test('faults are statuses with the cause, not answers', async () => {
  const { status, answer } = await send('/api/generative/generate', { text: STORY, model: 'no-such-model' });
  assert.equal(status, 500);
  assert.match(answer['details'], /"no-such-model", which is not installed; installed: demo/);
  assert.equal((await send('/embed', { text: 5 })).status, 502);
  const heard = [];
  for await (const event of events({ text: STORY, maxTokens: -3 })) {
    heard.push(event);
  }
  assert.equal(heard[0]?.[0], 'error');
});

test('a shared prefix shows in the cache endpoint, whose keys are no paths', async () => {
  await post('/api/kv-cache/clear', {});
  const idle = await get('/api/kv-cache/stats');
  assert.deepEqual([idle['hits'], idle['misses'], idle['hitRate'], idle['enabled']], [0, 0, 0, true]);
  const prompts = ['Then', 'But', 'So', 'And'].map((word) => `${LONG_PROMPT} ${word} the dog`);
  for (const text of prompts) {
    await post('/api/generative/generate', { text, maxTokens: 2 });
  }
  const stats = await get('/api/kv-cache/stats');
  assert.ok(stats['hits'] >= 9, JSON.stringify(stats));
  assert.ok(stats['hitRate'] > 30 && stats['hitRate'] <= 100, JSON.stringify(stats));
  assert.ok(stats['memorySize'] > 0);
  assert.deepEqual(await get('/api/kv-cache/..%2F..%2Fpackage/exists'), { exists: false });
  assert.deepEqual((await send('/api/kv-cache/..%2F..%2Fpackage', {}, 'DELETE')).answer, { success: false });
  assert.deepEqual(await post('/api/kv-cache/prune', {}), { success: true, message: 'Cache pruned' });
});

test('metrics are text that Prometheus reads, and count what was done between two readings', async () => {
  const sample = /^([a-z_][a-z0-9_:]*)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+\})? (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)$/;
  const scrape = async (): Promise<Map<string, number>> => {
    const response = await fetch(`${server.url}/metrics`);
    assert.equal(response.headers.get('content-type'), 'text/plain; version=0.0.4; charset=utf-8');
    const text = await response.text();
    assert.ok(text.endsWith('\n'));
    const samples = new Map<string, number>();
    const types = new Map<string, string>();
    for (const line of text.trimEnd().split('\n')) {
      const type = /^# TYPE (\S+) (counter|gauge|histogram)$/.exec(line);
      if (type) {
        assert.ok(!types.has(type[1]!), line);
        types.set(type[1]!, type[2]!);
      } else if (!/^# HELP \S+ ./.test(line)) {
        const [, name, labels = '', value] = sample.exec(line) ?? assert.fail(line);
        const isTyped = types.has(name!) || types.get(name!.replace(/_(bucket|sum|count)$/, '')) === 'histogram';
        assert.ok(isTyped && !samples.has(name! + labels), line);
        samples.set(name! + labels, Number(value));
      }
    }
    return samples;
  };
  await post('/api/generative/generate', { text: STORY, maxTokens: 1 });
  const before = await scrape();
  for (let i = 0; i < 3; i += 1) {
    await post('/api/generative/generate', { text: STORY, maxTokens: 8 });
  }
  const after = await scrape();
  const grown = (name: string): number => after.get(name)! - before.get(name)!;
  assert.equal(grown('ns_llm:generation_tokens_total{model_name="demo"}'), 24);
  assert.equal(grown('ns_llm:request_success_total{model_name="demo"}'), 3);
  assert.ok(after.has('ns_llm:prefix_cache_tier_hits_total{model_name="demo",tier="pool"}'));
  for (const name of ['time_to_first_token', 'inter_token_latency', 'e2e_request_latency']) {
    assert.equal(grown(`ns_llm:${name}_seconds_count`), 3, name);
    assert.equal(grown(`ns_llm:${name}_seconds_bucket{le="+Inf"}`), 3, name);
    assert.ok(grown(`ns_llm:${name}_seconds_sum`) > 0, name);
    const buckets = [...after].filter(([sampleName]) => sampleName.startsWith(`ns_llm:${name}_seconds_bucket`));
    assert.ok(buckets.length > 15 && buckets.every(([, count], idx) => count >= (buckets[idx - 1]?.[1] ?? 0)), name);
  }
  for (const name of ['request_queue_depth', 'gpu_utilization', 'active_requests', 'avg_latency_ms']) {
    assert.ok(after.has(name), name);
  }
});

test('GPU endpoints keep their shapes, whatever this machine has', async () => {
  const { capabilities, cpuInfo, current } = await get('/api/gpu/status');
  assert.deepEqual(Object.keys(capabilities), [
    'hasGpu', 'vendor', 'deviceCount', 'totalVram', 'computeCapability', 'providers',
  ]);
  assert.equal(capabilities.hasGpu, current !== null);
  assert.ok(cpuInfo.cores > 0 && capabilities.providers.includes('cpu'));
  assert.equal((await post('/api/gpu/can-handle', { requiredVram: 256 }))['capable'], true);
  assert.equal(typeof (await get('/api/gpu/utilization?minutes=5'))['average'], 'number');
  assert.equal((await get('/api/gpu/metadata'))['gpu'].available, capabilities.hasGpu);
});

test('chat is answered by the same engine', async () => {
  const { value, error, origin } = await post('/api/chat', { question: 'What is the capital of France?' });
  assert.deepEqual([error, origin], [null, 'local-llm']);
  assert.match(value, /Paris/);
  const wrong = await post('/api/chat', { question: 'Hello', model: 'no-such-model' });
  assert.equal(wrong['value'], null);
  assert.match(wrong['error'], /no-such-model/);
});

test('concurrent clients that stay or hang up: all that stay are answered, the server stays quick, the numbers move', async (t) => {
  await post('/api/performance/clear', {});
  const alone = new Map<number, string>();
  for (let i = 0; i < 8; i += 1) {
    alone.set(i, (await post('/api/generative/generate', { text: story(i), maxTokens: 48 }))['text']);
  }
  const slowest = { ms: 0 };
  let busy = true;
  const watch = (async () => {
    for (; busy; await sleep(20)) {
      const started = performance.now();
      await get('/health');
      slowest.ms = Math.max(slowest.ms, performance.now() - started);
    }
  })();
  const stay = Array.from({ length: 16 }, async (_, i) => {
    const { text } = await post('/api/generative/generate', { text: story(i % 8), maxTokens: 48 });
    assert.equal(text, alone.get(i % 8));
  });
  const hangUp = Array.from({ length: 8 }, async () => {
    for await (const [name] of events({ text: ENDLESS_PROMPT, maxTokens: 1_500 })) {
      assert.equal(name, '');
      return;
    }
  });
  const embeds = Array.from({ length: 8 }, () => post('/embed', { text: 'a fox and a bear' }));
  try {
    await Promise.all([...stay, ...hangUp, ...embeds]);
  } finally {
    busy = false;
    await watch;
  }
  t.diagnostic(`slowest health during generation: ${slowest.ms.toFixed(0)} ms`);
  // The bound of the contract is 400 ms; a busy test machine gets some more.
  assert.ok(slowest.ms < 1_000, `${slowest.ms} ms`);
  for (let tries = 0; (await get('/health'))['nsLlm'].active_requests > 0; tries += 1) {
    assert.ok(tries < 200, 'requests of clients that hung up go on');
    await sleep(20);
  }
  const { latency, requests, throughput } = await get('/api/performance/metrics?window=60000');
  assert.deepEqual([requests.successful, requests.failed, requests.cancelled], [32, 0, 8], JSON.stringify(requests));
  assert.equal(requests.successRate, '100.00');
  for (const [name, { p50, p95, p99, avg }] of Object.entries<Record<string, number>>(latency)) {
    assert.ok(p50! > 0 && p50! <= p95! && p95! <= p99! && avg! > 0, name);
  }
  assert.ok(Number(throughput.tokensPerSecond) > 0 && Number(throughput.requestsPerSecond) > 0);
  const { summary, bottlenecks, recommendations } = await get('/api/performance/report');
  assert.match(summary.grade, /^[ABC]$/);
  assert.ok(Array.isArray(bottlenecks.bottlenecks) && Array.isArray(recommendations));
  assert.equal((await get('/api/performance/bottlenecks?limit=5'))['analyzed'], 5);
});

test('SIGTERM during generations ends the server with code 0, soon and silently', async () => {
  const streams = Array.from({ length: 4 }, async () => {
    for await (const [name] of events({ text: ENDLESS_PROMPT, maxTokens: 1_900 })) {
      if (name === '') {
        return;
      }
    }
  });
  void post('/api/generative/generate', { text: ENDLESS_PROMPT, maxTokens: 1_900 }).catch(() => {});
  await Promise.all(streams);
  const started = Date.now();
  const exited = once(server.process, 'exit');
  server.process.kill('SIGTERM');
  assert.deepEqual(await exited, [0, null]);
  assert.ok(Date.now() - started < 15_000);
  assert.equal(server.errors(), '');
});

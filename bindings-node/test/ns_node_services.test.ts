import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import { GpuResourceManager, KvCacheService, NsNodeClient, PerformanceProfiler } from '../lib/ns-node/index.js';
import type { Distribution } from '../lib/ns-node/distribution.js';
import type { GpuReader } from '../lib/ns-node/gpu_watch.js';
import { gpuLines } from '../lib/ns-node/prometheus.js';
import { bottlenecksOf, reportOf } from '../lib/ns-node/performance_report.js';
import { assertPlain, LONG_PROMPT, SETTINGS } from './ns_node_support.js';
import { runScript, STORY, withCode } from './support.js';

const client = new NsNodeClient({ engine: SETTINGS });

test('the cache tells of KV that is really found again, and clearing makes it unfindable', async () => {
  const cache = new KvCacheService();
  await cache.initialize();
  const idle = cache.getStats();
  assertPlain(idle);
  assert.deepEqual([idle.hits, idle.misses, idle.hitRate, idle.memorySize], [0, 0, 0, 0]);
  const first = await client.generate(LONG_PROMPT, { maxTokens: 1 });
  assert.equal(cache.getStats().hits, 0);
  assert.ok(cache.getStats().misses >= 3);
  const second = await client.generate(`${LONG_PROMPT} Then the`, { maxTokens: 1 });
  assert.equal(first.cached_tokens, 0);
  assert.ok(second.cached_tokens >= 32);
  const stats = cache.getStats();
  assert.equal(stats.hits, second.cached_tokens / 16);
  assert.equal(stats.prefix.hitTokens, second.cached_tokens);
  assert.equal(stats.totalRequests, stats.hits + stats.misses);
  assert.ok(Math.abs(stats.hitRate - (stats.hits / stats.totalRequests) * 100) < 0.01);
  assert.ok(stats.memorySize >= 3 && stats.prefix.cachedBytes > 0);
  await cache.clear();
  assert.deepEqual([cache.getStats().hits, cache.getStats().hitRate], [0, 0]);
  assert.equal((await client.generate(LONG_PROMPT, { maxTokens: 1 })).cached_tokens, 0);
  assert.ok((await client.generate(LONG_PROMPT, { maxTokens: 1 })).cached_tokens >= 32);
});

test('stored responses come back as copies, typed arrays as they were, and are counted', async () => {
  const cache = new KvCacheService();
  const key = cache.cacheKey('prompt', 'demo');
  const data = { text: 'x', vector: new Float32Array([1, -0.5]), bytes: Buffer.from([1, 2, 3]), list: [1, null] };
  assert.equal(await cache.retrieve(key), null);
  assert.equal(await cache.store(key, data, { user: 'alice' }), true);
  const found = await cache.retrieve(key);
  assert.deepEqual(found?.data, { ...data, bytes: new Uint8Array([1, 2, 3]) });
  assert.deepEqual([found?.source, found?.metadata['user'], found?.metadata.accessCount], ['memory', 'alice', 1]);
  (found!.data as typeof data).vector[0] = 9;
  assert.equal(((await cache.retrieve(key))!.data as typeof data).vector[0], 1);
  const { stores, retrievals, responses, memorySize, diskSize } = cache.getStats();
  assert.deepEqual([stores, retrievals, responses.hits, responses.misses, diskSize], [1, 3, 2, 1, 0]);
  assert.ok(memorySize >= 1);
  assert.deepEqual([await cache.has(key), await cache.delete(key), await cache.delete(key)], [true, true, false]);
  const off = new KvCacheService({ enabled: false });
  assert.deepEqual([await off.store(key, 1), await off.retrieve(key), off.getStats().enabled], [false, null, false]);
  await assert.rejects(cache.store(key, 5n), withCode('invalid_argument', /BigInt/));
});

test('a key is never a path: nothing is read, written or removed beside the memory', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'ns-llm-cache-'));
  try {
    const cache = new KvCacheService({ cacheDir: folder });
    await cache.initialize();
    for (const key of ['../../package', '..%2F..%2Fpackage', '/etc/passwd', join(folder, 'x'), '', '__proto__', '\0']) {
      assert.deepEqual([await cache.has(key), await cache.delete(key), await cache.retrieve(key)], [false, false, null]);
      assert.equal(await cache.store(key, { key }), true);
      assert.deepEqual((await cache.retrieve(key))?.data, { key });
    }
    assert.deepEqual(readdirSync(folder), []);
    await assert.rejects(cache.has(5 as never), withCode('invalid_argument', /key is 5/));
    await assert.rejects(cache.store('k'.repeat(2_000), 1), withCode('invalid_argument', /2000 characters/));
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test('a cache key tells apart whatever changes an answer', () => {
  const cache = new KvCacheService();
  const keys = [
    cache.cacheKey('p'),
    cache.cacheKey('p', 'demo'),
    cache.cacheKey('p', 'demo', { temperature: 0.7 }),
    cache.cacheKey('p', 'demo', { topP: 0.5 }),
    cache.cacheKey('p', 'demo', { maxTokens: 5 }),
    cache.cacheKey('p', 'demo', { seed: 1n }),
    cache.cacheKey('p', 'demo', { system: 's' }),
    cache.cacheKey('q', 'demo'),
  ];
  assert.equal(new Set(keys).size, keys.length);
  assert.ok(keys.every((key) => /^[0-9a-f]{64}$/.test(key)));
  assert.equal(cache.cacheKey('p', 'demo', { temperature: 0 }), keys[1]);
});

test('serialized values keep every typed array, and a stranger\'s text makes plain values only', () => {
  const cache = new KvCacheService();
  const value = {
    float: new Float32Array([0.1, NaN, Infinity]),
    double: new Float64Array([Math.PI]),
    big: new BigInt64Array([-1n]),
    part: new Uint16Array([1, 2, 3, 4]).subarray(1, 3),
    nested: [{ int: new Int8Array([-128]) }],
    empty: new Uint32Array(0),
  };
  assert.deepEqual(cache.deserialize(cache.serialize(value)), { ...value, part: new Uint16Array([2, 3]) });
  const stranger = (text: string): unknown => cache.deserialize(Buffer.from(text).toString('base64'));
  for (const text of ['{"$typedArray":["Function","eA=="]}', '{"$typedArray":["constructor",""]}', '{"$typedArray":5}']) {
    assert.deepEqual(stranger(text), JSON.parse(text));
  }
  assert.deepEqual(stranger('{"$typedArray":["Float64Array","AAAA"]}'), new Float64Array(0));
  assert.throws(() => stranger('{'), withCode('invalid_argument', /no serialized value/));
});

test('stored responses are bounded in entries and bytes, the least recently used goes, and none is served too old', async () => {
  const small = new KvCacheService({ maxMemorySize: 2, maxDiskSize: 1 });
  const held = (cache: KvCacheService): Promise<boolean[]> =>
    Promise.all(['a', 'b', 'c', 'd'].map((key) => cache.has(key)));
  for (const key of ['a', 'b', 'c']) {
    assert.ok(await small.store(key, key));
  }
  const { metadata } = (await small.retrieve('a'))!;
  assert.ok(metadata.lastAccessed >= metadata.storedAt && Math.abs(Date.now() - metadata.storedAt) < 3_600_000);
  await small.store('d', 'd');
  assert.deepEqual(await held(small), [true, false, true, true]);
  const { evictions, responses } = small.getStats();
  assert.deepEqual([evictions, responses.entries], [1, 3]);
  await small.clear();
  assert.deepEqual([await held(small), small.getStats().responses.bytes], [[false, false, false, false], 0]);

  const tight = new KvCacheService({ maxBytes: 4_000 });
  assert.deepEqual([await tight.store('a', 'x'.repeat(3_000)), await tight.store('b', 'x'.repeat(1_000))], [true, true]);
  assert.deepEqual(await held(tight), [false, true, false, false]);
  assert.deepEqual([await tight.store('b', 'x'.repeat(4_000)), await tight.has('b')], [false, false]);
  assert.ok(tight.getStats().responses.bytes <= 4_000);

  const brief = new KvCacheService({ ttlMs: 1 });
  await brief.store('a', 1);
  await brief.store('b', 1);
  await sleep(5);
  assert.deepEqual([await brief.retrieve('a'), await brief.prune(), brief.getStats().responses.entries], [null, 1, 0]);
  assert.throws(() => new KvCacheService({ ttlMs: 0 }), withCode('invalid_argument', /ttlMs is 0/));
});

test('an idle profiler has finite numbers and no grade', () => {
  const profiler = new PerformanceProfiler();
  profiler.clear();
  const report = profiler.generateReport();
  assertPlain(report);
  assert.deepEqual([report.summary.score, report.summary.grade], [0, 'N/A']);
  const { requests, throughput, sampleSize } = report.metrics;
  assert.deepEqual([requests.total, requests.successRate, sampleSize], [0, '0.00', 0]);
  assert.deepEqual([throughput.requestsPerSecond, throughput.tokensPerSecond], ['0.00', '0.00']);
});

test('what a caller measures is in all numbers of its window, in fractions of a millisecond', async () => {
  const profiler = new PerformanceProfiler();
  profiler.clear();
  profiler.startProfile('one', 'generate', { user: 'alice' });
  await sleep(20);
  profiler.checkpoint('one', 'first-token');
  await sleep(40);
  const ended = profiler.endProfile('one', 'success', { tokenCount: 5 });
  assert.ok(ended && ended.duration >= 59 && ended.checkpoints[0]!.elapsed >= 19);
  assert.equal(profiler.endProfile('one'), null);
  profiler.startProfile('two', 'embed');
  profiler.endProfile('two', 'error');
  const { latency, requests, throughput, sampleSize, timeWindow } = profiler.getMetrics();
  assert.deepEqual([requests.total, requests.failed, requests.successRate, sampleSize], [2, 1, '50.00', 2]);
  assert.equal(timeWindow, '60s');
  assert.ok(latency.ttft.p95 >= 19 && latency.ttft.p95 < latency.endToEnd.p95);
  assert.ok(Math.abs(latency.perToken.avg - (latency.endToEnd.avg - latency.ttft.avg) / 4) < 0.01);
  assert.equal(latency.embedding.p95, 0);
  const perSecond = 5 / (latency.endToEnd.avg / 1e3);
  assert.ok(Math.abs(Number(throughput.tokensPerSecond) - perSecond) < 0.1);
  await sleep(30);
  const window = profiler.getMetrics(10);
  assert.deepEqual([window.sampleSize, window.requests.total, window.latency.endToEnd.p95], [0, 0, 0]);
  assertPlain(profiler.getMetrics(NaN));
  profiler.clear();
  assert.equal(profiler.getMetrics().requests.total, 0);
});

test('profiles that nobody ends are bounded', () => {
  const profiler = new PerformanceProfiler();
  for (let i = 0; i < 3_000; i += 1) {
    profiler.startProfile(`profile ${i}`);
  }
  assert.equal(profiler.getMetrics().throughput.concurrentRequests, 1_000);
  assert.equal(profiler.endProfile('profile 0'), null);
  assert.ok(profiler.endProfile('profile 2999'));
});

const times = (p95: number): Distribution => ({ p50: 1, p95, p99: p95, avg: 1 });
const FINE = { successful: 100, failed: 0, generations: 100, perToken: times(10), tokensPerSecond: 50 };

test('bottlenecks, score and recommendations follow the targets', async () => {
  const types = (observed: Partial<Parameters<typeof bottlenecksOf>[0]>): string[] => {
    return bottlenecksOf({ ...FINE, ...observed }).map(({ type }) => type);
  };
  assert.deepEqual(types({}), []);
  assert.deepEqual(types({ failed: 5 }), []);
  assert.deepEqual(types({ failed: 6 }), ['high_failure_rate']);
  assert.deepEqual(types({ perToken: times(81) }), ['slow_operations']);
  assert.deepEqual(types({ tokensPerSecond: 9.9 }), ['low_throughput']);
  assert.deepEqual(types({ tokensPerSecond: 9.9, generations: 10 }), []);
  const profiler = new PerformanceProfiler();
  profiler.clear();
  const idle = profiler.getMetrics();
  const graded = (endToEndP95: number, tokensPerSecond: number, successPercent: number, found = bottlenecksOf(FINE)): unknown[] => {
    const latency = { ...idle.latency, endToEnd: times(endToEndP95) };
    const requests = { ...idle.requests, successful: 1 };
    const analysis = { bottlenecks: found, analyzed: 1, timeframe: '' };
    const { score, grade } = reportOf({ ...idle, latency, requests }, { tokensPerSecond, successPercent }, analysis).summary;
    return [score, grade];
  };
  assert.deepEqual(graded(100, 50, 100), [100, 'A']);
  assert.deepEqual(graded(501, 50, 100), [90, 'A']);
  assert.deepEqual(graded(1_001, 50, 100), [80, 'A']);
  assert.deepEqual(graded(1_001, 9.99, 100), [65, 'B']);
  assert.deepEqual(graded(1_001, 9.99, 94), [59, 'C']);
  assert.deepEqual(graded(100, 50, 95, bottlenecksOf({ ...FINE, failed: 50, perToken: times(81) })), [85, 'A']);
  // Embeddings alone have no throughput to judge.
  assert.deepEqual(graded(0, 0, 100), [100, 'A']);
  await client.generate(STORY, { maxTokens: 24 });
  for (let i = 0; i < 4; i += 1) {
    await client.generate(STORY, { maxTokens: -1 }).catch(() => {});
  }
  const bad = profiler.generateReport();
  // 100, less 80 of failures, less 10 for that bottleneck, and less what a busy machine costs.
  assert.ok(bad.summary.score <= 10 && bad.summary.grade === 'C', JSON.stringify(bad));
  const [bottleneck] = bad.bottlenecks.bottlenecks;
  assert.deepEqual(Object.keys(bottleneck!), ['type', 'severity', 'current', 'target', 'suggestion']);
  assert.equal(bad.recommendations[0]?.category, 'high_failure_rate');
  assertPlain(bad);
});

/** Two devices, one of which tells little. */
const DEVICES: Awaited<ReturnType<GpuReader>> = [
  {
    vendor: 'nvidia', index: 0, name: 'RTX 3070', memoryTotalBytes: 8 * 2 ** 30, memoryUsedBytes: 2 * 2 ** 30,
    utilizationPercent: 15, temperatureCelsius: 52, powerWatts: 31.5, computeCapability: '8.6',
  },
  { vendor: 'nvidia', index: 1, name: 'Integrated' },
];

test('no GPU is a normal case: the endpoints keep their shapes and the processor answers', async () => {
  const manager = new GpuResourceManager({ readGpus: async () => [] });
  const none = { hasGpu: false, vendor: 'none', deviceCount: 0, totalVram: 0, computeCapability: null, providers: ['cpu'] };
  assert.deepEqual(await manager.initialize(), none);
  const status = await manager.getStatus();
  assertPlain(status);
  assert.deepEqual([status.capabilities, status.current, status.lastUpdate], [none, null, null]);
  assert.ok(status.cpuInfo.cores > 0 && status.cpuInfo.loadAverage.length === 3);
  assert.deepEqual(manager.canHandleInference(2048), { capable: true, device: 'cpu', reason: 'no GPU is there' });
  const placement = manager.canHandleInference(2 ** 40);
  assert.deepEqual([placement.capable, placement.device], [false, null]);
  assert.deepEqual(manager.getUtilizationTrend(5), { trend: 'unknown', average: 0, samples: 0 });
  assertPlain(manager.getNetworkMetadata());
});

test('devices are told in the units of the endpoints, and what one does not tell is a number', async () => {
  const manager = new GpuResourceManager({ readGpus: async () => DEVICES, engineDevices: () => ['cuda'] });
  await manager.initialize();
  const status = await manager.getStatus();
  assertPlain(status);
  assert.deepEqual(status.capabilities, {
    hasGpu: true, vendor: 'nvidia', deviceCount: 2, totalVram: 8_192, computeCapability: '8.6', providers: ['cuda', 'cpu'],
  });
  assert.deepEqual(status.current?.devices[0], {
    index: 0, name: 'RTX 3070', memoryTotal: 8_192, memoryUsed: 2_048, memoryFree: 6_144, utilization: 15, temperature: 52,
    powerDraw: 31.5, computeCapability: '8.6',
  });
  assert.deepEqual(status.current?.devices[1], {
    index: 1, name: 'Integrated', memoryTotal: 0, memoryUsed: 0, memoryFree: 0, utilization: 0, temperature: 0,
    powerDraw: 0, computeCapability: null,
  });
  const placed = manager.canHandleInference(2_048);
  assert.deepEqual(placed, { capable: true, device: 'gpu', deviceIndex: 0, availableVram: 6_144, utilization: 15 });
  assert.equal(manager.canHandleInference(7_000).device, 'cpu');
  assert.equal(manager.getNetworkMetadata().gpu.currentLoad, 7.5);
  // A GPU on which no engine computes does not make a request run there.
  const unused = new GpuResourceManager({ readGpus: async () => DEVICES, engineDevices: () => ['cpu'] });
  await unused.initialize();
  assert.deepEqual((await unused.getStatus()).capabilities.providers, ['cpu']);
  assert.match(JSON.stringify(unused.canHandleInference(1)), /no engine of this process computes on a GPU/);
});

test('each device has metrics of what it tells, and of nothing else', () => {
  const lines = gpuLines(DEVICES).filter((line) => !line.startsWith('#'));
  const of = (name: string) => `ns_llm:${name}{gpu="0",gpu_name="RTX 3070"}`;
  assert.deepEqual(lines.filter((line) => line.includes('RTX')), [
    `${of('gpu_memory_total_bytes')} ${8_192 * 2 ** 20}`, `${of('gpu_memory_used_bytes')} ${2_048 * 2 ** 20}`,
    `${of('gpu_utilization_perc')} 0.15`, `${of('gpu_temperature_celsius')} 52`, `${of('gpu_power_watts')} 31.5`,
  ]);
  assert.deepEqual(gpuLines([]), []);
});

test('a driver that fails or fades leaves what was known', async () => {
  let looks = 0;
  const readGpus: GpuReader = async () => {
    looks += 1;
    if (looks > 1) {
      throw new Error('driver is gone');
    }
    return DEVICES;
  };
  const manager = new GpuResourceManager({ readGpus });
  await manager.initialize();
  await sleep(1_050);
  assert.equal((await manager.getStatus()).capabilities.deviceCount, 2);
  assert.equal(looks, 2);
  const { trend, samples, average } = manager.getUtilizationTrend(5);
  assert.deepEqual([trend, samples, average], ['stable', 2, 7.5]);
});

test('services that watch and measure do not keep the process alive', async () => {
  const script = `
    const { GpuResourceManager, KvCacheService, PerformanceProfiler } = require('ns-llm/ns-node');
    const devices = async () => [{ vendor: 'amd', index: 0, name: 'x', utilizationPercent: 1 }];
    const manager = new GpuResourceManager({ readGpus: devices });
    new KvCacheService(); new PerformanceProfiler().startProfile('never ended');
    Promise.all([manager.initialize(), new GpuResourceManager().initialize()]).then(([{ vendor }]) => console.log(vendor));`;
  assert.deepEqual(await runScript(script), { code: 0, signal: null, stdout: 'amd\n', stderr: '' });
});

import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import { AbortError } from '../lib/index.js';
import type { Prompt } from '../lib/index.js';
import type { GenerateResult, KvCacheStats, TierUse } from '../lib/ns-node/index.js';
import { isIdle, openDemo, runScript, until, withCode, withDemo } from './support.js';
import { LONG_PROMPT } from './ns_node_support.js';

const NOTHING = { pool: 0, host: 0, disk: 0, remote: 0 };
/** A busy machine is no reason to compute what is there. */
const PATIENT_MS = 60_000;
let folder: string;

before(() => {
  folder = mkdtempSync(join(tmpdir(), 'ns-llm-kv-'));
});
after(() => rmSync(folder, { recursive: true }));

test('what an engine has computed, the next over the same directory finds on disk, and answers the same', async () => {
  const cache = { kvCacheDir: join(folder, 'a'), kvDiskBytes: 64 << 20, kvHostBytes: 1 << 20 };
  const options = { ...cache, kvLoadBudgetMs: PATIENT_MS };
  const ask = { maxTokens: 8, temperature: 0 };
  const first = await openDemo(options);
  const cold = await first.generate(LONG_PROMPT, ask);
  assert.deepEqual([cold.usage.cachedTokens, cold.usage.cachedByTier], [0, NOTHING]);
  assert.deepEqual(cold.usage.prefixMiss, { token: 0, reason: 'never_seen' });
  await first.flush();
  const [host, disk] = first.stats().kvTiers;
  assert.deepEqual([host?.name, disk?.name], ['host', 'disk']);
  assert.ok(disk!.stored >= 3 && disk!.blocks === disk!.stored && disk!.bytes > 0 && disk!.faults === 0, JSON.stringify(disk));
  await first.close();
  await withDemo(async (second) => {
    const warm = await second.generate(LONG_PROMPT, ask);
    const { cachedTokens, cachedByTier } = warm.usage;
    assert.ok(cachedTokens >= 48);
    assert.deepEqual(cachedByTier, { ...NOTHING, disk: cachedTokens });
    assert.deepEqual([warm.tokenIds, warm.usage.prefixMiss], [cold.tokenIds, undefined]);
    const stats = second.stats();
    assert.deepEqual(stats.prefixCacheHitsByTier, cachedByTier);
    assert.equal(stats.kvTiers[1]!.hits, cachedTokens / 16);
    const again = await second.generate(LONG_PROMPT, ask);
    assert.deepEqual(again.usage.cachedByTier, { ...NOTHING, pool: cachedTokens });
    const elsewhere = await second.generate(LONG_PROMPT, { ...ask, namespace: 'others' });
    assert.deepEqual(elsewhere.usage.cachedByTier, NOTHING);
  }, options);
});

test('without a directory there is no tier and nothing to wait for; a directory that cannot be is refused', async () => {
  await withDemo(async (engine) => {
    assert.deepEqual(engine.stats().kvTiers, []);
    await engine.flush();
    await engine.close();
    await assert.rejects(engine.flush(), withCode('closed'));
  });
  await assert.rejects(openDemo({ kvCacheDir: '' }), withCode('invalid_argument', /^kvCacheDir/));
  await assert.rejects(openDemo({ kvCacheDir: __filename }), withCode('io'));
  const small = openDemo({ kvCacheDir: join(folder, 'small'), kvDiskBytes: 1_000 });
  await assert.rejects(small, withCode('invalid_argument', /^kvDiskBytes is 1000/));
});

test('a flush says once what was not stored, and the engine why nothing is; rounded KV is apart and says so', async () => {
  const cache = { kvCacheDir: join(folder, 'told'), kvLoadBudgetMs: PATIENT_MS };
  await withDemo(async (writer) => {
    assert.deepEqual([writer.info.kvTierEncoding, writer.info.kvDiskRefusal], ['as-computed', undefined]);
    await withDemo(async (reader) => {
      assert.equal(reader.info.kvDiskRefusal, 'another process writes to this tier');
      await reader.generate(LONG_PROMPT, { maxTokens: 1 });
      await assert.rejects(reader.flush(), withCode('not_stored', /^disk tier: \d KV blocks were not stored .* another process writes/));
      await reader.flush();
    }, cache);
    await writer.generate(LONG_PROMPT, { maxTokens: 1 });
    await writer.flush();
  }, cache);
  for (const expected of [0, 48]) {
    await withDemo(async (rounded) => {
      assert.deepEqual([rounded.info.kvTierEncoding, rounded.info.kvDiskRefusal], ['int8', undefined]);
      const { usage } = await rounded.generate(LONG_PROMPT, { maxTokens: 1 });
      assert.ok(usage.cachedByTier.disk >= expected && (expected > 0 || usage.cachedTokens === 0), JSON.stringify(usage));
    }, { ...cache, kvTierEncoding: 'int8' });
  }
  await assert.rejects(openDemo({ kvTierEncoding: 'q4' as never }), withCode('invalid_argument', /^kvTierEncoding/));
});

test('warmed prompts are found by whoever asks next; a wrong one and a signal end the rest', async () => {
  await withDemo(async (engine) => {
    const prompts: Prompt[] = Array.from({ length: 12 }, (_, i) => `${i} ${LONG_PROMPT}`);
    const cold = await engine.warm(prompts);
    assert.ok(cold.cachedTokens === 0 && cold.computedTokens >= 12 * 50, JSON.stringify(cold));
    assert.equal(engine.stats().generationTokensTotal, 0);
    const { usage } = await engine.generate(prompts[11]!, { maxTokens: 1 });
    assert.ok(usage.cachedByTier.pool >= 48);
    const warm = await engine.warm(new Set(prompts));
    assert.equal(warm.computedTokens + warm.cachedTokens, cold.computedTokens);
    assert.ok(warm.computedTokens <= 12 * 17 && warm.cachedTokens >= 12 * 48, JSON.stringify(warm));
    const apart = await engine.warm([{ prompt: LONG_PROMPT }, { messages: [{ role: 'user', content: 'x' }] }], { namespace: 'b' });
    assert.equal(apart.cachedTokens, 0);
    assert.deepEqual(await engine.warm([]), { computedTokens: 0, cachedTokens: 0 });

    await assert.rejects(engine.warm([LONG_PROMPT, 5 as never]), withCode('invalid_argument', /^prompt is 5/));
    await assert.rejects(engine.warm(LONG_PROMPT as never), withCode('invalid_argument', /^prompts is a string/));
    await assert.rejects(engine.warm(prompts, { maxTokens: 5, signal: 1 } as never), withCode('invalid_argument'));
    const controller = new AbortController();
    const total = engine.stats().requestsTotal;
    const endless = function* (): Generator<Prompt> {
      for (let i = 0; ; i += 1) {
        if (i === 20) {
          controller.abort(new Error('enough'));
        }
        yield `${i} of them. ${LONG_PROMPT}`;
      }
    };
    await assert.rejects(engine.warm(endless(), { signal: controller.signal }), (error) => {
      return error instanceof AbortError && (error.cause as Error).message === 'enough';
    });
    await assert.rejects(engine.warm([LONG_PROMPT], { signal: AbortSignal.abort() }), AbortError);
    const stats = await until(engine, 'idleness', isIdle);
    assert.ok(stats.requestsTotal > total && stats.requestsTotal <= total + 20, JSON.stringify(stats));
  });
});

interface Life {
  result: GenerateResult;
  stats: KvCacheStats;
  metrics: string;
  /** After the clearing, if there was one. */
  cleared: KvCacheStats;
}

/** One life of a server: a question, perhaps a clearing, and what the cache says. */
async function life(directory: string, variables: Record<string, string>, clears = false): Promise<Life & { failure?: string }> {
  const script = `
    Object.assign(process.env, ${JSON.stringify({ KV_CACHE_DIR: directory, ...variables })});
    const { NsNodeClient, KvCacheService, prometheusText } = require('ns-llm/ns-node');
    const client = new NsNodeClient({ engine: { threads: 1, threadPriority: 'normal', kvBytes: 64 << 20, kvLoadBudgetMs: ${PATIENT_MS} } });
    const cache = new KvCacheService();
    client.generate(${JSON.stringify(LONG_PROMPT)}, { maxTokens: 1 }).then(async (result) => {
      await cache.flush();
      const [stats, metrics] = [cache.getStats(), prometheusText()];
      if (${clears}) await cache.clear();
      console.log(JSON.stringify({ result, stats, metrics, cleared: cache.getStats() }));
    }, (error) => console.log(JSON.stringify({ failure: error.code + ': ' + error.message })));`;
  const { code, stdout, stderr } = await runScript(script);
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout) as Life & { failure?: string };
}

test('a restarted server finds KV on disk and tells so; what was cleared stays cleared', async () => {
  const directory = join(folder, 'server');
  const sizes = { KV_DISK_BYTES: String(64 << 20), KV_HOST_BYTES: '1048576' };
  const first = await life(directory, sizes);
  assert.deepEqual(first.result.cached_by_tier, NOTHING);
  assert.ok(first.stats.diskWrites >= 3 && first.stats.diskSize === first.stats.diskWrites && first.stats.diskReads === 0);
  const second = await life(directory, sizes, true);
  const found = second.result.cached_tokens;
  assert.ok(found >= 48 && second.result.cached_by_tier.disk === found, JSON.stringify(second.result));
  const { stats } = second;
  assert.deepEqual([stats.hits, stats.diskReads], [found / 16, found / 16]);
  assert.deepEqual(stats.tiers.map(({ name, source }) => [name, source]), [['pool', 'memory'], ['host', 'memory'], ['disk', 'disk']]);
  const [pool, host, disk] = stats.tiers as [TierUse, TierUse, TierUse];
  assert.deepEqual([pool.hits, host.hits, disk.hits, pool.hitRate], [0, 0, found / 16, 0]);
  assert.deepEqual([pool.misses, host.misses, disk.misses], [stats.hits + stats.misses, stats.hits + stats.misses, stats.misses]);
  assert.ok(disk.entries >= 3 && disk.bytes > disk.entries * 1_000 && disk.hitRate === stats.hitRate && disk.hitRate > 50);
  assert.ok(second.metrics.includes(`ns_llm:prefix_cache_tier_hits_total{model_name="demo",tier="disk"} ${found}\n`));
  assert.ok(second.metrics.includes(`ns_llm:kv_cache_tier_hits_total{model_name="demo",tier="disk"} ${found / 16}\n`));
  assert.ok(second.metrics.includes('ns_llm:kv_cache_tier_faults_total{model_name="demo",tier="host"} 0\n'));
  assert.deepEqual([second.cleared.hits, second.cleared.diskReads, second.cleared.tiers[2]?.hits], [0, 0, 0]);
  const third = await life(directory, sizes);
  assert.deepEqual(third.result.cached_by_tier, NOTHING);
  const fourth = await life(directory, sizes);
  assert.equal(fourth.result.cached_by_tier.disk, found);
  assert.ok(existsSync(join(directory, 'epoch')) && (statSync(directory).mode & 0o077) === 0);
  const wrong = await life(directory, { KV_DISK_BYTES: '8 GiB' });
  assert.match(wrong.failure!, /^invalid_argument: .*KV_DISK_BYTES is "8 GiB", must be a number of bytes$/);
  const occupied = await life(__filename, {});
  assert.match(occupied.failure!, /^io: .*KV_CACHE_DIR .*kv_cache\.test/);
});

test('a process that is told to end first writes what it has computed', async () => {
  const directory = join(folder, 'told');
  const script = `
    process.env.KV_CACHE_DIR = ${JSON.stringify(directory)};
    const { Engine } = require('ns-llm');
    const { NsNodeClient } = require('ns-llm/ns-node');
    const flush = Engine.prototype.flush;
    Engine.prototype.flush = function () { return flush.call(this).then(() => console.log('flushed')); };
    setInterval(() => {}, 1_000);
    new NsNodeClient({ engine: { threads: 1, threadPriority: 'normal', kvBytes: 64 << 20 } })
      .generate(${JSON.stringify(LONG_PROMPT)}, { maxTokens: 1 })
      .then(() => process.kill(process.pid, 'SIGTERM'));`;
  const { signal, stdout, stderr } = await runScript(script);
  assert.deepEqual([signal, stdout], ['SIGTERM', 'flushed\n'], stderr);
  const next = await life(directory, {});
  assert.ok(next.result.cached_by_tier.disk >= 48, JSON.stringify(next.result));
});

/**
 * What the engines of this process do, as Prometheus reads it (text format 0.0.4). Names, units and buckets are those that
 * vLLM's dashboards know, with `ns_llm:` for `vllm:`; four gauges keep the names that the server's own alerts use.
 */

import type { Engine, KvTierStats, Stats } from '../engine.js';
import type { NativeGpu } from '../../native.js';
import type { Histogram } from './histogram.js';
import { state } from './shared_state.js';

/** The `Content-Type` of {@link prometheusText}. */
export const PROMETHEUS_CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8';

const PREFIX = 'ns_llm:';

type Kind = 'counter' | 'gauge' | 'histogram';
type Family = readonly [name: string, kind: Kind, help: string, value: (stats: Stats) => number];
type TierFamily = readonly [name: string, kind: Kind, help: string, value: (tier: KvTierStats) => number];

/** Of each model that is loaded. */
const OF_MODELS: readonly Family[] = [
  ['num_requests_running', 'gauge', 'Sequences that are being computed.', (stats) => stats.numSequencesRunning],
  ['num_requests_waiting', 'gauge', 'Sequences that wait.', (stats) => stats.numSequencesWaiting],
  ['num_requests_preparing', 'gauge', 'Requests that are being rendered and tokenized, or next to be.', (stats) => stats.numRequestsPreparing],
  ['kv_cache_usage_perc', 'gauge', 'Share of the KV blocks that live sequences hold, 0 to 1.', kvUsage],
  ['prompt_tokens_total', 'counter', 'Prompt tokens of admitted requests.', (stats) => stats.promptTokensTotal],
  ['generation_tokens_total', 'counter', 'Tokens produced.', (stats) => stats.generationTokensTotal],
  ['prefix_cache_queries_total', 'counter', 'Prompt tokens that were looked for in the prefix cache.', (stats) => stats.prefixCacheQueriesTotal],
  ['prefix_cache_hits_total', 'counter', 'Prompt tokens that were found there.', (stats) => stats.prefixCacheHitsTotal],
  ['num_preemptions_total', 'counter', 'Sequences that lost their blocks and were computed again.', (stats) => stats.preemptionsTotal],
  ['request_success_total', 'counter', 'Requests that ended by themselves.', (stats) => stats.requestsFinished],
];

type GpuFamily = readonly [name: string, help: string, value: (gpu: NativeGpu) => number | null | undefined];

/** Of each device of the machine, whoever uses it. */
const OF_GPUS: readonly GpuFamily[] = [
  ['gpu_memory_total_bytes', 'Memory of a device.', (gpu) => gpu.memoryTotalBytes],
  ['gpu_memory_used_bytes', 'The part of it that is in use.', (gpu) => gpu.memoryUsedBytes],
  ['gpu_utilization_perc', 'Share of the time in which it computed, 0 to 1.', ({ utilizationPercent }) => utilizationPercent == null ? null : utilizationPercent / 100],
  ['gpu_temperature_celsius', 'Temperature of its chip.', (gpu) => gpu.temperatureCelsius],
  ['gpu_power_watts', 'Power that it draws.', (gpu) => gpu.powerWatts],
];

/** Of each place beside the pool where a model's engine keeps KV blocks. */
const OF_TIERS: readonly TierFamily[] = [
  ['kv_cache_tier_blocks', 'gauge', 'KV blocks that are kept there.', (tier) => tier.blocks],
  ['kv_cache_tier_bytes', 'gauge', 'Bytes of them.', (tier) => tier.bytes],
  ['kv_cache_tier_hits_total', 'counter', 'KV blocks that were asked for and given.', (tier) => tier.hits],
  ['kv_cache_tier_hit_bytes_total', 'counter', 'Bytes of them.', (tier) => tier.hitBytes],
  ['kv_cache_tier_misses_total', 'counter', 'KV blocks that were asked for and not there.', (tier) => tier.misses],
  ['kv_cache_tier_stored_total', 'counter', 'KV blocks that were taken in.', (tier) => tier.stored],
  ['kv_cache_tier_evictions_total', 'counter', 'KV blocks that were given up for others.', (tier) => tier.evictions],
  ['kv_cache_tier_faults_total', 'counter', 'Calls that failed, damaged blocks included.', (tier) => tier.faults],
];
/** The pool and all that can be beside it. */
const TIERS = ['pool', 'host', 'disk', 'remote'] as const;

/** The text for a route such as `/metrics`; to be sent as it is, not as JSON. */
export function prometheusText(): string {
  const { engines, operations, gpus } = state;
  // For the next answer: a look at the devices takes its time, off this thread.
  void gpus.refresh();
  const models = byName(engines.open());
  const lines: string[] = [];
  for (const [name, kind, help, value] of OF_MODELS) {
    lines.push(...head(PREFIX + name, kind, help));
    for (const [model, stats] of models) {
      lines.push(`${PREFIX}${name}{model_name="${escaped(model)}"} ${sum(stats.map(value))}`);
    }
  }
  lines.push(...tiers(models));
  const { timeToFirstToken, interToken, endToEnd } = operations.seconds;
  lines.push(...histogram('time_to_first_token_seconds', 'From the start of a generation to its first token.', timeToFirstToken));
  lines.push(...histogram('inter_token_latency_seconds', 'Mean time between two tokens of a generation.', interToken));
  lines.push(...histogram('e2e_request_latency_seconds', 'From the start of a generation to its end.', endToEnd));
  const waiting = sum(models.flatMap(([, stats]) => stats.map(({ numSequencesWaiting }) => numSequencesWaiting)));
  const gauges = [
    ['request_queue_depth', 'Sequences that wait.', waiting],
    ['active_requests', 'Operations that are going on.', operations.active],
    ['avg_latency_ms', 'Mean time of all operations since the start.', operations.latency().avg],
    ['gpu_utilization', 'Percent, the mean over all devices; 0 without one.', gpus.utilization()],
  ] as const;
  for (const [name, help, value] of gauges) {
    lines.push(...head(name, 'gauge', help), `${name} ${value}`);
  }
  lines.push(...gpuLines(gpus.devices));
  return `${lines.join('\n')}\n`;
}

/** Of each device what it tells. A machine without one has none of these families. */
export function gpuLines(devices: readonly NativeGpu[]): string[] {
  return OF_GPUS.flatMap(([name, help, value]) => {
    const told = devices.filter((gpu) => value(gpu) != null);
    const line = (gpu: NativeGpu) => `${PREFIX}${name}{gpu="${gpu.index}",gpu_name="${escaped(gpu.name)}"} ${value(gpu)}`;
    return told.length > 0 ? [...head(PREFIX + name, 'gauge', help), ...told.map(line)] : [];
  });
}

/** Engines of one name, from folders of that name, are one line: no two lines may have the same labels. */
function byName(engines: readonly Engine[]): [string, Stats[]][] {
  const models = new Map<string, Stats[]>();
  for (const engine of engines) {
    const { name } = engine.info;
    models.set(name, [...(models.get(name) ?? []), engine.stats()]);
  }
  return [...models];
}

/** What was found where, of all models; and what each place that is there holds and did. */
function tiers(models: readonly [string, Stats[]][]): string[] {
  const hits = `${PREFIX}prefix_cache_tier_hits_total`;
  const lines = head(hits, 'counter', 'Prompt tokens that were found in the prefix cache, by the place where they were.');
  for (const [model, stats] of models) {
    for (const tier of TIERS) {
      const tokens = sum(stats.map(({ prefixCacheHitsByTier }) => prefixCacheHitsByTier[tier]));
      lines.push(`${hits}{model_name="${escaped(model)}",tier="${tier}"} ${tokens}`);
    }
  }
  for (const [name, kind, help, value] of OF_TIERS) {
    lines.push(...head(PREFIX + name, kind, help));
    for (const [model, stats] of models) {
      const all = stats.flatMap(({ kvTiers }) => kvTiers);
      for (const tier of TIERS.filter((tierName) => all.some((found) => found.name === tierName))) {
        const total = sum(all.filter((found) => found.name === tier).map(value));
        lines.push(`${PREFIX}${name}{model_name="${escaped(model)}",tier="${tier}"} ${total}`);
      }
    }
  }
  return lines;
}

function histogram(name: string, help: string, values: Histogram): string[] {
  const counts = values.cumulative();
  const total = counts.at(-1)!;
  return [
    ...head(PREFIX + name, 'histogram', help),
    ...values.bounds.map((bound, idx) => `${PREFIX}${name}_bucket{le="${bound}"} ${counts[idx]}`),
    `${PREFIX}${name}_bucket{le="+Inf"} ${total}`,
    `${PREFIX}${name}_sum ${values.sum}`,
    `${PREFIX}${name}_count ${total}`,
  ];
}

function head(name: string, kind: Kind, help: string): string[] {
  return [`# HELP ${name} ${help}`, `# TYPE ${name} ${kind}`];
}

function kvUsage({ kvBlocksUsed, kvBlocksTotal }: Stats): number {
  return kvBlocksTotal > 0 ? kvBlocksUsed / kvBlocksTotal : 0;
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

function escaped(label: string): string {
  return label.replace(/\\/g, '\\\\').replace(/"/g, '\\"').replace(/\n/g, '\\n');
}

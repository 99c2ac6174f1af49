/**
 * `ns-llm/ns-node`: drop-in parts for a server that has had its model in another process. Each part replaces one file of
 * the server by one line, such as `export { default } from 'ns-llm/ns-node';` (see bindings-node/ns-node.md).
 */

import { NsNodeClient } from './client.js';

export { NsNodeClient, NsNodeClient as default } from './client.js';
export type {
  ClientMetrics,
  ClientOptions,
  EmbedResult,
  GenerateResult,
  Health,
  NativeCommand,
  StreamEnd,
  StreamToken,
  TokenListener,
} from './client.js';
export type { CallOptions, GenerateCallOptions } from './call_options.js';
export type { Distribution } from './distribution.js';
export { GpuResourceManager } from './gpu_resource_manager.js';
export type {
  GpuCapabilities,
  GpuDevice,
  GpuSnapshot,
  GpuStatus,
  NetworkMetadata,
  NodeModel,
  Placement,
  UtilizationTrend,
} from './gpu_resource_manager.js';
export { KvCacheService } from './kv_cache_service.js';
export type { CacheContext, CachedResponse, KvCacheOptions, KvCacheStats } from './kv_cache_service.js';
export { embed, query, status } from './local_llm.js';
export type { AdapterAnswer } from './local_llm.js';
export { PREFIX_AFFINITY_HEADER, prefixAffinity } from '../prefix_affinity.js';
export type { AffinityRequest } from '../prefix_affinity.js';
export { PerformanceProfiler } from './performance_profiler.js';
export type { PerformanceMetrics, ProcessMemory } from './performance_metrics.js';
export type { Checkpoint, EndedProfile, Profile } from './performance_profiler.js';
export { PROMETHEUS_CONTENT_TYPE, prometheusText } from './prometheus.js';
export type { Bottleneck, BottleneckAnalysis, PerformanceReport, Recommendation } from './performance_report.js';
export type { EngineSettings, TierUse } from './shared_engines.js';

// `require('ns-llm/ns-node')` is the class itself as well, for callers that never learnt of default exports.
module.exports = Object.assign(NsNodeClient, exports);

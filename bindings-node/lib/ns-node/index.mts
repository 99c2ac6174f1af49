/** The same drop-in parts for `import`: the same classes, not copies of them. */

export { NsNodeClient, NsNodeClient as default } from './client.js';
export { GpuResourceManager } from './gpu_resource_manager.js';
export { KvCacheService } from './kv_cache_service.js';
export { embed, query, status } from './local_llm.js';
export { PerformanceProfiler } from './performance_profiler.js';
export { PREFIX_AFFINITY_HEADER, prefixAffinity } from '../prefix_affinity.js';
export { PROMETHEUS_CONTENT_TYPE, prometheusText } from './prometheus.js';
export type * from './index.js';

/**
 * What a server tells of its node's GPUs, and where it would compute. Devices are read from the driver's library and from
 * sysfs, never from another process; a machine without any is a normal case. Sizes are MiB.
 */

import { cpus, loadavg, totalmem } from 'node:os';

import type { NativeGpu } from '../../native.js';
import { GpuWatch } from './gpu_watch.js';
import type { GpuReader } from './gpu_watch.js';
import { state } from './shared_state.js';

/** What there is. */
export interface GpuCapabilities {
  hasGpu: boolean;
  vendor: 'nvidia' | 'amd' | 'none';
  deviceCount: number;
  /** MiB of all devices. */
  totalVram: number;
  /** Of the first device, such as "8.6". */
  computeCapability: string | null;
  /** What the engines of this process compute on, best first. */
  providers: string[];
}

/** One device. A value that it does not tell is 0. */
export interface GpuDevice {
  index: number;
  name: string;
  memoryTotal: number;
  memoryUsed: number;
  memoryFree: number;
  /** Percent. */
  utilization: number;
  /** Degrees Celsius. */
  temperature: number;
  /** Watts. */
  powerDraw: number;
  computeCapability: string | null;
}

/** Devices at one moment. */
export interface GpuSnapshot {
  vendor: string;
  deviceCount: number;
  totalVram: number;
  devices: GpuDevice[];
  timestamp: number;
}

/** Everything about this node's devices. */
export interface GpuStatus {
  capabilities: GpuCapabilities;
  current: GpuSnapshot | null;
  lastUpdate: number | null;
  cpuInfo: { model: string; cores: number; loadAverage: number[] };
}

/** Where a request would run. */
export type Placement =
  | { capable: true; device: 'gpu'; deviceIndex: number; availableVram: number; utilization: number }
  | { capable: true; device: 'cpu'; reason: string }
  | { capable: false; device: null; reason: string };

/** How busy the devices were. */
export interface UtilizationTrend {
  trend: 'unknown' | 'stable' | 'increasing' | 'decreasing';
  /** Percent. */
  average: number;
  samples: number;
  /** Points of percent, from the first quarter of the samples to the last. */
  change?: number;
}

/** What a node tells its peers. */
export interface NetworkMetadata {
  gpu: Omit<GpuCapabilities, 'hasGpu' | 'providers'> & { available: boolean; currentLoad: number };
  cpu: { model: string; cores: number; loadAverage: number };
  /** What is loaded, how much room there is and how much work. */
  models: NodeModel[];
  /** Sequences of all models that wait, and those that are computed. */
  queue: { depth: number; running: number };
  /** How the newest answered prompts began, newest first: names of `prefixAffinity`. */
  prefixes: string[];
  /** Whether new requests are taken. */
  accepting: boolean;
}

/** A model that a node has loaded. */
export interface NodeModel {
  name: string;
  /** `cpu` or `cuda`. */
  device: string;
  contextTokens: number;
  /** Sequences that are computed: one for each choice of a request. */
  running: number;
  /** Sequences that wait. */
  waiting: number;
  /** Requests that are not sequences yet: being rendered and tokenized, or next to be. */
  preparing: number;
  /** Blocks that are cached are given to whoever needs them. */
  kvBlocks: { total: number; used: number; cached: number; free: number };
}

/** Age at which `getStatus` looks again, milliseconds. */
const STATUS_AGE_MS = 1_000;
/** Change that makes a trend, points of percent. */
const TREND_POINTS = 10;
const MEBIBYTE = 1 << 20;

/** Any number of managers share one watch over the devices. */
export class GpuResourceManager {
  readonly #watch: GpuWatch;
  readonly #devicesInUse: () => string[];

  /** Both arguments are for tests: a reader of devices, and what engines compute on. */
  constructor(options: { readGpus?: GpuReader; engineDevices?: () => string[] } = {}) {
    this.#watch = options.readGpus ? new GpuWatch(options.readGpus) : state.gpus;
    this.#devicesInUse = options.engineDevices ?? (() => state.engines.open().map(({ info }) => info.device));
  }

  /** Looks for devices, and watches them from now on when there are some. */
  async initialize(): Promise<GpuCapabilities> {
    await this.#watch.start();
    return this.#capabilities();
  }

  async getStatus(): Promise<GpuStatus> {
    await this.#watch.refresh(STATUS_AGE_MS);
    const devices = this.#watch.devices.map(plain);
    const { vendor, deviceCount, totalVram } = this.#capabilities();
    const timestamp = this.#watch.lastUpdate ?? Date.now();
    return {
      capabilities: this.#capabilities(),
      current: devices.length > 0 ? { vendor, deviceCount, totalVram, devices, timestamp } : null,
      // As without a device nothing is watched.
      lastUpdate: devices.length > 0 ? this.#watch.lastUpdate : null,
      cpuInfo: { ...processor(), loadAverage: loadavg() },
    };
  }

  /**
   * Where a request that needs so much memory would run: the least busy GPU with room for it, when the engines compute on
   * GPUs at all; else the processor.
   */
  canHandleInference(requiredVram = 0): Placement {
    const required = Number.isFinite(requiredVram) ? Math.max(0, requiredVram) : 0;
    const devices = this.#watch.devices.map(plain);
    const usable = this.#providers().includes('cuda') ? devices : [];
    const [best] = usable
      .filter(({ memoryFree }) => memoryFree >= required)
      .sort((a, b) => a.utilization - b.utilization || b.memoryFree - a.memoryFree);
    if (best) {
      const { index, memoryFree, utilization } = best;
      return { capable: true, device: 'gpu', deviceIndex: index, availableVram: memoryFree, utilization };
    }
    const memory = Math.floor(totalmem() / MEBIBYTE);
    if (required > memory) {
      return { capable: false, device: null, reason: `${required} MiB are needed, the machine has ${memory} MiB` };
    }
    return { capable: true, device: 'cpu', reason: this.#whyProcessor(devices, usable, required) };
  }

  /** Over the last minutes, as far as they were watched. */
  getUtilizationTrend(minutes = 5): UtilizationTrend {
    const span = Number.isFinite(minutes) && minutes > 0 ? minutes : 5;
    const since = Date.now() - span * 60_000;
    const samples = this.#watch.samples.filter(({ timestamp }) => timestamp >= since).map((it) => it.utilization);
    if (samples.length === 0) {
      return { trend: 'unknown', average: 0, samples: 0 };
    }
    const quarter = Math.floor(samples.length / 4);
    const change = quarter > 0 ? mean(samples.slice(-quarter)) - mean(samples.slice(0, quarter)) : 0;
    const trend = change > TREND_POINTS ? 'increasing' : change < -TREND_POINTS ? 'decreasing' : 'stable';
    return { trend, average: mean(samples), samples: samples.length, change };
  }

  getNetworkMetadata(): NetworkMetadata {
    const { hasGpu, vendor, deviceCount, totalVram, computeCapability } = this.#capabilities();
    const currentLoad = this.#watch.utilization();
    return {
      gpu: { available: hasGpu, vendor, deviceCount, totalVram, computeCapability, currentLoad },
      cpu: { ...processor(), loadAverage: loadavg()[0] ?? 0 },
      ...work(),
    };
  }

  #capabilities(): GpuCapabilities {
    const devices = this.#watch.devices;
    const [first] = devices;
    return {
      hasGpu: first !== undefined,
      vendor: first?.vendor === 'nvidia' || first?.vendor === 'amd' ? first.vendor : 'none',
      deviceCount: devices.length,
      totalVram: devices.map(plain).reduce((sum, { memoryTotal }) => sum + memoryTotal, 0),
      computeCapability: first?.computeCapability ?? null,
      providers: this.#providers(),
    };
  }

  #providers(): string[] {
    const used = new Set(this.#devicesInUse());
    used.delete('cpu');
    return [...used, 'cpu'];
  }

  #whyProcessor(devices: GpuDevice[], usable: GpuDevice[], required: number): string {
    if (devices.length === 0) {
      return 'no GPU is there';
    }
    if (usable.length === 0) {
      return 'no engine of this process computes on a GPU';
    }
    const most = Math.max(...usable.map(({ memoryFree }) => memoryFree));
    return `${required} MiB are needed, the GPU with most room has ${most} MiB`;
  }
}

/** The engines of this process as those see them who choose between nodes. */
function work(): Pick<NetworkMetadata, 'models' | 'queue' | 'prefixes' | 'accepting'> {
  const models = state.engines.open().map((engine): NodeModel => {
    const { name, device, contextTokens } = engine.info;
    const stats = engine.stats();
    const { kvBlocksTotal: total, kvBlocksUsed: used, kvBlocksCached: cached, kvBlocksFree: free } = stats;
    const { numSequencesRunning: running, numSequencesWaiting: waiting, numRequestsPreparing: preparing } = stats;
    return { name, device, contextTokens, running, waiting, preparing, kvBlocks: { total, used, cached, free } };
  });
  const depth = models.reduce((sum, { waiting }) => sum + waiting, 0);
  const running = models.reduce((sum, model) => sum + model.running, 0);
  return { models, queue: { depth, running }, prefixes: state.prefixes.newest(), accepting: true };
}

function plain(gpu: NativeGpu): GpuDevice {
  const memoryTotal = mebibytes(gpu.memoryTotalBytes);
  const memoryUsed = mebibytes(gpu.memoryUsedBytes);
  return {
    index: gpu.index,
    name: gpu.name,
    memoryTotal,
    memoryUsed,
    memoryFree: Math.max(0, memoryTotal - memoryUsed),
    utilization: gpu.utilizationPercent ?? 0,
    temperature: gpu.temperatureCelsius ?? 0,
    powerDraw: gpu.powerWatts ?? 0,
    computeCapability: gpu.computeCapability ?? null,
  };
}

function processor(): { model: string; cores: number } {
  const all = cpus();
  return { model: all[0]?.model ?? 'unknown', cores: all.length };
}

function mebibytes(bytes: number | undefined): number {
  return Math.floor((bytes ?? 0) / MEBIBYTE);
}

function mean(values: number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/**
 * The GPUs of this machine over time: the newest look at them, and a bounded history of how busy they were. A look runs
 * off JavaScript's thread; several that are asked for at once are one.
 */

import { native } from '../native.js';
import type { NativeGpu } from '../../native.js';

/** Reads the devices, at one moment. */
export type GpuReader = () => Promise<NativeGpu[]>;

/** How busy all devices were on average, at a moment. */
export interface UtilizationSample {
  /** Milliseconds of the wall clock. */
  timestamp: number;
  /** Percent. */
  utilization: number;
}

/** Milliseconds between looks. */
const INTERVAL_MS = 5_000;
/** Samples kept: one hour. */
const MAX_SAMPLES = 720;

/** What is known of the devices. */
export class GpuWatch {
  /** From the newest look; empty without a device or before the first look. */
  devices: NativeGpu[] = [];
  /** When that was, milliseconds of the wall clock. */
  lastUpdate: number | null = null;
  readonly samples: UtilizationSample[] = [];
  readonly #read: GpuReader;
  #looking: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;

  constructor(read: GpuReader = () => native.NativeHost.gpus()) {
    this.#read = read;
  }

  /** Looks, unless a look is younger than `maxAgeMs`. A driver that fails leaves what was known. */
  async refresh(maxAgeMs = INTERVAL_MS): Promise<void> {
    if (this.lastUpdate !== null && Date.now() - this.lastUpdate < maxAgeMs) {
      return;
    }
    this.#looking ??= this.#look().finally(() => {
      this.#looking = undefined;
    });
    await this.#looking;
  }

  /** Looks regularly from now on, if there is a device. The timer does not keep the process alive. */
  async start(): Promise<void> {
    await this.refresh();
    if (this.devices.length > 0 && !this.#timer) {
      this.#timer = setInterval(() => void this.refresh(0), INTERVAL_MS);
      this.#timer.unref();
    }
  }

  /** Percent, the mean over all devices; 0 without one. */
  utilization(): number {
    const sum = this.devices.reduce((total, device) => total + (device.utilizationPercent ?? 0), 0);
    return this.devices.length > 0 ? sum / this.devices.length : 0;
  }

  async #look(): Promise<void> {
    const devices = await this.#read().catch(() => undefined);
    this.lastUpdate = Date.now();
    this.devices = devices ?? this.devices;
    if (this.devices.length > 0) {
      this.samples.push({ timestamp: this.lastUpdate, utilization: this.utilization() });
      this.samples.splice(0, Math.max(0, this.samples.length - MAX_SAMPLES));
    }
  }
}

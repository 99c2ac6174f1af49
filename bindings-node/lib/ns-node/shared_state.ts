/**
 * What all clients and services of one process share. It hangs on the global object under the version's own name: a
 * server and a package beside it may each have installed a copy of this package, and still must share one engine.
 */

import { GpuWatch } from './gpu_watch.js';
import { OperationLog } from './operation_log.js';
import { PrefixLog } from './prefix_log.js';
import { SharedEngines } from './shared_engines.js';
import { VERSION } from './version.js';

/** One of each per process and version. */
export interface SharedState {
  engines: SharedEngines;
  operations: OperationLog;
  gpus: GpuWatch;
  prefixes: PrefixLog;
}

const KEY = Symbol.for(`ns-llm/ns-node@${VERSION}`);

function shared(): SharedState {
  const home = globalThis as { [KEY]?: SharedState };
  home[KEY] ??= {
    engines: new SharedEngines(),
    operations: new OperationLog(),
    gpus: new GpuWatch(),
    prefixes: new PrefixLog(),
  };
  return home[KEY];
}

/** The state of this process. */
export const state: SharedState = shared();

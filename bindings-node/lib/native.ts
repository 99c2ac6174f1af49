/**
 * The native addon, and nothing else: `native.node` is built from `bindings-node/src` (Rust), its types are generated
 * from there into `native.d.ts`.
 */

import { join } from 'node:path';

import type * as Addon from '../native.js';
import { NsLlmError } from './errors.js';

export type {
  NativeBatch,
  NativeEmbedding,
  NativeEmbeddings,
  NativeEngine,
  NativeExchange,
  NativeOpening,
  NativeResponses,
  NativeServer,
  NativeStream,
  NativeSummary,
} from '../native.js';

/** The addon's file: from `dist/lib`, where this file runs, to the package's `bindings-node`. */
export const ADDON = join(__dirname, '..', '..', 'native.node');

/** The model that ships with the package. */
export const DEMO_MODEL = join(__dirname, '..', '..', '..', 'models', 'demo');

function load(): typeof Addon {
  try {
    return require(ADDON) as typeof Addon;
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new NsLlmError('addon_unavailable', `${ADDON} cannot be loaded (\`npm run build\` makes it): ${reason}`, {
      cause: error,
    });
  }
}

/** The loaded addon. */
export const native = load();

/** Limits and defaults of the engine. */
export const limits = native.NativeHost.limits();

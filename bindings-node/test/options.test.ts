/**
 * Options of an engine, here and in the other faces: each that the table of all faces names for this one is known to the
 * addon and to the types, and no other is.
 */

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';

import { Engine, NsLlmError } from '../lib/index.js';
import type { KvRemoteOptions, OpenOptions, ResponseCacheOptions } from '../lib/index.js';
import { ROOT } from './support.js';

/** Every name that the types have: one that is missing here, or too many, does not compile. */
const TYPES = {
  '': {
    model: 0, device: 0, weights: 0, kvDtype: 0, threads: 0, threadPriority: 0, contextTokens: 0, kvBytes: 0, memoryLimit: 0,
    blockTokens: 0, maxRunningSequences: 0, maxCudaGraphs: 0, prefillBudgetTokens: 0, mixedBudgetTokens: 0, maxWaitingRequests: 0,
    prefixCache: 0, kvHostBytes: 0, kvCacheDir: 0, kvDiskBytes: 0, kvLoadBudgetMs: 0, kvNamespaceShare: 0, kvRemote: 0,
    kvTierEncoding: 0, responseCache: 0, signal: 0, onProgress: 0,
  } satisfies Record<keyof OpenOptions, 0>,
  kvRemote: { url: 0, secret: 0, ttlS: 0, prefix: 0, timeoutMs: 0, ownerBytes: 0 } satisfies Record<keyof KvRemoteOptions, 0>,
  responseCache: {
    maxBytes: 0, maxEntries: 0, ttlMs: 0, adaptiveTtl: 0, version: 0, diskBytes: 0, remote: 0,
  } satisfies Record<keyof ResponseCacheOptions, 0>,
};

interface Row {
  option: string;
  node: string | { none: string };
}

const table = JSON.parse(readFileSync(join(ROOT, 'engine', 'engine_options.json'), 'utf8')) as { options: Row[] };
const named = table.options.flatMap(({ node }) => (typeof node === 'string' ? [node] : []));

test('the types have the options of the table, and a signal', () => {
  const { '': own, ...groups } = TYPES;
  const types = Object.keys(own).filter((name) => !(name in groups));
  for (const [group, names] of Object.entries(groups)) {
    types.push(...Object.keys(names).map((name) => `${group}.${name}`));
  }
  assert.deepEqual(types.sort(), [...named, 'signal'].sort());
});

test('the addon reads each option of the table, by its name', async () => {
  for (const path of named) {
    const [name, member] = path.split('.') as [keyof OpenOptions, string?];
    // Nothing can be opened there; what the addon reads it refuses before it looks.
    const needed = name === 'kvRemote' ? { url: 'redis://store' } : {};
    const wrong = { [name]: member === undefined ? Symbol.iterator : { ...needed, [member]: Symbol.iterator } };
    const model = name === 'model' ? {} : { model: '/there/is/nothing' };
    await assert.rejects(Engine.open({ ...model, ...wrong } as OpenOptions), (error) => {
      assert.ok(error instanceof NsLlmError && error.code === 'invalid_argument', `${path}: ${String(error)}`);
      assert.ok(error.message.startsWith(`${member ?? name} is a`) || error.message.startsWith(`${path} is a`), `${path}: ${error.message}`);
      return true;
    });
  }
});

test('the addon knows no other option', async () => {
  const groups: [string, OpenOptions][] = [
    ['', { nothing: 1 } as OpenOptions],
    ['kvRemote.', { kvRemote: { nothing: 1 } } as unknown as OpenOptions],
    ['responseCache.', { responseCache: { nothing: 1 } } as OpenOptions],
  ];
  const known: string[] = [];
  for (const [prefix, options] of groups) {
    const error: unknown = await Engine.open(options).catch((reason: unknown) => reason);
    assert.ok(error instanceof NsLlmError, String(error));
    const names = error.message.split('must be one of ')[1]!.split(', ');
    known.push(...names.map((name) => `${prefix}${name}`));
  }
  const own = known.filter((name) => name !== 'kvRemote' && name !== 'responseCache');
  // How far loading is, is told by TypeScript's own part.
  assert.deepEqual([...own, 'onProgress'].sort(), [...named].sort());
});

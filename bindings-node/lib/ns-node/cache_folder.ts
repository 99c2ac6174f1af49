/**
 * Where the engines of this process keep KV that outlives it: a folder that holds one directory for each model, because one
 * engine writes a directory; and the name of the present epoch, so that what was cleared stays cleared after a restart.
 */

import { createHash, randomUUID } from 'node:crypto';
import { mkdir, readFile, rename, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';

import { NsLlmError } from '../errors.js';
import type { KvRemoteOptions, OpenOptions } from '../engine.js';

/** What settings of an engine say of it. */
type CacheSettings = Pick<OpenOptions, 'kvCacheDir' | 'kvDiskBytes' | 'kvHostBytes' | 'kvRemote'>;

/** Options of one engine, and the folder that its directory lies in. */
export interface CacheOptions {
  root?: string;
  kvCacheDir?: string;
  kvDiskBytes?: number;
  kvHostBytes?: number;
  kvRemote?: KvRemoteOptions;
}

/**
 * Where a model's engine keeps KV: as its settings say, else the environment: `KV_CACHE_DIR`, `KV_DISK_BYTES`, `KV_HOST_BYTES`,
 * `KV_REMOTE_URL`, `KV_REMOTE_SECRET`.
 */
export function cacheOptions(model: string, settings: CacheSettings): CacheOptions {
  const options: CacheOptions = {};
  const root = settings.kvCacheDir ?? process.env['KV_CACHE_DIR'];
  const diskBytes = settings.kvDiskBytes ?? bytesOf('KV_DISK_BYTES');
  const hostBytes = settings.kvHostBytes ?? bytesOf('KV_HOST_BYTES');
  if (root) {
    // Two models of one name are two.
    const id = createHash('sha256').update(model).digest('hex').slice(0, 8);
    options.root = root;
    options.kvCacheDir = join(root, `${basename(model)}-${id}`);
  }
  if (diskBytes !== undefined) {
    options.kvDiskBytes = diskBytes;
  }
  if (hostBytes !== undefined) {
    options.kvHostBytes = hostBytes;
  }
  const url = process.env['KV_REMOTE_URL'];
  const remote = settings.kvRemote ?? (url ? { url, secret: process.env['KV_REMOTE_SECRET'] || undefined } : undefined);
  if (remote !== undefined) {
    options.kvRemote = remote;
  }
  return options;
}

function bytesOf(name: string): number | undefined {
  const text = process.env[name];
  if (!text) {
    return undefined;
  }
  const bytes = Number(text);
  if (!Number.isSafeInteger(bytes) || bytes < 0) {
    throw new NsLlmError('invalid_argument', `${name} is "${text}", must be a number of bytes`);
  }
  return bytes;
}

/** File of the epoch's name, beside the models' directories. */
const EPOCH_FILE = 'epoch';
/** What a name looks like; anything else in the file is no epoch of ours. */
const EPOCH_NAME = /^[0-9a-f-]{36}$/;

/** The time since the cache was last cleared. Its name is part of every namespace; before the first clearing it is empty. */
export class CacheEpoch {
  #name = '';
  readonly #roots = new Set<string>();

  get name(): string {
    return this.#name;
  }

  /** Takes a folder into account; the epoch that it names goes on here, unless this process has begun one. */
  async enter(root: string): Promise<void> {
    if (this.#roots.has(root)) {
      return;
    }
    await mkdir(root, { recursive: true, mode: 0o700 }).catch((error: unknown) => {
      throw new NsLlmError('io', `KV_CACHE_DIR ${root}: ${error instanceof Error ? error.message : String(error)}`, { cause: error });
    });
    const written = await readFile(join(root, EPOCH_FILE), 'utf8').catch(() => '');
    this.#roots.add(root);
    if (this.#name === '' && EPOCH_NAME.test(written)) {
      this.#name = written;
    } else if (this.#name !== written) {
      await this.#write(root);
    }
  }

  /** Begins a new epoch, here and in the folders. */
  async begin(): Promise<void> {
    this.#name = randomUUID();
    await Promise.all([...this.#roots].map((root) => this.#write(root)));
  }

  async #write(root: string): Promise<void> {
    const aside = join(root, `${EPOCH_FILE}.${randomUUID()}`);
    await writeFile(aside, this.#name, { mode: 0o600 });
    await rename(aside, join(root, EPOCH_FILE));
  }
}

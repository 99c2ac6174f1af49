/** What the tests share: a small engine on the model that ships, and ways to wait for a fact instead of for a time. */

import { execFile } from 'node:child_process';
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

import { Engine, NsLlmError } from '../lib/index.js';
import type { OpenOptions, Stats } from '../lib/index.js';

/** The repository's root, from `bindings-node/dist/test`. */
export const ROOT = join(__dirname, '..', '..', '..');

/** A prompt that the shipped model continues for long. */
export const STORY = 'Once upon a time';

/** The shipped model with a pool that is small but not tight, and threads that are not starved on a busy machine. */
export function openDemo(options: OpenOptions = {}): Promise<Engine> {
  return Engine.open({ threads: 1, threadPriority: 'normal', kvBytes: 64 << 20, ...options });
}

/** Runs `body` with an engine, which is closed whatever happens. */
export async function withDemo<T>(body: (engine: Engine) => Promise<T>, options?: OpenOptions): Promise<T> {
  const engine = await openDemo(options);
  try {
    return await body(engine);
  } finally {
    await engine.close();
  }
}

/** Waits until the statistics say so, at most ten seconds. */
export async function until(engine: Engine, what: string, holds: (stats: Stats) => boolean): Promise<Stats> {
  const deadline = Date.now() + 10_000;
  for (;;) {
    const stats = engine.stats();
    if (holds(stats)) {
      return stats;
    }
    assert.ok(Date.now() < deadline, `${what} did not come true: ${JSON.stringify(stats)}`);
    await sleep(5);
  }
}

/** Nothing runs, nothing waits, no live sequence holds a block. */
export function isIdle(stats: Stats): boolean {
  return stats.kvBlocksUsed === 0 && stats.numRequestsRunning === 0 && stats.numRequestsWaiting === 0;
}

/** For `assert.rejects` and `assert.throws`: an error of this package with this code. */
export function withCode(code: string, text?: RegExp): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof NsLlmError, `not an NsLlmError: ${String(error)}`);
    assert.equal(error.code, code, error.message);
    if (text) {
      assert.match(error.message, text);
    }
    return true;
  };
}

/** The garbage collector, without a flag on the command line. */
export function collectGarbage(): void {
  setFlagsFromString('--expose-gc');
  const gc: unknown = runInNewContext('gc');
  assert.ok(typeof gc === 'function');
  gc();
}

/** How a child process ended. */
export interface Ended {
  code: number | string | null;
  signal: string | null;
  stdout: string;
  stderr: string;
}

/** Runs JavaScript in a process of its own; `ns-llm` resolves to this package. */
export function runScript(script: string, type: 'commonjs' | 'module' = 'commonjs'): Promise<Ended> {
  return new Promise((resolve) => {
    const args = [`--input-type=${type}`, '--eval', script];
    execFile(process.execPath, args, { cwd: ROOT, timeout: 60_000 }, (error, stdout, stderr) => {
      const code = error ? (error.code ?? null) : 0;
      resolve({ code, signal: error?.signal ?? null, stdout, stderr });
    });
  });
}

/** What the tests share: a small engine on the model that ships, and ways to wait for a fact instead of for a time. */

import { execFile } from 'node:child_process';
import assert from 'node:assert/strict';
import { existsSync, readdirSync } from 'node:fs';
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

/** Size of a test: the small one, or with `NS_LLM_SOAK` set the one that takes hours. */
export function scaled(short: number, long: number): number {
  return process.env['NS_LLM_SOAK'] ? long : short;
}

/** A small seeded generator (Vigna's splitmix64, on 32 bits), so that a failure can be repeated. */
export function randomNumbers(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x9e3779b9) | 0;
    let z = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    return ((z ^ (z >>> 16)) >>> 0) % below;
  };
}

/**
 * An answer that came in at least so many pieces. Text that nobody has read yet is merged, and a busy machine may not run
 * JavaScript between two steps of a small model: then it is asked for again.
 */
export async function inPieces<T>(atLeast: number, read: () => Promise<T>, numPieces: (answer: T) => number): Promise<T> {
  for (let attempt = 1; ; attempt += 1) {
    const answer = await read();
    if (numPieces(answer) >= atLeast) {
      return answer;
    }
    assert.ok(attempt < 20, `${numPieces(answer)} pieces, at least ${atLeast} were expected`);
  }
}

/** Threads of this process; 0 where the system does not tell. */
export function numThreads(): number {
  return existsSync('/proc/self/task') ? readdirSync('/proc/self/task').length : 0;
}

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
  return stats.kvBlocksUsed === 0 && stats.numSequencesRunning === 0 && stats.numSequencesWaiting === 0;
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

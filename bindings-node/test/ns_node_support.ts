/** What the tests of `ns-llm/ns-node` share: engines that are small, model folders, and what a JSON answer may hold. */

import assert from 'node:assert/strict';
import { copyFileSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { DEMO_MODEL } from '../lib/index.js';
import type { EngineSettings } from '../lib/ns-node/index.js';

/** As the other tests open the model that ships: small, and not starved on a busy machine. */
export const SETTINGS: EngineSettings = { threads: 1, threadPriority: 'normal', kvBytes: 64 << 20 };

/** Three KV blocks and more of plain text. */
export const LONG_PROMPT =
  'Once upon a time there was a little dog who lived in a big house near the sea, and every day the dog ran to the ' +
  'water and looked at the boats, and every day the dog came home and told the cat what the dog had seen there.';

/** A prompt whose greedy answer runs to its limit. */
export const ENDLESS_PROMPT = 'a a a a a a a a';

const ANIMALS = ['fox', 'bear', 'dog', 'cat', 'bird', 'horse', 'fish', 'frog', 'duck', 'lion', 'mouse', 'cow'];

/** Twelve beginnings of stories. */
export function story(i: number): string {
  return `Once upon a time there was a ${ANIMALS[i % ANIMALS.length]} who`;
}

/** Nothing that JSON cannot hold or would change: no BigInt, no NaN, no typed array, nothing undefined. */
export function assertPlain(value: unknown, where = 'value'): void {
  if (typeof value === 'number') {
    assert.ok(Number.isFinite(value), `${where} is ${value}`);
  } else if (typeof value === 'object' && value !== null) {
    const isPlain = Array.isArray(value) || Object.getPrototypeOf(value) === Object.prototype;
    assert.ok(isPlain, `${where} is a ${value.constructor?.name}`);
    for (const [name, child] of Object.entries(value)) {
      assertPlain(child, `${where}.${name}`);
    }
  } else {
    assert.ok(value === null || typeof value === 'string' || typeof value === 'boolean', `${where} is a ${typeof value}`);
  }
}

/** A folder for models, removed by {@link ModelFolder.remove}. */
export class ModelFolder {
  readonly path = mkdtempSync(join(tmpdir(), 'ns-llm-models-'));

  /** The model that ships, under another name. */
  addDemo(name: string): void {
    mkdirSync(join(this.path, name));
    for (const file of readdirSync(DEMO_MODEL).filter((entry) => statSync(join(DEMO_MODEL, entry)).isFile())) {
      copyFileSync(join(DEMO_MODEL, file), join(this.path, name, file));
    }
  }

  /** A folder with these files. */
  add(name: string, files: Record<string, string>): void {
    mkdirSync(join(this.path, name));
    for (const [file, text] of Object.entries(files)) {
      writeFileSync(join(this.path, name, file), text);
    }
  }

  remove(): void {
    rmSync(this.path, { recursive: true });
  }
}

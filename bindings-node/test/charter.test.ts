import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';

import { ROOT } from './support.js';

const FOLDER = join(ROOT, 'bindings-node', 'test');

test('each promise J1 to J16 names its tests, and each named test is there', () => {
  const promises = new Map<string, number>();
  let promise = '';
  for (const row of readFileSync(join(FOLDER, 'README.md'), 'utf8').split('\n')) {
    const [, number = '', , named = ''] = row.split('|').map((cell) => cell.trim());
    promise = /^J\d+$/.test(number) ? number : promise;
    const [, file, title] = /^`([a-z_]+\.test\.ts)`: (.+)$/.exec(named) ?? [];
    if (file && title) {
      const source = readFileSync(join(FOLDER, file), 'utf8');
      assert.ok(source.includes(`test('${title}`) || source.includes(`test(\`${title}`), `${file}: ${title}`);
      promises.set(promise, (promises.get(promise) ?? 0) + 1);
    }
  }
  assert.deepEqual([...promises.keys()], Array.from({ length: 16 }, (_, index) => `J${index + 1}`));
});

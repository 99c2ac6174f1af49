import assert from 'node:assert/strict';
import { test } from 'node:test';

import { soak } from './soak.js';
import { scaled } from './support.js';

/** Where nobody waits for it, the short form is a minute. */
const SHORT_SECONDS = process.env['CI'] ? 60 : 20;

test('mixed load, aborts, mistakes and terminated workers: everything settles and nothing is left over', async (t) => {
  const report = await soak({ seconds: scaled(SHORT_SECONDS, 600), seed: 1, onLine: (line) => t.diagnostic(line) });
  t.diagnostic(JSON.stringify(report));
  assert.deepEqual(report.faults, []);
  assert.equal(report.unsettled, 0);
  // Each kind of end really came about.
  for (const outcome of ['ok', 'cancelled', 'deadline_exceeded', 'invalid_argument', 'prompt_too_long']) {
    assert.ok((report.outcomes[outcome] ?? 0) > 0, `${outcome} never happened`);
  }
  assert.ok(report.workers.terminated > 0, 'no worker was terminated in mid-generation');
});

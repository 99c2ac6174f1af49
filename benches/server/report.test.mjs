// The table of `npm run bench:server` says what was measured, and judges this server alone.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { ASKED, page, verdicts } from './report.mjs';

const times = (p50) => ({ p50, p95: 2 * p50, p99: 4 * p50 });

function run(part, server, concurrency, { p50 = 0.1, rate = 12_000, foreignCpus = 0 } = {}) {
  const stage = {
    concurrency, requests: 1_000, failed: 0, requests_per_s: rate, completion_tokens_per_s: rate, whole_ms: times(p50),
    overhead_ms: times(p50), first_token_ms: null, between_tokens_ms: null,
  };
  return { part, server, stage, foreignCpus, use: { cpuSeconds: 0.07, peakMib: 80 } };
}

test('what is asked is judged with one caller, throughput at its best, and of no other server', () => {
  const runs = [
    run('hits', 'ns-llm', 1), run('hits', 'ns-llm', 50, { p50: 4, rate: 13_000 }), run('misses', 'ns-llm', 1, { p50: 3 }),
    run('hits', 'ns-llm in express', 1, { p50: 9, rate: 1 }),
  ];
  const lines = verdicts(runs);
  const limits = Object.values(ASKED.hits.whole_ms).length + Object.values(ASKED.misses.overhead_ms).length + 1;
  assert.equal(lines.length, limits);
  assert.deepEqual(lines.filter((line) => !line.startsWith('met')).map((line) => line.slice(0, 33)), ['MISSED misses, overhead_ms p95, 1']);
  assert.ok(lines.some((line) => line.includes('requests/s: 13000')), lines.join('\n'));
  assert.equal(verdicts([run('hits', 'ns-llm', 1, { rate: 9_999 })]).filter((line) => line.startsWith('MISSED')).length, 1);
  assert.deepEqual(verdicts([]), []);
});

test('the table has a row for each time, and names what others disturbed', () => {
  const runs = [run('hits', 'ns-llm', 5, { foreignCpus: 0.31 }), run('misses', 'ns-llm', 1), run('peer', 'llama-server', 8)];
  const text = page({ machine: 'a machine', commit: 'commit 1', command: 'run.mjs', runs });
  const rows = text.split('\n').filter((line) => line.startsWith('|'));
  assert.equal(rows.length, 2 + 1 + 2 + 2, text);
  assert.ok(new Set(rows.map((row) => row.length)).size === 1, text);
  assert.match(rows[2], /hits +\| ns-llm +\| +5 \| +12000 .* whole \| +0\.100 \| +0\.200 \| +0\.400 \| +0\.070 \| +80 \| +0\.31 CPUs/);
  assert.match(rows.at(-1), /between tokens \| +- \| +- \| +- \|/);
});

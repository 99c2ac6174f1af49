// From what the load tool gave to one table: a row a stage, beside it what is asked of it.

import { QUIET_CPUS } from '../peers/quiet.mjs';

/** What is asked, by part: of answers from the response cache and of what is beside the engine's time. */
export const ASKED = {
  hits: { whole_ms: { p50: 0.5, p95: 1.5, p99: 3 }, requests_per_s: 10_000 },
  misses: { overhead_ms: { p95: 4 } },
};

const COLUMNS = ['part', 'server', 'at once', 'requests/s', 'tokens/s', 'failed', 'ms', 'p50', 'p95', 'p99', 'CPU ms/request', 'MiB', 'disturbed'];

/**
 * The table, and beneath it what is asked and whether it is met. `runs`: `{ part, server, stage, use, foreignCpus }`,
 * where `stage` is a stage of `ns-llm bench serve`.
 */
export function page({ machine, commit, command, runs }) {
  const rows = runs.flatMap((run) => rowsOf(run));
  const widths = COLUMNS.map((name, at) => Math.max(name.length, ...rows.map((row) => row[at].length)));
  const line = (cells) => `| ${cells.map((cell, at) => (at < 2 ? cell.padEnd(widths[at]) : cell.padStart(widths[at]))).join(' | ')} |`;
  const table = [line(COLUMNS), `|${widths.map((width) => '-'.repeat(width + 2)).join('|')}|`, ...rows.map(line)];
  return [`${machine}; ${commit}`, command, '', ...table, '', ...verdicts(runs)].join('\n');
}

/** Which times say something about a part. */
const TIMES = {
  hits: [['whole', 'whole_ms']],
  misses: [['overhead', 'overhead_ms'], ['whole', 'whole_ms']],
  streams: [['first token', 'first_token_ms'], ['between tokens', 'between_tokens_ms']],
  peer: [['first token', 'first_token_ms'], ['between tokens', 'between_tokens_ms']],
};

function rowsOf({ part, server, stage, use, foreignCpus }) {
  return TIMES[part].map(([title, name], index) => {
    const times = ['p50', 'p95', 'p99'].map((quantile) => shown(stage[name]?.[quantile]));
    const first = (value) => (index === 0 ? value : '');
    return [
      first(part),
      first(server),
      first(String(stage.concurrency ?? `${stage.rate_per_s}/s`)),
      first(shown(stage.requests_per_s)),
      first(shown(stage.completion_tokens_per_s)),
      first(String(stage.failed)),
      title,
      ...times,
      first(shown((use.cpuSeconds / Math.max(1, stage.requests)) * 1e3)),
      first(String(use.peakMib)),
      first(foreignCpus > QUIET_CPUS ? `${foreignCpus.toFixed(2)} CPUs` : ''),
    ];
  });
}

function shown(value) {
  if (value === undefined || value === null) {
    return '-';
  }
  return value >= 100 ? String(Math.round(value)) : value.toFixed(value < 10 ? 3 : 1);
}

/** Of this server alone: times with one caller, throughput at its best. */
export function verdicts(runs) {
  const lines = [];
  const say = (what, value, limit, isMet) => lines.push(`${isMet ? 'met   ' : 'MISSED'} ${what}: ${shown(value)} (asked: ${limit})`);
  for (const [part, asked] of Object.entries(ASKED)) {
    const own = runs.filter((run) => run.part === part && run.server === 'ns-llm' && run.stage.concurrency !== undefined);
    if (own.length === 0) {
      continue;
    }
    const alone = own.reduce((least, run) => (run.stage.concurrency < least.stage.concurrency ? run : least)).stage;
    for (const name of ['whole_ms', 'overhead_ms'].filter((name) => asked[name])) {
      for (const [quantile, limit] of Object.entries(asked[name])) {
        const value = alone[name]?.[quantile];
        say(`${part}, ${name} ${quantile}, ${alone.concurrency} at once`, value, `at most ${limit}`, value <= limit);
      }
    }
    if (asked.requests_per_s) {
      const most = Math.max(...own.map(({ stage }) => stage.requests_per_s));
      say(`${part}, requests/s`, most, `at least ${asked.requests_per_s}`, most >= asked.requests_per_s);
    }
  }
  return lines;
}

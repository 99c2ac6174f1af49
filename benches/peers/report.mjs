// From samples to a page: medians with the least and the most, ratios within the same rounds, what is asked of us, and the
// share of the machine's ceiling. Samples that others disturbed are left out unless there are no others.

import { ceiling, peaks } from './ceilings.mjs';
import { QUIET_CPUS } from './quiet.mjs';

/** What is asked is asked of this shape and these sizes. */
const ASKED_OF = { shape: 'qwen3-0.6b', promptTokens: 512, genTokens: 128 };
/** How many times the peer's speed ours must have at least; times and sizes: at most that part of the peer's. */
export const ASKED = {
  'llama.cpp': {
    Q8_0: { decode: 1.41, prompt: 2.68, 'sequences-16': 3.33, 'sequences-32': 3.66 },
    Q4_K_M: { decode: 1.21, prompt: 1.92 },
    BF16: { decode: 1.13, prompt: 1.33 },
  },
  'node-llama-cpp': {
    Q8_0: { 'node-decode-tps': 1.77, 'node-first-token-ms': 0.38, 'node-load-ms': 0.5, 'node-loaded-mib': 0.94 },
    Q4_K_M: { 'node-decode-tps': 1.62 },
  },
};

/** Titles in the order of the page; a figure with a number at its end has it in place of N. */
const TITLES = {
  decode: 'decode, 1 sequence, tokens/s',
  prompt: 'prompt, tokens/s',
  'sequences-N': 'decode, N sequences, tokens/s in all',
  'node-decode-tps': 'decode, 1 sequence, tokens/s',
  'node-first-token-ms': 'first token after the prompt, ms',
  'node-load-ms': 'load, ms',
  'node-loaded-mib': 'resident after load, MiB',
  'node-used-mib': 'resident after use, MiB',
  'prompt-of-N': 'prompt of N, tokens/s',
  'decode-after-N': 'decode after N tokens, tokens/s',
};
const isLess = (figure) => /-(ms|mib)$/.test(figure);

/**
 * The page. `samples` are the lines of one measurement: `{ figure, engine, format, round, value, foreignCpus }`, and those of
 * the machine `{ limit, round, median, foreignCpus }`; `about` describes machine, versions and sizes.
 */
export function page(about, samples) {
  const limits = limitTable(samples.filter(({ limit }) => limit));
  const figures = samples.filter(({ figure }) => figure);
  const sections = [
    `# ${about.shape}: ns-llm beside its peers`,
    aboutLines(about).join('\n'),
    '## The machine\n\n' + limits.text,
    comparison('llama.cpp', about, limits.medians, figures),
    comparison('node-llama-cpp', about, limits.medians, figures),
    neighbours(figures),
  ];
  return `${sections.filter(Boolean).join('\n\n')}\n`;
}

function aboutLines({ date, machine, threads, versions, sizes, runsAs, command }) {
  const named = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
  const runs = Object.entries(runsAs ?? {}).map(([format, as]) => `${format} as ${as}`);
  return [
    `${date}. ${machine.cpu}, ${machine.cores} cores, ${machine.memoryGib} GiB, Linux ${machine.kernel}; ${threads} threads.`,
    `${named.join('; ')}.${runs.length > 0 ? ` ns-llm runs ${runs.join('; ')}.` : ''}`,
    `Prompt of ${sizes.promptTokens} tokens, ${sizes.genTokens} generated. Command: \`npm run bench:peers${command}\`.`,
    'Each cell: median (least to most, runs); the ratio is that of the medians, in parentheses the least and the most of one round.',
  ];
}

function limitTable(samples) {
  const rows = unique(samples.map(({ limit }) => limit)).map((limit) => {
    const values = samples.filter((s) => s.limit === limit).map(({ median: value, ...sample }) => ({ ...sample, value }));
    return [limit, quiet(values)];
  });
  const medians = Object.fromEntries(rows.map(([limit, { values }]) => [limit, median(values)]));
  return { medians, text: table(['limit', 'median (least to most, runs)'], rows.map(([limit, { text }]) => [limit, text])) };
}

/** Ours beside one peer; in Node, the figures whose names begin with `node-`. */
function comparison(peer, about, limits, figures) {
  const rows = [];
  const isOfPeer = ({ figure }) => figure.startsWith('node-') === (peer === 'node-llama-cpp');
  for (const { title, figure, format } of inOrder(figures.filter(isOfPeer))) {
    const of = (engine) => quiet(figures.filter((s) => s.figure === figure && s.format === format && s.engine === engine));
    const [ours, theirs] = [of('ns-llm'), of(peer)];
    const bound = isAsked(about) ? ASKED[peer][format]?.[figure] : undefined;
    const most = ceiling(figure, about.models[format], peaks(limits, format), about.sizes);
    const ratio = [ratioCell(ours, theirs), verdict(bound, isLess(figure), ours, theirs)];
    rows.push([title, format, ours.text, theirs.text, ...ratio, most ? number(most) : '', share(most, isLess(figure), ours)]);
  }
  const head = ['figure', 'weights', 'ns-llm', peer, 'ratio', 'asked', 'ceiling', 'share of it'];
  return rows.length > 0 && `## Beside ${peer}\n\n${table(head, rows)}`;
}

function isAsked({ shape, sizes }) {
  const { promptTokens, genTokens } = sizes;
  return Object.entries(ASKED_OF).every(([name, value]) => ({ shape, promptTokens, genTokens })[name] === value);
}

/** Decoding beside one busy process per core, as a share of decoding alone. */
function neighbours(figures) {
  const rows = [];
  for (const format of unique(figures.filter(({ figure }) => figure === 'busy').map((s) => s.format))) {
    for (const engine of ['ns-llm', 'llama.cpp']) {
      const of = (figure) => quiet(figures.filter((s) => s.figure === figure && s.format === format && s.engine === engine));
      const [alone, busy] = [of('alone'), of('busy')];
      rows.push([format, engine, alone.text, busy.text, ratioCell(busy, alone)]);
    }
  }
  const head = ['weights', 'engine', 'alone, tokens/s', 'with neighbours, tokens/s', 'share'];
  return rows.length > 0 && `## Decoding beside one busy process per core, at the lowest priority\n\n${table(head, rows)}`;
}

/** Each figure and format that was measured, titled, in the order of the page. */
function inOrder(figures) {
  const order = Object.keys(TITLES);
  const found = unique(figures.map(({ figure, format }) => `${figure} ${format}`)).map((key) => {
    const [figure, format] = key.split(' ');
    const number = /\d+$/.exec(figure)?.[0];
    const name = number ? figure.replace(/\d+$/, 'N') : figure;
    const title = TITLES[name]?.replace(/\bN\b/, number);
    return { figure, format, title, place: order.indexOf(name), number: Number(number ?? 0) };
  });
  return found.filter(({ place }) => place >= 0).sort((a, b) => a.place - b.place || a.number - b.number);
}

/** Values of the undisturbed samples, or of all where there are none, which the text then says. */
function quiet(samples) {
  const undisturbed = samples.filter(({ foreignCpus }) => foreignCpus <= QUIET_CPUS);
  const used = undisturbed.length > 0 ? undisturbed : samples;
  const isDisturbed = undisturbed.length === 0 && samples.length > 0;
  const byRound = new Map(used.map(({ round, value }) => [round, value]));
  const values = used.map(({ value }) => value);
  return { values, byRound, isDisturbed, text: values.length > 0 ? cell(values) + (isDisturbed ? ' disturbed' : '') : '–' };
}

function ratioCell(ours, theirs) {
  if (ours.values.length === 0 || theirs.values.length === 0) {
    return '–';
  }
  const inBoth = [...ours.byRound].filter(([round]) => theirs.byRound.has(round));
  const rounds = inBoth.map(([round, value]) => value / theirs.byRound.get(round));
  const range = rounds.length > 1 ? ` (${number(Math.min(...rounds))} to ${number(Math.max(...rounds))})` : '';
  return number(median(ours.values) / median(theirs.values)) + range;
}

/** Whether the ratio is what is asked; disturbed samples decide nothing. */
function verdict(bound, less, ours, theirs) {
  if (bound === undefined) {
    return '';
  }
  const asked = `${less ? '≤' : '≥'} ${bound}`;
  if (ours.isDisturbed || theirs.isDisturbed || ours.values.length === 0 || theirs.values.length === 0) {
    return asked;
  }
  const ratio = median(ours.values) / median(theirs.values);
  return `${asked}: ${(less ? ratio <= bound : ratio >= bound) ? 'met' : '**missed**'}`;
}

/** Of a speed, what is reached of the most; of a time, the least over what was taken. */
function share(most, less, { values }) {
  if (most === undefined || values.length === 0) {
    return '';
  }
  return `${Math.round(100 * (less ? most / median(values) : median(values) / most))} %`;
}

function cell(values) {
  return `${number(median(values))} (${number(Math.min(...values))} to ${number(Math.max(...values))}, ${values.length})`;
}

function number(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function unique(values) {
  return [...new Set(values)];
}

function table(head, rows) {
  const line = (cells) => `| ${cells.join(' | ')} |`;
  return [line(head), line(head.map(() => '---')), ...rows.map(line)].join('\n');
}

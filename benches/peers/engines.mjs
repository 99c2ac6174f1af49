// Who is measured, by which command, and how what it prints becomes figures. The rules are the same for all (README.md): random
// prompts, only the last position's logits, greedy decoding that ignores the end of text, one process per run.

import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { ROOT } from '../../scripts/process.mjs';

const IN_PROCESS = fileURLToPath(new URL('in_process.mjs', import.meta.url));
/** Sizes of one of n parallel sequences, as in `ns-llm bench`. */
export const PARALLEL_PROMPT_TOKENS = 128;
export const PARALLEL_GEN_TOKENS = 64;
/** Tokens decoded after a long context. */
export const LONG_GEN_TOKENS = 32;
const LONG_TIMEOUT_S = 3600;

/**
 * The runs of one round, in order. A run is `{ engine, format, command, args, read }`, where `read(stdout)` gives figures by
 * name; `busy` runs are beside one busy process per core.
 */
export function planOf({ at, models, suites, threads, sizes, vocabSize, kvTokenBytes }) {
  const runs = [];
  const pair = (format, ...both) => runs.push(...both.map((run) => ({ format, ...run })));
  for (const [format, model] of Object.entries(models)) {
    const of = { at, model, threads, sizes, vocabSize, kvTokenBytes };
    if (suites.native) {
      const counts = sizes.parallelFormats.includes(format) ? sizes.parallel : [];
      pair(format, ...llamaNative(of, counts), nsLlmNative(of, counts));
    }
    if (suites.node && sizes.nodeFormats.includes(format)) {
      pair(format, inNode(of, 'node-llama-cpp'), inNode(of, 'ns-llm'));
    }
    if (suites.busy) {
      pair(format, llamaDecode(of, 'alone'), nsLlmDecode(of, 'alone'));
      pair(format, { ...llamaDecode(of, 'busy'), busy: true }, { ...nsLlmDecode(of, 'busy'), busy: true });
    }
    if (suites.long && sizes.longFormats.includes(format)) {
      sizes.contexts.forEach((context) => pair(format, llamaLong(of, context), nsLlmLong(of, context)));
    }
  }
  return runs;
}

function llamaNative({ at, model, threads, sizes }, counts) {
  const single = {
    engine: 'llama.cpp',
    command: join(at.llamaBin, 'llama-bench'),
    args: ['-m', model, '-p', sizes.promptTokens, '-n', sizes.genTokens, '-t', threads, '-r', 1, '-o', 'json'],
    read: (stdout) => Object.fromEntries(llamaBench(stdout).map((test) => [test.n_prompt ? 'prompt' : 'decode', test.avg_ts])),
  };
  if (counts.length === 0) {
    return [single];
  }
  const parallel = {
    ...batchedBench({ at, model, threads }, { counts, prompt: PARALLEL_PROMPT_TOKENS, gen: PARALLEL_GEN_TOKENS }),
    read: (stdout) => Object.fromEntries(jsonLines(stdout).map((row) => [`sequences-${row.pl}`, row.speed_tg])),
  };
  return [single, parallel];
}

function nsLlmNative({ at, model, threads, sizes }, counts) {
  return {
    engine: 'ns-llm',
    command: at.nsLlm,
    args: [...bench(model, threads, sizes.promptTokens, sizes.genTokens), `--parallel=${counts.join(',')}`],
    read: (stdout) => {
      const { prompt_tps: prompt, decode_tps: decode, parallel, isa, weights } = lastJson(stdout);
      const sequences = parallel.map(({ n, gen_tps: speed }) => [`sequences-${n}`, speed]);
      return { prompt, decode, ...Object.fromEntries(sequences), runsAs: `${weights} weights, ${isa}` };
    },
  };
}

/** Prompt and generation of n sequences, timed apart, with llama.cpp's own batch sizes of `llama-bench`. */
function batchedBench({ at, model, threads }, { counts, prompt, gen }) {
  const context = Math.max(...counts) * (prompt + gen) + 64;
  const sizes = ['-c', context, '-b', 2048, '-ub', 512, '-npp', prompt, '-ntg', gen, '-npl', counts.join(',')];
  return {
    engine: 'llama.cpp',
    command: join(at.llamaBin, 'llama-batched-bench'),
    args: ['-m', model, ...sizes, '-t', threads, '--output-format', 'jsonl'],
  };
}

function llamaDecode({ at, model, threads, sizes }, figure) {
  return {
    engine: 'llama.cpp',
    command: join(at.llamaBin, 'llama-bench'),
    args: ['-m', model, '-p', 0, '-n', sizes.genTokens, '-t', threads, '-r', 1, '-o', 'json'],
    read: (stdout) => ({ [figure]: llamaBench(stdout)[0].avg_ts }),
  };
}

function nsLlmDecode({ at, model, threads, sizes }, figure) {
  return {
    engine: 'ns-llm',
    command: at.nsLlm,
    args: bench(model, threads, 1, sizes.genTokens),
    read: (stdout) => ({ [figure]: lastJson(stdout).decode_tps }),
  };
}

/** Prompt and decoding after it in one run: a prompt of many thousand tokens takes minutes. */
function llamaLong({ at, model, threads }, context) {
  return {
    ...batchedBench({ at, model, threads }, { counts: [1], prompt: context, gen: LONG_GEN_TOKENS }),
    timeoutS: LONG_TIMEOUT_S,
    read: (stdout) => {
      const [{ speed_pp: prompt, speed_tg: decode }] = jsonLines(stdout);
      return { [`prompt-of-${context}`]: prompt, [`decode-after-${context}`]: decode };
    },
  };
}

function nsLlmLong({ at, model, threads, kvTokenBytes }, context) {
  const tokens = context + LONG_GEN_TOKENS + 64;
  const pool = ['--context', tokens, '--kv-mib', Math.ceil((tokens * kvTokenBytes) / 2 ** 20) + 1];
  return {
    engine: 'ns-llm',
    timeoutS: LONG_TIMEOUT_S,
    command: at.nsLlm,
    args: [...bench(model, threads, context, LONG_GEN_TOKENS), '--depth', context, ...pool],
    read: (stdout) => {
      const { prompt_tps: prompt, decode_tps: decode } = lastJson(stdout);
      return { [`prompt-of-${context}`]: prompt, [`decode-after-${context}`]: decode };
    },
  };
}

function inNode({ at, model, threads, sizes, vocabSize }, engine) {
  return {
    engine,
    command: process.execPath,
    args: [IN_PROCESS, engine, model, threads, sizes.promptTokens, sizes.genTokens, vocabSize],
    cwd: ROOT,
    env: { NS_LLM_PEERS_NODE_LLAMA_CPP: at.nodeLlamaCpp },
    read: (stdout) => {
      const figures = Object.entries(lastJson(stdout)).map(([name, value]) => [`node-${name.replaceAll('_', '-')}`, value]);
      return Object.fromEntries(figures);
    },
  };
}

function bench(model, threads, promptTokens, genTokens) {
  const lengths = ['--prompt-tokens', promptTokens, '--gen-tokens', genTokens, '--repeat', 1];
  return ['bench', '--model', model, '--threads', threads, ...lengths, '--json'];
}

/** The array of tests that `llama-bench -o json` prints after whatever else it says. */
export function llamaBench(stdout) {
  return JSON.parse(stdout.slice(stdout.indexOf('[')));
}

export function jsonLines(stdout) {
  return stdout.split('\n').filter((line) => line.startsWith('{')).map((line) => JSON.parse(line));
}

function lastJson(stdout) {
  return jsonLines(stdout).at(-1);
}

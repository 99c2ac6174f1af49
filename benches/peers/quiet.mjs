// One measured process at a time on a machine that others use too. Before a run it waits until nobody else computes; a run
// that others disturb is stopped and repeated; and each result says how much of the machine others used meanwhile. One busy
// process among as many compute threads as there are cores can halve a figure, so a figure without this is a rumour.
// Linux: it reads /proc.

import { spawn } from 'node:child_process';
import { readFileSync, readdirSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

/** Mean use of others, in CPUs, up to which a run counts as undisturbed. */
export const QUIET_CPUS = 0.06;
/** Use of others within one second that ends a run at once. */
const DISTURBED_CPUS = 0.2;
const TICKS_PER_SECOND = 100;

/** Process groups that end with us, whatever ends us. */
const groups = new Set();
const endAll = () => groups.forEach((group) => killGroup(group));
process.on('exit', endAll);
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => process.exit(1));
}

/**
 * Runs a command, at most `tries` times until nothing disturbs it; the last try counts in any case, and its `foreignCpus`
 * tell. `neighbours` are processes of ours whose work is part of the measurement. Gives stdout and what others used.
 */
export async function runQuietly(command, args, options) {
  const { env = {}, cwd, timeoutS = 600, waitS = 60, tries = 5, neighbours = [] } = options;
  for (let left = tries - 1; ; left -= 1) {
    await untilQuiet(waitS, neighbours);
    const result = await runOnce(command, args, { env, cwd, timeoutS, neighbours, mayEnd: left > 0 });
    if (result && (left === 0 || result.foreignCpus <= QUIET_CPUS)) {
      return result;
    }
  }
}

/** Runs `work` beside one process per core that computes without end at the lowest priority. */
export async function withBusyNeighbours(count, work) {
  const children = Array.from({ length: count }, () =>
    spawn('nice', ['-n', '19', 'sh', '-c', 'while :; do :; done'], { stdio: 'ignore', detached: true }),
  );
  const ids = children.map((child) => child.pid).filter((id) => id !== undefined);
  ids.forEach((id) => groups.add(id));
  try {
    if (ids.length !== count) {
      throw new Error('busy neighbours could not be started');
    }
    return await work(ids);
  } finally {
    ids.forEach(killGroup);
  }
}

/** Two seconds in which nobody but the neighbours computes, or the time is over. */
async function untilQuiet(waitS, neighbours) {
  const end = performance.now() + 1e3 * waitS;
  for (;;) {
    const before = sample(neighbours);
    await sleep(2000);
    const { foreignCpus } = difference(before, sample(neighbours), 0);
    if (foreignCpus < QUIET_CPUS || performance.now() > end) {
      return;
    }
  }
}

/** `undefined` when it was ended because others disturbed it. */
async function runOnce(command, args, { env, cwd, timeoutS, neighbours, mayEnd }) {
  const before = sample(neighbours);
  // The shell tells the processor time of its children, which Node does not.
  const script = '"$@"; code=$?; times >&3; exit $code';
  const child = spawn('sh', ['-c', script, 'sh', command, ...args], {
    cwd,
    detached: true,
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe', 'pipe'],
  });
  groups.add(child.pid);
  const [, stdout, stderr, times] = child.stdio.map((stream) => stream && collect(stream));
  const closed = new Promise((resolve, reject) => child.on('error', reject).on('close', (code) => resolve(code ?? 'a signal')));
  const watch = watchGroup(child.pid, { before, neighbours, timeoutS, mayEnd });
  const code = await closed.finally(() => {
    watch.stop();
    groups.delete(child.pid);
  });
  if (watch.ending === 'disturbed') {
    return undefined;
  }
  if (watch.ending === 'timeout' || code !== 0) {
    const why = watch.ending === 'timeout' ? `took more than ${timeoutS} s` : `ended with ${code}`;
    throw new Error(`${command} ${why}: ${stderr.text.trim().slice(-600)}`);
  }
  return { stdout: stdout.text, ...difference(before, sample(neighbours), childSeconds(times.text)) };
}

/** Looks once a second how much others compute, and ends the group when it is too much or takes too long. */
function watchGroup(group, { before, neighbours, timeoutS, mayEnd }) {
  let last = { ...before, own: 0 };
  const started = performance.now();
  const watch = { ending: undefined, stop: () => clearInterval(timer) };
  const end = (why) => {
    watch.ending = why;
    killGroup(group);
  };
  const timer = setInterval(() => {
    const [now, own] = [sample(neighbours), groupSeconds(group)];
    const { foreignCpus } = difference(last, now, own - last.own);
    last = { ...now, own };
    if (mayEnd && foreignCpus > DISTURBED_CPUS) {
      end('disturbed');
    } else if (performance.now() - started > 1e3 * timeoutS) {
      end('timeout');
    }
  }, 1000);
  return watch;
}

/** CPU seconds of all, stolen ones, and those of the neighbours and of this process. */
function sample(neighbours) {
  const [all] = readFileSync('/proc/stat', 'utf8').split('\n', 1);
  const [user, nice, system, , , irq, softirq, stolen] = all.split(/\s+/).slice(1).map(Number);
  const { userCPUTime, systemCPUTime } = process.resourceUsage();
  const ours = (userCPUTime + systemCPUTime) / 1e6 + neighbours.reduce((sum, id) => sum + groupSeconds(id), 0);
  return {
    at: performance.now() / 1e3,
    busy: (user + nice + system + irq + softirq) / TICKS_PER_SECOND,
    stolen: stolen / TICKS_PER_SECOND,
    ours,
  };
}

function difference(before, after, ownSeconds) {
  const seconds = after.at - before.at;
  const foreign = after.busy - before.busy - (after.ours - before.ours) - ownSeconds;
  const stolenCpus = (after.stolen - before.stolen) / seconds;
  return { seconds, foreignCpus: Math.max(0, foreign) / seconds, stolenCpus, ownSeconds };
}

/** CPU seconds of every process of one group, with their ended children. */
function groupSeconds(group) {
  let ticks = 0;
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) {
      continue;
    }
    let stat;
    try {
      stat = readFileSync(`/proc/${name}/stat`, 'utf8');
    } catch {
      continue; // it has ended meanwhile
    }
    // The name of the program, in parentheses, may hold anything.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    if (Number(fields[2]) === group) {
      ticks += fields.slice(11, 15).reduce((sum, field) => sum + Number(field), 0);
    }
  }
  return ticks / TICKS_PER_SECOND;
}

/** From the shell's `times`: two lines, itself and its children; each has user and system time as `1m2.34s`. */
export function childSeconds(times) {
  const spent = [...times.matchAll(/(\d+)m([\d.]+)s/g)].map(([, minutes, seconds]) => 60 * Number(minutes) + Number(seconds));
  return spent.reduce((sum, seconds) => sum + seconds, 0);
}

function killGroup(group) {
  try {
    process.kill(-group, 'SIGKILL');
  } catch {
    // it has ended by itself
  }
  groups.delete(group);
}

function collect(stream) {
  const collected = { text: '' };
  stream.setEncoding('utf8').on('data', (text) => (collected.text += text));
  return collected;
}

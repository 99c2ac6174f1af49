// The servers that are measured, each a process group of its own on a free port of 127.0.0.1: this one, its routes inside Node's
// hosts, and llama-server. What a server is told is in the report, as it could be typed.

import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import { ROOT } from '../../scripts/process.mjs';

const HOST = fileURLToPath(new URL('host.mjs', import.meta.url));
const START_TIMEOUT_MS = 120_000;
const TICKS_PER_SECOND = 100;

/** Ended with us, whatever ends us. */
const running = new Set();
process.on('exit', () => running.forEach((server) => server.kill()));

/** `ns-llm serve` with these arguments; on one core, if one is named. */
export function nsLlm(program, args, core) {
  return start('ns-llm', pinned(core, program, ['serve', '--port', '0', ...args]), (stderr) => /listening at (http:\S+)/.exec(stderr)?.[1]);
}

/** The same routes as middleware of `node`, `express`, `express5` or `fastify`. */
export function inNode(host, { model, responseCacheMib }, core) {
  const command = pinned(core, process.execPath, [HOST, host, model, String(responseCacheMib)]);
  return start(`ns-llm in ${host}`, command, (stderr) => /listening at (http:\S+)/.exec(stderr)?.[1]);
}

/** llama.cpp's own server. */
export async function llamaServer(program, args) {
  const port = await freePort();
  const address = `http://127.0.0.1:${port}`;
  const isThere = async () => {
    const response = await fetch(`${address}/health`).catch(() => undefined);
    return response?.ok ? address : undefined;
  };
  return start('llama-server', [program, '--host', '127.0.0.1', '--port', String(port), ...args], isThere);
}

function pinned(core, program, args) {
  return core === undefined ? [program, ...args] : ['taskset', '--cpu-list', String(core), program, ...args];
}

/** Starts a command and waits for its address, which `addressOf` finds in what it says, or by asking. */
async function start(name, [program, ...args], addressOf) {
  const child = spawn(program, args, { cwd: ROOT, detached: true, stdio: ['ignore', 'ignore', 'pipe'] });
  const server = new RunningServer(name, child, [program, ...args].join(' '));
  running.add(server);
  const end = performance.now() + START_TIMEOUT_MS;
  while (!server.hasEnded && performance.now() < end) {
    server.address = await addressOf(server.said);
    if (server.address) {
      return server;
    }
    await sleep(50);
  }
  await server.stop();
  throw new Error(`${server.command} did not start: ${server.said.trim().slice(-600)}`);
}

class RunningServer {
  #child;
  #ended;

  constructor(name, child, command) {
    Object.assign(this, { name, command, pid: child.pid, address: undefined, said: '', hasEnded: false });
    this.#child = child;
    child.stderr.setEncoding('utf8').on('data', (text) => (this.said = (this.said + text).slice(-16_384)));
    this.#ended = new Promise((resolve) => {
      const end = (error) => {
        this.said += error instanceof Error ? error.message : '';
        this.hasEnded = true;
        resolve();
      };
      child.on('error', end).on('close', end);
    });
  }

  /** Sum of a counter over its labels, as /metrics tells it. */
  async counter(name) {
    const text = await (await fetch(`${this.address}/metrics`)).text();
    const lines = text.split('\n').filter((line) => line.startsWith(`ns_llm:${name}{`));
    if (lines.length === 0) {
      throw new Error(`${this.name} does not count ${name}`);
    }
    return lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(' ') + 1)), 0);
  }

  /** Processor seconds so far, and the most memory it ever had, MiB. */
  use() {
    const stat = readFileSync(join('/proc', String(this.pid), 'stat'), 'utf8');
    // The name of the program, in parentheses, may hold anything.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    const status = readFileSync(join('/proc', String(this.pid), 'status'), 'utf8');
    const peakMib = Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1024;
    return { cpuSeconds: (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND, peakMib: Math.round(peakMib) };
  }

  kill(signal = 'SIGKILL') {
    try {
      process.kill(-this.pid, signal);
    } catch {
      // it has ended by itself
    }
  }

  async stop() {
    this.kill('SIGTERM');
    const last = setTimeout(() => this.kill(), 5_000);
    await this.#ended;
    clearTimeout(last);
    running.delete(this);
  }
}

async function freePort() {
  const listener = createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => listener.on('listening', resolve));
  const { port } = listener.address();
  await new Promise((resolve) => listener.close(resolve));
  return port;
}

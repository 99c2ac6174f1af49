// A fleet on this machine, for tests and measurements: ns-llm servers with the model that ships, the balancers with the files
// of this folder (only addresses replaced), and a store. Everything listens on free ports of 127.0.0.1 and ends with `stop`.

import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('../..', import.meta.url));
/** Built by `cargo test --workspace`, which runs before the tests; or the program that is named. */
export const PROGRAM = process.env.NS_LLM_PROGRAM ?? join(process.env.CARGO_TARGET_DIR ?? join(ROOT, 'target'), 'debug', 'ns-llm');

/** Why something cannot be tried here; `false` when it can. */
export function lacks(...programs) {
  if (!existsSync(PROGRAM)) {
    return 'cargo has not built ns-llm';
  }
  const missing = programs.find((program) => !has(program));
  return missing ? `${missing} is not here (npm run setup:fleet)` : false;
}

export function has(program) {
  return spawnSync('sh', ['-c', `command -v ${program}`], { env: environment() }).status === 0;
}

/** Debian keeps some of them where only root looks. */
function environment() {
  return { ...process.env, PATH: `${process.env.PATH}:/usr/sbin:/sbin` };
}

export async function freePorts(count) {
  const listeners = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'));
  const ports = await Promise.all(
    listeners.map((listener) => new Promise((resolve) => listener.on('listening', () => resolve(listener.address().port)))),
  );
  await Promise.all(listeners.map((listener) => new Promise((resolve) => listener.close(resolve))));
  return ports;
}

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Waits until `condition` gives something. Gives up only where something hangs. */
export async function until(condition, what, patienceMs = 120_000) {
  const start = Date.now();
  for (;;) {
    const value = await condition();
    if (value) {
      return value;
    }
    if (Date.now() - start > patienceMs) {
      throw new Error(`waited in vain: ${what}`);
    }
    await sleep(50);
  }
}

/** One fleet: what it starts, it ends. */
export class Fleet {
  children = new Set();
  folder = mkdtempSync(join(tmpdir(), 'ns-llm-fleet-'));

  /** A program that runs until the fleet ends. What it says goes to a file that `said` reads. */
  start(program, args, options = {}) {
    const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'], ...options, env: { ...environment(), ...options.env } });
    child.said = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream?.on('data', (data) => (child.said = (child.said + data).slice(-20_000)));
    }
    child.ended = new Promise((resolve) => child.on('close', (code, signal) => resolve({ code, signal })));
    child.on('error', (error) => (child.said += error.message));
    this.children.add(child);
    return child;
  }

  /** A server on `port`; ready when this resolves. */
  async server(port, args = []) {
    const model = join(ROOT, 'models', 'demo');
    const all = ['serve', '--model', model, '--port', String(port), '--threads', '1', '--grace', '2', ...args];
    if (!args.includes('--kv-mib')) {
      all.push('--kv-mib', '32');
    }
    const child = this.start(PROGRAM, all, { env: { NS_LLM_API_KEY: '' } });
    const address = await new Promise((resolve, reject) => {
      createInterface({ input: child.stderr }).on('line', (line) => {
        const match = /http:\S+/.exec(line);
        if (match) {
          resolve(match[0]);
        }
      });
      child.on('close', () => reject(new Error(`the server ended: ${child.said}`)));
    });
    return { child, address, port };
  }

  /** A file of this folder's neighbours with other addresses. */
  configuration(path, replacements) {
    let text = readFileSync(join(ROOT, 'deploy', path), 'utf8');
    for (const [from, to] of replacements) {
      if (!text.includes(from)) {
        throw new Error(`${path} has no ${from}`);
      }
      text = text.replaceAll(from, to);
    }
    const file = join(this.folder, path.replaceAll('/', '-'));
    writeFileSync(file, text);
    return file;
  }

  /** nginx or HAProxy before the servers on `ports`; gives its address. `edits`: what else of its file is replaced. */
  async balancer(kind, ports, edits = []) {
    const [port] = await freePorts(1);
    const file = kind === 'nginx' ? 'nginx/nginx.conf' : 'haproxy/haproxy.cfg';
    const replacements = [['127.0.0.1:8080', `127.0.0.1:${port}`], ...[8081, 8082, 8083].map((from, idx) => [`127.0.0.1:${from}`, `127.0.0.1:${ports[idx]}`])];
    const path = this.configuration(file, [...replacements, ...edits]);
    const args = kind === 'nginx' ? ['-c', path, '-p', this.folder, '-g', 'daemon off; master_process off;'] : ['-db', '-f', path];
    const child = this.start(kind, args);
    const address = `http://127.0.0.1:${port}`;
    await until(() => {
      if (child.exitCode !== null) {
        throw new Error(`${kind} ended: ${child.said}`);
      }
      return fetch(`${address}/balancer`).then(({ ok }) => ok, () => false);
    }, `${kind} answers`);
    // HAProxy has to have seen each server ready twice.
    await until(async () => (await fetch(`${address}/ready`)).ok, 'a server behind it answers');
    return { address, child };
  }

  async redis(args = []) {
    const [port] = await freePorts(1);
    const child = this.start('redis-server', ['--port', String(port), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no', '--dir', this.folder, ...args]);
    await until(() => /[Rr]eady to accept connections/.test(child.said), 'redis-server listens');
    return `redis://127.0.0.1:${port}`;
  }

  async stop() {
    for (const child of this.children) {
      child.kill('SIGKILL');
    }
    await Promise.all([...this.children].map((child) => child.ended));
    rmSync(this.folder, { recursive: true, force: true });
  }
}

/** A completion; `prefix`: the header of the prompt's beginning. */
export async function ask(address, body, { prefix, signal } = {}) {
  const headers = { 'content-type': 'application/json', ...(prefix ? { 'x-ns-llm-prefix': prefix } : {}) };
  return fetch(`${address}/v1/completions`, { method: 'POST', headers, body: JSON.stringify({ model: 'demo', ...body }), signal });
}

/** The sum of a counter over all servers, or of each. */
export async function counters(servers, name) {
  return Promise.all(
    servers.map(async ({ address }) => {
      const text = await (await fetch(`${address}/metrics`)).text();
      const lines = text.split('\n').filter((line) => line.startsWith(`ns_llm:${name}{`));
      return lines.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
    }),
  );
}

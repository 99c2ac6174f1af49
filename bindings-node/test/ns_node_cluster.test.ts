import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { pathToFileURL } from 'node:url';

import { prefixAffinity } from '../lib/index.js';
import { GpuResourceManager } from '../lib/ns-node/index.js';
import { assertPlain } from './ns_node_support.js';
import { ROOT } from './support.js';

interface Node {
  process: ChildProcess;
  url: string;
}

interface Answer {
  text: string;
  cached_tokens: number;
  node: string;
}

interface Cluster {
  generate(text: string, options?: object): Promise<Answer>;
}

/** The example server in a process of its own, on a free port. */
async function start(): Promise<Node> {
  const child = spawn(process.execPath, [join(ROOT, 'examples', 'ns-node', 'server.mjs')], { env: { ...process.env, PORT: '0' } });
  let printed = '';
  for await (const text of child.stdout) {
    printed += String(text);
    const url = /http:\/\/[\d.:]+/.exec(printed)?.[0];
    if (url) {
      return { process: child, url };
    }
  }
  throw new Error('the server ended');
}

let nodes: Node[];
let cluster: Cluster;
before(async () => {
  nodes = await Promise.all([start(), start(), start()]);
  const module = (await import(pathToFileURL(join(ROOT, 'examples', 'ns-node', 'cluster.mjs')).href)) as {
    Cluster: new (addresses: string[]) => Cluster;
  };
  cluster = new module.Cluster(nodes.map(({ url }) => url));
});
after(() => nodes.forEach((node) => node.process.kill('SIGKILL')));

/** Beginnings that are longer than what is hashed. */
const prompt = (number: number): string => `Story ${number}. ${'Once upon a time there was a shy dragon in a far land. '.repeat(6)}`;

/** Names of beginnings are those that Rust gives: both are held against the same vectors. */
test('names of beginnings are those of the vectors', () => {
  const text = readFileSync(join(ROOT, 'server', 'affinity-vectors.json'), 'utf8');
  const vectors = JSON.parse(text) as { request: Parameters<typeof prefixAffinity>[0]; prefix: string }[];
  assert.ok(vectors.length >= 8);
  for (const { request, prefix } of vectors) {
    assert.equal(prefixAffinity(request), prefix, JSON.stringify(request));
  }
  for (const wrong of [undefined, [-1], ['a'], 5]) {
    assert.throws(() => prefixAffinity({ prompt: wrong as never }), { code: 'invalid_argument' });
  }
});

/** What begins alike goes where it was computed; what does not is spread. */
test('a request goes to the node that holds its beginning', async () => {
  const options = { maxTokens: 4 };
  const first = await Promise.all(Array.from({ length: 9 }, (_, number) => cluster.generate(prompt(number), options)));
  assert.equal(new Set(first.map(({ node }) => node)).size, 3, 'many at once are on all nodes');
  // What is known of a node is half a second old at most.
  await new Promise((resolve) => setTimeout(resolve, 600));
  for (const [number, { node, text }] of first.entries()) {
    const again = await cluster.generate(prompt(number), options);
    assert.deepEqual([again.node, again.text], [node, text]);
    assert.ok(again.cached_tokens >= 64, `${again.cached_tokens}`);
  }
});

/** A node tells plain values of its models, its room and its work, as the server of the command line does. */
test('a node tells what others choose by', async () => {
  const { url } = nodes[0] as Node;
  const metadata = (await (await fetch(`${url}/api/gpu/metadata`)).json()) as ReturnType<GpuResourceManager['getNetworkMetadata']>;
  assertPlain(metadata);
  const [model] = metadata.models;
  assert.deepEqual([model?.name, model?.device, metadata.accepting], ['demo', 'cpu', true]);
  const { total, used, cached, free } = model!.kvBlocks;
  assert.ok(total > 0 && cached > 0 && used + cached + free === total);
  assert.ok(metadata.prefixes.length >= 1 && metadata.prefixes.every((name) => /^[0-9a-f]{16}$/.test(name)));
  assert.equal(new GpuResourceManager().getNetworkMetadata().models.length, 0, 'nothing is loaded here');
});

/** A node that is killed under load costs no request; what it held is computed by another one. */
test('a dead node is passed over', async () => {
  const options = { maxTokens: 32 };
  const held = await cluster.generate(prompt(1), options);
  const dead = nodes.find(({ url }) => url === held.node) as Node;
  const load = Array.from({ length: 12 }, (_, number) => cluster.generate(prompt(number), options));
  dead.process.kill('SIGKILL');
  const answers = await Promise.all(load);
  assert.ok(answers.every(({ text }) => text.length > 0));
  const again = await cluster.generate(prompt(1), options);
  assert.notEqual(again.node, held.node);
  assert.equal(again.text, held.text, 'the same request has the same answer everywhere');
});

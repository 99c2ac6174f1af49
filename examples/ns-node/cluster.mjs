// Several nodes as one: each request goes to the least loaded node that already holds the beginning of its prompt, and to
// another one when that is away. A node is asked what it tells its peers (`GET /api/gpu/metadata`): models, free KV blocks,
// queue, and the names of the prompts it has lately answered. A node is a server like server.mjs beside this file.
//
//   node examples/ns-node/cluster.mjs "Once upon a time" http://127.0.0.1:3009 http://127.0.0.1:3010

import { pathToFileURL } from 'node:url';
import { prefixAffinity } from 'ns-llm/ns-node';

/** How old what is known of a node may be, milliseconds. */
const MAX_AGE_MS = 500;
/** A node that did not answer is not asked for so long. */
const REST_MS = 2_000;
/** What a node may take to tell of itself. */
const LOOK_TIMEOUT_MS = 1_000;
/** Requests more than the least loaded node has, beyond which a held prefix is not worth its queue. */
const MAX_EXTRA_LOAD = 4;

export class Cluster {
  #nodes;
  /** Names of the model, when it is not the nodes' first. */
  #model;

  constructor(addresses, { model } = {}) {
    this.#nodes = addresses.map((address) => ({ address, metadata: undefined, seenAt: 0, restsUntil: 0, sent: 0 }));
    this.#model = model;
  }

  /** Continues a text on the node that suits it best; gives its answer and who gave it. */
  async generate(text, options = {}) {
    await this.#look();
    const failures = [];
    for (const node of this.choose(text, options)) {
      try {
        node.sent += 1;
        const result = await post(`${node.address}/api/generative/generate`, { text, ...options });
        return { ...result, node: node.address };
      } catch (error) {
        // What the request itself is to blame for is the same everywhere.
        if (error.status < 500) {
          throw error;
        }
        node.restsUntil = Date.now() + REST_MS;
        failures.push(`${node.address}: ${error.message}`);
      } finally {
        node.sent -= 1;
      }
    }
    throw new Error(`no node answered (${failures.join('; ') || 'none is there'})`);
  }

  /** Nodes in the order in which they should be tried. */
  choose(text, { contextId } = {}) {
    const now = Date.now();
    const nodes = this.#nodes.filter(({ metadata, restsUntil }) => metadata?.accepting && restsUntil <= now);
    const least = Math.min(...nodes.map(load));
    const holds = ({ metadata }) => {
      const model = this.#model ?? metadata.models[0]?.name;
      return metadata.prefixes.includes(prefixAffinity({ model, cache_salt: contextId, prompt: text }));
    };
    const isWorthIt = (node) => holds(node) && load(node) <= least + MAX_EXTRA_LOAD;
    return nodes.sort((a, b) => isWorthIt(b) - isWorthIt(a) || load(a) - load(b) || room(b) - room(a));
  }

  async #look() {
    const now = Date.now();
    const old = this.#nodes.filter(({ seenAt, restsUntil }) => now - seenAt > MAX_AGE_MS && restsUntil <= now);
    await Promise.all(
      old.map(async (node) => {
        try {
          const signal = AbortSignal.timeout(LOOK_TIMEOUT_MS);
          node.metadata = await (await fetch(`${node.address}/api/gpu/metadata`, { signal })).json();
          node.seenAt = Date.now();
        } catch {
          node.metadata = undefined;
          node.restsUntil = Date.now() + REST_MS;
        }
      }),
    );
  }
}

/** Requests that a node has, as it says, and those that are on their way to it. */
const load = ({ metadata, sent }) => metadata.queue.running + metadata.queue.depth + sent;

/** Blocks that a new request could have. */
const room = ({ metadata }) => metadata.models.reduce((sum, { kvBlocks }) => sum + kvBlocks.free + kvBlocks.cached, 0);

async function post(url, body) {
  const response = await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) {
    throw Object.assign(new Error(answer.details ?? answer.error ?? `status ${response.status}`), { status: response.status });
  }
  return answer;
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [text, ...addresses] = process.argv.slice(2);
  console.log(await new Cluster(addresses).generate(text));
}

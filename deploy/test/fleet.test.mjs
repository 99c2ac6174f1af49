// The files of this folder at work: three servers behind nginx, then behind HAProxy, each as it is configured here but for the
// ports. What is not on this machine is skipped by name; `npm run setup:fleet` installs it.

import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';

import { ask, counters, Fleet, freePorts, lacks, sleep, until } from './fleet.mjs';

const { prefixAffinity } = await import('ns-llm').catch(() => ({}));

/** Beginnings that are longer than what is hashed. */
const beginning = (number) => `Story number ${number}. ${'Once upon a time there was a shy dragon in a far land. '.repeat(6)}`;
const request = (number, more = {}) => ({ prompt: `${beginning(number)} It`, max_tokens: 8, temperature: 0, ...more });

for (const kind of ['nginx', 'haproxy']) {
  const skip = lacks(kind) || (prefixAffinity ? false : 'the addon is not built');

  const suite = skip ? (name) => test(name, { skip }) : describe;

  suite(kind, () => {
    const fleet = new Fleet();
    let servers;
    let address;

    before(async () => {
      const ports = await freePorts(3);
      servers = await Promise.all(ports.map((port) => fleet.server(port)));
      ({ address } = await fleet.balancer(kind, ports));
    });

    after(() => fleet.stop());

    const affinity = (number) => prefixAffinity({ model: 'demo', prompt: request(number).prompt });
    const send = (number, more) => ask(address, request(number, more), { prefix: affinity(number) });

    test('requests that begin alike go to one server, others to all', async () => {
      const done = [];
      for (let number = 0; number < 12; number += 1) {
        for (let turn = 0; turn < 2; turn += 1) {
          done.push(await (await send(number)).json());
          // A balancer that bounds each server's load takes one for busy until it has itself seen the end of its answer.
          await sleep(60);
        }
      }
      let found = 0;
      for (let number = 0; number < 12; number += 1) {
        const [first, second] = done.slice(2 * number, 2 * number + 2);
        assert.equal(second.choices[0].text, first.choices[0].text);
        found += second.usage.prompt_tokens_details.cached_tokens >= 64 ? 1 : 0;
      }
      // By chance it were four.
      assert.ok(found >= (kind === 'nginx' ? 12 : 9), `${found} of 12`);
      const counts = await counters(servers, 'prompt_tokens_total');
      assert.ok(counts.filter((count) => count > 0).length >= 2, `${counts}`);
      // The servers name what they answered as the clients do.
      const known = await Promise.all(servers.map(async (server) => (await (await fetch(`${server.address}/api/gpu/metadata`)).json()).prefixes));
      for (let number = 0; number < 12; number += 1) {
        assert.ok(known.flat().includes(affinity(number)));
      }
    });

    test('tokens are not held back', async () => {
      const response = await send(1, { stream: true, max_tokens: 400, ignore_eos: true });
      assert.equal(response.status, 200);
      const reader = response.body.getReader();
      const { value } = await reader.read();
      assert.match(new TextDecoder().decode(value), /^data: \{/);
      const running = await Promise.all(servers.map(async (server) => (await (await fetch(`${server.address}/ready`)).json()).queue.running));
      assert.equal(running.reduce((sum, count) => sum + count), 1, 'the answer goes on while its beginning is here');
      // Whoever leaves ends the request, through the balancer, too.
      await reader.cancel();
      const idle = async () => {
        const states = await Promise.all(servers.map(async (server) => (await fetch(`${server.address}/ready`)).json()));
        return states.every(({ queue }) => queue.running === 0);
      };
      await until(idle, 'the request ends with its client');
    });

    test('one server is killed under load: whole answers come all the same, streams are cut short and seen to be', async () => {
      // A stream on the one that will die.
      const [dead] = servers;
      let stream;
      for (let number = 0; !stream && number < 60; number += 1) {
        const reader = (await send(number, { stream: true, max_tokens: 1500, ignore_eos: true })).body.getReader();
        await reader.read();
        const { queue } = await (await fetch(`${dead.address}/ready`)).json();
        if (queue.running > 0) {
          stream = reader;
        } else {
          await reader.cancel();
        }
      }
      assert.ok(stream, 'one of sixty goes there');
      let sent = 0;
      const statuses = [];
      const worker = async () => {
        while (sent < 40) {
          sent += 1;
          const response = await send(100 + (sent % 20));
          statuses.push(response.status);
          await response.text();
        }
      };
      const load = Promise.all(Array.from({ length: 6 }, worker));
      await until(() => statuses.length >= 6, 'the load runs');
      dead.child.kill('SIGKILL');
      await load;
      assert.deepEqual(statuses.filter((status) => status !== 200), [], 'no whole answer is lost');
      assert.ok(statuses.length >= 40);
      const isCut = (error) => error instanceof TypeError && error.message === 'terminated';
      await assert.rejects(readToEnd(stream), isCut, 'a stream says that it was cut');
      // It comes back by itself: nobody tells the balancer.
      servers[0] = await fleet.server(dead.port);
      let number = 200;
      await until(async () => {
        await (await send(number)).text();
        number += 1;
        const [tokens] = await counters([servers[0]], 'prompt_tokens_total');
        return tokens > 0;
      }, 'the server that came back is given work');
    });

    test('a caller has a rate', async () => {
      // Rates that no machine is too slow for.
      const edits = kind === 'nginx' ? [['rate=50r/s', 'rate=1r/m'], ['burst=100', 'burst=10']] : [['http_req_rate(10s)', 'http_req_rate(1h)'], ['gt 500', 'gt 10']];
      const strict = await fleet.balancer(kind, servers.map(({ port }) => port), edits);
      const status = async (key) => (await fetch(`${strict.address}/v1/models`, { headers: { authorization: `Bearer ${key}` } })).status;
      const answers = [];
      for (let number = 0; number < 14; number += 1) {
        answers.push(await status('somebody-in-a-hurry'));
      }
      assert.deepEqual([answers[0], answers.at(-1)], [200, 429], answers.join());
      assert.equal(await status('somebody-else'), 200, 'others are not kept out');
    });
  });
}

const noRedis = lacks('redis-server');
test('servers that share a Redis read what the others have computed', { skip: noRedis }, async () => {
  const fleet = new Fleet();
  try {
    const remote = ['--kv-remote-url', await fleet.redis(['--maxmemory', '64mb', '--maxmemory-policy', 'allkeys-lru']), '--kv-load-budget-ms', '60000'];
    const [one, other] = await Promise.all((await freePorts(2)).map((port) => fleet.server(port, remote)));
    const stored = async () => (await (await fetch(`${one.address}/api/gpu/metadata`)).json()).models[0].tiers.find(({ name }) => name === 'remote').stored;
    // A prompt that is computed sooner than it would be fetched is no failure: the next one may be read.
    let number = 0;
    const found = await until(async () => {
      number += 1;
      const before = await stored();
      const computed = await (await ask(one.address, request(number))).json();
      await until(async () => (await stored()) >= before + 4, 'the blocks are in the store');
      const read = await (await ask(other.address, request(number))).json();
      assert.equal(read.choices[0].text, computed.choices[0].text);
      return read.usage.prompt_tokens_details.cached_by_tier.remote > 0 && read.usage.prompt_tokens_details;
    }, 'a prompt is read from the store');
    assert.equal(found.cached_tokens, found.cached_by_tier.remote + found.cached_by_tier.pool);
  } finally {
    await fleet.stop();
  }
});

async function readToEnd(reader) {
  for (;;) {
    const { done } = await reader.read();
    if (done) {
      return;
    }
  }
}

/** The routes of `ns-llm serve` inside servers of Node: one handler, the same behaviour under each. */

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { Agent, createServer, request } from 'node:http';
import type { IncomingMessage, RequestListener, Server, ServerResponse } from 'node:http';
import { connect } from 'node:net';
import type { AddressInfo } from 'node:net';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import { createHandler, Engine } from '../lib/index.js';
import type { Handler, HandlerOptions } from '../lib/index.js';
import { inPieces, isIdle, openDemo, STORY, until, withCode } from './support.js';

/** What is used of Express 4 and 5 here; their types are packages of their own. */
interface ExpressApp extends RequestListener {
  use(...handlers: (string | Handler | object)[]): void;
  get(path: string, route: (request: IncomingMessage, response: ServerResponse) => void): void;
}
type Express = (() => ExpressApp) & Record<'json' | 'text' | 'raw', (options?: object) => object>;

interface FastifyApp {
  server: Server;
  register(plugin: Handler['fastify'], options: object): void;
  post(path: string, route: (request: { body: unknown }) => unknown): void;
  listen(options: object): Promise<unknown>;
  close(): Promise<void>;
}

interface Host {
  url: string;
  close: () => Promise<void>;
}

async function listen(listener: RequestListener): Promise<Host> {
  const server = createServer(listener);
  await once(server.listen(0, '127.0.0.1'), 'listening');
  const close = async (): Promise<void> => {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  };
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, close };
}

function mountOnExpress(express: Express, options: HandlerOptions): Promise<Host> {
  const app = express();
  app.use('/llm', createHandler(engine, options));
  app.get('/llm/own', (_request, response) => response.end('of the host'));
  return listen(app);
}

/** Every kind of host, with the routes below `/llm`. */
const HOSTS: Record<string, (options: HandlerOptions) => Promise<Host>> = {
  'node:http': (options) => listen(createHandler(engine, { ...options, basePath: '/llm' })),
  'Express 4': (options) => mountOnExpress(require('express') as Express, options),
  'Express 5': (options) => mountOnExpress(require('express5') as Express, options),
  Fastify: async (options) => {
    const app = (require('fastify') as (options: object) => FastifyApp)({ forceCloseConnections: true });
    app.register(createHandler(engine, options).fastify, { prefix: '/llm' });
    app.post('/own', ({ body }) => body);
    await app.listen({ port: 0, host: '127.0.0.1' });
    return { url: `http://127.0.0.1:${(app.server.address() as AddressInfo).port}`, close: () => app.close() };
  },
};

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

async function withHost(name: string, options: HandlerOptions, body: (host: Host) => Promise<void>): Promise<void> {
  const host = await HOSTS[name]!(options);
  try {
    await body(host);
  } finally {
    await host.close();
  }
}

function post(url: string, body: unknown, init: RequestInit = {}): Promise<Response> {
  const text = typeof body === 'string' ? body : JSON.stringify(body);
  const headers = { 'content-type': 'application/json', ...(init.headers as Record<string, string>) };
  return fetch(url, { ...init, method: 'POST', body: text, headers });
}

/** A test reads answers field by field. */
async function json(response: Response | Promise<Response>): Promise<any> {
  return (await response).json();
}

const ENDLESS = { prompt: STORY, max_tokens: 1_900, ignore_eos: true, stream: true };
const SECRET = 'a-secret-of-some-length';

for (const name of Object.keys(HOSTS)) {
  test(`${name}: answers come whole and in pieces, and are the engine's own`, () =>
    withHost(name, {}, async ({ url }) => {
      const models = await json(fetch(`${url}/llm/v1/models`));
      assert.equal(models.data[0].id, 'demo');
      const { text } = await engine.generate(STORY, { maxTokens: 40, ignoreEos: true });
      const asked = { prompt: STORY, max_tokens: 40, ignore_eos: true };
      const whole = await post(`${url}/llm/v1/completions`, asked);
      assert.equal(whole.status, 200);
      assert.match(whole.headers.get('x-request-id') ?? '', /^req_/);
      assert.equal((await json(whole)).choices[0].text, text);
      const read = async (): Promise<string[]> => {
        const response = await post(`${url}/llm/v1/completions`, { ...asked, stream: true });
        assert.equal(response.headers.get('content-type'), 'text/event-stream');
        const pieces: string[] = [];
        for await (const piece of response.body!) {
          pieces.push(Buffer.from(piece as Uint8Array).toString());
        }
        return pieces;
      };
      const pieces = await inPieces(2, read, (answer) => answer.length);
      const events = pieces.join('').split('\n\n').filter((event) => event.startsWith('data: {'));
      const streamed = events.map((event) => JSON.parse(event.slice(6)).choices[0]?.text ?? '').join('');
      assert.equal(streamed, text);
      assert.ok(pieces.join('').endsWith('data: [DONE]\n\n'));
    }));

  test(`${name}: a client that hangs up cancels its request`, () =>
    withHost(name, {}, async ({ url }) => {
      const before = engine.stats().requestsCancelled;
      for (const stream of [true, false]) {
        const gone = new AbortController();
        const answer = post(`${url}/llm/v1/completions`, { ...ENDLESS, stream }, { signal: gone.signal });
        if (stream) {
          await (await answer).body!.getReader().read();
        } else {
          answer.catch(() => {});
          await until(engine, 'it runs', ({ numSequencesRunning }) => numSequencesRunning === 1);
        }
        gone.abort();
        await until(engine, 'nothing is left', isIdle);
      }
      assert.equal(engine.stats().requestsCancelled, before + 2);
    }));

  test(`${name}: faults are the client's own, and keys and sizes are kept`, () =>
    withHost(name, { apiKeys: [{ name: 'one', secret: SECRET }], maxBodyBytes: 1_000 }, async ({ url }) => {
      const headers = { authorization: `Bearer ${SECRET}` };
      const ask = async (path: string, body: unknown, given: Record<string, string> = headers) => {
        const response = await post(url + path, body, { headers: given });
        return [response.status, (await json(response)).error?.code];
      };
      assert.deepEqual(await ask('/llm/v1/completions', { prompt: 'A' }, {}), [401, 'invalid_api_key']);
      assert.deepEqual(await ask('/llm/v1/completions', '{"prompt": '), [400, 'invalid_argument']);
      assert.deepEqual(await ask('/llm/tokenize', { prompt: 'x'.repeat(900) }), [200, undefined]);
      assert.deepEqual(await ask('/llm/tokenize', { prompt: 'x'.repeat(1_000) }), [413, 'body_too_large']);
      assert.deepEqual(await ask('/llm/tokenize', { prompt: 'A' }, { ...headers, 'content-encoding': 'gzip' }), [415, 'encoding_not_supported']);
      // Refused by its head, not a byte of it read; and without a length, where the limit is.
      assert.equal(await statusOf(url, ['Content-Length: 99999999999'], ''), 413);
      const chunk = `200\r\n${'x'.repeat(0x200)}\r\n`;
      assert.equal(await statusOf(url, ['Transfer-Encoding: chunked'], `${chunk.repeat(3)}0\r\n\r\n`), 413);
    }));
}

/** The status of an answer to bytes that are written as they are. */
async function statusOf(url: string, headers: string[], body: string): Promise<number> {
  const socket = connect(Number(new URL(url).port), '127.0.0.1');
  const head = ['POST /llm/tokenize HTTP/1.1', 'Host: localhost', `Authorization: Bearer ${SECRET}`, ...headers];
  socket.write(`${head.join('\r\n')}\r\n\r\n${body}`);
  const [first] = (await once(socket, 'data')) as [Buffer];
  socket.destroy();
  return Number(first.toString().split(' ')[1]);
}

test('what is none of the routes is left to the host', async () => {
  for (const name of ['Express 4', 'Express 5']) {
    await withHost(name, { apiKeys: [SECRET] }, async ({ url }) => {
      assert.equal(await (await fetch(`${url}/llm/own`)).text(), 'of the host');
      assert.equal((await fetch(`${url}/llm/nothing`)).status, 404);
    });
  }
  await withHost('Fastify', {}, async ({ url }) => {
    assert.deepEqual(await json(post(`${url}/own`, { its: 'parsers' })), { its: 'parsers' });
    assert.equal((await json(fetch(`${url}/llm/nothing`))).error.code, 'unknown_route');
  });
  await withHost('node:http', {}, async ({ url }) => {
    for (const path of ['/v1/models', '/llm/nothing', '/llmv1/models']) {
      assert.equal((await json(fetch(url + path))).error.code, 'unknown_route', path);
    }
  });
});

test('a body that the host has parsed is taken as it is', async () => {
  for (const express of [require('express') as Express, require('express5') as Express]) {
    for (const parser of [express.json(), express.text({ type: '*/*' }), express.raw({ type: '*/*' })]) {
      const app = express();
      app.use(parser);
      app.use('/llm', createHandler(engine));
      const host = await listen(app);
      const prompt = 'a fox — ein Fuchs — 狐';
      const { tokens } = await json(post(`${host.url}/llm/tokenize`, { prompt }));
      assert.deepEqual(tokens, await engine.tokenize(prompt));
      assert.equal((await fetch(`${host.url}/llm/health`)).status, 200);
      const unparsed = await post(`${host.url}/llm/tokenize`, { prompt }, { headers: { 'content-type': 'text/csv' } });
      assert.equal(unparsed.status, 200, 'what the host has not read is read');
      await host.close();
    }
  }
  // Read by somebody, and kept nowhere: a fault of the host that is told, and does not end it.
  const handler = createHandler(engine);
  const host = await listen((incoming, response) => {
    incoming.resume().on('end', () => handler(incoming, response));
  });
  const lost = await post(`${host.url}/tokenize`, { prompt: 'A' });
  assert.equal(lost.status, 400);
  assert.match((await json(lost)).error.message, /read before/);
  await host.close();
});

test('a client that takes nothing is hung up, and its answer is not piled up', async () => {
  let response: ServerResponse | undefined;
  const handler = createHandler(engine, { stallTimeoutMs: 300 });
  const host = await listen((incoming, outgoing) => {
    response = outgoing;
    handler(incoming, outgoing);
  });
  const before = engine.stats();
  const socket = connect(Number(new URL(host.url).port), '127.0.0.1');
  socket.pause();
  const body = JSON.stringify({ ...ENDLESS, n: 8, logprobs: 20 });
  socket.write(`POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
  let most = 0;
  let stats = before;
  while (stats.requestsCancelled === before.requestsCancelled) {
    assert.equal(stats.requestsFinished, before.requestsFinished, 'it did not run to its end');
    await sleep(1);
    most = Math.max(most, response?.writableLength ?? 0);
    stats = engine.stats();
  }
  assert.ok(response!.destroyed && most > 0, `${most} bytes`);
  assert.ok(most < 1 << 20, `${most} bytes wait in this process`);
  socket.destroy();
  await host.close();
});

test('the client of OpenAI works unchanged', () =>
  withHost('Express 5', { apiKeys: [SECRET] }, async ({ url }) => {
    const { OpenAI, BadRequestError } = require('openai') as typeof import('openai');
    const client = new OpenAI({ apiKey: SECRET, baseURL: `${url}/llm/v1`, maxRetries: 0 });
    const asked = { model: 'demo', messages: [{ role: 'user' as const, content: 'Tell me of a fox.' }], max_tokens: 12, seed: 3 };
    const { choices } = await client.chat.completions.create(asked);
    let text = '';
    for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
      text += chunk.choices[0]?.delta.content ?? '';
    }
    assert.equal(text, choices[0]!.message.content);
    const { data } = await client.embeddings.create({ model: 'demo', input: 'a red fox' });
    assert.equal(data[0]!.embedding.length, engine.info.embeddingDimensions);
    const tools = [{ type: 'function' as const, function: { name: 'f' } }];
    await assert.rejects(client.chat.completions.create({ ...asked, tools }), (error) => error instanceof BadRequestError && error.param === 'tools');
  }));

test('connections are kept from one request to the next', () =>
  withHost('node:http', {}, async ({ url }) => {
    const { port } = new URL(url);
    const agent = new Agent({ keepAlive: true, maxSockets: 1 });
    const body = '{"prompt": "A"}';
    const headers = { 'content-length': body.length };
    for (const [round, path] of ['/llm/tokenize', '/llm/nothing', '/llm/tokenize'].entries()) {
      const sent = request({ agent, port, host: '127.0.0.1', path, method: 'POST', headers });
      sent.end(body);
      const [answer] = (await once(sent, 'response')) as [IncomingMessage];
      assert.equal(answer.statusCode, path.endsWith('tokenize') ? 200 : 404);
      await answer.toArray();
      assert.equal(sent.reusedSocket, round > 0);
    }
    agent.destroy();
  }));

test('what touches all callers takes a key that is marked for it', () => {
  const [plain, admin] = [SECRET, `${SECRET}-of-the-operator`];
  return withHost('node:http', { apiKeys: [plain, { secret: admin, admin: true }] }, async ({ url }) => {
    const clear = (secret: string) =>
      fetch(`${url}/llm/api/kv-cache/clear`, { method: 'POST', headers: { authorization: `Bearer ${secret}` } });
    const refused = await clear(plain);
    assert.equal(refused.status, 403);
    assert.match(await refused.text(), /admin/);
    assert.deepEqual(await json(clear(admin)), { success: true, message: 'Cache cleared' });
  });
});

test('it stops, and survives its engine', async () => {
  const own = await openDemo();
  const handler = createHandler([{ engine: own, name: 'first', aliases: ['other'] }, engine]);
  const host = await listen(handler);
  const names = (await json(fetch(`${host.url}/v1/models`))).data.map(({ id }: { id: string }) => id);
  assert.deepEqual(names, ['first', 'demo']);
  const ask = (model: string) => post(`${host.url}/v1/completions`, { model, prompt: STORY, max_tokens: 2 });
  assert.deepEqual([(await ask('other')).status, (await ask('demo')).status, (await ask('nobody')).status], [200, 200, 404]);
  const running = await post(`${host.url}/v1/completions`, { ...ENDLESS, model: 'first' });
  await own.close();
  assert.match(await running.text(), /"code":"closed"/);
  assert.deepEqual([(await ask('first')).status, (await ask('demo')).status], [503, 200]);
  handler.stop();
  const refused = await ask('demo');
  assert.deepEqual([refused.status, refused.headers.get('retry-after')], [503, '1']);
  await host.close();
});

test('what it cannot be made of is named', () => {
  const cases: [unknown, unknown, RegExp][] = [
    [{}, {}, /engine/],
    [[], {}, /no model/],
    [engine, { maxBodyBytes: 0 }, /maxBodyBytes is 0/],
    [engine, { requestTimeoutMs: 0 }, /requestTimeoutMs is/],
    [engine, { apiKeys: ['short'] }, /secret/],
    [engine, { apiKeys: [{ name: 'one' }] }, /secret is missing/],
    [engine, { apiKeys: [{ secret: SECRET, admin: 'yes' }] }, /admin/],
    [engine, { apiKeys: [{ secret: SECRET, tokensPerMinute: 0 }] }, /tokensPerMinute is 0/],
    [engine, { hosts: ['x'] }, /hosts/],
    [engine, { basePath: 'llm' }, /basePath/],
    [[engine, engine], {}, /two models are called demo/],
  ];
  for (const [engines, options, text] of cases) {
    const make = () => createHandler(engines as Engine, options as HandlerOptions);
    assert.throws(make, withCode('invalid_argument', text));
  }
});

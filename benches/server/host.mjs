// A server of Node with the routes of ns-llm in it: `host.mjs node|express|express5|fastify MODEL RESPONSE_CACHE_MIB`. It says on
// stderr where it listens.

import { createServer } from 'node:http';

import { createHandler, Engine } from 'ns-llm';

const [host, model, mib] = process.argv.slice(2);
const engine = await Engine.open(model, { threads: 1, responseCache: { maxBytes: Number(mib) * 2 ** 20 } });
const handler = createHandler(engine);

/** Each listens at any free port, and gives the address. */
const HOSTS = {
  node: () => listen(createServer(handler)),
  express: async () => listen(createServer((await import('express')).default().use(handler))),
  express5: async () => listen(createServer((await import('express5')).default().use(handler))),
  fastify: async () => {
    const app = (await import('fastify')).fastify();
    await app.register(handler.fastify);
    return app.listen({ port: 0, host: '127.0.0.1' });
  },
};

if (!HOSTS[host]) {
  throw new Error(`the host is ${host}, must be one of ${Object.keys(HOSTS).join(', ')}`);
}
console.error(`listening at ${await HOSTS[host]()}`);
process.on('SIGTERM', () => process.exit(0));

async function listen(server) {
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return `http://127.0.0.1:${server.address().port}`;
}

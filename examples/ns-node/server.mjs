// A small Express server with the engine inside: the routes of a node whose model once ran in another process, each
// answered by the drop-in parts of `ns-llm/ns-node`. `PORT=0` takes a free port; the address is printed when it listens.
//
//   node examples/ns-node/server.mjs
//   curl -s localhost:3009/api/generative/generate -H 'content-type: application/json' -d '{"text":"Once upon a time"}'

import express from 'express';
import Client, {
  GpuResourceManager,
  KvCacheService,
  PerformanceProfiler,
  PROMETHEUS_CONTENT_TYPE,
  prometheusText,
  query,
} from 'ns-llm/ns-node';

const PORT = Number(process.env.PORT ?? 3009);

const client = new Client();
const gpus = new GpuResourceManager();
const kvCache = new KvCacheService();
const profiler = new PerformanceProfiler();
await gpus.initialize();
await kvCache.initialize();

const app = express();
app.use(express.json({ limit: '1mb' }));

app.get('/health', async (_, res) => {
  const nsLlm = await client.health();
  // The parts are plain objects of the caller's own.
  nsLlm.metrics = await client.metrics();
  nsLlm.clientType = 'native';
  res.status(nsLlm.available ? 200 : 503).json({ status: nsLlm.available ? 'ok' : 'degraded', nsLlm });
});

app.post('/embed', async (req, res) => {
  const { text, model } = req.body ?? {};
  try {
    res.json(await client.embed(text, { model }));
  } catch (error) {
    res.status(502).json({ error: 'ns-llm-unavailable', details: error.message });
  }
});

app.post('/api/generative/generate', async (req, res) => {
  const { text, model, maxTokens, timeout } = req.body ?? {};
  try {
    res.json(await client.generate(text, { model, maxTokens, timeout }));
  } catch (error) {
    res.status(500).json({ error: 'Internal server error', details: error.message });
  }
});

app.post('/api/generative/generate/stream', async (req, res) => {
  const { text, model, maxTokens, timeout } = req.body ?? {};
  // Whoever hangs up wants no more tokens: the request ends within one step.
  const hangUp = new AbortController();
  res.on('close', () => hangUp.abort());
  res.set({ 'content-type': 'text/event-stream', 'cache-control': 'no-cache', connection: 'keep-alive' });
  const onToken = (token) => {
    if (token.stream_token) {
      res.write(`data: ${JSON.stringify(token)}\n\n`);
    }
  };
  try {
    await client.generateStream(text, { model, maxTokens, timeout, signal: hangUp.signal }, onToken);
    res.write('event: done\ndata: [DONE]\n\n');
  } catch (error) {
    if (!res.headersSent) {
      res.status(500);
    }
    res.write(`event: error\ndata: ${JSON.stringify({ error: error.message })}\n\n`);
  }
  res.end();
});

app.post('/api/chat', async (req, res) => {
  const { question, model } = req.body ?? {};
  res.json(await query({ query: question, model }));
});

// As text: `res.json` would make one quoted string of it, which no Prometheus reads.
app.get('/metrics', (_, res) => res.set('content-type', PROMETHEUS_CONTENT_TYPE).end(prometheusText()));

app.get('/api/kv-cache/stats', (_, res) => res.json(kvCache.getStats()));
app.post('/api/kv-cache/clear', async (_, res) => {
  await kvCache.clear();
  res.json({ success: true, message: 'Cache cleared' });
});
app.post('/api/kv-cache/prune', async (_, res) => {
  await kvCache.prune();
  res.json({ success: true, message: 'Cache pruned' });
});
app.get('/api/kv-cache/:key/exists', async (req, res) => res.json({ exists: await kvCache.has(req.params.key) }));
app.delete('/api/kv-cache/:key', async (req, res) => res.json({ success: await kvCache.delete(req.params.key) }));

app.get('/api/gpu/status', async (_, res) => res.json(await gpus.getStatus()));
app.post('/api/gpu/can-handle', (req, res) => res.json(gpus.canHandleInference(Number(req.body?.requiredVram ?? 0))));
app.get('/api/gpu/utilization', (req, res) => res.json(gpus.getUtilizationTrend(Number(req.query.minutes ?? 5))));
app.get('/api/gpu/metadata', (_, res) => res.json(gpus.getNetworkMetadata()));

app.get('/api/performance/metrics', (req, res) => res.json(profiler.getMetrics(Number(req.query.window ?? 60_000))));
app.get('/api/performance/report', (_, res) => res.json(profiler.generateReport()));
app.get('/api/performance/bottlenecks', (req, res) => res.json(profiler.analyzeBottlenecks(Number(req.query.limit ?? 100))));
app.post('/api/performance/clear', (_, res) => {
  profiler.clear();
  res.json({ success: true, message: 'Performance history cleared' });
});

const server = app.listen(PORT, '127.0.0.1', () => {
  console.log(`listening on http://127.0.0.1:${server.address().port}`);
});

for (const signal of ['SIGTERM', 'SIGINT']) {
  process.on(signal, () => {
    server.close();
    process.exit(0);
  });
}

/** A user's program, compiled but never run: the types of the package as `import` sees them. */

import { AbortError, createHandler, Engine, NsLlmError } from 'ns-llm';
import type { ChatCompletion, Chunk, Completion, Embedding, Embeddings, GenerateOptions, Handler } from 'ns-llm';
import Client, { KvCacheService, type GenerateResult, type PerformanceReport, PerformanceProfiler } from 'ns-llm/ns-node';

export async function serve(signal: AbortSignal): Promise<string> {
  const client: Client = new Client({ modelPath: './models', engine: { threads: 2 } });
  const { text, tokens_generated }: GenerateResult = await client.generate('Once', { maxTokens: 5, timeout: 1_000, signal });
  const pieces: string[] = [];
  await client.generateStream('Once', { model: 'tinyllama' }, ({ stream_token, done }) => done || pieces.push(stream_token));
  const report: PerformanceReport = new PerformanceProfiler().generateReport();
  // @ts-expect-error: a wrong type
  await client.embed(5);
  return `${text} ${tokens_generated + new KvCacheService().getStats().hits} ${report.summary.grade} ${pieces.join('')}`;
}

export async function tell(signal: AbortSignal): Promise<string> {
  await using engine = await Engine.open('models/demo', {
    threads: 2,
    signal,
    onProgress: ({ fraction }) => fraction.toFixed(2),
  });
  const options: GenerateOptions = { maxTokens: 64, seed: 1n, stop: ['.'], logitBias: { 5: -100 }, signal };
  const { text, usage, timings, logprobs }: Completion = await engine.generate('Once upon a time', options);
  const total: number = usage.promptTokens + timings.totalMs + (logprobs?.[0]?.top[0]?.logprob ?? 0);
  const stream = engine.stream({ messages: [{ role: 'user', content: 'Hello' }] }, { temperature: 0.7, n: 2 });
  for await (const chunk of stream) {
    const { choice, text: piece, tokenIds }: Chunk = chunk;
    tokenIds.push(choice, piece.length);
  }
  const { embedding, truncated }: Embedding = await engine.embed('Hello', { dimensions: 8, normalize: true, signal });
  const { embeddings, tokens }: Embeddings = await engine.embed(['Hello', [1, 2], new Uint32Array(3)]);
  const vectors: Float32Array[] = truncated ? [embedding] : embeddings.slice(0, tokens.length);
  const seed: number | bigint = (await stream.result).seed;
  const blocks: number = engine.stats().kvBlocksUsed + engine.memory().weightsBytes + engine.info.vocabSize;
  await engine.generate({ tokens: await engine.tokenize('a', { addSpecial: false }) }, { seed });
  return `${text} ${total} ${blocks} ${vectors.length}`;
}

export async function asOpenAi(engine: Engine, signal: AbortSignal): Promise<string> {
  const messages = [{ role: 'user' as const, content: 'Hello' }];
  const answer: ChatCompletion = await engine.chat.completions.create({ model: 'any', messages, n: 2, user: 'me' });
  const params = { messages, stream: true, stream_options: { include_usage: true } } as const;
  let text = answer.choices[0]?.message.content ?? '';
  for await (const chunk of await engine.chat.completions.create(params, { signal, timeout: 1000 })) {
    text += chunk.choices[0]?.delta.content ?? '';
  }
  const list = await engine.embeddings.create({ input: ['a', 'b'], dimensions: 8 });
  const numbers: number[] = list.data[0]?.embedding ?? [];
  const packed = await engine.embeddings.create({ input: 'a', encoding_format: 'base64' });
  const bytes: string = packed.data[0]?.embedding ?? '';
  return `${text} ${numbers.length} ${bytes}`;
}

export function mounted(engine: Engine): Handler {
  const apiKeys = ['a-secret-of-some-length', { secret: 'another-secret-of-ours', tokensPerMinute: 10_000 }];
  const handler: Handler = createHandler([{ engine, aliases: ['gpt-4'] }], { apiKeys, basePath: '/llm' });
  handler({ method: 'GET', url: '/', rawHeaders: [] }, { statusCode: 200, headersSent: false }, (error) => explain(error));
  // @ts-expect-error: a misspelt option
  createHandler(engine, { keys: [] });
  return handler;
}

export function explain(error: unknown): string {
  if (error instanceof AbortError) {
    return String(error.cause);
  }
  return error instanceof NsLlmError && error.code === 'overloaded' ? 'try later' : 'unknown';
}

export async function refused(engine: Engine): Promise<void> {
  // @ts-expect-error: a misspelt option
  await engine.generate('Once', { maxToken: 5 });
  // @ts-expect-error: a wrong type
  await engine.generate('Once', { temperature: '0' });
  // @ts-expect-error: not a prompt
  engine.stream(5);
  // @ts-expect-error: an engine is made by Engine.open()
  new Engine();
  // @ts-expect-error: a parameter that is not there
  await engine.chat.completions.create({ messages: [], tools: [] });
  // @ts-expect-error: not an input
  await engine.embed(5);
  // @ts-expect-error: not one of the forms
  await Engine.open('models/demo', { weights: 'q4' });
}

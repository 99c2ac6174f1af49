import assert from 'node:assert/strict';
import { getEventListeners } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import { AbortError, NsLlmError } from '../lib/index.js';
import type { ChatCompletionChunk, ChatCompletionCreateParamsBase, Engine, RequestOptions } from '../lib/index.js';
import { checkNames, NOT_SUPPORTED_NAMES } from '../lib/openai/parameters.js';
import { collectGarbage, inPieces, isIdle, openDemo, ROOT, STORY, until, withCode } from './support.js';

const QUESTION = 'What is the month after May?';
const ANSWER = 'The month after May is June.';
const messages = [{ role: 'user', content: QUESTION }];
const TALE = [{ role: 'user', content: 'Tell me a story about a bear.' }];
/** Long enough that no test can see its end by itself. */
const LONG = { messages: [{ role: 'user', content: STORY }], max_tokens: 1500, logit_bias: { 2: -100, 0: -100 } };

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

async function collect(stream: AsyncIterable<ChatCompletionChunk>): Promise<ChatCompletionChunk[]> {
  const chunks: ChatCompletionChunk[] = [];
  for await (const chunk of stream) {
    chunks.push(chunk);
  }
  return chunks;
}

/** For `assert.rejects`: an error with this code that names this parameter, first in its message. */
function about(param: string, code: string): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof NsLlmError, String(error));
    assert.deepEqual([error.code, error.param], [code, param], error.message);
    assert.ok(error.message.startsWith(`${param} is `), error.message);
    return true;
  };
}

test('a chat completion has the shape that OpenAI gives, field by field', async () => {
  const started = Math.floor(Date.now() / 1000);
  const { id, created, system_fingerprint, ...rest } = await engine.chat.completions.create({ model: 'any', messages });
  assert.match(id, /^chatcmpl-[0-9a-f-]{36}$/);
  assert.ok(created >= started && created <= Date.now() / 1000);
  assert.match(system_fingerprint, /^demo-/);
  assert.deepEqual(rest, {
    object: 'chat.completion',
    model: 'demo',
    choices: [
      {
        index: 0,
        message: { role: 'assistant', content: ANSWER, refusal: null },
        logprobs: null,
        finish_reason: 'stop',
      },
    ],
    usage: {
      prompt_tokens: rest.usage.prompt_tokens,
      completion_tokens: 10,
      total_tokens: rest.usage.prompt_tokens + 10,
      prompt_tokens_details: { cached_tokens: 0 },
    },
  });
  const again = await engine.chat.completions.create({ messages });
  assert.ok(again.usage.prompt_tokens_details.cached_tokens >= 0);
});

test('a stream has the shape that OpenAI gives: role first, then text, then the end, then the counts', async () => {
  const request = { messages, stream: true, stream_options: { include_usage: true } } as const;
  const read = async () => collect(await engine.chat.completions.create(request));
  const chunks = await inPieces(5, read, ({ length }) => length);
  assert.equal(new Set(chunks.map(({ id }) => id)).size, 1);
  assert.ok(chunks.every(({ object }) => object === 'chat.completion.chunk'));
  const last = chunks.pop()!;
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage?.completion_tokens, 10);
  assert.ok(chunks.every(({ usage, choices }) => usage === null && choices.length === 1));
  assert.deepEqual(chunks.map(({ choices }) => choices[0]!.delta.role), ['assistant', ...chunks.slice(1).map(() => undefined)]);
  assert.equal(chunks.map(({ choices }) => choices[0]!.delta.content ?? '').join(''), ANSWER);
  assert.deepEqual(chunks.at(-1)!.choices[0], { index: 0, delta: {}, logprobs: null, finish_reason: 'stop' });
  assert.ok(chunks.slice(0, -1).every(({ choices }) => choices[0]!.finish_reason === null));
});

test('without include_usage no chunk has usage, and none is without a choice', async () => {
  const chunks = await collect(await engine.chat.completions.create({ messages, stream: true }));
  assert.ok(chunks.every((chunk) => !('usage' in chunk) && chunk.choices.length === 1));
});

test('n choices, streamed or not, are the same, each with its own role and end', async () => {
  const params = { messages: TALE, n: 3, temperature: 2, seed: 5, max_tokens: 24 };
  const { choices } = await engine.chat.completions.create(params);
  assert.deepEqual(choices.map(({ index }) => index), [0, 1, 2]);
  assert.equal(new Set(choices.map(({ message }) => message.content)).size, 3);
  const chunks = await collect(await engine.chat.completions.create({ ...params, stream: true }));
  for (const { index, message, finish_reason } of choices) {
    const own = chunks.map((chunk) => chunk.choices[0]!).filter((choice) => choice.index === index);
    assert.equal(own.map(({ delta }) => delta.content ?? '').join(''), message.content);
    assert.deepEqual([own[0]?.delta.role, own.filter(({ delta }) => delta.role).length], ['assistant', 1]);
    assert.deepEqual([own.at(-1)?.finish_reason, own.filter((own) => own.finish_reason).length], [finish_reason, 1]);
  }
});

test('logprobs name each token by text and bytes, streamed or not', async () => {
  const params = { messages: [{ role: 'user', content: 'Repeat after me: 🍎' }], logprobs: true, top_logprobs: 2 };
  const { choices } = await engine.chat.completions.create(params);
  const content = choices[0]!.logprobs!.content;
  const text = Buffer.from(content.flatMap(({ bytes }) => bytes)).toString();
  assert.ok(text.startsWith('🍎') && choices[0]!.message.content === '🍎', text);
  assert.ok(content.some(({ token }) => token.includes('\ufffd')), 'the character was one token');
  for (const { token, logprob, top_logprobs } of content) {
    assert.equal(top_logprobs.length, 2);
    assert.deepEqual([top_logprobs[0]?.token, top_logprobs[0]?.logprob], [token, logprob], 'greedy takes the best');
    assert.ok(logprob <= 0 && logprob >= -9999);
  }
  const chunks = await collect(await engine.chat.completions.create({ ...params, stream: true }));
  assert.deepEqual(chunks.flatMap((chunk) => chunk.choices[0]!.logprobs?.content ?? []), content);
  const plain = await engine.chat.completions.create({ ...params, top_logprobs: null, max_tokens: 1 });
  assert.deepEqual(plain.choices[0]!.logprobs?.content[0]?.top_logprobs, []);
});

test('each parameter does what generate does with its own name', async () => {
  const common = { messages: TALE };
  const table: [object, object][] = [
    [{ max_tokens: 3 }, { maxTokens: 3 }],
    [{ max_completion_tokens: 3 }, { maxTokens: 3 }],
    [{ temperature: 1.3, seed: 9 }, { temperature: 1.3, seed: 9 }],
    [{ temperature: 1.3, seed: 9, top_p: 0.5 }, { temperature: 1.3, seed: 9, topP: 0.5 }],
    [{ temperature: 1.3, seed: 9, top_k: 3 }, { temperature: 1.3, seed: 9, topK: 3 }],
    [{ temperature: 1.3, seed: 9, min_p: 0.4 }, { temperature: 1.3, seed: 9, minP: 0.4 }],
    [{ repetition_penalty: 1.8 }, { repetitionPenalty: 1.8 }],
    [{ presence_penalty: 2 }, { presencePenalty: 2 }],
    [{ frequency_penalty: 2 }, { frequencyPenalty: 2 }],
    [{ stop: ['a'] }, { stop: ['a'] }],
    [{ stop: 'the' }, { stop: 'the' }],
    [{ logit_bias: { 40: 50 } }, { logitBias: { 40: 50 } }],
  ];
  const answers = new Set<string>();
  for (const [params, options] of table) {
    const own = await engine.generate(common, { maxTokens: 24, ...options });
    const { choices } = await engine.chat.completions.create({ max_tokens: 24, ...common, ...params });
    assert.equal(choices[0]?.message.content, own.text, JSON.stringify(params));
    answers.add(own.text);
  }
  assert.ok(answers.size > 6, 'the parameters changed nothing');
});

test('parts of a content are joined, developer is system, and an earlier answer may be sent back as it came', async () => {
  const parts = [{ type: 'text' as const, text: 'What is the month ' }, { type: 'text' as const, text: 'after May?' }];
  const { choices } = await engine.chat.completions.create({ messages: [{ role: 'user', content: parts }] });
  assert.equal(choices[0]!.message.content, ANSWER);
  const again = { role: 'user', content: 'Thank you.' };
  const answer = async (role: string): Promise<string> => {
    const conversation = [{ role, content: 'Be short.' }, ...messages, choices[0]!.message, again];
    return (await engine.chat.completions.create({ messages: conversation })).choices[0]!.message.content;
  };
  assert.equal(await answer('developer'), await answer('system'));
});

test('a parameter that would change the answer and cannot be followed is refused by name, never dropped', async () => {
  const json = { type: 'json_schema', json_schema: { name: 'x', schema: {} } };
  const table: [string, string, object][] = [
    ['tools', 'not_supported', { tools: [{ type: 'function', function: { name: 'f' } }] }],
    ['tool_choice', 'not_supported', { tool_choice: 'required' }],
    ['functions', 'not_supported', { functions: [{}] }],
    ['response_format', 'not_supported', { response_format: { type: 'json_object' } }],
    ['response_format', 'not_supported', { response_format: json }],
    ['modalities', 'not_supported', { modalities: ['text', 'audio'] }],
    ['audio', 'not_supported', { audio: { voice: 'x', format: 'mp3' } }],
    ['reasoning_effort', 'not_supported', { reasoning_effort: 'high' }],
    ['web_search_options', 'not_supported', { web_search_options: {} }],
    ['messages[0].content[0].type', 'not_supported', { messages: [{ role: 'user', content: [{ type: 'image_url' }] }] }],
    ['messages[0].role', 'not_supported', { messages: [{ role: 'tool', content: 'x', tool_call_id: 'a' }] }],
    ['messages[0].tool_calls', 'not_supported', { messages: [{ role: 'assistant', tool_calls: [{}] }] }],
    ['messages[0].name', 'not_supported', { messages: [{ role: 'user', content: 'x', name: 'Ann' }] }],
    ['maxTokens', 'invalid_argument', { maxTokens: 3 }],
    ['messages', 'invalid_argument', { messages: undefined }],
    ['messages', 'invalid_argument', { messages: [] }],
    ['messages[0].content', 'invalid_argument', { messages: [{ role: 'user' }] }],
    ['stream', 'invalid_argument', { stream: 'yes' }],
    ['logprobs', 'invalid_argument', { logprobs: 3 }],
    ['top_logprobs', 'invalid_argument', { top_logprobs: 3 }],
    ['top_logprobs', 'invalid_argument', { logprobs: true, top_logprobs: 21 }],
    ['max_tokens', 'invalid_argument', { max_tokens: -1 }],
    ['max_completion_tokens', 'invalid_argument', { max_completion_tokens: 1.5 }],
    ['temperature', 'invalid_argument', { temperature: 'hot' }],
    ['top_p', 'invalid_argument', { top_p: 2 }],
    ['presence_penalty', 'invalid_argument', { presence_penalty: 3 }],
    ['frequency_penalty', 'invalid_argument', { frequency_penalty: -3 }],
    ['logit_bias', 'invalid_argument', { logit_bias: { 999999: 1 } }],
    ['n', 'invalid_argument', { n: 9 }],
    ['stop', 'invalid_argument', { stop: [''] }],
    ['seed', 'invalid_argument', { seed: 1.5 }],
  ];
  const before = engine.stats().requestsTotal;
  for (const [param, code, params] of table) {
    for (const stream of [false, true]) {
      const given = { messages, stream, ...params } as ChatCompletionCreateParamsBase;
      await assert.rejects(engine.chat.completions.create(given), about(param, code), JSON.stringify(params));
    }
  }
  const options = { messages, stream_options: {} };
  await assert.rejects(engine.chat.completions.create(options), about('stream_options', 'invalid_argument'));
  assert.equal(engine.stats().requestsTotal, before);
  const timeout = engine.chat.completions.create({ messages }, { timeout: 0 });
  await assert.rejects(timeout, about('timeout', 'invalid_argument'));
});

test('parameters that change nothing are taken: null, neutral values, and what only concerns a service', async () => {
  const harmless = {
    user: 'u', metadata: { a: 'b' }, store: true, service_tier: 'auto', safety_identifier: 's', prompt_cache_key: 'p',
    tools: [], tool_choice: 'none', response_format: { type: 'text' }, modalities: ['text'], audio: null, stop: null,
    temperature: null, n: null, seed: null, logit_bias: null, logprobs: null, top_logprobs: null, stream: null,
    stream_options: null, max_tokens: null, reasoning_effort: 'none', verbosity: 'medium', parallel_tool_calls: true,
  };
  const params = { messages, model: 'gpt-x', ...harmless } as ChatCompletionCreateParamsBase;
  const options: RequestOptions = { maxRetries: 2, headers: {}, timeout: 60_000 };
  const answer = await engine.chat.completions.create(params, options);
  assert.ok('choices' in answer);
  assert.equal(answer.choices[0]!.message.content, ANSWER);
});

test('a signal ends a completion and a stream with its reason; controller.abort() and break end a stream quietly', async () => {
  const ways: Record<string, (abort: AbortController) => Promise<void>> = {
    async completion(abort) {
      const running = engine.chat.completions.create(LONG, { signal: abort.signal });
      await until(engine, 'its start', ({ numSequencesRunning }) => numSequencesRunning > 0);
      abort.abort('mine');
      await assert.rejects(running, (error) => error instanceof AbortError && error.cause === 'mine');
    },
    async stream(abort) {
      const stream = await engine.chat.completions.create({ ...LONG, stream: true }, { signal: abort.signal });
      const loop = async (): Promise<void> => {
        for await (const _ of stream) {
          abort.abort('mine');
        }
      };
      await assert.rejects(loop(), (error) => error instanceof AbortError && error.cause === 'mine');
    },
    async controller() {
      const options = { include_usage: true };
      const stream = await engine.chat.completions.create({ ...LONG, stream: true, stream_options: options });
      let chunks = 0;
      for await (const { choices } of stream) {
        assert.equal(choices.length, 1, 'no counts of an answer that was given up');
        chunks += 1;
        stream.controller.abort();
      }
      assert.equal(chunks, 1);
    },
    async break() {
      for await (const _ of await engine.chat.completions.create({ ...LONG, stream: true })) {
        break;
      }
    },
    async forgotten() {
      await (async () => {
        await engine.chat.completions.create({ ...LONG, stream: true });
      })();
      await until(engine, 'its end after the garbage collector', (stats) => {
        collectGarbage();
        return isIdle(stats);
      });
    },
  };
  for (const [way, ended] of Object.entries(ways)) {
    const before = await until(engine, 'idleness', isIdle);
    const abort = new AbortController();
    await ended(abort);
    await until(engine, `the end: ${way}`, (stats) => {
      const ended = stats.requestsCancelled + stats.requestsRefused;
      return isIdle(stats) && ended === before.requestsCancelled + before.requestsRefused + 1;
    });
    assert.equal(getEventListeners(abort.signal, 'abort').length, 0);
  }
});

test('toReadableStream gives the chunks as lines of JSON', async () => {
  const stream = await engine.chat.completions.create({ messages, stream: true });
  const lines = (await new Response(stream.toReadableStream()).text()).trimEnd().split('\n');
  const chunks: ChatCompletionChunk[] = lines.map((line) => JSON.parse(line));
  assert.equal(chunks.map(({ choices }) => choices[0]?.delta.content ?? '').join(''), ANSWER);
});

test('embeddings have the shape that OpenAI gives, as numbers or as base64', async () => {
  const input = ['a red fox', 'a quick fox'];
  const { embeddings, usage } = await engine.embed(input);
  const list = await engine.embeddings.create({ input, model: 'any', user: 'u' });
  const total = { prompt_tokens: usage.promptTokens, total_tokens: usage.promptTokens };
  assert.deepEqual(list, {
    object: 'list',
    data: embeddings.map((vector, index) => ({ object: 'embedding', index, embedding: Array.from(vector) })),
    model: 'demo',
    usage: total,
  });
  const { data } = await engine.embeddings.create({ input, encoding_format: 'base64', dimensions: 8 });
  const bytes = Buffer.from(data[0]!.embedding, 'base64');
  const floats = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  assert.deepEqual(floats, (await engine.embed(input[0]!, { dimensions: 8 })).embedding);
  const ids = await engine.tokenize(input[0]!);
  for (const one of [input[0]!, ids, [ids]]) {
    assert.deepEqual((await engine.embeddings.create({ input: one })).data, [list.data[0]]);
  }
});

test('embedding inputs that are too long, and parameters that are not known, are refused', async () => {
  const long = 'bear '.repeat(2 * engine.info.maxEmbeddingTokens);
  await assert.rejects(engine.embeddings.create({ input: long }), withCode('prompt_too_long'));
  const table: [string, object][] = [
    ['encoding_format', { encoding_format: 'hex' }],
    ['input', { input: undefined }],
    ['input', { input: [] }],
    ['dimensions', { dimensions: -1 }],
    ['truncate', { truncate: true }],
  ];
  for (const [param, params] of table) {
    await assert.rejects(engine.embeddings.create({ input: 'a', ...params }), about(param, 'invalid_argument'));
  }
  const signal = AbortSignal.abort('mine');
  await assert.rejects(engine.embeddings.create({ input: 'a' }, { signal }), (error) => error instanceof AbortError);
});

test('what cannot be followed is refused as the server refuses it', () => {
  const list = JSON.parse(readFileSync(join(ROOT, 'server', 'unsupported-parameters.json'), 'utf8')) as {
    name: string;
    neutral: unknown[];
    refused: unknown[];
  }[];
  assert.ok(list.length >= 10);
  for (const { name, neutral, refused } of list) {
    for (const value of [...neutral, null]) {
      checkNames({ [name]: value }, []);
    }
    for (const value of refused) {
      assert.throws(() => checkNames({ [name]: value }, []), { code: 'not_supported', param: name }, JSON.stringify(value));
    }
  }
  assert.deepEqual(list.map(({ name }) => name).sort(), [...NOT_SUPPORTED_NAMES].sort());
});

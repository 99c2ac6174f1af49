import assert from 'node:assert/strict';
import { mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';

import { DEMO_MODEL, Engine, NsLlmError } from '../lib/index.js';
import type {
  ChatCompletionCreateParamsNonStreaming,
  EmbeddingCreateParams,
  EmbedOptions,
  GenerateOptions,
  Prompt,
  RequestOptions,
} from '../lib/index.js';
import { isIdle, openDemo, STORY, until, withCode } from './support.js';

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

/** Values of every type that JavaScript has, and numbers that fit nothing. */
const ODD_VALUES: readonly unknown[] = [
  undefined, null, true, false, 0, -0, 1, -1, 1.5, NaN, Infinity, -Infinity, 2 ** 31, 2 ** 32, 2 ** 53, 1e308, -1e308,
  5e-324, 0n, -1n, 2n ** 64n, 2n ** 200n, '', 'text', '\0', '\ud800', 'x'.repeat(1 << 16), Symbol('s'), Symbol.iterator,
  [], [undefined], [[]], [NaN], [-1], [1.5], ['a', 1], new Array(3), new Array(100_000).fill(7), {}, { length: 3 },
  { a: 1 }, { prompt: 3 }, { prompt: STORY, tokens: [1] }, { messages: [] }, { messages: [{}] }, { messages: [null] },
  { messages: [{ role: 1, content: 2 }] }, { tokens: 'x' }, { tokens: [4_000_000_000] }, { tokens: [2 ** 40] }, () => 1,
  async () => {}, class {}, new Date(0), /x/, new Map([[1, 2]]), new Set([1]), new WeakMap(), Promise.resolve(1),
  new Uint8Array(4), new Float64Array([NaN]), new Uint32Array(0), new BigUint64Array(2), new ArrayBuffer(8),
  new SharedArrayBuffer(8), new DataView(new ArrayBuffer(8)), new Proxy({}, {}), Object.create(null), new Error('e'),
  globalThis, Engine, new (class Odd extends Array {})(),
];

const OPTION_NAMES = [
  'maxTokens', 'temperature', 'topK', 'topP', 'minP', 'repetitionPenalty', 'presencePenalty', 'frequencyPenalty',
  'logitBias', 'seed', 'stop', 'stopTokenIds', 'ignoreEos', 'n', 'logprobs', 'promptLogprobs', 'priority', 'timeoutMs',
  'namespace', 'prefixCache', 'responseCache', 'responseTags', 'responseTtlMs', 'signal',
];

const EMBED_NAMES = ['dimensions', 'truncate', 'normalize', 'priority', 'timeoutMs', 'signal'];

const EMBEDDING_NAMES = ['input', 'model', 'dimensions', 'encoding_format', 'user'];

const CHAT_NAMES = [
  'messages', 'model', 'max_tokens', 'max_completion_tokens', 'temperature', 'top_p', 'top_k', 'min_p', 'n', 'stop',
  'seed', 'presence_penalty', 'frequency_penalty', 'repetition_penalty', 'logit_bias', 'logprobs', 'top_logprobs',
  'stream', 'stream_options', 'tools', 'response_format', 'user', 'metadata',
];

const messages = [{ role: 'user', content: STORY }];

const OPEN_NAMES = [
  'model', 'device', 'weights', 'kvDtype', 'threads', 'threadPriority', 'contextTokens', 'kvBytes', 'memoryLimit',
  'blockTokens',
  'maxCudaGraphs', 'maxRunningSequences', 'prefillBudgetTokens', 'mixedBudgetTokens', 'maxWaitingRequests', 'prefixCache', 'kvHostBytes',
  'kvCacheDir', 'kvDiskBytes', 'kvLoadBudgetMs', 'kvNamespaceShare', 'kvRemote', 'kvTierEncoding', 'responseCache', 'signal',
  'onProgress',
];

/** Calls something that may succeed or fail, but only with an error of this package. Tells which. */
async function outcome(call: () => unknown): Promise<'ok' | string> {
  try {
    await call();
    return 'ok';
  } catch (error) {
    assert.ok(error instanceof NsLlmError, `${String(error)} is no NsLlmError`);
    assert.match(error.code, /^[a-z_]+$/);
    assert.notEqual(error.code, 'internal', error.message);
    return error.code;
  }
}

test('more than 60 odd values for the prompt and for each option: every one works or is a typed error', async () => {
  assert.ok(ODD_VALUES.length > 60);
  let refused = 0;
  for (const value of ODD_VALUES) {
    const calls: (() => Promise<unknown>)[] = [
      () => engine.generate(value as Prompt, { maxTokens: 1 }),
      () => engine.generate(STORY, value as GenerateOptions),
      () => engine.tokenize(value as string),
      () => engine.tokenize(STORY, value as object),
      () => engine.detokenize(value as number[]),
      () => engine.embed(value as string),
      () => engine.embed(STORY, value as EmbedOptions),
      () => engine.embeddings.create(value as EmbeddingCreateParams),
      () => engine.embeddings.create({ input: STORY }, value as RequestOptions),
      () => engine.chat.completions.create(value as ChatCompletionCreateParamsNonStreaming),
      () => engine.chat.completions.create({ messages, max_tokens: 1 }, value as RequestOptions),
      ...EMBED_NAMES.map((name) => () => engine.embed(STORY, { [name]: value })),
      ...CHAT_NAMES.map((name) => () => engine.chat.completions.create({ messages, max_tokens: 1, [name]: value })),
      ...EMBEDDING_NAMES.map((name) => () => engine.embeddings.create({ input: STORY, [name]: value })),
      ...OPTION_NAMES.map((name) => () => engine.generate(STORY, { maxTokens: 1, [name]: value })),
    ];
    const outcomes = await Promise.all(calls.map(outcome));
    refused += outcomes.filter((code) => code !== 'ok').length;
  }
  assert.ok(refused > 1000, `${refused} refused`);
  assert.equal((await engine.generate(STORY, { maxTokens: 2 })).tokenIds.length, 2, 'the engine still answers');
  await until(engine, 'idleness', isIdle);
});

test('more than 60 odd values for open and each of its options: every one works or is a typed error', async () => {
  const opened: Engine[] = [];
  const keep = async (promise: Promise<Engine>): Promise<void> => {
    opened.push(await promise);
  };
  // Without a model nothing is loaded: what passes the checks of types and ranges ends at the missing folder.
  const nowhere = join(tmpdir(), 'ns-llm-no-model');
  for (const value of ODD_VALUES) {
    const named = OPEN_NAMES.map((name) => () => keep(Engine.open(nowhere, { [name]: value })));
    await Promise.all(named.map(outcome));
    if (value !== undefined && value !== null && typeof value !== 'object') {
      assert.notEqual(await outcome(() => keep(Engine.open(value as string))), 'ok');
    }
  }
  assert.equal(opened.length, 0);
});

test('a wrong type or range is refused with the name of the field as JavaScript writes it', async () => {
  const table: [string, GenerateOptions, RegExp][] = [
    ['a fraction', { maxTokens: 1.5 }, /^maxTokens is 1\.5, must be an integer/],
    ['NaN', { temperature: NaN }, /^temperature is NaN, must be 0 to 100/],
    ['negative', { topK: -1 }, /^topK is -1, must be/],
    ['above', { repetitionPenalty: 101 }, /^repetitionPenalty is 101, must be/],
    ['too many', { n: 9 }, /^n is 9, must be 1 to 8/],
    ['logprobs', { logprobs: 21 }, /^logprobs is 21, must be at most 20/],
    ['time', { timeoutMs: 0 }, /^timeoutMs is 0, must be 1 to 86400000/],
    ['beyond 2^53', { seed: 2 ** 53 }, /^seed is 9007199254740992, must be an integer/],
    ['a large bigint', { seed: 2n ** 64n }, /^seed is a bigint beyond 64 bits/],
    ['text', { maxTokens: '5' as unknown as number }, /^maxTokens is a string, must be a number/],
    ['a choice', { priority: 'urgent' as 'high' }, /^priority is "urgent", must be one of high, normal, background/],
    ['a token id', { stopTokenIds: [1, -1] }, /^stopTokenIds\[1\] is -1, must be an integer/],
    ['a vocabulary', { logitBias: { 999_999: 1 } }, /^logitBias.* 999999/],
    ['stop strings', { stop: new Array(17).fill('x') }, /^stop is 17 entries long/],
    ['an unknown name', { maxToken: 5 } as GenerateOptions, /"maxToken"/],
  ];
  for (const [what, options, message] of table) {
    await assert.rejects(engine.generate(STORY, options), withCode('invalid_argument', message), what);
    assert.throws(() => engine.stream(STORY, options), withCode('invalid_argument', message), what);
  }
});

test('an exception of a getter reaches the caller as it is', async () => {
  const mine = new Error('mine');
  const options = {
    get maxTokens(): number {
      throw mine;
    },
  };
  await assert.rejects(engine.generate(STORY, options), mine);
});

test('a prompt too long for the context is an error with both lengths', async () => {
  await assert.rejects(engine.generate('bear '.repeat(5000)), withCode('prompt_too_long', /context of \d+/));
});

test('text above 4 MiB is refused before it is copied', async () => {
  const text = 'x'.repeat(64 << 20);
  const started = performance.now();
  await assert.rejects(engine.generate(text), withCode('invalid_argument', /^prompt is 67108864 characters long/));
  await assert.rejects(engine.tokenize(text), withCode('invalid_argument', /^text is/));
  assert.ok(performance.now() - started < 1000);
});

test('a folder that is no model is an error that names what is missing', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'ns-llm-'));
  await assert.rejects(Engine.open(join(folder, 'nothing')), NsLlmError);
  await assert.rejects(Engine.open(folder), withCode('missing_file', /config\.json/));
  writeFileSync(join(folder, 'config.json'), '{"architectures": 3}');
  await assert.rejects(Engine.open(folder), NsLlmError);
  assert.match(DEMO_MODEL, /demo$/);
});

test('errors look like errors: name, message, code, and instanceof', async () => {
  const error = await engine.generate(STORY, { n: 0 }).then(() => assert.fail(), (thrown: unknown) => thrown);
  assert.ok(error instanceof NsLlmError && error instanceof Error);
  assert.equal(String(error), 'NsLlmError: n is 0, must be 1 to 8');
  assert.deepEqual(Object.keys(error), ['code']);
});

import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';

import { NsLlmError } from '../lib/index.js';
import type { Engine } from '../lib/index.js';
import { native } from '../lib/native.js';
import { isIdle, openDemo, STORY, until } from './support.js';

let engine: Engine;
before(async () => {
  engine = await openDemo();
});
after(() => engine.close());

test('generate gives text, its tokens, and counts and times that fit them', async () => {
  const { text, tokenIds, finishReason, choices, usage, timings } = await engine.generate(STORY, { maxTokens: 24 });
  assert.equal(tokenIds.length, 24);
  assert.equal(finishReason, 'length');
  assert.equal(text, await engine.detokenize(tokenIds));
  assert.deepEqual(choices, [{ text, tokenIds, finishReason }]);
  assert.equal(usage.promptTokens, (await engine.tokenize(STORY)).length);
  assert.equal(usage.completionTokens, 24);
  assert.ok(timings.firstTokenMs > 0 && timings.totalMs >= timings.firstTokenMs, JSON.stringify(timings));
});

test('text, its own tokens and an object are three ways to say the same prompt', async () => {
  const expected = await engine.generate(STORY, { maxTokens: 8 });
  const tokens = await engine.tokenize(STORY);
  for (const prompt of [{ prompt: STORY }, { tokens }, { tokens: Uint32Array.from(tokens) }]) {
    assert.deepEqual((await engine.generate(prompt, { maxTokens: 8 })).tokenIds, expected.tokenIds);
  }
});

test('messages are rendered by the template of the model, and it answers', async () => {
  const messages = [{ role: 'user', content: 'What is the month after May?' }];
  const { text, finishReason, tokenIds } = await engine.generate({ messages });
  assert.equal(text, 'The month after May is June.');
  assert.equal(finishReason, 'stop');
  assert.equal(tokenIds.at(-1), 2, 'the end token of the chat template counts as a token, not as text');
});

test('a reported seed, number or bigint, gives the same sampled tokens again, and another seed others', async () => {
  const sampled = { maxTokens: 24, temperature: 1.5 };
  const first = await engine.generate(STORY, sampled);
  const again = await engine.generate(STORY, { ...sampled, seed: first.seed });
  assert.deepEqual(again.tokenIds, first.tokenIds);
  assert.equal(again.seed, first.seed);
  const large = await engine.generate(STORY, { ...sampled, seed: 2n ** 64n - 1n });
  assert.equal(large.seed, 2n ** 64n - 1n);
  assert.notDeepEqual(large.tokenIds, first.tokenIds);
});

test('n gives that many choices, which differ when sampled, and the top level is the first', async () => {
  const result = await engine.generate(STORY, { maxTokens: 16, temperature: 1.5, seed: 7, n: 3 });
  assert.equal(result.choices.length, 3);
  assert.equal(new Set(result.choices.map(({ text }) => text)).size, 3);
  assert.equal(result.text, result.choices[0]?.text);
  assert.equal(result.usage.completionTokens, result.choices.flatMap(({ tokenIds }) => tokenIds).length);
});

test('logprobs come with each token, best alternative first, and only when asked for', async () => {
  const { tokenIds, logprobs, promptLogprobs } = await engine.generate(STORY, {
    maxTokens: 6,
    logprobs: 3,
    promptLogprobs: true,
  });
  assert.deepEqual(logprobs?.map(({ chosen }) => chosen.tokenId), tokenIds);
  for (const { chosen, top } of logprobs ?? []) {
    assert.equal(top.length, 3);
    assert.equal(top[0]?.tokenId, chosen.tokenId, 'a greedy choice is the most likely one');
    assert.ok(chosen.logprob <= 0 && top[0]!.logprob >= top[1]!.logprob && top[1]!.logprob >= top[2]!.logprob);
  }
  assert.equal(promptLogprobs?.length, (await engine.tokenize(STORY)).length - 1);
  const plain = await engine.generate(STORY, { maxTokens: 2 });
  assert.ok(!('logprobs' in plain) && !('promptLogprobs' in plain));
});

test('a stop string ends the answer before it, as one string or several', async () => {
  const { text } = await engine.generate(STORY, { maxTokens: 32 });
  const word = text.trim().split(/\s+/)[4]!;
  for (const stop of [word, ['never to be seen', word]]) {
    const stopped = await engine.generate(STORY, { maxTokens: 32, stop });
    assert.equal(stopped.text, text.slice(0, text.indexOf(word)));
    assert.equal(stopped.finishReason, 'stop');
  }
});

test('logitBias and stopTokenIds reach the sampler', async () => {
  const { tokenIds } = await engine.generate(STORY, { maxTokens: 4 });
  const banned = await engine.generate(STORY, { maxTokens: 1, logitBias: { [tokenIds[0]!]: -100 } });
  assert.notEqual(banned.tokenIds[0], tokenIds[0]);
  const stopped = await engine.generate(STORY, { maxTokens: 4, stopTokenIds: [tokenIds[1]!] });
  assert.deepEqual(stopped.tokenIds, tokenIds.slice(0, 2));
  assert.equal(stopped.finishReason, 'stop');
});

test('the same prompt again finds its KV in the cache, and not with prefixCache off', async () => {
  const tokens = await engine.tokenize(`${STORY} ${'there was a little bear. '.repeat(6)}`);
  await engine.generate({ tokens }, { maxTokens: 1 });
  const warm = await engine.generate({ tokens }, { maxTokens: 8 });
  const cold = await engine.generate({ tokens }, { maxTokens: 8, prefixCache: 'off' });
  assert.ok(warm.usage.cachedTokens > 0, 'the cache was never hit');
  assert.equal(cold.usage.cachedTokens, 0);
  assert.deepEqual(warm.tokenIds, cold.tokenIds);
});

test('token ids are copied when they are given: what happens to the array later changes nothing', async () => {
  const tokens = Uint32Array.from(await engine.tokenize(STORY));
  const expected = await engine.generate({ tokens }, { maxTokens: 8 });
  const running = engine.generate({ tokens }, { maxTokens: 8 });
  tokens.fill(0);
  assert.deepEqual((await running).tokenIds, expected.tokenIds);
});

test('tokenize and detokenize are inverse for any text', async () => {
  for (const text of ['', 'Once upon a time', 'naïve café, 日本語, 👩‍👩‍👧', ' \n\t ', '<|im_end|>']) {
    assert.equal(await engine.detokenize(await engine.tokenize(text)), text);
  }
});

test('info, memory and stats tell what is loaded, held and done', async () => {
  const { architecture, numParameters, vocabSize, hasChatTemplate, threads, device } = engine.info;
  assert.equal(architecture, 'Qwen3ForCausalLM');
  assert.ok(numParameters > 5e6 && numParameters < 6e6 && vocabSize === 2048 && hasChatTemplate);
  assert.deepEqual([threads, device, engine.info.deviceName], [1, 'cpu', 'cpu']);
  assert.match(engine.info.deviceReason, /^(no CUDA device: |it was asked for)/);
  const { weightsBytes, kvReservedBytes } = engine.memory();
  assert.ok(weightsBytes >= numParameters * 2 && kvReservedBytes <= 64 << 20, JSON.stringify(engine.memory()));
  const stats = await until(engine, 'idleness', isIdle);
  assert.ok(stats.requestsFinished > 10 && stats.generationTokensTotal > 100 && stats.stepsTotal > 100);
});

test('keys and values in 8 bits: twice the blocks in the same bytes, and an answer', async () => {
  const blocks = async (kvDtype: 'auto' | 'f16' | 'int8'): Promise<number> => {
    const small = await openDemo({ kvBytes: 8 << 20, kvDtype });
    assert.equal(small.info.kvDtype, kvDtype === 'auto' ? 'f16' : kvDtype);
    assert.equal((await small.generate(STORY, { maxTokens: 4 })).tokenIds.length, 4);
    const { kvBlocksTotal } = small.stats();
    await small.close();
    return kvBlocksTotal;
  };
  const [auto, f16, int8] = [await blocks('auto'), await blocks('f16'), await blocks('int8')];
  assert.ok(auto === f16 && int8 > 1.8 * f16 && int8 < 2 * f16, `${auto} ${f16} ${int8}`);
});

test('the bytes of weights and KV pool are reported to the garbage collector, and taken back by close', async () => {
  const before = native.NativeEngine.externalMemory();
  const other = await openDemo();
  const { weightsBytes, kvReservedBytes } = other.memory();
  const held = weightsBytes + kvReservedBytes;
  const reported = native.NativeEngine.externalMemory() - before;
  assert.ok(Math.abs(reported - held) < held * 0.1, `${reported} bytes reported, ${held} held`);
  await other.close();
  assert.ok(native.NativeEngine.externalMemory() - before < held * 0.1);
});

test('32 requests at once are each answered as if alone', async () => {
  const prompts = Array.from({ length: 32 }, (_, i) => `${STORY} ${i}`);
  const together = await Promise.all(prompts.map((prompt) => engine.generate(prompt, { maxTokens: 6 })));
  for (const i of [0, 13, 31]) {
    const alone = await engine.generate(prompts[i]!, { maxTokens: 6 });
    assert.deepEqual(alone.tokenIds, together[i]?.tokenIds);
  }
  assert.ok(!together.some((result) => result instanceof NsLlmError));
});

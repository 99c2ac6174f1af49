// The published clients against `ns-llm serve` with the model that ships: as they are installed, with nothing changed but
// their address. What this machine lacks (the program, Python's client) is skipped by name.

import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'a-secret-of-some-length';
const messages = [{ role: 'user', content: 'Tell me a story about a fox.' }];

/** Built by `cargo test --workspace`, which runs before. */
const program = join(process.env.CARGO_TARGET_DIR ?? join(ROOT, 'target'), 'debug', 'ns-llm');
const require = createRequire(import.meta.url);

/** Why clients cannot be tried here; `false` when they can. */
const skip = existsSync(program) ? false : 'cargo has not built ns-llm';

let child;
let address;

before(async () => {
  if (skip) {
    return;
  }
  const model = join(ROOT, 'models', 'demo');
  const options = ['--port', '0', '--threads', '1', '--kv-mib', '32', '--alias', 'llama3.2', '--public-probes'];
  const env = { ...process.env, NS_LLM_API_KEY: KEY };
  child = spawn(program, ['serve', '--model', model, ...options], { env, stdio: ['ignore', 'ignore', 'pipe'] });
  for await (const line of createInterface({ input: child.stderr })) {
    address = /http:\S+/.exec(line)?.[0];
    if (address) {
      break;
    }
  }
  assert.ok(address, 'the server says where it listens');
});

after(() => child?.kill());

describe('openai', { skip }, () => {
  const client = () => {
    const { OpenAI } = require('openai');
    return new OpenAI({ apiKey: KEY, baseURL: `${address}/v1`, maxRetries: 0 });
  };

  test('models are listed and found', async () => {
    const names = [];
    for await (const { id } of client().models.list()) {
      names.push(id);
    }
    assert.deepEqual(names, ['demo']);
    assert.equal((await client().models.retrieve('demo')).object, 'model');
  });

  test('a chat is answered, whole and in chunks', async () => {
    const params = { model: 'demo', messages, max_tokens: 16, seed: 5, temperature: 0.8 };
    const { choices, usage } = await client().chat.completions.create(params);
    assert.equal(choices[0].message.role, 'assistant');
    assert.equal(usage.completion_tokens, 16);
    const stream = await client().chat.completions.create({ ...params, stream: true, stream_options: { include_usage: true } });
    let text = '';
    let last;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? '';
      last = chunk;
    }
    assert.equal(text, choices[0].message.content);
    assert.equal(last.usage.total_tokens, usage.total_tokens);
    // The client's own way to put chunks together.
    const final = await client().chat.completions.stream(params).finalChatCompletion();
    assert.equal(final.choices[0].message.content, text);
    assert.equal(final.choices[0].finish_reason, 'length');
  });

  test('leaving a stream ends its request', async () => {
    const stream = await client().chat.completions.create({ model: 'demo', messages, stream: true, ignore_eos: true });
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      break;
    }
    let ready;
    do {
      ready = await (await fetch(`${address}/ready`)).json();
    } while (ready.models[0].requests_running > 0);
    assert.equal(ready.queue.running, 0);
  });

  test('completions, embeddings and responses are answered', async () => {
    const completion = await client().completions.create({ model: 'demo', prompt: ['Once', 'The'], max_tokens: 4 });
    assert.deepEqual(completion.choices.map(({ index }) => index), [0, 1]);
    // Without a format the client asks for base64 and reads it itself.
    const input = ['a red fox', 'a quick fox'];
    const read = await client().embeddings.create({ model: 'demo', input });
    const numbers = await client().embeddings.create({ model: 'demo', input, encoding_format: 'float' });
    const asFloats = (vector) => Array.from(Float32Array.from(vector));
    assert.deepEqual(read.data.map(({ embedding }) => asFloats(embedding)), numbers.data.map(({ embedding }) => asFloats(embedding)));
    const response = await client().responses.create({ model: 'demo', input: 'Tell me of a fox.', max_output_tokens: 8 });
    assert.ok(response.output_text.length > 0);
    assert.equal((await client().responses.retrieve(response.id)).output_text, response.output_text);
    let text = '';
    const stream = await client().responses.create({ model: 'demo', input: 'A fox', max_output_tokens: 8, stream: true });
    for await (const event of stream) {
      text += event.type === 'response.output_text.delta' ? event.delta : '';
      if (event.type === 'response.incomplete' || event.type === 'response.completed') {
        assert.equal(event.response.output[0].content[0].text, text);
      }
    }
    assert.ok(text.length > 0);
  });

  test('errors are the client\'s own', async () => {
    const { OpenAI, AuthenticationError, BadRequestError, NotFoundError } = require('openai');
    const tools = [{ type: 'function', function: { name: 'f', parameters: {} } }];
    const withTools = client().chat.completions.create({ model: 'demo', messages, tools });
    await assert.rejects(withTools, (error) => error instanceof BadRequestError && error.param === 'tools');
    await assert.rejects(client().chat.completions.create({ model: 'other', messages }), NotFoundError);
    const stranger = new OpenAI({ apiKey: 'not-the-secret-of-ours', baseURL: `${address}/v1`, maxRetries: 0 });
    await assert.rejects(stranger.models.list(), AuthenticationError);
    const late = await client().chat.completions.create({ model: 'demo', messages, stream: true, ignore_eos: true, n: 8, timeout_ms: 500 }).catch((error) => error);
    const read = async () => {
      if (late instanceof Error) {
        throw late;
      }
      for await (const chunk of late) {
        assert.ok(chunk.choices);
      }
    };
    await assert.rejects(read(), (error) => error.code === 'deadline_exceeded');
  });
});

describe('ollama', { skip }, () => {
  const client = async () => {
    const { Ollama } = await import('ollama');
    return new Ollama({ host: address, headers: { Authorization: `Bearer ${KEY}` } });
  };
  const options = { temperature: 0, num_predict: 8 };

  test('names are listed, chats and prompts answered, whole and in pieces', async () => {
    const ollama = await client();
    const { models } = await ollama.list();
    assert.ok(models.some(({ name }) => name.includes('llama3.2')));
    const { message } = await ollama.chat({ model: 'llama3.2', messages, options });
    let text = '';
    for await (const part of await ollama.chat({ model: 'llama3.2', messages, options, stream: true })) {
      text += part.message.content;
    }
    assert.equal(text, message.content);
    const { response, eval_count: count } = await ollama.generate({ model: 'demo', prompt: 'Once upon a time', options });
    assert.ok(response.length > 0 && count > 0 && count <= 8);
  });

  test('vectors are made, and errors told', async () => {
    const ollama = await client();
    const { embeddings } = await ollama.embed({ model: 'demo', input: ['a fox', 'a hare'] });
    const { embedding } = await ollama.embeddings({ model: 'demo', prompt: 'a fox' });
    assert.deepEqual(embeddings[0], embedding);
    await assert.rejects(ollama.chat({ model: 'other', messages }), /other/);
    await assert.rejects(ollama.chat({ model: 'demo', messages, format: 'json' }), /format/);
  });
});

const python = spawnSync('python3', ['-c', 'import openai'], { stdio: 'ignore' });
const withoutPython = python.status === 0 ? skip : 'Python has no openai';

test('openai of Python', { skip: withoutPython }, () => {
  const script = `
from openai import OpenAI, BadRequestError
client = OpenAI(api_key="${KEY}", base_url="${address}/v1", max_retries=0)
ask = dict(model="demo", messages=[{"role": "user", "content": "A fox"}], max_tokens=8, seed=5)
whole = client.chat.completions.create(**ask).choices[0].message.content
parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(stream=True, **ask)]
assert "".join(parts) == whole, (parts, whole)
assert len(client.embeddings.create(model="demo", input="a fox").data[0].embedding) > 0
assert client.responses.create(model="demo", input="A fox", max_output_tokens=4).output_text
try:
    client.chat.completions.create(tools=[{"type": "function", "function": {"name": "f"}}], **ask)
    raise SystemExit("tools were let pass")
except BadRequestError as error:
    assert error.param == "tools", error
`;
  const { status, stderr } = spawnSync('python3', ['-c', script], { encoding: 'utf8' });
  assert.equal(status, 0, stderr);
});

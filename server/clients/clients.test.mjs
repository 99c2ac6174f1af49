// The published clients against `ns-llm serve` with the model that ships: as they are installed, with nothing changed but
// their address. What this machine lacks (the program, Python's packages) is skipped by name.

import assert from 'node:assert/strict';
import { execFile, spawn, spawnSync } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
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

/** Packages for Python, in a folder of their own that git ignores. */
const PYTHON_PACKAGES = ['openai==3.54.0', 'schemathesis==4.32.5'];
const packages = join(ROOT, 'target', 'clients', ...PYTHON_PACKAGES.map((name) => name.replace('==', '-')));
const pythonEnv = { ...process.env, PYTHONPATH: packages, PYTHONDONTWRITEBYTECODE: '1' };

function python(args) {
  return spawnSync('python3', args, { encoding: 'utf8', env: pythonEnv });
}

/** The same, while this process goes on. */
function pythonAsync(args) {
  return new Promise((resolve) => {
    execFile('python3', args, { env: pythonEnv, maxBuffer: 64 << 20 }, (error, stdout, stderr) => {
      resolve({ status: error ? (error.code ?? 1) : 0, stdout, stderr });
    });
  });
}

/** Why Python's packages cannot be tried; they are fetched once. */
function fetchPackages() {
  const marker = join(packages, 'complete');
  if (existsSync(marker)) {
    return false;
  }
  const pip = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-compile', '--retries', '1', '--timeout', '10'];
  const { error, status } = python([...pip, '--target', packages, ...PYTHON_PACKAGES]);
  if (error || status !== 0) {
    return `pip cannot fetch ${PYTHON_PACKAGES.join(' and ')}`;
  }
  writeFileSync(marker, '');
  return false;
}

const withoutPython = skip || fetchPackages();

/** A server of the model that ships, on a free port. */
async function start(more) {
  const model = join(ROOT, 'models', 'demo');
  const options = ['--port', '0', '--threads', '1', '--kv-mib', '32', '--alias', 'llama3.2', ...more];
  const env = { ...process.env, NS_LLM_API_KEY: KEY };
  const child = spawn(program, ['serve', '--model', model, ...options], { env, stdio: ['ignore', 'ignore', 'pipe'] });
  for await (const line of createInterface({ input: child.stderr })) {
    const address = /http:\S+/.exec(line)?.[0];
    if (address) {
      return { child, address };
    }
  }
  throw new Error('the server did not say where it listens');
}

let child;
let address;

before(async () => {
  if (!skip) {
    ({ child, address } = await start(['--public-probes']));
  }
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
    } while (ready.models[0].sequences_running > 0);
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

describe('ai, with the provider for servers of OpenAI\'s kind', { skip }, () => {
  const provider = async () => {
    const { createOpenAICompatible } = await import('@ai-sdk/openai-compatible');
    return createOpenAICompatible({ name: 'ns-llm', baseURL: `${address}/v1`, apiKey: KEY, includeUsage: true });
  };

  test('text is generated, whole and in pieces, and counted', async () => {
    const { generateText, streamText } = await import('ai');
    const asked = { model: (await provider())('demo'), messages, maxOutputTokens: 12, seed: 5, temperature: 0.8, maxRetries: 0 };
    const { text, usage, finishReason } = await generateText(asked);
    assert.deepEqual([usage.outputTokens, finishReason], [12, 'length']);
    const stream = streamText(asked);
    let streamed = '';
    for await (const piece of stream.textStream) {
      streamed += piece;
    }
    assert.equal(streamed, text);
    assert.equal((await stream.usage).outputTokens, 12);
  });

  test('vectors are made, and tools are refused by name', async () => {
    const { embedMany, generateText, jsonSchema, tool } = await import('ai');
    const { embeddings } = await embedMany({ model: (await provider()).embeddingModel('demo'), values: ['a fox', 'a hare'] });
    assert.ok(embeddings.length === 2 && embeddings[0].length > 0);
    const inputSchema = jsonSchema({ type: 'object', properties: {} });
    const tools = { look: tool({ description: 'looks', inputSchema, execute: () => 'a fox' }) };
    const withTools = generateText({ model: (await provider())('demo'), messages, tools, maxRetries: 0 });
    await assert.rejects(withTools, (error) => error.statusCode === 400 && /tools/.test(error.message));
  });
});

describe('LangChain', { skip }, () => {
  const fields = () => ({ model: 'demo', apiKey: KEY, configuration: { baseURL: `${address}/v1` }, maxRetries: 0 });

  test('ChatOpenAI answers, whole and in pieces, and refuses tools by name', async () => {
    const { ChatOpenAI } = await import('@langchain/openai');
    const chat = new ChatOpenAI({ ...fields(), maxTokens: 12, temperature: 0 });
    const answer = await chat.invoke([['system', 'Tell stories.'], ['human', 'Tell me of a fox.']]);
    const { output_tokens: count } = answer.usage_metadata;
    assert.ok(count > 0 && count <= 12, String(count));
    let text = '';
    for await (const chunk of await chat.stream([['system', 'Tell stories.'], ['human', 'Tell me of a fox.']])) {
      text += chunk.content;
    }
    assert.equal(text, answer.content);
    const tools = [{ type: 'function', function: { name: 'look', description: 'looks', parameters: { type: 'object', properties: {} } } }];
    await assert.rejects(chat.bindTools(tools).invoke('Look.'), /tools/);
  });

  test('OpenAIEmbeddings makes vectors', async () => {
    const { OpenAIEmbeddings } = await import('@langchain/openai');
    const vectors = await new OpenAIEmbeddings(fields()).embedDocuments(['a fox', 'a hare']);
    assert.ok(vectors.length === 2 && vectors[0].length > 0);
  });
});

test('openai of Python', { skip: skip || withoutPython }, () => {
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
  const { status, stderr } = python(['-c', script]);
  assert.equal(status, 0, stderr);
});

test('requests made from the OpenAPI document are answered as it says', { skip: skip || withoutPython }, async () => {
  // What asks for long answers gets one second.
  const own = await start(['--request-timeout', '1']);
  const checks = 'not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth';
  const { status, stdout, stderr } = await pythonAsync([
    ...['-m', 'schemathesis.cli', 'run', join(ROOT, 'server', 'openapi.json'), '--url', own.address],
    ...['--header', `Authorization: Bearer ${KEY}`, '--checks', checks, '--phases', 'examples,fuzzing'],
    ...['--max-examples', process.env.NS_LLM_SOAK ? '500' : '3', '--seed', '1', '--no-shrink', '--suppress-health-check', 'all'],
  ]);
  own.child.kill();
  assert.equal(status, 0, stdout + stderr);
});

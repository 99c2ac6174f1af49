// The page as people meet it: in a browser without a screen, against `ns-llm serve` with the model that ships. What this machine
// lacks (the program, chromium) is skipped by name; `npm run setup:fleet` installs the browser.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const KEY = 'a-secret-of-some-length';
/** Built by `cargo test --workspace`, which runs before. */
const program = join(process.env.CARGO_TARGET_DIR ?? join(ROOT, 'target'), 'debug', 'ns-llm');
const chromium = ['/usr/bin/chromium', '/usr/bin/chromium-browser'].find(existsSync);
const FLAGS = [
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];
const PATIENCE = { timeout: 120_000 };

const skip = !existsSync(program) ? 'cargo has not built ns-llm' : !chromium ? 'chromium is not here (npm run setup:fleet)' : false;

async function serve(options, env = {}) {
  const all = ['serve', '--model', join(ROOT, 'models', 'demo'), '--port', '0', '--threads', '1', '--kv-mib', '24', ...options];
  const child = spawn(program, all, { env: { ...process.env, NS_LLM_API_KEY: '', ...env }, stdio: ['ignore', 'ignore', 'pipe'] });
  for await (const line of createInterface({ input: child.stderr })) {
    const address = /http:\S+/.exec(line)?.[0];
    if (address) {
      return { child, address };
    }
  }
  throw new Error('the server does not say where it listens');
}

const suite = skip ? (name) => test(name, { skip }) : describe;

suite('the page', () => {
  const profile = mkdtempSync(join(tmpdir(), 'ns-llm-page-'));
  let open;
  let locked;
  let browser;
  const complaints = [];

  before(async () => {
    [open, locked] = await Promise.all([serve(['--kv-host-mib', '16']), serve([], { NS_LLM_API_KEY: KEY })]);
    const { chromium: launcher } = createRequire(import.meta.url)('playwright-core');
    browser = await launcher.launchPersistentContext(profile, { executablePath: chromium, args: FLAGS, headless: true });
  });

  after(async () => {
    await browser?.close();
    open?.child.kill();
    locked?.child.kill();
    rmSync(profile, { recursive: true, force: true });
  });

  /** A tab with the page in it; what it complains of is collected. */
  async function tab({ address = open.address, path = '/', size = { width: 1280, height: 800 }, scheme = 'light' } = {}) {
    const page = await browser.newPage();
    page.setDefaultTimeout(PATIENCE.timeout);
    page.on('console', (message) => message.type() === 'error' && !/status of (401|503)/.test(message.text()) && complaints.push(message.text()));
    page.on('pageerror', (error) => complaints.push(error.message));
    await page.setViewportSize(size);
    await page.emulateMedia({ colorScheme: scheme });
    await page.goto(address + path);
    return page;
  }

  async function say(page, text) {
    await page.getByRole('textbox', { name: 'Message', exact: true }).fill(text);
    await page.keyboard.press('Enter');
    await page.locator('#send').waitFor({ state: 'visible' });
    return page.locator('.message.assistant').last();
  }

  test('its files need no key and allow a browser little', async () => {
    const response = await fetch(`${locked.address}/`);
    assert.equal(response.status, 200);
    const policy = response.headers.get('content-security-policy');
    assert.match(policy, /default-src 'none'/);
    assert.ok(!/unsafe|https?:|data:|\*/.test(policy), policy);
    const html = await response.text();
    assert.ok(!/<script(?![^>]* src=)|<style|\son\w+=|\sstyle=/.test(html), 'nothing is inline');
    for (const [, path] of html.matchAll(/(?:href|src)="(\/[^"]*)"/g)) {
      const file = await fetch(locked.address + path);
      assert.equal(file.status, 200, path);
      const again = await fetch(locked.address + path, { headers: { 'if-none-match': file.headers.get('etag') } });
      assert.equal(again.status, 304, path);
    }
    assert.equal((await fetch(`${locked.address}/v1/models`)).status, 401, 'what is behind them does');
  });

  test('a conversation is answered, and says where its prompts came from', async () => {
    const page = await tab();
    const requests = [];
    page.on('request', (request) => request.url().endsWith('/v1/chat/completions') && requests.push(request));
    const first = await say(page, 'What is the capital of France?');
    assert.equal(await first.locator('.said').textContent(), 'The capital of France is Paris.');
    assert.match(await first.locator('.facts').textContent(), /\d+ tokens.*tokens\/s.*to the first.*prompt tokens/s);
    await page.getByLabel('Temperature').fill('0');
    await page.getByLabel('Max tokens').fill('7');
    const second = await say(page, 'And now tell me a story about a fox who lives in France.');
    const facts = await second.locator('.facts').textContent();
    assert.match(facts, /7 tokens.*limit was its end/s);
    assert.match(facts, /16 found in the pool/);
    assert.match(facts, /From token 16 on it was computed: nobody had computed it before\./);
    // What was filled in is what was asked, and a balancer is told how it begins.
    const body = requests[1].postDataJSON();
    assert.deepEqual([body.temperature, body.max_tokens, body.messages.length, body.top_p], [0, 7, 3, undefined]);
    const { prefixes } = await (await fetch(`${open.address}/api/gpu/metadata`)).json();
    assert.ok(prefixes.includes(requests[1].headers()['x-ns-llm-prefix']), 'the server names the beginning alike');
    await page.getByRole('button', { name: 'New conversation' }).click();
    assert.equal(await page.locator('.message').count(), 0);
    await page.close();
  });

  test('an answer is shown as it grows, and stops when it is told to', async () => {
    const page = await tab();
    // Longer than any test waits, were it not stopped.
    await page.route('**/v1/chat/completions', (route) => {
      route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), max_tokens: 1900, ignore_eos: true }) });
    });
    await page.getByRole('textbox', { name: 'Message', exact: true }).fill('Tell me a story.');
    await page.keyboard.press('Enter');
    const said = page.locator('.message.assistant .said');
    await page.waitForFunction(() => document.querySelector('.message.assistant .said')?.textContent.length > 20, null, PATIENCE);
    const early = (await said.textContent()).length;
    await page.waitForFunction((early) => document.querySelector('.message.assistant .said').textContent.length > early, early, PATIENCE);
    assert.ok(await page.getByRole('button', { name: 'Stop' }).isVisible());
    await page.keyboard.press('Escape');
    await page.getByText('Stopped.').waitFor();
    let running;
    do {
      ({ running } = (await (await fetch(`${open.address}/ready`)).json()).queue);
    } while (running > 0);
    await page.close();
  });

  test('what a model says is text, and what goes wrong is told', async () => {
    const page = await tab();
    const evil = '<img src=x onerror="window.harmed = 1"><script>window.harmed = 1</script>';
    const chunk = (object) => `data: ${JSON.stringify({ choices: [], ...object })}\n\n`;
    const delta = (content) => chunk({ choices: [{ index: 0, delta: { content } }] });
    const answers = [
      { body: `${delta(evil)}data: [DONE]\n\n` },
      { body: delta('It is') },
      { body: `${delta('It')}${chunk({ error: { message: 'the server is stopping', code: 'closed' } })}` },
      { status: 503, headers: { 'retry-after': '3' }, body: JSON.stringify({ error: { message: 'the queue is full', code: 'overloaded' } }) },
    ];
    await page.route('**/v1/chat/completions', (route) => {
      const { headers = {}, ...answer } = answers.shift();
      route.fulfill({ headers: { 'content-type': 'text/event-stream', ...headers }, ...answer });
    });
    const first = await say(page, 'x');
    assert.equal(await first.locator('.said').textContent(), evil);
    assert.equal(await page.evaluate(() => [window.harmed, document.querySelectorAll('main img, main script').length].join()), ',0');
    for (const expected of [/ended before the answer did \(interrupted\)/, /the server is stopping \(closed\)/, /the queue is full \(overloaded\)\. Try again in 3 seconds/]) {
      const message = await say(page, 'x');
      assert.match(await message.getByRole('alert').textContent(), expected);
    }
    await page.close();
  });

  test('a key is asked for, and kept no longer than is said', async () => {
    const page = await tab({ address: locked.address });
    const dialog = page.getByRole('dialog', { name: 'API key' });
    await dialog.waitFor();
    await page.getByLabel('Key', { exact: true }).fill('a-wrong-key-of-some-length');
    await page.keyboard.press('Enter');
    await page.getByText('key refused').waitFor();
    await page.getByLabel('Key', { exact: true }).fill(KEY);
    await page.keyboard.press('Enter');
    await page.getByText('ready', { exact: true }).waitFor();
    const answer = await say(page, 'What is the capital of France?');
    assert.match(await answer.locator('.said').textContent(), /Paris/);
    const stored = () => page.evaluate(() => JSON.stringify([{ ...sessionStorage }, { ...localStorage }, document.cookie]));
    assert.ok(!(await stored()).includes(KEY), 'in memory alone');
    await page.reload();
    await dialog.waitFor();
    await page.getByLabel('Key', { exact: true }).fill(KEY);
    await page.getByLabel(/Keep it until/).check();
    await page.keyboard.press('Enter');
    await page.getByText('ready', { exact: true }).waitFor();
    await page.reload();
    await page.getByText('ready', { exact: true }).waitFor();
    assert.ok(await dialog.isHidden());
    assert.equal(await page.evaluate(() => JSON.stringify({ ...localStorage })), '{}');
    await page.close();
  });

  test('the dashboard shows the response cache where there is one', async () => {
    const cached = await serve(['--response-cache-mib', '8']);
    try {
      const body = JSON.stringify({ prompt: 'Once upon a time', max_tokens: 2, temperature: 0 });
      for (let round = 0; round < 2; round += 1) {
        const headers = { 'content-type': 'application/json' };
        assert.equal((await fetch(`${cached.address}/v1/completions`, { method: 'POST', headers, body })).status, 200);
      }
      const page = await tab({ address: cached.address, path: '/#dashboard' });
      const tile = page.locator('.tile', { hasText: 'Answers found' });
      assert.match(await tile.textContent(), /50 %1 of 2 look-ups; 1 kept, [1-9]/);
      await page.close();
      const other = await tab({ path: '/#dashboard' });
      await other.getByText('Prefix hit rate').waitFor();
      assert.equal(await other.getByText('Answers found').count(), 0);
      await other.close();
    } finally {
      cached.child.kill();
    }
  });

  test('the dashboard shows what the server does', async () => {
    const page = await tab({ path: '/#dashboard' });
    await page.getByLabel('Every').selectOption('1000');
    await page.getByText('Prefix hit rate').waitFor();
    const tile = async (name) => page.locator('.tile', { hasText: name }).textContent();
    const tokens = async () => Number(/([\d,]+) since the start/.exec(await tile('Generated'))[1].replaceAll(',', ''));
    const earlier = await tokens();
    const body = JSON.stringify({ model: 'demo', messages: [{ role: 'user', content: 'Count from one to ten, please.' }], max_tokens: 24, ignore_eos: true });
    for (let round = 0; round < 2; round += 1) {
      assert.equal((await fetch(`${open.address}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body })).status, 200);
    }
    await page.waitForFunction((earlier) => Number(/([\d,]+) since/.exec(document.querySelector('.tile').textContent)[1].replaceAll(',', '')) >= earlier + 48, earlier, PATIENCE);
    assert.match(await tile('Prefix hit rate'), /[1-9]\d* of \d+ tokens/);
    assert.match(await tile('First token, p95'), /\d ms/);
    assert.match(await tile('KV blocks used'), /[1-9]\d* cached, .* of [1-9]/);
    const tiers = await page.locator('#tiers tbody tr td:first-child').allTextContents();
    assert.deepEqual(tiers, ['pool', 'host']);
    assert.deepEqual(await page.locator('#models tbody td').allTextContents().then((cells) => [cells[0], cells.at(-1)]), ['demo', 'ready']);
    // Lines were drawn, in colours that are there.
    const painted = await page.evaluate(() =>
      [...document.querySelectorAll('.chart:not([hidden]) canvas')].map((canvas) => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return data.some((value, idx) => idx % 4 === 3 && value > 200);
      }),
    );
    assert.ok(painted.length >= 5 && painted.every(Boolean), `${painted}`);
    // Nobody asks while nobody looks.
    await page.getByRole('button', { name: 'Pause' }).click();
    const asked = [];
    page.on('request', (request) => request.url().endsWith('/metrics') && asked.push(request));
    await page.getByRole('tab', { name: 'Playground' }).click();
    await say(page, 'What is the capital of France?');
    assert.deepEqual(asked, []);
    await page.close();
  });

  test('it is used with the keyboard alone, and everything has a name', async () => {
    const page = await tab();
    await page.getByRole('tab', { name: 'Playground' }).focus();
    await page.keyboard.press('ArrowRight');
    assert.ok(await page.getByRole('tabpanel', { name: 'Dashboard' }).isVisible());
    await page.keyboard.press('/');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'text');
    const nameless = await page.evaluate(() => {
      const named = (element) => element.getAttribute('aria-label') || element.labels?.length > 0 || (element.tagName === 'BUTTON' && element.textContent.trim() !== '');
      return [...document.querySelectorAll('button, input, select, textarea, [role="img"]')].filter((element) => !named(element)).map((element) => element.outerHTML);
    });
    assert.deepEqual(nameless, []);
    await page.close();
  });

  test('it fits narrow screens and is read in the dark', async () => {
    for (const scheme of ['light', 'dark']) {
      const page = await tab({ size: { width: 360, height: 700 }, scheme });
      await say(page, 'What is the capital of France?');
      for (const name of ['Playground', 'Dashboard']) {
        await page.getByRole('tab', { name }).click();
        const [wide, shown] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
        assert.ok(wide <= shown, `${name} is ${wide} wide on ${shown}`);
      }
      const { ground, contrasts } = await page.evaluate(luminances);
      assert.equal(ground > 0.5, scheme === 'light');
      for (const [name, contrast] of Object.entries(contrasts)) {
        assert.ok(contrast >= 4.5, `${name} on ${scheme}: ${contrast.toFixed(2)}`);
      }
      await page.close();
    }
  });

  test('no tab has complained', () => assert.deepEqual(complaints, []));
});

/** In the page: how light its ground is, and the contrasts of what is read (WCAG 2.2, 1.4.3). */
function luminances() {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map((value) => {
      const part = Number(value) / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const ground = luminance(style('body').backgroundColor);
  const card = luminance(style('.card').backgroundColor);
  const text = luminance(style('body').color);
  const muted = luminance(style('.state').color);
  const send = style('#send');
  const contrasts = { text: contrast(text, ground), muted: contrast(muted, ground), onCard: contrast(muted, card), button: contrast(luminance(send.color), luminance(send.backgroundColor)) };
  return { ground, contrasts };
}

describe('its modules', () => {
  test('events are read however they are cut', async () => {
    globalThis.sessionStorage ??= { getItem: () => null };
    const { eventData } = await import('./server.mjs');
    const text = 'data: {"a":"é"}\n\n: ping\n\ndata: one\ndata: two\n\ndata: [DONE]\n\n';
    for (const size of [1, 7, 1000]) {
      const pieces = text.match(new RegExp(`[^]{1,${size}}`, 'g'));
      const found = [];
      for await (const data of eventData(ReadableStream.from(pieces))) {
        found.push(data);
      }
      assert.deepEqual(found, ['{"a":"é"}', 'one\ntwo', '[DONE]']);
    }
  });

  test('a conversation begins alike for the page and the server', async () => {
    globalThis.sessionStorage ??= { getItem: () => null };
    const { prefixAffinity } = await import('./server.mjs');
    const vectors = JSON.parse(readFileSync(new URL('../affinity-vectors.json', import.meta.url), 'utf8'));
    const own = vectors.filter(({ request }) => request.messages?.every(({ role, content }) => role !== 'developer' && typeof content === 'string'));
    assert.ok(own.length >= 4);
    for (const { request, prefix } of own) {
      assert.equal(await prefixAffinity(request), prefix);
    }
  });

  test("Prometheus' text is read", async () => {
    const { readSamples, sums } = await import('./prometheus.mjs');
    const text = '# HELP a b\n# TYPE a counter\nns_llm:a{model_name="x\\"}y"} 3\nns_llm:a{model_name="z",le="+Inf"} 4.5\nb 1e3\n';
    const samples = readSamples(text);
    assert.deepEqual(samples.map(({ value }) => value), [3, 4.5, 1000]);
    assert.equal(samples[0].labels.model_name, 'x"}y');
    assert.deepEqual([sums(samples)('a'), sums(samples)('b'), sums(samples)('c')], [7.5, 1000, 0]);
  });
});

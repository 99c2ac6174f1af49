/**
 * The playground: a conversation, what it asks for, and what each answer cost. All that a model says becomes text nodes and
 * never markup.
 */

import { ask, chat } from './server.mjs';

const TIERS = ['pool', 'host', 'disk', 'remote'];
const TIER_WORDS = { pool: 'in the pool', host: 'in host memory', disk: 'on disk', remote: 'in the shared store' };
/** Why a prefix was not found, as `prefix_miss.reason` of an answer's usage names it. */
const MISS_WORDS = {
  never_seen: () => 'nobody had computed it before',
  evicted: (tier) => `it had been given up for others${tier ? `, last ${TIER_WORDS[tier]}` : ''}`,
  slower: () => 'it was kept, but computing it was faster than fetching it',
  fault: () => 'the place that keeps it failed',
  gave_up: () => 'it was being fetched and did not come in time',
  disabled: () => 'the cache was not used',
};

const get = (id) => document.getElementById(id);

function element(tag, { className, text } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) {
    made.className = className;
  }
  if (text !== undefined) {
    made.textContent = text;
  }
  made.append(...children);
  return made;
}

const count = (number, noun) => `${number.toLocaleString('en')} ${noun}${number === 1 ? '' : 's'}`;
const milliseconds = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 10_000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);

export class Chat {
  #messages = [];
  #running;
  #onUnauthorized;

  constructor({ onUnauthorized }) {
    this.#onUnauthorized = onUnauthorized;
    const text = get('text');
    get('composer').addEventListener('submit', (event) => {
      event.preventDefault();
      void this.#send(text.value);
    });
    text.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        void this.#send(text.value);
      }
    });
    addEventListener('keydown', (event) => {
      if (event.key === 'Escape' && this.#running) {
        this.#running.abort();
      }
    });
    get('stop').addEventListener('click', () => this.#running?.abort());
    get('clear').addEventListener('click', () => this.#clear());
    for (const idea of get('empty').querySelectorAll('button')) {
      idea.addEventListener('click', () => void this.#send(idea.textContent));
    }
    if (matchMedia('(max-width: 860px)').matches) {
      get('controls').open = false;
    }
  }

  async loadModels() {
    try {
      const { data } = await (await ask('/v1/models')).json();
      const chosen = get('model').value;
      get('model').replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    } catch (error) {
      this.#tellProblem(this.#add('assistant', ''), error);
    }
  }

  #clear() {
    this.#running?.abort();
    this.#messages = [];
    get('log').replaceChildren(get('empty'));
    get('empty').hidden = false;
    get('text').focus();
  }

  /** The body of a request: what was filled in, and nothing else. */
  #request() {
    const body = { model: get('model').value, messages: [...this.#messages], stream: true };
    body.stream_options = { include_usage: true };
    const system = get('system').value;
    if (system.trim() !== '') {
      body.messages.unshift({ role: 'system', content: system });
    }
    for (const input of document.querySelectorAll('[data-field]')) {
      if (input.value !== '') {
        body[input.dataset.field] = input.type === 'number' ? Number(input.value) : input.value;
      }
    }
    const stops = get('stops').value.split('\n').filter((line) => line !== '');
    if (stops.length > 0) {
      body.stop = stops;
    }
    if (!get('cached').checked) {
      body.cache_prompt = false;
    }
    return body;
  }

  async #send(text) {
    const invalid = document.querySelector('[data-field]:invalid');
    if (this.#running || text.trim() === '') {
      return;
    }
    if (invalid) {
      get('controls').open = true;
      invalid.reportValidity();
      return;
    }
    get('text').value = '';
    this.#messages.push({ role: 'user', content: text });
    this.#add('user', text);
    await this.#answer();
  }

  async #answer() {
    const message = this.#add('assistant', '');
    const controller = new AbortController();
    this.#setRunning(controller);
    message.classList.add('running');
    const said = message.querySelector('.said').appendChild(document.createTextNode(''));
    const seen = { started: performance.now(), first: undefined, reason: undefined, usage: undefined, timings: undefined };
    try {
      for await (const chunk of chat(this.#request(), controller.signal)) {
        const [choice] = chunk.choices;
        const delta = choice?.delta?.content;
        if (delta) {
          seen.first ??= performance.now();
          this.#grow(said, delta);
        }
        seen.reason = choice?.finish_reason ?? seen.reason;
        seen.usage = chunk.usage ?? seen.usage;
        seen.timings = chunk.timings ?? seen.timings;
      }
      message.append(this.#facts(seen));
    } catch (error) {
      if (controller.signal.aborted) {
        message.append(element('p', { className: 'why facts', text: 'Stopped. The server was told, and computes no more of it.' }));
      } else {
        this.#tellProblem(message, error);
      }
    } finally {
      message.classList.remove('running');
      this.#setRunning(undefined);
    }
    if (said.data !== '') {
      this.#messages.push({ role: 'assistant', content: said.data });
    }
    message.append(this.#actions(said.data));
    this.#follow();
  }

  /** Adds to an answer, and stays at its end if that is where the reader is. */
  #grow(said, delta) {
    const isAtEnd = this.#isAtEnd();
    said.appendData(delta);
    if (isAtEnd) {
      this.#follow();
    }
  }

  #isAtEnd() {
    const scroller = this.#scroller();
    return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  }

  #follow() {
    this.#scroller().scrollTop = this.#scroller().scrollHeight;
  }

  #scroller() {
    return matchMedia('(max-width: 860px)').matches ? document.scrollingElement : get('log');
  }

  #add(role, text) {
    get('empty').hidden = true;
    const who = role === 'user' ? 'You' : 'Model';
    const message = element('article', { className: `message ${role}` }, element('span', { className: 'sr', text: `${who}: ` }), element('div', { className: 'said', text }));
    get('log').append(message);
    this.#follow();
    return message;
  }

  #setRunning(controller) {
    this.#running = controller;
    get('send').hidden = Boolean(controller);
    get('stop').hidden = !controller;
    get('log').setAttribute('aria-busy', String(Boolean(controller)));
    if (!controller) {
      get('text').focus({ preventScroll: true });
    }
  }

  #actions(text) {
    const copy = element('button', { text: 'Copy' });
    copy.addEventListener('click', async () => {
      await navigator.clipboard?.writeText(text).catch(() => {});
      copy.textContent = 'Copied';
      setTimeout(() => (copy.textContent = 'Copy'), 1500);
    });
    const again = element('button', { text: 'Ask again' });
    again.addEventListener('click', () => void this.#again());
    return element('div', { className: 'actions' }, copy, again);
  }

  /** Asks the last question anew. */
  async #again() {
    if (this.#running) {
      return;
    }
    if (this.#messages.at(-1)?.role === 'assistant') {
      this.#messages.pop();
    }
    await this.#answer();
  }

  #tellProblem(message, error) {
    if (error.status === 401) {
      this.#onUnauthorized();
    }
    const later = error.retryAfter ? ` Try again in ${count(error.retryAfter, 'second')}.` : '';
    const code = error.code ? ` (${error.code})` : '';
    const words = error.status || error.code ? error.message : 'the server cannot be reached';
    const said = element('p', { className: 'facts problem', text: `${words}${code}.${later}` });
    said.setAttribute('role', 'alert');
    message.append(said);
  }

  /** What an answer cost, and where its prompt came from. */
  #facts({ started, first, reason, usage, timings }) {
    const facts = element('div', { className: 'facts' });
    if (!usage) {
      return facts;
    }
    const figures = element('div', { className: 'figures' });
    const figure = (value, unit) => figures.append(element('span', {}, element('b', { text: value }), ` ${unit}`));
    figure(usage.completion_tokens.toLocaleString('en'), usage.completion_tokens === 1 ? 'token' : 'tokens');
    if (timings && usage.completion_tokens > 1 && timings.predicted_ms > 0) {
      figure((((usage.completion_tokens - 1) / timings.predicted_ms) * 1000).toFixed(1), 'tokens/s');
    }
    if (first !== undefined) {
      figure(milliseconds(first - started), 'to the first');
    }
    if (timings) {
      figure(milliseconds(timings.queue_ms), 'waited');
    }
    if (reason) {
      figure(reason === 'length' ? 'limit' : reason, 'was its end');
    }
    facts.append(figures, ...this.#source(usage));
    return facts;
  }

  #source({ prompt_tokens: prompt, prompt_tokens_details: details }) {
    const { cached_tokens: cached = 0, cached_by_tier: tiers, prefix_miss: miss } = details ?? {};
    // Where a whole answer was kept, no tier had a part in it.
    const byTier = tiers ?? { pool: cached };
    const parts = TIERS.map((tier) => [tier, byTier[tier] ?? 0]);
    const found = parts.reduce((sum, [, tokens]) => sum + tokens, 0);
    parts.push(['computed', Math.max(0, prompt - Math.max(found, cached))]);
    const bar = element('div', { className: 'source' });
    const legend = element('div', { className: 'legend' }, element('b', { text: `${count(prompt, 'prompt token')}:` }));
    for (const [name, tokens] of parts.filter(([, tokens]) => tokens > 0)) {
      const piece = element('span', { className: name });
      piece.style.flexGrow = String(tokens);
      bar.append(piece);
      legend.append(element('span', { className: name, text: `${tokens.toLocaleString('en')} ${name === 'computed' ? 'computed' : `found ${TIER_WORDS[name]}`}` }));
    }
    bar.setAttribute('role', 'img');
    bar.setAttribute('aria-label', `${cached} of ${count(prompt, 'prompt token')} came from a cache`);
    const words = this.#why(miss, found);
    return [bar, legend, element('p', { className: 'why', text: words })];
  }

  #why(miss, found) {
    if (!miss) {
      return found > 0
        ? 'All full blocks were found; the last tokens of a prompt are always computed.'
        : 'The prompt is shorter than a block and one token, and computed as a whole.';
    }
    const reason = (MISS_WORDS[miss.reason] ?? (() => miss.reason))(miss.tier);
    return `From token ${miss.token.toLocaleString('en')} on it was computed: ${reason}.`;
  }
}

/**
 * The dashboard: what the server tells of itself, asked for again and again while somebody looks, and five minutes of it
 * remembered. Rates are differences of counters between two looks.
 */

import { Chart } from './charts.mjs';
import { readSamples, sums } from './prometheus.mjs';
import { ask } from './server.mjs';

/** Looks that are remembered. */
const MAX_POINTS = 300;
/** Over which latencies are told, milliseconds. */
const WINDOW_MS = 60_000;

const get = (id) => document.getElementById(id);
const whole = (value) => Math.round(value).toLocaleString('en');
const rate = (value) => (value > 0 && value < 10 ? value.toFixed(1) : whole(value));
const ms = (value) => (value > 0 && value < 10 ? `${value.toFixed(1)} ms` : value < 10_000 ? `${whole(value)} ms` : `${(value / 1000).toFixed(1)} s`);
const percent = (value) => `${value < 10 && value > 0 ? value.toFixed(1) : Math.round(value)} %`;
const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];

function bytes(value) {
  let [size, unit] = [value, 0];
  while (size >= 1024 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? size : size.toFixed(1)} ${UNITS[unit]}`;
}

/** Everything that one look at the server gives. */
async function look() {
  const json = async (path) => (await ask(path)).json();
  const [text, performance_, node, gpu, ready] = await Promise.all([
    ask('/metrics').then((response) => response.text()),
    json(`/api/performance/metrics?window=${WINDOW_MS}`),
    json('/api/gpu/metadata'),
    json('/api/gpu/status'),
    json('/ready'),
  ]);
  return { at: Date.now() / 1000, total: sums(readSamples(text)), performance: performance_, node, gpu, ready };
}

/** The numbers of a look that are drawn; rates need the look before. */
function pointOf(now, before) {
  const seconds = before ? now.at - before.at : 0;
  const delta = (name) => Math.max(0, now.total(name) - before.total(name));
  const perSecond = (name) => (seconds > 0 ? delta(name) / seconds : null);
  const { ttft, perToken, endToEnd } = now.performance.latency;
  const some = now.performance.sampleSize > 0;
  const kv = { total: 0, used: 0, cached: 0, free: 0 };
  for (const { kvBlocks } of now.node.models) {
    for (const name of Object.keys(kv)) {
      kv[name] += kvBlocks[name];
    }
  }
  const queried = before ? delta('prefix_cache_queries_total') : 0;
  return {
    at: now.at,
    generated: perSecond('generation_tokens_total'),
    prompted: perSecond('prompt_tokens_total'),
    requests: perSecond('request_success_total'),
    firstP50: some ? ttft.p50 : null,
    firstP95: some ? ttft.p95 : null,
    tokenP95: some && perToken.p95 > 0 ? perToken.p95 : null,
    totalP95: some ? endToEnd.p95 : null,
    running: now.total('num_requests_running'),
    waiting: now.node.queue.depth,
    kv,
    hitPercent: queried > 0 ? (delta('prefix_cache_hits_total') / queried) * 100 : null,
    gpuPercent: now.gpu.current ? mean(now.gpu.current.devices.map(({ utilization }) => utilization)) : null,
  };
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);

export class Dashboard {
  #points = [];
  #before;
  #charts = [];
  #isVisible = false;
  #isPaused = false;
  #timer;
  #looking = false;
  #onUnauthorized;

  constructor({ onUnauthorized }) {
    this.#onUnauthorized = onUnauthorized;
    get('interval').addEventListener('change', () => this.#schedule());
    get('pause').addEventListener('click', () => {
      this.#isPaused = !this.#isPaused;
      get('pause').setAttribute('aria-pressed', String(this.#isPaused));
      get('pause').textContent = this.#isPaused ? 'Go on' : 'Pause';
      this.#schedule();
    });
    document.addEventListener('visibilitychange', () => this.#schedule());
    const chart = (title, lines, options) => {
      const series = lines.map(([label, show]) => [label, show]);
      this.#charts.push({ chart: new Chart(get('charts'), title, series, options), values: lines.map(([, , value]) => value) });
    };
    chart('Tokens per second', [['generated', rate, (p) => p.generated], ['prompt', rate, (p) => p.prompted]]);
    chart('Latency', [['first p50', ms, (p) => p.firstP50], ['first p95', ms, (p) => p.firstP95], ['next p95', ms, (p) => p.tokenP95]]);
    chart('Requests', [['running', whole, (p) => p.running], ['waiting', whole, (p) => p.waiting]], { least: 4, isWhole: true });
    chart('KV blocks', [['used', whole, (p) => p.kv.used], ['cached', whole, (p) => p.kv.cached], ['free', whole, (p) => p.kv.free]], { least: 10, isWhole: true });
    chart('Prompt tokens found in the cache', [['hit rate', percent, (p) => p.hitPercent]], { max: 100 });
    chart('Answers per second', [['ended', rate, (p) => p.requests]]);
    chart('GPU', [['utilization', percent, (p) => p.gpuPercent]], { max: 100 });
  }

  /** Nothing is asked for while nobody looks. */
  setVisible(isVisible) {
    this.#isVisible = isVisible;
    this.recolor();
    this.#schedule();
  }

  recolor() {
    this.#charts.forEach(({ chart }) => chart.draw());
  }

  #schedule() {
    clearInterval(this.#timer);
    if (this.#isVisible && !this.#isPaused && document.visibilityState === 'visible') {
      this.#timer = setInterval(() => void this.#look(), Number(get('interval').value));
      void this.#look();
    }
  }

  async #look() {
    if (this.#looking) {
      return;
    }
    this.#looking = true;
    try {
      const now = await look();
      const point = pointOf(now, this.#before);
      this.#before = now;
      this.#points = [...this.#points, point].slice(-MAX_POINTS);
      this.#show(now, point);
    } catch (error) {
      if (error.status === 401) {
        this.#onUnauthorized();
      }
      get('updated').textContent = error.status ? error.message : 'the server cannot be reached';
    } finally {
      this.#looking = false;
    }
  }

  #show(now, point) {
    get('updated').textContent = `as of ${new Date(now.at * 1000).toLocaleTimeString('en-GB')}`;
    this.#showTiles(now, point);
    const times = this.#points.map(({ at }) => at);
    for (const { chart, values } of this.#charts) {
      chart.set(times, values.map((value) => this.#points.map(value)));
    }
    this.#charts.at(-1).chart.hide(!now.gpu.current);
    this.#showTiers(now);
    this.#showModels(now);
    this.#showGpus(now);
  }

  #showTiles(now, point) {
    const { total } = now;
    const { kv } = point;
    const queries = total('prefix_cache_queries_total');
    const hits = queries > 0 ? (total('prefix_cache_hits_total') / queries) * 100 : 0;
    const { successful, failed, cancelled } = now.performance.requests;
    const orNone = (value, show) => (value === null ? '–' : show(value));
    const tiles = [
      ['Generated', orNone(point.generated, rate), 'tokens/s', `${whole(total('generation_tokens_total'))} since the start`],
      ['First token, p95', orNone(point.firstP95, ms), '', `p50 ${orNone(point.firstP50, ms)}, last minute`],
      ['Whole answer, p95', orNone(point.totalP95, ms), '', `${whole(successful)} done, ${whole(failed)} failed, ${whole(cancelled)} given up`],
      ['Waiting', whole(point.waiting), '', `${whole(point.running)} running, room for ${whole(now.node.queue.maxWaiting)} more`],
      ['KV blocks used', kv.total > 0 ? percent((kv.used / kv.total) * 100) : '–', '', `${whole(kv.cached)} cached, ${whole(kv.free)} free of ${whole(kv.total)}`],
      ['Prefix hit rate', percent(hits), '', `${whole(total('prefix_cache_hits_total'))} of ${whole(queries)} tokens`],
    ];
    const found = total('response_cache_hits_total');
    const lookUps = found + total('response_cache_misses_total');
    if (total('response_cache_max_bytes') > 0) {
      const held = `${whole(total('response_cache_entries'))} kept, ${bytes(total('response_cache_bytes'))}`;
      const share = lookUps > 0 ? percent((found / lookUps) * 100) : '–';
      tiles.push(['Answers found', share, '', `${whole(found)} of ${whole(lookUps)} look-ups; ${held}`]);
    }
    get('tiles').replaceChildren(
      ...tiles.map(([name, value, unit, note]) => {
        const tile = made('div', 'tile', made('dt', '', name), made('dd', '', value));
        if (unit) {
          tile.lastChild.append(made('small', '', unit));
        }
        tile.append(made('dd', 'note', note));
        return tile;
      }),
    );
  }

  #showTiers({ node }) {
    const rows = [];
    for (const { name, kvBlocks, hitTokens, tiers } of node.models) {
      const of = (tier) => (node.models.length > 1 ? `${tier} (${name})` : tier);
      rows.push([of('pool'), whole(kvBlocks.used + kvBlocks.cached), '', whole(hitTokens.pool), '', '', '', '']);
      for (const tier of tiers) {
        const counts = [tier.hits, tier.stored, tier.evictions, tier.faults].map(whole);
        rows.push([of(tier.name), whole(tier.blocks), bytes(tier.bytes), whole(hitTokens[tier.name] ?? 0), ...counts]);
      }
    }
    fill(get('tiers'), rows);
  }

  #showModels({ node, ready }) {
    const stateOf = (name) => ready.models.find(({ id }) => id === name)?.reason ?? 'ready';
    fill(
      get('models'),
      node.models.map((model) => [model.name, model.device, whole(model.contextTokens), whole(model.running), whole(model.waiting), stateOf(model.name)]),
    );
  }

  #showGpus({ gpu }) {
    const devices = gpu.current?.devices ?? [];
    if (devices.length === 0) {
      const { model, cores, loadAverage } = gpu.cpuInfo;
      const load = loadAverage.map((value) => value.toFixed(2)).join(' ');
      get('gpus').replaceChildren(made('p', 'muted', `No GPU is there. ${model}, ${cores} cores, load ${load}.`));
      return;
    }
    get('gpus').replaceChildren(
      ...devices.map(({ name, memoryUsed, memoryTotal, utilization, temperature, powerDraw }) => {
        const meter = document.createElement('meter');
        Object.assign(meter, { min: 0, max: Math.max(1, memoryTotal), value: memoryUsed });
        meter.setAttribute('aria-label', `${name}: memory used`);
        const words = `${whole(memoryUsed)} of ${whole(memoryTotal)} MiB, ${percent(utilization)} busy, ${whole(temperature)} °C, ${whole(powerDraw)} W`;
        return made('div', 'device', made('b', '', name), meter, made('span', 'muted', words));
      }),
    );
  }
}

/** An element of children, or of a text. */
function made(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

function fill(table, rows) {
  table.tBodies[0].replaceChildren(...rows.map((cells) => made('tr', '', ...cells.map((cell) => made('td', '', cell)))));
}

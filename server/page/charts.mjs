/** Lines over time, drawn by uPlot, in the page's colours; each with its newest values as text beside it. */

/* global uPlot */

const NUM_SERIES_COLORS = 4;
const MIN_SPAN_SECONDS = 60;
/** Between two lines behind counts. */
const WHOLE_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6, 1e7];

/** Colours as the page has them now: a canvas cannot read custom properties. */
function colors(root) {
  const probe = document.createElement('span');
  probe.hidden = true;
  root.append(probe);
  const of = (name) => {
    probe.className = `probe-${name}`;
    return getComputedStyle(probe).color;
  };
  const found = { line: of('line'), muted: of('muted'), series: [] };
  for (let number = 1; number <= NUM_SERIES_COLORS; number += 1) {
    found.series.push(of(String(number)));
  }
  probe.remove();
  return found;
}

const faded = (color) => color.replace(/^rgb\((.*)\)$/, 'rgb($1 / .13)').replaceAll(', ', ' ');

/** One chart. `series`: `[label, show]` for each line, where `show` writes a value. */
export class Chart {
  #figure;
  #now;
  #place;
  #plot;
  #series;
  #options;
  #data;

  constructor(parent, title, series, options = {}) {
    this.#series = series;
    this.#options = options;
    this.#data = [[], ...series.map(() => [])];
    this.#figure = document.createElement('figure');
    this.#figure.className = 'card chart';
    const caption = document.createElement('figcaption');
    this.#now = document.createElement('span');
    this.#now.className = 'now';
    caption.append(title, this.#now);
    this.#place = document.createElement('div');
    this.#place.className = 'plot';
    this.#place.setAttribute('role', 'img');
    this.#place.setAttribute('aria-label', `${title} over the last minutes`);
    this.#figure.append(caption, this.#place);
    parent.append(this.#figure);
    new ResizeObserver(() => this.#resize()).observe(this.#place);
  }

  /** Takes all values anew: seconds since 1970, and a list for each line. */
  set(times, lists) {
    this.#data = [times, ...lists];
    this.#plot?.setData(this.#data);
    this.#now.replaceChildren(
      ...this.#series.map(([label, show], idx) => {
        const item = document.createElement('span');
        item.className = `s${idx + 1}`;
        const newest = lists[idx].at(-1);
        item.textContent = `${label} ${newest === null || newest === undefined ? 'none' : show(newest)}`;
        return item;
      }),
    );
  }

  /** Not shown where there is nothing to draw. */
  hide(isHidden) {
    this.#figure.hidden = isHidden;
  }

  /** Draws anew, in the colours of now. */
  draw() {
    const { clientWidth: width, clientHeight: height } = this.#place;
    this.#plot?.destroy();
    this.#plot = undefined;
    if (width === 0) {
      return;
    }
    const { line, muted, series } = colors(this.#figure);
    const axis = { stroke: muted, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: '11px system-ui, sans-serif' };
    const show = this.#series[0][1];
    const { max, least = 1, isWhole = false } = this.#options;
    const options = {
      width,
      height,
      legend: { show: false },
      cursor: { y: false, points: { size: 6 } },
      // To the right half of a time of day, which stands below the last look.
      padding: [8, 26, 0, 0],
      scales: {
        // Never less than a minute wide, so that the first looks do not fly past.
        x: { range: (_, first, last) => [Math.min(first, last - MIN_SPAN_SECONDS), last] },
        y: { range: (_, __, highest) => [0, max ?? Math.max(least, highest * 1.1)] },
      },
      axes: [
        { ...axis, size: 26, space: 70, values: (_, times) => times.map(timeOfDay) },
        { ...axis, size: 54, space: 34, incrs: isWhole ? WHOLE_STEPS : undefined, values: (_, values) => values.map((value) => show(value)) },
      ],
      series: [
        {},
        ...this.#series.map(([label], idx) => ({
          label,
          stroke: series[idx],
          fill: idx === 0 ? faded(series[idx]) : undefined,
          width: 2,
          spanGaps: true,
          points: { show: false },
        })),
      ],
    };
    this.#plot = new uPlot(options, this.#data, this.#place);
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.#place;
    if (!this.#plot) {
      this.draw();
    } else if (width > 0 && width !== this.#plot.width) {
      this.#plot.setSize({ width, height });
    }
  }
}

function timeOfDay(seconds) {
  const time = new Date(seconds * 1000);
  return [time.getHours(), time.getMinutes(), time.getSeconds()].map((part) => String(part).padStart(2, '0')).join(':');
}

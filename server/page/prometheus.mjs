/** Prometheus' text form, read: the counts and gauges that the dashboard shows. */

/** Every sample of a text: `{ name, labels, value }`. Lines that are none are passed over. */
export function readSamples(text) {
  const samples = [];
  for (const line of text.split('\n')) {
    const match = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)$/.exec(line);
    if (match && !line.startsWith('#')) {
      samples.push({ name: match[1], labels: readLabels(match[2] ?? ''), value: Number(match[3]) });
    }
  }
  return samples;
}

function readLabels(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(/([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"/g)) {
    labels[name] = value.replace(/\\(.)/g, (_, escaped) => (escaped === 'n' ? '\n' : escaped));
  }
  return labels;
}

/** Sums by name over all models, whichever of its two prefixes the server gives its names. */
export function sums(samples) {
  const totals = new Map();
  for (const { name, value } of samples) {
    const bare = name.replace(/^(ns_llm|vllm):/, '');
    totals.set(bare, (totals.get(bare) ?? 0) + value);
  }
  return (name) => totals.get(name) ?? 0;
}

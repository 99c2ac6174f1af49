// What of this folder is no balancer: Prometheus' rules and Grafana's dashboard name metrics that a server has, and alerts fire
// when they should; manifests are what Kubernetes accepts; the image is built from files that are there. What is not on this
// machine is skipped by name; `npm run setup:fleet` installs it.

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';

import { Fleet, freePorts, has, lacks, ROOT, until } from './fleet.mjs';

const DEPLOY = join(ROOT, 'deploy');
const read = (...path) => readFileSync(join(DEPLOY, ...path), 'utf8');

function succeeds(program, args, options) {
  const { status, stdout, stderr } = spawnSync(program, args, { encoding: 'utf8', ...options });
  assert.equal(status, 0, `${program} ${args.join(' ')}:\n${stdout}${stderr}`);
  return stdout;
}

describe('prometheus', () => {
  const skip = has('promtool') ? false : 'promtool is not here (npm run setup:fleet)';
  const cwd = join(DEPLOY, 'prometheus');

  test('its files are valid', { skip }, () => {
    const said = succeeds('promtool', ['check', 'config', 'prometheus.yml'], { cwd });
    assert.match(said, /12 rules found/);
  });

  test('each alert fires in its time', { skip }, () => {
    succeeds('promtool', ['test', 'rules', 'ns-llm.rules.test.yml'], { cwd });
    const alerts = [...read('prometheus', 'ns-llm.rules.yml').matchAll(/- alert: (\w+)/g)].map(([, name]) => name);
    const tried = read('prometheus', 'ns-llm.rules.test.yml');
    assert.ok(alerts.length >= 7);
    assert.deepEqual(alerts.filter((name) => !tried.includes(`alertname: ${name}\n`)), [], 'alerts without a test');
  });

  test('Prometheus reads a server, and every metric that is named is there', { skip: lacks('prometheus') }, async () => {
    const fleet = new Fleet();
    try {
      const [first, second, third, port] = await freePorts(4);
      await fleet.server(first);
      fleet.configuration('prometheus/ns-llm.rules.yml', []);
      const replacements = [[':8081', `:${first}`], [':8082', `:${second}`], [':8083', `:${third}`], ['ns-llm.rules.yml', 'prometheus-ns-llm.rules.yml'], ['scrape_interval: 5s', 'scrape_interval: 1s'], ['evaluation_interval: 5s', 'evaluation_interval: 1s']];
      const file = fleet.configuration('prometheus/prometheus.yml', replacements);
      fleet.start('prometheus', [`--config.file=${file}`, `--storage.tsdb.path=${join(fleet.folder, 'data')}`, `--web.listen-address=127.0.0.1:${port}`]);
      const query = async (expression) => {
        const address = `http://127.0.0.1:${port}/api/v1/query?query=${encodeURIComponent(expression)}`;
        // While it starts it answers otherwise, or not at all.
        const response = await fetch(address).catch(() => undefined);
        return response?.ok ? (await response.json()).data.result : [];
      };
      await until(async () => (await query('up == 1')).length === 1, 'Prometheus reads the server');
      await until(async () => (await query('up == 0')).length === 2, 'the two that are not there are seen, too');
      const texts = [read('prometheus', 'ns-llm.rules.yml'), read('grafana', 'ns-llm.json'), read('kubernetes', 'hpa.yaml'), read('kubernetes', 'keda.yaml')];
      const named = new Set(texts.flatMap((text) => text.match(/\b(ns_llm:[a-z_]+|request_queue_depth|gpu_utilization)\b/g)));
      const recorded = [...texts[0].matchAll(/record: (ns_llm:\S+?):p95|record: (\S+)/g)].map(([, p95, other]) => p95 ?? other);
      const metrics = [...named].filter((name) => !recorded.includes(name));
      assert.ok(metrics.length >= 12, metrics.join());
      for (const name of metrics) {
        assert.ok((await query(`{__name__="${name}"}`)).length > 0, `${name} is named, and no server has it`);
      }
    } finally {
      await fleet.stop();
    }
  });
});

test('the dashboard has an id, its variables, and panels with a query each that fit the grid', () => {
  const { panels, templating, uid, schemaVersion } = JSON.parse(read('grafana', 'ns-llm.json'));
  assert.deepEqual([uid, schemaVersion > 30], ['ns-llm', true]);
  assert.deepEqual(templating.list.map(({ name }) => name), ['source', 'instance']);
  assert.ok(panels.length >= 10);
  assert.equal(new Set(panels.map(({ id }) => id)).size, panels.length);
  for (const { title, targets, gridPos } of panels) {
    assert.ok(title && targets.length > 0 && targets.every(({ expr }) => expr) && gridPos.x + gridPos.w <= 24, title);
  }
});

describe('kubernetes', () => {
  const python = process.env.NS_LLM_KUBERNETES_VALIDATE ?? join(ROOT, 'target', 'kubernetes-validate', 'bin', 'kubernetes-validate');
  const skip = existsSync(python) ? false : 'kubernetes-validate is not here (npm run setup:fleet)';
  const files = readdirSync(join(DEPLOY, 'kubernetes'));

  test('manifests are what the published schemas ask for', { skip }, () => {
    // KEDA's kinds are its own, and not among them.
    const paths = files.filter((name) => name !== 'keda.yaml').map((name) => join(DEPLOY, 'kubernetes', name));
    assert.ok(paths.length >= 3);
    succeeds(python, ['--strict', '--version', '1.30', ...paths]);
  });

  test('probes ask /ready and /health, a stop takes less than its grace, and autoscalers name the deployment', () => {
    const deployment = read('kubernetes', 'ns-llm.yaml');
    assert.match(deployment, /readinessProbe:\s+httpGet: \{ path: \/ready,/);
    assert.match(deployment, /livenessProbe:\s+httpGet: \{ path: \/health,/);
    const grace = Number(/- --grace\s+- "(\d+)"/.exec(deployment)[1]);
    assert.ok(Number(/terminationGracePeriodSeconds: (\d+)/.exec(deployment)[1]) > grace + 5);
    for (const name of ['hpa.yaml', 'keda.yaml']) {
      assert.match(read('kubernetes', name), /name: ns-llm\b/);
    }
    assert.match(read('kubernetes', 'keda.yaml'), /apiVersion: keda\.sh\/v1alpha1\nkind: ScaledObject/);
  });

  test('the server knows the arguments that it is given', { skip: lacks() }, async () => {
    const { PROGRAM } = await import('./fleet.mjs');
    const help = succeeds(PROGRAM, ['serve', '--help']);
    const given = [read('kubernetes', 'ns-llm.yaml'), read('Dockerfile')].flatMap((text) => text.match(/(?<=[\s"])--[a-z][a-z-]+(?=["\n ])/g));
    const ofOthers = ['--release', '--locked', '--package', '--file', '--tag', '--publish', '--env', '--yes', '--no-install-recommends', '--system', '--uid', '--no-create-home', '--shell', '--directory', '--owner', '--mode', '--fail', '--silent', '--output'];
    const own = given.filter((name) => !ofOthers.includes(name));
    assert.ok(own.length >= 10);
    assert.deepEqual(own.filter((name) => !help.includes(name)), []);
  });
});

test('the image is built from what is there, and does not run as root', () => {
  const instructions = read('Dockerfile').replaceAll(/\\\n\s*/g, '').split('\n').filter((line) => /^[A-Z]/.test(line));
  const stages = instructions.filter((line) => line.startsWith('FROM '));
  assert.ok(stages.length === 2 && stages.every((line) => /:[\w.-]+( AS \w+)?$/.test(line)), 'two stages, versions named');
  const last = instructions.slice(instructions.lastIndexOf(stages[1]));
  const copied = last.filter((line) => line.startsWith('COPY ') && !line.includes('--from')).flatMap((line) => line.split(' ').slice(1, -1));
  assert.ok(copied.length >= 5);
  assert.deepEqual(copied.filter((path) => !existsSync(join(ROOT, path))), []);
  const user = last.findIndex((line) => /^USER (?!0\b|root\b)\S+$/.test(line));
  const entry = last.findIndex((line) => line.startsWith('ENTRYPOINT ['));
  assert.ok(user > 0 && entry > user, 'the user is no root when it starts');
  assert.ok(last.some((line) => line.startsWith('HEALTHCHECK ') && line.includes('/health')));
  assert.ok(instructions.some((line) => line.startsWith('RUN cargo build --release --locked --package ns-llm-cli')));
});

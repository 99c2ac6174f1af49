// `npm run setup:fleet`: installs what the tests of deploy/ and of the page need and this machine lacks: balancers, Prometheus,
// Redis and a browser from Debian's packages (as root), and the schemas of Kubernetes' manifests into a folder of their own.

import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';

import { ROOT, run } from './process.mjs';

const PACKAGES = {
  nginx: 'nginx-light',
  haproxy: 'haproxy',
  promtool: 'prometheus',
  'redis-server': 'redis-server',
  chromium: 'chromium',
  python3: 'python3-venv',
};
const VALIDATOR = join(ROOT, 'target', 'kubernetes-validate');

const isThere = (program) =>
  spawnSync('sh', ['-c', `command -v ${program}`], { env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` } }).status === 0;

const missing = Object.entries(PACKAGES).filter(([program]) => !isThere(program));
if (missing.length > 0) {
  const names = missing.map(([, name]) => name);
  const asRoot = process.getuid?.() === 0 ? [] : ['sudo'];
  const [command, ...args] = [...asRoot, 'apt-get', 'install', '--yes', '--no-install-recommends', ...names];
  await check(command, args);
}
if (!existsSync(join(VALIDATOR, 'bin', 'kubernetes-validate'))) {
  await check('python3', ['-m', 'venv', VALIDATOR]);
  await check(join(VALIDATOR, 'bin', 'pip'), ['install', '--quiet', 'kubernetes-validate==1.37.0']);
}
console.log('what the tests of deploy/ need is here');

async function check(command, args) {
  const code = await run(command, args);
  if (code !== 0) {
    console.error(`${command} ended with code ${code}`);
    process.exit(1);
  }
}

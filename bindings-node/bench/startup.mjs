// `npm run bench:startup`: what the package weighs before it does anything. Time of a first `require` in a new process
// (medians over 15, file cache warm; the aim is 50 ms), size of the addon and of the installed package. With
// `NS_LLM_COMPARE` set to a folder that has node_modules/node-llama-cpp, the same figures of that package beside it.

import { execFileSync } from 'node:child_process';
import { existsSync, lstatSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { build } from '../../scripts/build.mjs';
import { ROOT } from '../../scripts/process.mjs';

const RUNS = 15;
const MiB = 2 ** 20;

await build();
const folder = mkdtempSync(join(tmpdir(), 'ns-llm-startup-'));
try {
  install(folder);
  report('ns-llm', folder, join(folder, 'node_modules', 'ns-llm'), "require('ns-llm')");
} finally {
  rmSync(folder, { recursive: true });
}
const other = process.env.NS_LLM_COMPARE;
if (other && existsSync(join(other, 'node_modules', 'node-llama-cpp'))) {
  // Its addon is loaded by getLlama(), not by the import; ours by the import itself.
  const load = "import('node-llama-cpp').then((llama) => llama.getLlama({ build: 'never', progressLogs: false }))";
  report('node-llama-cpp, with its dependencies', other, join(other, 'node_modules'), load);
}

function install(into) {
  const npm = (args, cwd) => execFileSync('npm', [...args, '--ignore-scripts'], { cwd, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] });
  const [{ filename }] = JSON.parse(npm(['pack', '--json', '--pack-destination', into], ROOT));
  npm(['install', '--offline', '--no-audit', '--no-fund', '--prefix', into, join(into, filename)], into);
}

function report(name, cwd, installed, load) {
  const script = `const started = performance.now();
    Promise.resolve(${load}).then(() => { console.log(performance.now() - started); process.exit(); });`;
  const times = Array.from({ length: RUNS }, () => {
    return Number(execFileSync(process.execPath, ['--eval', script], { cwd, encoding: 'utf8' }));
  });
  times.sort((a, b) => a - b);
  const { bytes, addons } = sizes(installed);
  const loaded = `loaded in ${times[RUNS >> 1].toFixed(1)} ms (${times[0].toFixed(1)} to ${times[RUNS - 1].toFixed(1)})`;
  console.log(`${name}: ${loaded}; installed ${(bytes / MiB).toFixed(1)} MiB, of it addons ${(addons / MiB).toFixed(1)} MiB`);
}

function sizes(path) {
  const sum = { bytes: 0, addons: 0 };
  for (const name of readdirSync(path)) {
    const file = join(path, name);
    const stat = lstatSync(file);
    if (stat.isDirectory()) {
      const inner = sizes(file);
      sum.bytes += inner.bytes;
      sum.addons += inner.addons;
    } else if (stat.isFile()) {
      sum.bytes += stat.size;
      sum.addons += /\.(node|so|dll|dylib)$/.test(name) ? stat.size : 0;
    }
  }
  return sum;
}

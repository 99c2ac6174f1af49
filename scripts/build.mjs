// `npm run build`: whatever is missing or older than its sources. Packages by `npm ci`, the addon by cargo (which knows
// what is current), TypeScript by tsc (incremental).

import { existsSync, mkdirSync, readFileSync, renameSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { ROOT, run } from './process.mjs';
import { declarations } from './declarations.mjs';
import { withoutGlibcLoader } from './portable-addon.mjs';

const path = (...parts) => join(ROOT, ...parts);
const modified = (file) => (existsSync(file) ? statSync(file).mtimeMs : 0);

/** Builds everything. Throws with the name of the step that failed; its own output is on the terminal. */
export async function build() {
  await installPackages();
  await buildAddon();
  await compileTypeScript();
}

async function installPackages() {
  if (modified(path('node_modules', '.package-lock.json')) >= modified(path('package-lock.json'))) {
    return;
  }
  await step('npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund']);
}

/** cargo, then a copy beside the TypeScript sources, with the type declarations that the macros wrote. */
async function buildAddon() {
  const typeDefs = join(process.env.CARGO_TARGET_DIR ?? path('target'), 'type-def');
  const typeDef = join(typeDefs, 'ns-llm-node');
  mkdirSync(typeDefs, { recursive: true });
  const env = { NAPI_TYPE_DEF_TMP_FOLDER: typeDefs };
  if (!existsSync(typeDef)) {
    // The macros write only while the crate is compiled.
    env.NAPI_FORCE_BUILD_NS_LLM_NODE = String(Date.now());
  }
  let library;
  const onLine = (line) => {
    library = addonOf(line) ?? library;
  };
  const args = ['build', '--release', '--package', 'ns-llm-node', '--message-format', 'json-render-diagnostics'];
  await step('cargo', args, { env, onLine, hidden: true });
  if (!library) {
    throw new Error('cargo made no addon');
  }
  replaceIfOlder(library, path('bindings-node', 'native.node'));
  writeIfChanged(path('bindings-node', 'native.d.ts'), declarations(readFileSync(typeDef, 'utf8')));
}

/** The addon's file, when this message of cargo names it. */
function addonOf(line) {
  const message = JSON.parse(line);
  if (message.reason !== 'compiler-artifact' || message.target.name !== 'ns_llm_node') {
    return undefined;
  }
  return message.filenames.find((name) => /\.(so|dylib|dll)$/.test(name));
}

/** By rename: a running process keeps the file that it has mapped. */
function replaceIfOlder(from, to) {
  if (modified(to) >= modified(from)) {
    return;
  }
  writeFileSync(`${to}.new`, withoutGlibcLoader(readFileSync(from)));
  renameSync(`${to}.new`, to);
}

function writeIfChanged(file, text) {
  if (!existsSync(file) || readFileSync(file, 'utf8') !== text) {
    writeFileSync(file, text);
  }
}

async function compileTypeScript() {
  const tsc = path('node_modules', 'typescript', 'bin', 'tsc');
  await step(process.execPath, [tsc, '--project', path('tsconfig.json')]);
  mkdirSync(path('bindings-node', 'dist'), { recursive: true });
  writeIfChanged(path('bindings-node', 'dist', 'native.d.ts'), readFileSync(path('bindings-node', 'native.d.ts'), 'utf8'));
}

async function step(command, args, options) {
  const code = await run(command, args, options);
  if (code !== 0) {
    throw new Error(`${[command, ...args].join(' ')} ended with code ${code}`);
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await build().catch((error) => {
    console.error(`build failed: ${error.message}`);
    process.exitCode = 1;
  });
}

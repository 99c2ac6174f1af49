/**
 * Which models are there, and which of them a name means. Models are the folders below `MODEL_PATH` (or that folder
 * itself) which hold a configuration and weights, and the one that ships. A name in a request is compared with their
 * names and never becomes a path.
 */

import { readFile, readdir, realpath, stat } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';

import { NsLlmError } from '../errors.js';
import { DEMO_MODEL } from '../native.js';
import { describe } from '../request.js';

/** What a model is asked for. */
export type Purpose = 'generate' | 'embed';

/** A model that can be opened. */
export interface InstalledModel {
  /** Name of its folder. */
  name: string;
  /** Absolute path of its folder, without links: a model under two names is one. */
  folder: string;
  /** Whether its architecture writes text; another one makes vectors only. */
  canGenerate: boolean;
  /** Whether it was made for vectors: then it is the default for them. */
  isEncoder: boolean;
}

/** Where to look, when it is not the environment that says so. */
export interface CatalogOptions {
  /** Instead of `MODEL_PATH`. */
  modelPath?: string | undefined;
  /** Instead of `DEFAULT_MODEL`. */
  defaultModel?: string | undefined;
}

/** Names that callers are known to send. When none of them is installed, the default model answers under its own name. */
const KNOWN_NAMES = [
  'all-MiniLM-L6-v2',
  'gpt2',
  'llama2-7b',
  'llama3',
  'llama3.1:8b',
  'llama3.2',
  'llama3.2:1b',
  'llama3.2:3b',
  'tinyllama',
];
/** Folders below `MODEL_PATH` that are looked at. */
const MAX_FOLDERS = 1_024;
/** How long a look at the folders holds: a new model is found without a restart, and a busy server reads nothing. */
const LOOK_AGAIN_MS = 2_000;

/** The models of one `MODEL_PATH`. The environment is read at each call: it may be filled after this module is loaded. */
export class ModelCatalog {
  readonly #options: CatalogOptions;
  #look: { root: string; at: number; models: Promise<InstalledModel[]> } | undefined;

  constructor(options: CatalogOptions = {}) {
    this.#options = options;
  }

  /** The model that a name means for a purpose; without a name the default of that purpose. */
  async resolve(name: unknown, purpose: Purpose): Promise<InstalledModel> {
    if (name !== undefined && name !== null && typeof name !== 'string') {
      throw new NsLlmError('invalid_argument', `model is ${describe(name)}, must be a string`);
    }
    const models = await this.installed();
    if (name) {
      const found = matching(models, name);
      if (found) {
        return found;
      }
      if (!isKnown(name)) {
        throw notInstalled('model', name, models);
      }
    }
    return this.#default(models, purpose);
  }

  /** Everything that is there, the model that ships at the end. */
  async installed(): Promise<InstalledModel[]> {
    const path = this.#options.modelPath ?? process.env['MODEL_PATH'];
    const root = path ? resolve(path) : '';
    const now = Date.now();
    if (!this.#look || this.#look.root !== root || now - this.#look.at > LOOK_AGAIN_MS) {
      const models = look(root);
      this.#look = { root, at: now, models };
      // A folder that was not there may be there at the next call.
      models.catch(() => (this.#look = undefined));
    }
    return this.#look.models;
  }

  #default(models: InstalledModel[], purpose: Purpose): InstalledModel {
    const encoder = models.find(({ isEncoder }) => isEncoder);
    if (purpose === 'embed' && encoder) {
      return encoder;
    }
    const name = this.#options.defaultModel ?? process.env['DEFAULT_MODEL'];
    const chosen = name ? matching(models, name) : undefined;
    if (name && !chosen && !isKnown(name)) {
      throw notInstalled('DEFAULT_MODEL', name, models);
    }
    // The one that ships writes text, so there always is one.
    return chosen ?? models.find(({ canGenerate }) => canGenerate)!;
  }
}

async function look(root: string): Promise<InstalledModel[]> {
  const shipped = { name: basename(DEMO_MODEL), folder: await realpath(DEMO_MODEL), canGenerate: true, isEncoder: false };
  if (root === '') {
    return [shipped];
  }
  const isFolder = await stat(root).then((found) => found.isDirectory(), () => false);
  if (!isFolder) {
    throw new NsLlmError('missing_file', `MODEL_PATH is ${root}, where no folder is`);
  }
  const itself = await readModel(root);
  if (itself) {
    return [itself, shipped];
  }
  const names = (await readdir(root)).sort().slice(0, MAX_FOLDERS);
  const models = await Promise.all(names.map((name) => readModel(join(root, name))));
  return [...models.filter((model) => model !== undefined), shipped];
}

/** The model in a folder; nothing when it has no configuration or no weights. */
async function readModel(folder: string): Promise<InstalledModel | undefined> {
  const files: string[] = await readdir(folder).catch(() => []);
  if (!files.includes('config.json') || !files.some((file) => file.endsWith('.safetensors'))) {
    return undefined;
  }
  const config = await readFile(join(folder, 'config.json'), 'utf8').catch(() => '');
  const architecture = architectureOf(config);
  return {
    name: basename(folder),
    folder: await realpath(folder),
    canGenerate: /ForCausalLM$|LMHeadModel$/.test(architecture),
    isEncoder: /^Bert(Model|ForMaskedLM)$/.test(architecture),
  };
}

/**
 * As `config.json` names it; nothing when it names none. A model of another kind, or one that cannot be read, is no
 * default: it answers, or says what is wrong with it, when it is asked for by name.
 */
function architectureOf(config: string): string {
  try {
    const { architectures } = JSON.parse(config) as { architectures?: unknown };
    return Array.isArray(architectures) ? String(architectures[0]) : '';
  } catch {
    return '';
  }
}

/**
 * The model with this name; else the shortest name that begins with the same words: `llama3.2:3b` means a folder
 * `Llama-3.2-3B-Instruct`, `tinyllama` a folder `TinyLlama-1.1B-Chat-v1.0`.
 */
function matching(models: InstalledModel[], name: string): InstalledModel | undefined {
  const wanted = words(name);
  const beginsAlike = (model: InstalledModel): boolean => {
    const given = words(model.name);
    return wanted.length > 0 && wanted.every((word, index) => given[index] === word);
  };
  const byLength = (a: InstalledModel, b: InstalledModel): number => words(a.name).length - words(b.name).length;
  return models.find((model) => model.name === name) ?? models.filter(beginsAlike).sort(byLength)[0];
}

function isKnown(name: string): boolean {
  const wanted = words(name).join(' ');
  return KNOWN_NAMES.some((known) => words(known).join(' ') === wanted);
}

/** Words and numbers of a name, without one organisation before it and the tag `latest` behind it. */
function words(name: string): string[] {
  const bare = name.replace(/^\w[\w.-]*\/(?=[^/]+$)/, '').replace(/:latest$/, '');
  return bare.toLowerCase().match(/[a-z]+|[0-9]+/g) ?? [];
}

function notInstalled(field: string, name: string, models: InstalledModel[]): NsLlmError {
  const shown = JSON.stringify(name.length > 80 ? `${name.slice(0, 80)}…` : name);
  const there = models.map((model) => model.name).join(', ');
  return new NsLlmError('invalid_argument', `${field} is ${shown}, which is not installed; installed: ${there}`);
}

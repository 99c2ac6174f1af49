/** The version of this package. */

import { readFileSync } from 'node:fs';
import { join } from 'node:path';

/** From `bindings-node/dist/lib/ns-node`, where this file runs, to the package. */
const MANIFEST = join(__dirname, '..', '..', '..', '..', 'package.json');

/** As in `package.json`. */
export const VERSION = (JSON.parse(readFileSync(MANIFEST, 'utf8')) as { version: string }).version;

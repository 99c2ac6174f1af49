/** The same package for `import`: the same classes, not copies of them. */

export { AbortError, DEMO_MODEL, Engine, NsLlmError, ResponseStream } from './index.js';
export type * from './index.js';

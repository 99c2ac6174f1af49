/** The same package for `import`: the same classes, not copies of them. */

export {
  AbortError,
  ChatCompletionStream,
  createHandler,
  DEMO_MODEL,
  Engine,
  NsLlmError,
  ResponseStream,
} from './index.js';
export type * from './index.js';

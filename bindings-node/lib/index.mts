/** The same package for `import`: the same classes, not copies of them. */

export {
  AbortError,
  ChatCompletionStream,
  createHandler,
  DEMO_MODEL,
  Engine,
  NsLlmError,
  PREFIX_AFFINITY_HEADER,
  prefixAffinity,
  ResponseStream,
} from './index.js';
export type * from './index.js';

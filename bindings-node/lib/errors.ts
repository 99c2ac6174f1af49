/**
 * Errors of this package: one class with a stable `code`, and one way from whatever the addon throws to it.
 */

/**
 * What went wrong, as a stable name. The engine's codes are the same in Rust and C; `addon_unavailable` belongs to
 * this package alone. A later version may add codes, so keep a default branch.
 */
export type ErrorCode =
  | 'invalid_argument'
  | 'prompt_too_long'
  | 'exceeds_kv_pool'
  | 'overloaded'
  | 'template'
  | 'tokenizer'
  | 'no_chat_template'
  | 'cancelled'
  | 'deadline_exceeded'
  | 'non_finite_embedding'
  | 'non_finite_logits'
  | 'non_finite_weights'
  | 'not_supported'
  | 'closed'
  | 'internal'
  | 'io'
  | 'missing_file'
  | 'config'
  | 'invalid_json'
  | 'weights'
  | 'missing_tensor'
  | 'unused_tensors'
  | 'tensor_shape'
  | 'tensor_dtype'
  | 'unknown_architecture'
  | 'out_of_memory'
  | 'device_unavailable'
  | 'device_lost'
  | 'storage'
  | 'not_stored'
  | 'addon_unavailable'
  | (string & {});

/** Every error of this package. Its message names the field, the value and the limit, or the file and what is wrong. */
export class NsLlmError extends Error {
  /** Stable name of the kind of error. */
  readonly code: ErrorCode;
  /** The parameter at fault, as OpenAI names it; only in errors of `engine.chat` and `engine.embeddings`. */
  declare readonly param?: string;

  constructor(code: ErrorCode, message: string, options?: { cause?: unknown; param?: string }) {
    super(message, options);
    this.code = code;
    if (options?.param !== undefined) {
      this.param = options.param;
    }
  }

  static {
    // On the prototype, as the language's own errors have it: it is not listed as a property of each error.
    Object.defineProperty(this.prototype, 'name', { value: 'NsLlmError', configurable: true, writable: true });
  }
}

/** The caller's `AbortSignal` ended the operation. `cause` is the signal's `reason`. */
export class AbortError extends NsLlmError {
  constructor(reason: unknown) {
    const text = reason instanceof Error ? reason.message : 'the operation was aborted';
    super('cancelled', text, { cause: reason });
  }

  static {
    Object.defineProperty(this.prototype, 'name', { value: 'AbortError', configurable: true, writable: true });
  }
}

/** What the addon threw, as an error of this package. An exception of the caller's own getters stays what it is. */
export function fromNative(error: unknown): unknown {
  if (error instanceof NsLlmError || !(error instanceof Error) || !('code' in error)) {
    return error;
  }
  return new NsLlmError(codeOf(String(error.code)), error.message, { cause: error });
}

/** `action`, with what it throws passed through {@link fromNative}. */
export function wrapErrors<T>(action: () => T): T {
  try {
    return action();
  } catch (error) {
    throw fromNative(error);
  }
}

/** The promise of a native call, with what it throws or rejects with passed through {@link fromNative}. */
export async function settled<T>(call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    throw fromNative(error);
  }
}

/** The addon's generated glue has names of its own for wrong types and caught panics. */
function codeOf(code: string): ErrorCode {
  if (code === 'InvalidArg' || code.endsWith('Expected')) {
    return 'invalid_argument';
  }
  return /^[a-z_]+$/.test(code) ? code : 'internal';
}

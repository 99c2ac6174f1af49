/**
 * JSON that keeps typed arrays: each is written as its type's name and its bytes in base64. All else is as in JSON. It is
 * read by a parser that makes nothing but plain values and typed arrays, so it may come from a stranger.
 */

import { NsLlmError } from '../errors.js';

/** The one key of an object that stands for a typed array: `{ "$typedArray": ["Float32Array", "AACAPw=="] }`. */
const TAG = '$typedArray';

const TYPES = {
  Int8Array,
  Uint8Array,
  Uint8ClampedArray,
  Int16Array,
  Uint16Array,
  Int32Array,
  Uint32Array,
  BigInt64Array,
  BigUint64Array,
  Float32Array,
  Float64Array,
};

/** The text of a value. What JSON cannot hold is refused. */
export function stringify(value: unknown): string {
  let text: string | undefined;
  try {
    text = JSON.stringify(value, function (this: Record<string, unknown>, key, given: unknown) {
      // `given` has been through toJSON, which a Buffer has.
      return tagged(this[key]) ?? given;
    });
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new NsLlmError('invalid_argument', `the value cannot be written as JSON: ${reason}`, { cause: error });
  }
  if (text === undefined) {
    throw new NsLlmError('invalid_argument', `the value cannot be written as JSON: it is a ${typeof value}`);
  }
  return text;
}

/** The value of a text. */
export function parse(text: string): unknown {
  return JSON.parse(text, (_, value: unknown) => typedArray(value) ?? value);
}

function tagged(value: unknown): object | undefined {
  if (!ArrayBuffer.isView(value)) {
    return undefined;
  }
  const name = Buffer.isBuffer(value) ? 'Uint8Array' : value.constructor.name;
  if (!Object.hasOwn(TYPES, name)) {
    return undefined;
  }
  return { [TAG]: [name, Buffer.from(value.buffer, value.byteOffset, value.byteLength).toString('base64')] };
}

function typedArray(value: unknown): object | undefined {
  if (typeof value !== 'object' || value === null || !Object.hasOwn(value, TAG) || Object.keys(value).length !== 1) {
    return undefined;
  }
  const [name, base64]: unknown[] = [(value as Record<string, unknown>)[TAG]].flat();
  if (typeof name !== 'string' || typeof base64 !== 'string' || !Object.hasOwn(TYPES, name)) {
    return undefined;
  }
  const Type = TYPES[name as keyof typeof TYPES];
  const bytes = Buffer.from(base64, 'base64');
  const whole = bytes.length - (bytes.length % Type.BYTES_PER_ELEMENT);
  // A copy: a Buffer of a pool need not be aligned.
  return new Type(new Uint8Array(bytes.subarray(0, whole)).buffer);
}

/** `engine.embeddings`: OpenAI's embedding objects from an engine in this process. */

import type { EmbeddingInput, EmbedOptions, Embeddings } from '../embedding.js';
import { isOneInput } from '../embedding.js';
import { checkNames, parameterError, shown, toCallOptions, withOpenAiName } from './parameters.js';
import type { CreateEmbeddingResponse, EmbeddingCreateParams, RequestOptions } from './types.js';

/** What of an engine is used here. */
export interface EmbeddingEngine {
  embed(inputs: readonly EmbeddingInput[], options: EmbedOptions): Promise<Embeddings>;
}

const PARAMETERS = ['input', 'model', 'dimensions', 'encoding_format', 'user'];

/** `engine.embeddings`. */
export class EmbeddingResource {
  readonly #engine: EmbeddingEngine;

  /** @internal */
  constructor(engine: EmbeddingEngine) {
    this.#engine = engine;
  }

  /**
   * Turns inputs into vectors of unit length. An input that is too long for the model is `prompt_too_long`: the answer has
   * no place to say that something was cut. `engine.embed` cuts, and says so.
   */
  create(
    params: EmbeddingCreateParams & { encoding_format: 'base64' },
    options?: RequestOptions,
  ): Promise<CreateEmbeddingResponse<string>>;
  create(params: EmbeddingCreateParams, options?: RequestOptions): Promise<CreateEmbeddingResponse>;
  async create(
    params: EmbeddingCreateParams,
    options: RequestOptions = {},
  ): Promise<CreateEmbeddingResponse<number[] | string>> {
    const given = { ...params };
    checkNames(given, PARAMETERS);
    const { input, dimensions, encoding_format: encoding = 'float' } = given;
    if (encoding !== 'float' && encoding !== 'base64') {
      throw parameterError('invalid_argument', 'encoding_format', shown(encoding), '"float" or "base64"');
    }
    if (typeof input !== 'string' && !Array.isArray(input)) {
      throw parameterError('invalid_argument', 'input', shown(input), 'a string or an array');
    }
    const inputs = isOneInput(input) ? [input] : input;
    try {
      const embed = { ...toCallOptions(options), dimensions: dimensions ?? undefined, truncate: false };
      const { embeddings, model, usage } = await this.#engine.embed(inputs, embed);
      return {
        object: 'list',
        data: embeddings.map((vector, index) => ({ object: 'embedding', index, embedding: encoded(vector, encoding) })),
        model,
        usage: { prompt_tokens: usage.promptTokens, total_tokens: usage.promptTokens },
      };
    } catch (error) {
      throw withOpenAiName(error, given);
    }
  }
}

function encoded(vector: Float32Array, encoding: 'float' | 'base64'): number[] | string {
  if (encoding === 'float') {
    return Array.from(vector);
  }
  // Every platform that Node's addons run on keeps floats in little-endian order.
  return Buffer.from(vector.buffer, vector.byteOffset, vector.byteLength).toString('base64');
}

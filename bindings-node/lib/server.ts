/**
 * The HTTP face inside a server that Node runs: the routes of `ns-llm serve` (OpenAI's, Ollama's and the rest) as one handler
 * for `node:http`, Express and Fastify. The routes are Rust; here are only the ways of a request and its answer between them
 * and Node's streams: bodies are read when the routes ask for them, answers are made as fast as their clients take them.
 */

import type { IncomingMessage, ServerResponse } from 'node:http';

import { Engine, nativeOf } from './engine.js';
import { fromNative, NsLlmError, wrapErrors } from './errors.js';
import { native } from './native.js';
import type { NativeExchange, NativeServer } from './native.js';
import { describe, plainObject } from './request.js';
import type { NativeHead } from '../native.js';

/** A key that callers must have. */
export interface ApiKeyOptions {
  /** At least 16 visible ASCII characters. Callers send it as `Authorization: Bearer` or `x-api-key`. */
  secret: string;
  /** Who it belongs to; not secret. Requests find only what this name has computed in the caches. Default: drawn from the secret. */
  name?: string | undefined;
  /** Requests in a minute; beyond it 429. Default: any number. */
  requestsPerMinute?: number | undefined;
  /** Tokens of prompts and answers in a minute; beyond it 429. Default: any number. */
  tokensPerMinute?: number | undefined;
  /** The best class that its requests may ask for. Default `high`. */
  bestPriority?: 'high' | 'normal' | 'background' | undefined;
  /** Whether it may empty the caches and forget what was measured, of all callers. Default false. */
  admin?: boolean | undefined;
}

/** How to answer. Everything is optional. */
export interface HandlerOptions {
  /**
   * Who may call. Without a key, and unless `behindAuth` is set, only connections to a loopback address are answered; others are
   * told 403.
   */
  apiKeys?: readonly (string | ApiKeyOptions)[] | undefined;
  /** Whether something before the handler decides who may call: then no key is needed. Default false. */
  behindAuth?: boolean | undefined;
  /**
   * Values of `Host` that are answered, without port; others are told 421, so that no page can have its own name point here.
   * Default: any where keys or `behindAuth` keep strangers out, else the names of this machine for itself.
   */
  allowedHosts?: readonly string[] | undefined;
  /** Web pages that may ask: exact origins such as `https://app.example`. Default: those of the host itself. */
  corsOrigins?: readonly string[] | undefined;
  /** Whether `/health` and `/ready` need no key. Default false. */
  publicProbes?: boolean | undefined;
  /** Whether any model name is taken for the first model. Default false: an unknown one is 404. */
  anyModel?: boolean | undefined;
  /** Whether metrics are named as vLLM names its own. Default false. */
  vllmMetricNames?: boolean | undefined;
  /** Longest body of a request; beyond it 413, before it is read if its length was announced. Default 8 MiB. */
  maxBodyBytes?: number | undefined;
  /** Requests that the engine is given at once; more wait in turn. Default 64. */
  maxRunningRequests?: number | undefined;
  /** Requests that may wait; the next one is told 503 and when to come again. Default 1,000. */
  maxWaitingRequests?: number | undefined;
  /** From a request's head to the end of its body, milliseconds; beyond it 408. Default 30,000. */
  bodyTimeoutMs?: number | undefined;
  /** A client that does not take what is written for so long, milliseconds, is hung up. Default 30,000. */
  stallTimeoutMs?: number | undefined;
  /** How often a comment keeps a silent event stream open, milliseconds. Default 15,000. */
  pingIntervalMs?: number | undefined;
  /** A request's time, waiting and answering, when it names none, milliseconds. Default 600,000. */
  requestTimeoutMs?: number | undefined;
  /** What all paths begin with, such as `/llm`, where the host does not take that away itself (`node:http`). Default: nothing. */
  basePath?: string | undefined;
}

/** An engine, and what its model is called. */
export interface ServedModel {
  engine: Engine;
  /** Default: the name of its model. */
  name?: string | undefined;
  /** Other names by which it may be asked for. */
  aliases?: readonly string[] | undefined;
}

/** A request as Node's server gives it: `http.IncomingMessage`, or Express's `Request`. */
export interface HandlerRequest {
  readonly method?: string | undefined;
  readonly url?: string | undefined;
  readonly rawHeaders: readonly string[];
}

/** An answer as Node's server takes it: `http.ServerResponse`, or Express's `Response`. */
export interface HandlerResponse {
  statusCode: number;
  readonly headersSent: boolean;
}

/** What answers requests: `http.createServer(handler)`, `app.use('/llm', handler)`, `app.register(handler.fastify)`. */
export interface Handler {
  /** With `next`, what is none of the routes is left to the host; without it, that is 404. It never throws. */
  (request: HandlerRequest, response: HandlerResponse, next?: (error?: unknown) => void): void;
  /** The same as a plugin: `app.register(handler.fastify, { prefix: '/llm' })`. */
  readonly fastify: (instance: object, options: unknown, done: (error?: Error) => void) => void;
  /** Refuses new work from now on, with 503; what runs may finish. `engine.close()` ends that, too. */
  stop(): void;
}

/**
 * The routes of `ns-llm serve` over one engine or several, for a server of your own; the first engine answers requests that
 * name no model.
 *
 * ```ts
 * const app = express();
 * app.use('/llm', createHandler(engine, { apiKeys: [process.env.LLM_KEY] }));
 * ```
 */
export function createHandler(
  engines: Engine | ServedModel | readonly (Engine | ServedModel)[],
  options: HandlerOptions = {},
): Handler {
  const { basePath = '', apiKeys, ...rest } = plainObject('options', options, 'an object');
  const base = toBasePath(basePath);
  const server = wrapErrors(() => {
    const keys = apiKeys?.map((key) => (typeof key === 'string' ? { secret: key } : key));
    const made = new native.NativeServer({ ...rest, apiKeys: keys });
    for (const served of isList(engines) ? engines : [engines]) {
      const { engine, name, aliases = [] } = toServedModel(served);
      made.addModel(nativeOf(engine), name, [...aliases]);
    }
    made.start();
    return made;
  });
  const handler = (request: HandlerRequest, response: HandlerResponse, next?: (error?: unknown) => void): void => {
    const target = withoutBase(request.url ?? '/', base);
    // Express and Node give what `HandlerRequest` and `HandlerResponse` name only the beginning of.
    handle(server, request as IncomingMessage, response as ServerResponse, target, next);
  };
  return Object.assign(handler, {
    fastify: fastifyPlugin(server),
    stop: () => wrapErrors(() => server.stop()),
  });
}

function isList<T, U>(value: T | readonly U[]): value is readonly U[] {
  return Array.isArray(value);
}

function toServedModel(value: Engine | ServedModel): ServedModel {
  const served = value instanceof Engine ? { engine: value } : plainObject('engine', value, 'an Engine');
  if (!(served.engine instanceof Engine)) {
    throw new NsLlmError('invalid_argument', `engine is ${describe(served.engine)}, must be an Engine`);
  }
  return served;
}

function toBasePath(path: unknown): string {
  if (typeof path !== 'string' || !/^(\/.*)?$/.test(path)) {
    throw new NsLlmError('invalid_argument', `basePath is ${describe(path)}, must be a path that begins with /`);
  }
  return path.replace(/\/+$/, '');
}

/** The target as the routes know it; `undefined` when it is outside of `base`. */
function withoutBase(target: string, base: string): string | undefined {
  if (!target.startsWith(base)) {
    return undefined;
  }
  const rest = target.slice(base.length);
  if (rest === '' || rest.startsWith('?')) {
    return `/${rest}`;
  }
  return rest.startsWith('/') || base === '' ? rest : undefined;
}

/** What the plugin needs of Fastify. */
interface FastifyHost {
  readonly prefix: string;
  removeAllContentTypeParsers(): void;
  addContentTypeParser(type: string, parser: (request: unknown, body: unknown, done: (error: null) => void) => void): void;
  all(path: string, route: (request: { raw: IncomingMessage }, reply: FastifyAnswer) => void): void;
}

interface FastifyAnswer {
  readonly raw: ServerResponse;
  hijack(): void;
}

/** In a plugin's own context the host's other routes keep their parsers; here bodies are left unread. */
function fastifyPlugin(server: NativeServer): Handler['fastify'] {
  return (instance, _options, done) => {
    const host = instance as FastifyHost;
    host.removeAllContentTypeParsers();
    host.addContentTypeParser('*', (_request, _body, parsed) => parsed(null));
    host.all('/*', ({ raw }, reply) => {
      reply.hijack();
      handle(server, raw, reply.raw, withoutBase(raw.url ?? '/', toBasePath(host.prefix)));
    });
    done();
  };
}

/** Answers a request, whatever happens: nothing is thrown into the host. */
function handle(
  server: NativeServer,
  request: IncomingMessage,
  response: ServerResponse,
  target: string | undefined,
  next?: (error?: unknown) => void,
): void {
  try {
    if (target === undefined || !server.hasPath(target.split('?', 1)[0]!)) {
      if (next) {
        next();
        return;
      }
      if (target === undefined) {
        refuse(response, 404, 'unknown_route', 'there is no such route');
        return;
      }
    }
    const body = bodyOf(request);
    const exchange = server.ask({
      method: request.method ?? 'GET',
      target,
      headers: body.bytes ? headersFor(request.rawHeaders, body.bytes.length) : (request.rawHeaders as string[]),
      ...(request.socket?.localAddress ? { localAddress: request.socket.localAddress } : {}),
      ...(body.bytes ? { body: body.bytes } : {}),
      streamsBody: body.streams,
    });
    new Relay(request, response, exchange, server.stallTimeoutMs(), body.streams).start();
  } catch (thrown) {
    const error = fromNative(thrown);
    const isCallers = error instanceof NsLlmError && error.code === 'invalid_argument';
    refuse(response, isCallers ? 400 : 500, isCallers ? error.code : 'internal', isCallers ? error.message : 'the handler failed');
  }
}

/** OpenAI's error object, for what goes wrong before the routes are reached. */
function refuse(response: ServerResponse, status: number, code: string, message: string): void {
  if (response.headersSent) {
    response.destroy();
    return;
  }
  const type = status === 500 ? 'server_error' : status === 404 ? 'not_found_error' : 'invalid_request_error';
  response.statusCode = status;
  response.setHeader('content-type', 'application/json');
  response.end(JSON.stringify({ error: { message, type, param: null, code } }));
}

/** Where the body of a request is: still on its way, or read by the host before (`express.json()`), or nowhere. */
function bodyOf(request: IncomingMessage): { streams: boolean; bytes?: Uint8Array } {
  const { 'content-length': length = '0', 'transfer-encoding': encoding } = request.headers;
  if (encoding === undefined && Number(length) === 0) {
    return { streams: false };
  }
  if (!request.readableDidRead && !request.readableEnded) {
    return { streams: true };
  }
  const { body } = request as { body?: unknown };
  if (body === undefined) {
    throw new NsLlmError('invalid_argument', 'the body was read before this handler, and is not in `body` of the request');
  }
  if (body instanceof Uint8Array) {
    return { streams: false, bytes: body };
  }
  return { streams: false, bytes: Buffer.from(typeof body === 'string' ? body : JSON.stringify(body)) };
}

/** Headers of a body that the host has decoded and parsed: its length and coding are not those of the wire any more. */
function headersFor(raw: readonly string[], length: number): string[] {
  const headers = ['content-length', String(length)];
  for (let index = 0; index + 1 < raw.length; index += 2) {
    if (!/^(content-length|content-encoding|transfer-encoding)$/i.test(raw[index]!)) {
      headers.push(raw[index]!, raw[index + 1]!);
    }
  }
  return headers;
}

/** One request's way to the routes and back. */
class Relay {
  readonly #request: IncomingMessage;
  readonly #response: ServerResponse;
  readonly #exchange: NativeExchange;
  readonly #stallTimeoutMs: number;
  readonly #streamsBody: boolean;
  #hasHead = false;
  /** Runs while the connection takes nothing more. */
  #stalled: NodeJS.Timeout | undefined;

  constructor(
    request: IncomingMessage,
    response: ServerResponse,
    exchange: NativeExchange,
    stallTimeoutMs: number,
    streamsBody: boolean,
  ) {
    this.#request = request;
    this.#response = response;
    this.#exchange = exchange;
    this.#stallTimeoutMs = stallTimeoutMs;
    this.#streamsBody = streamsBody;
  }

  start(): void {
    // Comes also when the client has hung up: then whatever it asked for is cancelled.
    this.#response.on('close', () => {
      clearTimeout(this.#stalled);
      this.#exchange.cancel();
    });
    // Without a listener an error of a broken connection would end the process; 'close' follows it.
    this.#response.on('error', () => this.#exchange.cancel());
    this.#exchange.head((error, head) => this.#guarded(error, () => head && this.#writeHead(head)));
    // The routes have looked at the head by now: an answer means that the body is not wanted.
    if (this.#streamsBody && !this.#hasHead) {
      this.#sendBody();
    }
  }

  /** Runs in a callback of the addon, which must not throw. After an error the client is hung up or told. */
  #guarded(error: unknown, action: () => void): void {
    if (this.#response.destroyed) {
      this.#exchange.cancel();
      return;
    }
    try {
      if (error) {
        throw error;
      }
      action();
    } catch {
      this.#exchange.cancel();
      refuse(this.#response, 500, 'internal', 'the handler failed');
    }
  }

  /** One piece after the other: the next is read from the connection when the routes have taken the one before. */
  #sendBody(): void {
    const request = this.#request;
    const send = (piece: Uint8Array): void => {
      request.pause();
      this.#exchange.write(piece).then(
        (isWanted) => (isWanted ? request.resume() : request.off('data', send)),
        () => this.#exchange.cancel(),
      );
    };
    request.on('data', send);
    request.on('end', () => this.#exchange.end());
    request.on('error', () => this.#exchange.cancel());
  }

  #writeHead({ status, headers, piece, isWhole }: NativeHead): void {
    this.#hasHead = true;
    const response = this.#response;
    response.statusCode = status;
    for (let index = 0; index + 1 < headers.length; index += 2) {
      const [name, value] = [headers[index]!, headers[index + 1]!];
      if (name === 'vary') {
        response.appendHeader(name, value);
      } else {
        response.setHeader(name, value);
      }
    }
    if (this.#streamsBody && !this.#request.complete) {
      // What is left of the body would have to be read before the connection could serve another request.
      response.setHeader('connection', 'close');
    }
    if (isWhole) {
      response.end(piece);
      return;
    }
    response.flushHeaders();
    if (!piece || this.#write(piece)) {
      this.#relay();
    }
  }

  /** Pieces of the answer until there is none, or the connection has enough for now. */
  #relay(): void {
    let goesOn = true;
    while (goesOn) {
      goesOn = false;
      let isAtOnce = true;
      this.#exchange.read((error, piece) =>
        this.#guarded(error, () => {
          if (piece === null) {
            this.#response.end();
          } else if (this.#write(piece)) {
            if (isAtOnce) {
              goesOn = true;
            } else {
              this.#relay();
            }
          }
        }),
      );
      isAtOnce = false;
    }
  }

  /** Whether the connection takes more at once; otherwise the relay goes on when it does. */
  #write(piece: Uint8Array): boolean {
    if (this.#response.write(piece)) {
      return true;
    }
    this.#stalled = setTimeout(() => this.#response.destroy(), this.#stallTimeoutMs);
    this.#response.once('drain', () => {
      clearTimeout(this.#stalled);
      this.#guarded(null, () => this.#relay());
    });
    return false;
  }
}

/*
 * ns_llm.h - the C interface of ns-llm, a native LLM inference engine in one process.
 *
 * This file is written from the doc comments of the library; do not edit it. It is C11 and C++17.
 *
 *
 * Contents
 *
 *   Version      which library a program works with
 *   Errors       statuses, and the sentence about the last failure
 *   Text         how texts are passed
 *   Log          what an engine tells an operator
 *   Engine       open a model, free it
 *   Figures      what is loaded, what was done, bytes, health
 *   Events       what a request has to say
 *   Request      submit, fetch events, wait, cancel, free
 *   Embeddings   texts to vectors
 *   Tokenizer    texts to token ids and back
 *
 *
 * A whole program
 *
 *     int main(void) {
 *         ns_llm_engine engine;
 *         ns_llm_engine_params where = { .struct_size = sizeof where, .model = { "models/demo", 11 } };
 *         if (ns_llm_engine_open(&where, &engine) != NS_LLM_OK) {
 *             fprintf(stderr, "%s\n", ns_llm_last_error(NULL));
 *             return 1;
 *         }
 *         ns_llm_request request;
 *         ns_llm_request_params what = { .struct_size = sizeof what, .prompt = { "Once upon a time", 16 } };
 *         ns_llm_status status = ns_llm_generate(engine, &what, NULL, NULL, &request);
 *         ns_llm_event event = { .struct_size = sizeof event };
 *         while (status == NS_LLM_OK && (status = ns_llm_request_next(request, NS_LLM_FOREVER, &event)) == NS_LLM_OK)
 *             fwrite(event.text.data, 1, event.text.size, event.kind == NS_LLM_EVENT_FAILED ? stderr : stdout);
 *         if (status != NS_LLM_ENDED)
 *             fprintf(stderr, "%s: %s\n", ns_llm_status_name(status), ns_llm_last_error(NULL));
 *         ns_llm_request_free(request);
 *         ns_llm_engine_free(engine);
 *         return status != NS_LLM_ENDED;
 *     }
 *
 *
 * Lifecycle
 *
 * Open an engine on a model; submit requests to it, as many at once as you like; fetch their events, or hear them in a
 * callback; free each request and the engine, in any order. There is nothing to initialise and nothing global: loading
 * the library starts no thread, reads no environment, installs no signal handler, prints nothing.
 *
 * Handles are 64-bit ids, not pointers. A handle that was freed, never given, or is of another kind is answered with
 * NS_LLM_BAD_HANDLE by every function, for the life of the process: no id is used twice. 0 is never a handle;
 * functions that free accept it and do nothing, so a handle can be set to 0 and freed without a question.
 *
 *
 * Threads
 *
 * Every function may be called from any thread at any time, several at once on the same engine or request, and from
 * inside callbacks; what cannot work inside a callback says so with NS_LLM_IN_CALLBACK and does not hang, and what has
 * room for one thread only says NS_LLM_BUSY to the second. Functions that free end what is running, and wait for it, so
 * that nothing calls back into memory that is going away; inside a callback they do not wait, and the rest happens when
 * the callback has returned.
 *
 * An engine computes on threads of its own, and tells events on one thread of its own, never on the thread that
 * submitted; lines of the log come on the thread that causes them. The program's threads, signal handlers and
 * floating-point state are left alone. A child of fork() has none of an engine's threads: if an engine was opened before
 * the fork, every function that could use one answers NS_LLM_FORKED_PROCESS there.
 *
 *
 * Ownership
 *
 * What you pass in is copied before the function returns, except `user_data`, which stays yours and is only handed
 * back. What the library shows you is the library's: in a callback until that returns, in a fetched event until the next
 * one is fetched, in ns_llm_model_info until the engine is freed. All other results are written to buffers and structs
 * of yours; there is nothing to release but handles.
 *
 * Text is a pointer and a size in bytes, UTF-8, without a NUL at the end; text that is not UTF-8 is refused. Only
 * version, status names and ns_llm_last_error() are NUL-terminated. Where a number of elements or bytes is 0, the
 * pointer is not looked at. Functions that fill a buffer say how much room they need when it is too small, so a call
 * without a buffer measures.
 *
 *
 * Errors
 *
 * Functions that can fail return an ns_llm_status, and ns_llm_last_error() has a sentence about it. Every fault of a
 * request, of a model's files or of the machine is a status; the library does not abort, exit, or let anything unwind
 * into the program. A fault of one request is told to that request alone. Out-parameters have a defined value also on
 * failure: each function says which.
 *
 *
 * Versions and growth
 *
 * Structs that may grow begin with `struct_size`: set it to the struct's sizeof, and zero what you do not set; the
 * others never change. A program built with an older header gets defaults for fields that it does not know. A program
 * built with a newer one gets NS_LLM_UNSUPPORTED, and not silence, if it sets a field that the library does not know, and
 * zeros in results that the library does not have. Any other size is NS_LLM_INVALID_ARGUMENT. Fields are only ever added
 * at the end, numbers of statuses and other constants are never reused, functions are not removed within a major version
 * (before 1.0: a minor version).
 */

#ifndef NS_LLM_H
#define NS_LLM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Version -------------------------------------------------------------------------------------------------------
 *
 * `NS_LLM_VERSION_NUMBER` is what you compiled against, ns_llm_version_number() is what you run with. A program works
 * with any library that has its `NS_LLM_ABI_VERSION` and is at least as new. That number is the same for all versions
 * with the same major version; while the major version is 0, for all with the same minor version. The shared library's
 * name carries it too (libns_llm.so.0.1), so a linked program gets no other; one that loads the library by itself should
 * compare it with ns_llm_abi_version().
 */

/** The version of this header. */
#define NS_LLM_VERSION_MAJOR 0
#define NS_LLM_VERSION_MINOR 1
#define NS_LLM_VERSION_PATCH 0

/** The version of this header as one number, which grows with the version. */
#define NS_LLM_VERSION_NUMBER (NS_LLM_VERSION_MAJOR * 1000000 + NS_LLM_VERSION_MINOR * 1000 + NS_LLM_VERSION_PATCH)

/** What this header and the library must have in common; see above. */
#define NS_LLM_ABI_VERSION (NS_LLM_VERSION_MAJOR == 0 ? NS_LLM_VERSION_MINOR : NS_LLM_VERSION_MAJOR * 1000)

/**
 * The version of the library that is running, in the form of `NS_LLM_VERSION_NUMBER`: 1002003 is 1.2.3.
 *
 * Threads:    any. Cannot fail.
 */
uint32_t ns_llm_version_number(void);

/**
 * The ABI version of the library that is running: programs that were compiled with this `NS_LLM_ABI_VERSION` work with it.
 *
 * Threads:    any. Cannot fail.
 */
uint32_t ns_llm_abi_version(void);

/**
 * The version of the library that is running, as text such as "1.2.3".
 *
 * Ownership:  the text is the library's, ends with NUL and lives as long as the library is loaded.
 * Threads:    any. Cannot fail.
 */
const char *ns_llm_version(void);

/*
 * Errors --------------------------------------------------------------------------------------------------------
 *
 * Every function that can fail returns a status, and leaves a sentence about it that names the field, the value and
 * the limit, or the file and the place in it: see ns_llm_last_error(). Decide by the status, show the sentence.
 */

/**
 * How a call ended. Numbers are never reused and never change their meaning; newer libraries may return new ones, so
 * treat an unknown number as a failure. 1 to 99 are about the call itself, 100 to 199 about a request, 200 to 299
 * about its life, 300 to 399 about files, 400 to 499 about the machine.
 */
typedef enum ns_llm_status {
    /** It worked. */
    NS_LLM_OK = 0,
    /** A pointer that must point to something is NULL. */
    NS_LLM_NULL_ARGUMENT = 1,
    /** A handle was never given, was freed, or belongs to something of another kind. */
    NS_LLM_BAD_HANDLE = 2,
    /** A text is not UTF-8. */
    NS_LLM_INVALID_UTF8 = 3,
    /** A pointer is not aligned for what it points to. */
    NS_LLM_MISALIGNED_POINTER = 4,
    /** The caller's header is newer than this library, and an option that the library does not know is in use. */
    NS_LLM_UNSUPPORTED = 5,
    /** The result does not fit the caller's buffer; the size that is needed was written. */
    NS_LLM_BUFFER_TOO_SMALL = 6,
    /** The time given for waiting passed. Nothing changed; wait again. */
    NS_LLM_TIMEOUT = 7,
    /** The function waits for callbacks to return, so it cannot be called from inside one. */
    NS_LLM_IN_CALLBACK = 8,
    /** This process was forked from one that had opened an engine, whose threads stayed there. Fork first, then open. */
    NS_LLM_FORKED_PROCESS = 9,
    /** The request is read in the other of the two ways: with a callback, or with ns_llm_request_next(). */
    NS_LLM_WRONG_READER = 10,
    /** Another thread is in the middle of the same call, and the two would take each other's events. */
    NS_LLM_BUSY = 11,
    /** The last event was read before; there will be no other. */
    NS_LLM_ENDED = 12,
    /** A field is outside its range. */
    NS_LLM_INVALID_ARGUMENT = 100,
    /** The prompt does not fit the context. */
    NS_LLM_PROMPT_TOO_LONG = 101,
    /** Prompt and answer need more KV blocks than the engine has, even alone. */
    NS_LLM_EXCEEDS_KV_POOL = 102,
    /** A queue is full. Nothing was lost; try again later. */
    NS_LLM_OVERLOADED = 103,
    /** The model's chat template refused the messages or broke one of its bounds. */
    NS_LLM_TEMPLATE = 104,
    /** Text could not be turned into tokens. */
    NS_LLM_TOKENIZER = 105,
    /** Messages were given, but the model has no chat template. */
    NS_LLM_NO_CHAT_TEMPLATE = 106,
    /** The model is not made for what was asked, such as writing text with an embedding model. */
    NS_LLM_NOT_SUPPORTED = 107,
    /** The caller cancelled. */
    NS_LLM_CANCELLED = 200,
    /** The request did not end within its timeout. */
    NS_LLM_DEADLINE_EXCEEDED = 201,
    /** The model computed a value that is not finite. Only this request ended. */
    NS_LLM_NON_FINITE_LOGITS = 202,
    /** The engine was freed. */
    NS_LLM_CLOSED = 203,
    /** A defect of this library. The process is unharmed; free the engine and open a new one. */
    NS_LLM_INTERNAL = 204,
    /** The model computed a vector that is not finite. Only this request ended. */
    NS_LLM_NON_FINITE_EMBEDDING = 205,
    /** A file or folder could not be read. */
    NS_LLM_IO = 300,
    /** A file that the model needs is not there. */
    NS_LLM_MISSING_FILE = 301,
    /** A configuration file is not what it should be. */
    NS_LLM_CONFIG = 302,
    /** A weights file is damaged or lies about itself. */
    NS_LLM_WEIGHTS = 303,
    /** A tensor that the model needs is in no file. */
    NS_LLM_MISSING_TENSOR = 304,
    /** The files hold tensors that the model has no use for. */
    NS_LLM_UNUSED_TENSORS = 305,
    /** A tensor has another shape than the configuration says. */
    NS_LLM_TENSOR_SHAPE = 306,
    /** A tensor has an element type that cannot be used there. */
    NS_LLM_TENSOR_DTYPE = 307,
    /** The model's architecture is not known. */
    NS_LLM_UNKNOWN_ARCHITECTURE = 308,
    /** A file is not the JSON that it should be. */
    NS_LLM_INVALID_JSON = 309,
    /** Weights that are to be quantized are not finite. */
    NS_LLM_NON_FINITE_WEIGHTS = 310,
    /** Memory for weights or KV could not be had. */
    NS_LLM_OUT_OF_MEMORY = 400,
    /** The device that was asked for is not there. */
    NS_LLM_DEVICE_UNAVAILABLE = 401,
    /** A cache tier could not bring to its medium what it holds. Requests are not touched by it. */
    NS_LLM_STORAGE = 402,
    /** The device was lost while it computed. Every request of the engine ends with this; free it, and open another. */
    NS_LLM_DEVICE_LOST = 403,
    /** Some of what a cache tier was to keep since the last flush was not stored. Requests are not touched by it. */
    NS_LLM_NOT_STORED = 404,
} ns_llm_status;

/**
 * The sentence about the last call on this thread that failed; "" if none did.
 *
 * Ownership:  the text is the library's and ends with NUL. It is valid until the next call on this thread that fails,
 *             or the end of the thread. Calls that succeed leave it as it is, so ask right after a failure.
 * Threads:    any; each thread has its own.
 * NULL:       `out_size` may be NULL; otherwise it receives the size in bytes, without the NUL.
 * Cannot fail and never returns NULL.
 *
 * The caller promises:
 * `out_size` is NULL or points to a writable `size_t`.
 */
const char *ns_llm_last_error(size_t *out_size);

/**
 * The name of a status: lower case, such as "prompt_too_long"; "unknown" for a number that this library does not have.
 * Names are as stable as the numbers, and are the `code` of errors in Rust and JavaScript.
 *
 * Ownership:  the text is the library's, ends with NUL and lives as long as the library is loaded.
 * Threads:    any. Cannot fail.
 */
const char *ns_llm_status_name(int status);

/*
 * Text ----------------------------------------------------------------------------------------------------------
 *
 * A text is a pointer and a size in bytes, in UTF-8, without a NUL at the end. It may hold any character, NUL too.
 */

/** A text inside a struct or an array. `data` may be NULL where `size` is 0. */
typedef struct ns_llm_text {
    /** The first byte. */
    const char *data;
    /** Number of bytes. */
    size_t size;
} ns_llm_text;

/*
 * Log -----------------------------------------------------------------------------------------------------------
 *
 * An engine has little to say beside its answers, and prints nothing; a program that keeps a log gives each engine a
 * callback for what an operator wants to find there. INFO: a model was loaded, with its figures; an engine was freed,
 * with its counts. WARN: a request was refused because a queue is full. ERROR: a request ended by a defect of this
 * library (told once for an engine).
 */

/** How much a line of the log matters. */
typedef enum ns_llm_log_level {
    /** Something went wrong that should not be possible. */
    NS_LLM_LOG_ERROR = 1,
    /** Something was refused that a larger limit or a smaller load would have allowed. */
    NS_LLM_LOG_WARN = 2,
    /** Something that happens once in the life of an engine. */
    NS_LLM_LOG_INFO = 3,
} ns_llm_log_level;

/**
 * Receives one line: `size` bytes of UTF-8 without a line break, the library's, valid until the callback returns. Called
 * on the thread that caused it, the engine's callback thread included, so calls can overlap; never after
 * ns_llm_engine_free() has returned, unless that was called inside a callback. It may call any function of this header,
 * except those that say NS_LLM_IN_CALLBACK. It must return: no longjmp, no C++ exception.
 */
typedef void (*ns_llm_log_callback)(enum ns_llm_log_level level, const char *line, size_t size, void *user_data);

/*
 * Engine --------------------------------------------------------------------------------------------------------
 *
 * An engine is a loaded model with its KV blocks, its worker, its compute threads and its callback thread. It serves
 * many requests at once; a program normally opens one engine per model.
 */

/** A flag of `ns_llm_engine_params`: KV of earlier prompts is not used again. */
#define NS_LLM_ENGINE_NO_PREFIX_CACHE 1

/**
 * A flag of `ns_llm_engine_params`: compute threads get the same priority as the program's own threads, not a lower
 * one.
 */
#define NS_LLM_ENGINE_NORMAL_PRIORITY 2

/**
 * A flag of `ns_llm_engine_params`: a kept answer's time follows its use, from a sixth of `response_ttl_ms` to twice as
 * long.
 */
#define NS_LLM_ENGINE_ADAPTIVE_RESPONSE_TTL 4

/** A flag of `ns_llm_engine_params`: answers are not kept in `kv_cache_dir`. */
#define NS_LLM_ENGINE_NO_RESPONSE_DISK 8

/** A flag of `ns_llm_engine_params`: answers are not shared through `kv_remote_url`. */
#define NS_LLM_ENGINE_NO_RESPONSE_REMOTE 16

/** A flag of `ns_llm_engine_params`: steps on a CUDA device are launched kernel by kernel; none is captured as a graph. */
#define NS_LLM_ENGINE_NO_CUDA_GRAPHS 32

/** Where an engine computes. */
typedef enum ns_llm_device {
    /**
     * The first CUDA device, if the library was built with CUDA, the machine has a driver and a device for it, and the
     * model fits; else the CPU. `device_reason` of ns_llm_engine_info() says why.
     */
    NS_LLM_DEVICE_AUTO = 0,
    /** The CPU. */
    NS_LLM_DEVICE_CPU = 1,
    /** The CUDA device number `device_ordinal`. */
    NS_LLM_DEVICE_CUDA = 2,
} ns_llm_device;

/**
 * In which form an engine keeps and multiplies weights. The quantized forms are those of GGUF files; weights that are stored
 * otherwise are rounded while they are loaded.
 */
typedef enum ns_llm_weights {
    /** As the model's files have them; with `memory_limit_bytes` the best form that fits. */
    NS_LLM_WEIGHTS_AUTO = 0,
    /** 32-bit floats. */
    NS_LLM_WEIGHTS_F32 = 1,
    /** bfloat16. */
    NS_LLM_WEIGHTS_BF16 = 2,
    /** IEEE half precision. */
    NS_LLM_WEIGHTS_F16 = 3,
    /** 8 bits. */
    NS_LLM_WEIGHTS_Q8_0 = 4,
    /** 6 bits. */
    NS_LLM_WEIGHTS_Q6_K = 5,
    /** 5 bits. */
    NS_LLM_WEIGHTS_Q5_K = 6,
    /** 4 bits. */
    NS_LLM_WEIGHTS_Q4_K = 7,
    /** 3 bits. */
    NS_LLM_WEIGHTS_Q3_K = 8,
    /** 2 bits. */
    NS_LLM_WEIGHTS_Q2_K = 9,
    /** 5 bits, an older format. */
    NS_LLM_WEIGHTS_Q5_1 = 10,
    /** 5 bits, an older format. */
    NS_LLM_WEIGHTS_Q5_0 = 11,
    /** 4 bits, an older format. */
    NS_LLM_WEIGHTS_Q4_1 = 12,
    /** 4 bits, an older format. */
    NS_LLM_WEIGHTS_Q4_0 = 13,
    /** 4 bits at uneven levels. */
    NS_LLM_WEIGHTS_IQ4_NL = 14,
    /** Floats of 4 bits. */
    NS_LLM_WEIGHTS_MXFP4 = 15,
} ns_llm_weights;

/** How an engine keeps keys and values. */
typedef enum ns_llm_kv_dtype {
    /** 32-bit floats with 32-bit weights, else half precision. */
    NS_LLM_KV_DTYPE_AUTO = 0,
    /** 32-bit floats. */
    NS_LLM_KV_DTYPE_F32 = 1,
    /** IEEE half precision. */
    NS_LLM_KV_DTYPE_F16 = 2,
    /** bfloat16. */
    NS_LLM_KV_DTYPE_BF16 = 3,
    /** 8-bit integers with a scale for each token and head: half the memory of half precision. */
    NS_LLM_KV_DTYPE_INT8 = 4,
} ns_llm_kv_dtype;

/** How an engine keeps KV blocks outside its pool: in host memory, in `kv_cache_dir` and at `kv_remote_url`. */
typedef enum ns_llm_kv_tier_encoding {
    /** As they were computed: what is found again equals what would be computed, bit for bit. */
    NS_LLM_KV_TIER_ENCODING_AS_COMPUTED = 0,
    /**
     * Rounded to 8-bit integers with a scale for each token and head: half the bytes of half precision. An answer over blocks
     * that came back is a little other than one that was computed whole; no engine without this finds them.
     */
    NS_LLM_KV_TIER_ENCODING_INT8 = 1,
} ns_llm_kv_tier_encoding;

/**
 * Hears how far loading is; both sizes are bytes of weights. Called by ns_llm_engine_open(), one call at a time, on
 * the calling thread or on a loading thread, and never after it has returned. Returns `true` to go on, `false` to
 * cancel: then ns_llm_engine_open() returns NS_LLM_CANCELLED. It must return: no longjmp, no C++ exception.
 */
typedef bool (*ns_llm_progress_callback)(uint64_t loaded_bytes, uint64_t total_bytes, void *user_data);

/** How to open an engine. A struct of zeros, but for `struct_size` and `model`, asks for every default. */
typedef struct ns_llm_engine_params {
    /** `sizeof(ns_llm_engine_params)`. */
    size_t struct_size;
    /** Path of the model: its folder, or a GGUF file. */
    ns_llm_text model;
    /** A value of `ns_llm_device`. */
    uint32_t device;
    /** A value of `ns_llm_weights`. */
    uint32_t weights;
    /** Any of the `NS_LLM_ENGINE_` flags. */
    uint32_t flags;
    /** Compute threads. 0: all cores, less one that is left to the program if there are more than two. */
    uint32_t threads;
    /** Longest sequence, prompt and answer, in tokens. 0: the model's own, as far as the KV pool holds it. */
    size_t context_tokens;
    /**
     * Size of the KV pool, bytes. 0: a quarter of the available memory, at most 2 GiB; on a CUDA device all that weights
     * and steps leave of nine tenths of its free memory.
     */
    uint64_t kv_bytes;
    /** Tokens in a KV block, a multiple of 16. 0: 16. */
    size_t block_tokens;
    /** Sequences that may run at once; more wait. 0: 64. */
    size_t max_running_sequences;
    /** Requests that may wait; the next one gets NS_LLM_OVERLOADED. 0: 1000. */
    size_t max_waiting_requests;
    /** Tokens that one step may compute while nothing decodes. 0: 512. */
    size_t prefill_budget_tokens;
    /** Tokens that one step may compute while something decodes. 0: 128. */
    size_t mixed_budget_tokens;
    /** Hears how far loading is, or NULL. */
    ns_llm_progress_callback progress;
    /** Handed to `progress`. */
    void *progress_user_data;
    /** Hears what belongs into a log, or NULL. */
    ns_llm_log_callback log;
    /** Handed to `log`. */
    void *log_user_data;
    /** A value of `ns_llm_kv_dtype`. */
    uint32_t kv_dtype;
    /** With NS_LLM_DEVICE_CUDA the number of the device, from 0; else 0. */
    uint32_t device_ordinal;
    /**
     * What weights and KV pool may take together, bytes. With NS_LLM_WEIGHTS_AUTO weights that are too large are rounded to
     * the best form that fits: bfloat16, Q8_0, Q6_K, Q5_K, Q4_K, Q3_K or Q2_K; if none does, NS_LLM_OUT_OF_MEMORY, with what
     * the smallest needs in the text. 0: what is available.
     */
    uint64_t memory_limit_bytes;
    /** Host memory for KV blocks that the pool gives away, bytes. 0: none. */
    uint64_t kv_host_bytes;
    /**
     * Directory where KV blocks outlive the process: the next engine with the same model, numerics and namespace finds them
     * again. It is made if it is missing, and belongs to engines alone. One engine at a time writes, others read. NULL: blocks
     * end with the engine.
     */
    ns_llm_text kv_cache_dir;
    /** Bytes that the files in `kv_cache_dir` take at most. 0: 8 GiB. */
    uint64_t kv_disk_bytes;
    /** How long a request waits for KV from a place that makes no progress before it computes the rest, milliseconds. 0: 50. */
    uint64_t kv_load_budget_ms;
    /**
     * Share of the KV pool, of host memory, of `kv_cache_dir` and of the kept answers, in memory and on disk, that what
     * is cached for one owner of namespaces may keep when others need room, to 1. The owner is what stands before the
     * first line break of a namespace. 0: 1, all of it.
     */
    double kv_namespace_share;
    /**
     * Bytes of answers that are kept in memory, to be given again without computing a token to requests for the same. 0: none
     * are. With `kv_cache_dir` they outlive the process, with `kv_remote_url` nodes share them.
     */
    uint64_t response_cache_bytes;
    /** How long an answer is kept, milliseconds, at most a year. 0: one hour. */
    uint64_t response_ttl_ms;
    /**
     * Store of KV blocks that nodes share, `redis://[[user]:password@]host[:port][/database]`; the way to it is not encrypted.
     * NULL: none, and nothing in the fields below that say how it is used.
     */
    ns_llm_text kv_remote_url;
    /**
     * What all nodes know and the store does not, 16 to 1,024 bytes: records that are not authenticated with it are not used.
     * NULL: the store is trusted not to make records up.
     */
    ns_llm_text kv_remote_secret;
    /** Bytes that the files with answers take at most, in `answers` beneath `kv_cache_dir`; at least some 4 MiB. 0: 256 MiB. */
    uint64_t response_disk_bytes;
    /** A value of `ns_llm_kv_tier_encoding`. */
    uint32_t kv_tier_encoding;
    /** 0. */
    uint32_t reserved;
    /**
     * Bytes of KV, and as many of answers, that this engine stores at `kv_remote_url` within a day, for which they are kept, for
     * one owner of namespaces. 0: no limit.
     */
    uint64_t kv_remote_owner_bytes;
    /**
     * Steps that a CUDA device keeps captured as graphs, to 256; those that ran least recently make room. 0: 32. No
     * result depends on it. With NS_LLM_ENGINE_NO_CUDA_GRAPHS none is.
     */
    size_t max_cuda_graphs;
    /**
     * How long what is stored at `kv_remote_url` is kept there when nobody stores it again, seconds, at most thirty days. 0: one
     * day.
     */
    uint64_t kv_remote_ttl_s;
    /** What all names at `kv_remote_url` begin with, at most 64 bytes. NULL: "ns-llm". */
    ns_llm_text kv_remote_prefix;
    /** How long one call to `kv_remote_url` may take, connecting included, milliseconds, at most 10,000. 0: 500. */
    uint64_t kv_remote_timeout_ms;
    /** Answers that are kept in memory at most. 0: as many as `response_cache_bytes` holds. */
    uint64_t response_max_entries;
    /**
     * Part of the key of every answer: those of another version are not found. For what answers depend on and the engine does
     * not know.
     */
    uint64_t response_version;
} ns_llm_engine_params;

/** An engine: an id, not a pointer. 0 is never an engine. */
typedef uint64_t ns_llm_engine;

/**
 * Loads a model and starts an engine for it. Returns when it can answer, which may take seconds.
 *
 * Ownership:  `params` and what it points to are copied, but `log_user_data` must stay valid until the engine is freed.
 *             `*out_engine` is a new handle; free it with ns_llm_engine_free().
 * Threads:    any, also concurrently, also inside a callback.
 * NULL:       `params`, `params->model.data` and `out_engine` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_CANCELLED if the progress callback said so; NS_LLM_NULL_ARGUMENT,
 *             NS_LLM_MISALIGNED_POINTER, NS_LLM_INVALID_UTF8, NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the
 *             parameters; any status from 300 to 399 about the files; NS_LLM_OUT_OF_MEMORY; NS_LLM_DEVICE_UNAVAILABLE;
 *             NS_LLM_STORAGE about `kv_cache_dir`; NS_LLM_OVERLOADED if 16777216 engines are open; NS_LLM_FORKED_PROCESS in the child of a process that had
 *             opened an engine; NS_LLM_INTERNAL.
 * On failure: `*out_engine` is 0, and nothing is left behind.
 *
 * The caller promises:
 * `params` points to a `size_t` and to as many readable bytes as that says; its texts are readable and its `progress`
 * callable until this function returns, its `log` until ns_llm_engine_free() has. `out_engine` points to a writable
 * `ns_llm_engine`.
 */
ns_llm_status ns_llm_engine_open(const struct ns_llm_engine_params *params,
                                 ns_llm_engine *out_engine);

/**
 * Ends all requests of an engine with NS_LLM_CLOSED, stops its threads and frees its memory.
 *
 * Outside of callbacks it returns when that is done and every last event has been told, so nothing of the engine calls
 * the program any more; this takes about one step, and what a disk needs to take the KV blocks that wait for it, and as
 * long as the callback that is running, so do not hold a lock that the callback takes. Inside a callback the last events
 * are told after that callback has returned. Request handles stay valid until they are freed. Calls that other threads
 * are in the middle of end with NS_LLM_CLOSED.
 *
 * Ownership:  `engine` is dead afterwards; it may be freed before or after its requests.
 * Threads:    any, also inside a callback.
 * NULL:       0 is allowed and does nothing.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE if it is not an engine or was freed before; NS_LLM_FORKED_PROCESS;
 *             NS_LLM_INTERNAL.
 * On failure: nothing changed.
 */
ns_llm_status ns_llm_engine_free(ns_llm_engine engine);

/**
 * Waits until the KV blocks that were computed so far, and kept answers, are on disk, where they outlive a failure of power;
 * at most a minute. Without `kv_cache_dir` and `kv_remote_url` there is nothing to wait for. They are written by themselves,
 * too: this is for programs that must know.
 *
 * Threads:    any, also concurrently, also inside a callback.
 * Returns:    NS_LLM_OK; NS_LLM_STORAGE if the medium did not take them; NS_LLM_NOT_STORED if some of them were not stored since
 *             the last call: too much waited, a place failed or may not be written, which ns_llm_last_error() says; all else is
 *             stored; NS_LLM_DEADLINE_EXCEEDED; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the engine is freed meanwhile;
 *             NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: requests are not touched, and nothing false is ever found: a block that cannot be read is computed again.
 */
ns_llm_status ns_llm_engine_flush(ns_llm_engine engine);

/**
 * Forgets the KV that is cached for later: in the pool, in host memory and in the files of `kv_cache_dir`, for all namespaces
 * and for every model that has used the directory. Nothing of it is found any more when this returns. Requests that run are
 * not touched, and what is computed from now on is cached again. A store that nodes share is left as it is. Waits at most a
 * minute.
 *
 * Threads:    any, also concurrently; inside a callback it holds up the events of all engines.
 * Returns:    NS_LLM_OK; NS_LLM_STORAGE if the files could not be removed, or if another process writes them: this engine
 *             does not use them any more, another might; NS_LLM_DEADLINE_EXCEEDED; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the
 *             engine is freed meanwhile; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: pool and host memory are cleared all the same, unless the engine is closed.
 */
ns_llm_status ns_llm_engine_clear_prefix_cache(ns_llm_engine engine);

/*
 * Figures -------------------------------------------------------------------------------------------------------
 *
 * What is loaded, what was done, and how many bytes it takes. The program gives a struct with its `struct_size` set, and
 * finds it filled.
 */

/** A place beside the pool where an engine keeps KV blocks. */
typedef enum ns_llm_kv_tier {
    /** Host memory: `kv_host_bytes`. */
    NS_LLM_KV_TIER_HOST = 0,
    /** Files: `kv_cache_dir`. */
    NS_LLM_KV_TIER_DISK = 1,
    /** A store that nodes share. */
    NS_LLM_KV_TIER_REMOTE = 2,
} ns_llm_kv_tier;

/** What is loaded. The texts are the library's and valid until the engine is freed. */
typedef struct ns_llm_model_info {
    /** `sizeof(ns_llm_model_info)`. */
    size_t struct_size;
    /** Last component of the model's path. */
    ns_llm_text name;
    /** As in the model's config.json, such as "Qwen3ForCausalLM". */
    ns_llm_text architecture;
    /** How the weights are kept, such as "bf16". */
    ns_llm_text weights;
    /** How keys and values are kept, such as "f16". */
    ns_llm_text kv_dtype;
    /** "cpu" or "cuda". */
    ns_llm_text device;
    /** The instruction set in use, such as "avx2" or "portable"; on a CUDA device its architecture, such as "sm_90". */
    ns_llm_text isa;
    /** Numbers in all weights. */
    uint64_t num_parameters;
    /** Those that are multiplied with every token of a prompt: the matrices of the layers. */
    uint64_t num_layer_parameters;
    /** Entries of the vocabulary: token ids are below this. */
    uint64_t vocab_size;
    /** Longest sequence, prompt and answer, in tokens. */
    uint64_t context_tokens;
    /** Elements of the vector that an embedding request gets. */
    uint64_t embedding_dimensions;
    /** Longest input of an embedding request, tokens; more is cut. */
    uint64_t max_embedding_tokens;
    /** Compute threads; 0 on a CUDA device. */
    uint64_t threads;
    /** What opening took, milliseconds. */
    double load_ms;
    /** 1 if the model can write text; 0 if it makes vectors only. */
    uint32_t can_generate;
    /** 1 if messages can be turned into a prompt, else 0. */
    uint32_t has_chat_template;
    /** Which device: "cpu", or number and name of a CUDA device, such as "cuda:0 NVIDIA H200". */
    ns_llm_text device_name;
    /** Why it was chosen: that it was asked for, or what NS_LLM_DEVICE_AUTO found. */
    ns_llm_text device_reason;
    /**
     * How keys and values are kept outside the pool: "as-computed", or "int8", rounded: then an answer over blocks that came
     * back from there is a little other than one that was computed whole.
     */
    ns_llm_text kv_tier_encoding;
    /**
     * Why nothing is stored in `kv_cache_dir`: another process writes it, or a newer version has. The engine does without what
     * it may not use. Empty: it stores there, or none was given.
     */
    ns_llm_text kv_disk_refusal;
} ns_llm_model_info;

/** What an engine has done and is doing. Those named `_total` only grow. */
typedef struct ns_llm_stats {
    /** `sizeof(ns_llm_stats)`. */
    size_t struct_size;
    /** Sequences that are being computed. */
    uint64_t num_sequences_running;
    /** Sequences that wait. */
    uint64_t num_sequences_waiting;
    /** Blocks of the KV pool. */
    uint64_t kv_blocks_total;
    /** Blocks that live sequences hold. */
    uint64_t kv_blocks_used;
    /** Blocks that hold KV for later, and are given away when needed. */
    uint64_t kv_blocks_cached;
    /** Blocks that hold nothing. */
    uint64_t kv_blocks_free;
    /** Requests admitted: the finished, cancelled, failed and live ones. */
    uint64_t requests_total;
    /** Requests that ended by themselves. */
    uint64_t requests_finished_total;
    /** Requests that were cancelled. */
    uint64_t requests_cancelled_total;
    /** Admitted requests that ended in an error. */
    uint64_t requests_failed_total;
    /** Requests that were refused or given up before they were admitted. */
    uint64_t requests_refused_total;
    /** Prompt tokens of admitted requests. */
    uint64_t prompt_tokens_total;
    /** Prompt tokens that the prefix cache was asked for. */
    uint64_t prefix_cache_queries_total;
    /** Prompt tokens that it had. */
    uint64_t prefix_cache_hits_total;
    /** Tokens produced. */
    uint64_t generation_tokens_total;
    /** Tokens of inputs that were turned into vectors. */
    uint64_t embedding_tokens_total;
    /** Tokens computed, those of preempted sequences again. */
    uint64_t computed_tokens_total;
    /** Sequences that lost their blocks and were computed again. */
    uint64_t preemptions_total;
    /** Steps run. */
    uint64_t steps_total;
    /** Milliseconds since the engine was opened. */
    uint64_t uptime_ms;
    /** Of `prefix_cache_hits_total`, tokens whose KV was in the pool. */
    uint64_t prefix_cache_pool_hits_total;
    /** Those that the pool had given away and host memory had kept. */
    uint64_t prefix_cache_host_hits_total;
    /** Those that were read from disk. */
    uint64_t prefix_cache_disk_hits_total;
    /** Those that came from a store that nodes share. */
    uint64_t prefix_cache_remote_hits_total;
    /** Graphs of steps that a CUDA device keeps now. This and the next four are 0 on the CPU. */
    uint64_t cuda_graphs_kept;
    /** Steps that were captured as graphs. */
    uint64_t cuda_graphs_captured_total;
    /** Steps that ran as one of them. */
    uint64_t cuda_graphs_launched_total;
    /** Graphs that made room for others. */
    uint64_t cuda_graphs_evicted_total;
    /** 1: no step of this engine is captured, because it was not asked for or a capture failed. */
    uint64_t cuda_graphs_refused;
    /** Requests that are not sequences yet, one for each choice or input: being rendered and tokenized, or next to be. */
    uint64_t num_requests_preparing;
} ns_llm_stats;

/**
 * What a tier holds and what became of what it was asked. All but `bytes` and `hit_bytes` count blocks; those named `_total`
 * only grow.
 */
typedef struct ns_llm_kv_tier_stats {
    /** `sizeof(ns_llm_kv_tier_stats)`. */
    size_t struct_size;
    /** 1 if the engine has this tier; else everything here is 0. */
    uint64_t is_there;
    /** Held now, as far as this engine knows. */
    uint64_t blocks;
    /** Bytes of them. */
    uint64_t bytes;
    /** Asked for and given. */
    uint64_t hits_total;
    /** Bytes of them. */
    uint64_t hit_bytes_total;
    /** Asked for and not there. */
    uint64_t misses_total;
    /** Taken in. */
    uint64_t stored_total;
    /** Given up for others. */
    uint64_t evictions_total;
    /** Calls that failed, damaged blocks included. Each was a miss and no more. */
    uint64_t faults_total;
} ns_llm_kv_tier_stats;

/** Bytes that an engine holds. */
typedef struct ns_llm_memory_use {
    /** `sizeof(ns_llm_memory_use)`. */
    size_t struct_size;
    /** Weights, as they are kept. */
    uint64_t weights_bytes;
    /** The KV pool, as reserved. */
    uint64_t kv_reserved_bytes;
    /** The part of it that live sequences hold. */
    uint64_t kv_used_bytes;
    /** The part of it that is kept for later. */
    uint64_t kv_cached_bytes;
    /** Answers that are kept in memory. */
    uint64_t response_cache_bytes;
} ns_llm_memory_use;

/**
 * Says what is loaded.
 *
 * Ownership:  `*out_info` is the caller's, its texts the library's until the engine is freed.
 * Threads:    any, also inside a callback.
 * NULL:       `out_info` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
 *             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_info` is unchanged.
 *
 * The caller promises:
 * `out_info` points to a `size_t` and to as many writable bytes as that says.
 */
ns_llm_status ns_llm_engine_info(ns_llm_engine engine, struct ns_llm_model_info *out_info);

/**
 * Says what an engine has done so far, as of its last step.
 *
 * Ownership:  `*out_stats` is the caller's.
 * Threads:    any, also inside a callback.
 * NULL:       `out_stats` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
 *             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_stats` is unchanged.
 *
 * The caller promises:
 * `out_stats` points to a `size_t` and to as many writable bytes as that says.
 */
ns_llm_status ns_llm_engine_stats(ns_llm_engine engine, struct ns_llm_stats *out_stats);

/**
 * Says what one of the places beside the pool, a value of `ns_llm_kv_tier`, holds and has done, as of the last step.
 *
 * Ownership:  `*out_stats` is the caller's.
 * Threads:    any, also inside a callback.
 * NULL:       `out_stats` must not be NULL.
 * Returns:    NS_LLM_OK, also if the engine does not have this tier; NS_LLM_UNSUPPORTED if the library does not know it;
 *             NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT about
 *             `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_stats` is unchanged.
 *
 * The caller promises:
 * `out_stats` points to a `size_t` and to as many writable bytes as that says.
 */
ns_llm_status ns_llm_engine_kv_tier(ns_llm_engine engine,
                                    uint32_t tier,
                                    struct ns_llm_kv_tier_stats *out_stats);

/**
 * Says how many bytes an engine holds.
 *
 * Ownership:  `*out_memory` is the caller's.
 * Threads:    any, also inside a callback.
 * NULL:       `out_memory` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
 *             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_memory` is unchanged.
 *
 * The caller promises:
 * `out_memory` points to a `size_t` and to as many writable bytes as that says.
 */
ns_llm_status ns_llm_engine_memory(ns_llm_engine engine, struct ns_llm_memory_use *out_memory);

/**
 * Says whether an engine takes requests. Costs next to nothing: made for a health check.
 *
 * Threads:    any, also inside a callback.
 * Returns:    NS_LLM_OK; NS_LLM_INTERNAL if a defect of this library ended the engine, with the reason in
 *             ns_llm_last_error(): free it and open a new one; NS_LLM_BAD_HANDLE (also for 0); NS_LLM_CLOSED if it is just
 *             being freed; NS_LLM_FORKED_PROCESS.
 */
ns_llm_status ns_llm_engine_health(ns_llm_engine engine);

/*
 * Response cache ------------------------------------------------------------------------------------------------
 *
 * Whole answers, given again without computing a token to requests for the same: `response_cache_bytes` of
 * `ns_llm_engine_params` turns it on, `response_cache` of `ns_llm_request_params` says what part it has in a request. This is
 * to forget and to count.
 */

/** What the response cache of an engine has done and holds. Those named `_total` only grow. */
typedef struct ns_llm_response_cache_stats {
    /** `sizeof(ns_llm_response_cache_stats)`. */
    size_t struct_size;
    /** Requests that were answered from it. */
    uint64_t answers_total;
    /** Look-ups that found something. */
    uint64_t hits_total;
    /** Look-ups that did not. */
    uint64_t misses_total;
    /** Entries stored. */
    uint64_t stores_total;
    /** Entries given up for want of room. */
    uint64_t evictions_total;
    /** Entries given up because their time was over. */
    uint64_t expired_total;
    /** Entries given up by tag, or all at once. */
    uint64_t invalidated_total;
    /** Answers not stored because they had become invalid while they were computed. */
    uint64_t outdated_total;
    /** Answers not stored because they were too large. */
    uint64_t too_large_total;
    /** Entries held. */
    uint64_t entries;
    /** Bytes of these. */
    uint64_t bytes;
    /** The budget. */
    uint64_t max_bytes;
    /** Requests that were answered from files; each is counted as a miss above. */
    uint64_t disk_hits_total;
    /** Answers in files. */
    uint64_t disk_entries;
    /** Bytes of these files. */
    uint64_t disk_bytes;
    /** Requests that were answered from a store that nodes share; each is counted as a miss above. */
    uint64_t remote_hits_total;
    /** Answers written to files and to that store. */
    uint64_t tier_stores_total;
    /** Answers not written there: too much waited, or the place was left alone because it failed. */
    uint64_t tier_drops_total;
    /** Calls to these places that failed, damaged answers included. Each was a miss and no more. */
    uint64_t tier_faults_total;
    /** Requests that were computed because these places took too long to answer. */
    uint64_t tier_give_ups_total;
} ns_llm_response_cache_stats;

/**
 * Says what the response cache of an engine has done and holds.
 *
 * Ownership:  `*out_stats` is the caller's.
 * Threads:    any, also inside a callback.
 * NULL:       `out_stats` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT
 *             about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_stats` is unchanged.
 *
 * The caller promises:
 * `out_stats` points to a `size_t` and to as many writable bytes as that says.
 */
ns_llm_status ns_llm_responses_stats(ns_llm_engine engine, struct ns_llm_response_cache_stats *out_stats);

/**
 * Forgets every kept answer whose request had this tag, in all namespaces. Answers with it that are just being computed are
 * not kept either. In files and in a shared store they are not found any more; that is written behind, and outlives the
 * process once ns_llm_engine_flush() has returned. Other nodes keep what they have in memory until its time is over.
 *
 * Ownership:  `tag` is the caller's.
 * Threads:    any, also inside a callback.
 * NULL:       `tag` may be NULL if `tag_size` is 0; `out_num` must not be NULL.
 * Returns:    NS_LLM_OK, also if no answer had it; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
 *             NS_LLM_INVALID_UTF8; NS_LLM_INVALID_ARGUMENT if the tag has more than 512 bytes; NS_LLM_FORKED_PROCESS;
 *             NS_LLM_INTERNAL.
 * On failure: nothing is forgotten, and `*out_num` is 0; else it is the number of answers that were, in memory.
 *
 * The caller promises:
 * `tag` points to `tag_size` readable bytes, `out_num` to a writable `size_t`.
 */
ns_llm_status ns_llm_responses_invalidate(ns_llm_engine engine,
                                          const char *tag,
                                          size_t tag_size,
                                          size_t *out_num);

/**
 * Forgets every kept answer, and does not keep those that are just being computed: also in files, and for all nodes in a
 * shared store, as ns_llm_responses_invalidate() does.
 *
 * Threads:    any, also inside a callback.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE (also for 0); NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 */
ns_llm_status ns_llm_responses_clear(ns_llm_engine engine);

/*
 * Events --------------------------------------------------------------------------------------------------------
 *
 * What a request has to say arrives as a sequence of events. A generation tells any number of DELTA, one FINISHED for
 * each choice, and as the very last either DONE or FAILED; an embedding request tells one EMBEDDING for each input, in any
 * order, and the same last event. Whatever happens to an accepted request - it ends, it is cancelled, its engine is
 * freed - there is exactly one last event.
 *
 * There are two ways to hear them, and each request has one of the two, chosen when it is submitted: a callback, which
 * the engine calls on a thread of its own; or ns_llm_request_next(), with which the program fetches events on a thread of
 * its choice. Either way a slow reader loses nothing and slows down nobody but itself: what it has not heard yet waits,
 * merged into one DELTA a choice.
 */

/** What an event tells. Ignore kinds that you do not know. */
typedef enum ns_llm_event_kind {
    /**
     * New tokens of one choice, and the text that they complete: `choice`, `text`, `token_ids`, and `logprobs` if they
     * were asked for.
     */
    NS_LLM_EVENT_DELTA = 1,
    /** One choice has ended: `choice`, `finish_reason`. */
    NS_LLM_EVENT_FINISHED = 2,
    /** The last event of a request that ended by itself: `summary`, and `prompt_logprobs` if they were asked for. */
    NS_LLM_EVENT_DONE = 3,
    /** The last event of any other: `status` says why, `text` says it in a sentence. */
    NS_LLM_EVENT_FAILED = 4,
    /** The vector of one input of an embedding request: `input`, `embedding`, `num_input_tokens`, `is_truncated`. */
    NS_LLM_EVENT_EMBEDDING = 5,
} ns_llm_event_kind;

/** Why a choice ended. */
typedef enum ns_llm_finish_reason {
    /** It has not, or for a reason that is newer than this header. */
    NS_LLM_FINISH_OTHER = 0,
    /** A stop text, a stop token or one of the model's end tokens. */
    NS_LLM_FINISH_STOP = 1,
    /** `max_tokens`, or the end of the context. */
    NS_LLM_FINISH_LENGTH = 2,
} ns_llm_finish_reason;

/** Why the prefix cache did not have all of a prompt. */
typedef enum ns_llm_prefix_miss {
    /** It had all that can be found: all full blocks but what the last token needs. */
    NS_LLM_PREFIX_MISS_NONE = 0,
    /** Nobody has computed it in this namespace, as far as is known. What other namespaces have computed is not told. */
    NS_LLM_PREFIX_MISS_NEVER_SEEN = 1,
    /** It was there; the KV pool gave it up for others. */
    NS_LLM_PREFIX_MISS_EVICTED_FROM_POOL = 2,
    /** It was there; host memory gave it up for others. */
    NS_LLM_PREFIX_MISS_EVICTED_FROM_HOST = 3,
    /** It was there; the disk gave it up for others. */
    NS_LLM_PREFIX_MISS_EVICTED_FROM_DISK = 4,
    /** It was there; the store that nodes share gave it up for others. */
    NS_LLM_PREFIX_MISS_EVICTED_FROM_REMOTE = 5,
    /** It is there; computing it was estimated to be faster than fetching it. */
    NS_LLM_PREFIX_MISS_SLOWER = 6,
    /** It is there; the place failed or rests after failures, or it led to a failure and is not used again. */
    NS_LLM_PREFIX_MISS_FAULT = 7,
    /** It was being fetched; nothing arrived for too long. */
    NS_LLM_PREFIX_MISS_GAVE_UP = 8,
    /** The request does not read the cache, or not so far, or the engine has none. */
    NS_LLM_PREFIX_MISS_DISABLED = 9,
    /** A reason that is newer than this header. */
    NS_LLM_PREFIX_MISS_OTHER = 10,
} ns_llm_prefix_miss;

/** A request: an id, not a pointer. 0 is never a request. */
typedef uint64_t ns_llm_request;

/** Counts and times of a request that ended by itself. Times are milliseconds. */
typedef struct ns_llm_summary {
    /** `sizeof(ns_llm_summary)`: set by whoever owns the struct. */
    size_t struct_size;
    /** Tokens of the prompt, or of all inputs of an embedding request. */
    uint64_t prompt_tokens;
    /** Tokens of all choices, stop tokens included. */
    uint64_t completion_tokens;
    /** Tokens of the prompt that were not computed: found in the prefix cache, or the whole answer was kept. */
    uint64_t cached_tokens;
    /** How often the request lost its KV to others and was computed again (its tokens are the same). */
    uint64_t preemptions;
    /** The seed that was used (of an embedding request: 0). Give it again to get the same answer. */
    uint64_t seed;
    /** From submission to the first step that computed the request. */
    double queue_ms;
    /** From that step to the first token. */
    double prompt_ms;
    /** From submission to the first token. */
    double first_token_ms;
    /** From the first token to the last. */
    double decode_ms;
    /** From submission to the end. */
    double total_ms;
    /** Of `cached_tokens`, those whose KV was in the pool. */
    uint64_t cached_pool_tokens;
    /** Those that the pool had given away and host memory had kept. */
    uint64_t cached_host_tokens;
    /** Those that were read from disk. */
    uint64_t cached_disk_tokens;
    /** Those that came from a store that nodes share. */
    uint64_t cached_remote_tokens;
    /** Why the rest of the prompt was not found: a value of `ns_llm_prefix_miss`. Ignore values that you do not know. */
    uint64_t prefix_miss;
    /** Position of the first prompt token that was not found: the first of a block. */
    uint64_t prefix_miss_token;
    /** 1 if the answer was kept from an earlier request and nothing was computed, else 0. */
    uint64_t from_response_cache;
} ns_llm_summary;

/** A token and the natural logarithm of its probability under the model: before temperature, penalties and truncation. */
typedef struct ns_llm_logprob {
    /** The token. */
    uint32_t token_id;
    /** Its log-probability: 0 or less. */
    float logprob;
} ns_llm_logprob;

/** How likely one token was, and which ones were likeliest in its place. */
typedef struct ns_llm_token_logprobs {
    /** The token that was chosen; in a prompt, the one that stands there. */
    struct ns_llm_logprob chosen;
    /** The likeliest, best first. */
    const struct ns_llm_logprob *top;
    /** Number of `top`: as many as were asked for. */
    size_t num_top;
} ns_llm_token_logprobs;

/**
 * One event. Fields that its kind does not name are zero, NULL or empty; `text.data` is never NULL. What it points to is
 * the library's: in a callback it is valid until the callback returns, after ns_llm_request_next() until the next call of
 * that for the same request, or until the request is freed. Copy what you keep.
 */
typedef struct ns_llm_event {
    /**
     * `sizeof(ns_llm_event)`: set by whoever owns the struct. In a callback that is the library: fields beyond this size
     * are newer than the library that is running.
     */
    size_t struct_size;
    /** The request: the value that ns_llm_generate() gives, also if that has not returned yet. */
    ns_llm_request request;
    /** What this event tells. */
    enum ns_llm_event_kind kind;
    /** Which choice, from 0. */
    uint32_t choice;
    /**
     * New text of the choice, or the sentence about a failure. Whole UTF-8 characters, never a part of a stop text;
     * what may still become either is held back, so the text can be empty and can lag behind the tokens.
     */
    ns_llm_text text;
    /** New tokens of the choice. */
    const uint32_t *token_ids;
    /** Number of `token_ids`. */
    size_t num_token_ids;
    /** One for each of `token_ids`, if `logprobs` was set in the request. */
    const struct ns_llm_token_logprobs *logprobs;
    /** Number of `logprobs`: 0, or `num_token_ids`. */
    size_t num_logprobs;
    /** Why the choice ended. */
    enum ns_llm_finish_reason finish_reason;
    /** Why the request failed. */
    ns_llm_status status;
    /** Counts and times, or NULL. */
    const struct ns_llm_summary *summary;
    /** One for each token of the prompt from the second on, if NS_LLM_REQUEST_PROMPT_LOGPROBS was set. */
    const struct ns_llm_token_logprobs *prompt_logprobs;
    /** Number of `prompt_logprobs`. */
    size_t num_prompt_logprobs;
    /** The vector of an input. */
    const float *embedding;
    /** Number of `embedding`. */
    size_t num_dimensions;
    /** Which input, from 0. */
    size_t input;
    /** Tokens that the vector was computed from. */
    size_t num_input_tokens;
    /** 1 if the input was longer and lost its end, else 0. */
    uint64_t is_truncated;
} ns_llm_event;

/**
 * Receives the events of a request, on the engine's callback thread: one thread per engine, made by
 * ns_llm_engine_open(), with a stack of 2 MiB. Events of one engine never overlap, so a callback that blocks holds up
 * the events of all its requests (but not their computing).
 *
 * Returns `true` to go on, `false` to cancel the request: then only its last event still comes. What the last event
 * returns is ignored. A callback may call any function of this header, freeing its own request and engine included,
 * except those that say NS_LLM_IN_CALLBACK. It must return: no longjmp, no C++ exception.
 */
typedef bool (*ns_llm_event_callback)(const struct ns_llm_event *event, void *user_data);

/*
 * Request -------------------------------------------------------------------------------------------------------
 *
 * A request is one prompt and its answer. Submitting one returns at once; its events come to a callback, or are fetched
 * with ns_llm_request_next(). Each accepted request has a handle that the program frees.
 */

/** A bit of `ns_llm_request_params.set`: `max_tokens` holds a value. */
#define NS_LLM_SET_MAX_TOKENS 1

/** A bit of `ns_llm_request_params.set`: `seed` holds a value. */
#define NS_LLM_SET_SEED 2

/** A bit of `ns_llm_request_params.set`: `temperature` holds a value. */
#define NS_LLM_SET_TEMPERATURE 4

/** A bit of `ns_llm_request_params.set`: `top_k` holds a value. */
#define NS_LLM_SET_TOP_K 8

/** A bit of `ns_llm_request_params.set`: `top_p` holds a value. */
#define NS_LLM_SET_TOP_P 16

/** A bit of `ns_llm_request_params.set`: `min_p` holds a value. */
#define NS_LLM_SET_MIN_P 32

/** A bit of `ns_llm_request_params.set`: `repetition_penalty` holds a value. */
#define NS_LLM_SET_REPETITION_PENALTY 64

/** A bit of `ns_llm_request_params.set`: `presence_penalty` holds a value. */
#define NS_LLM_SET_PRESENCE_PENALTY 128

/** A bit of `ns_llm_request_params.set`: `frequency_penalty` holds a value. */
#define NS_LLM_SET_FREQUENCY_PENALTY 256

/** A bit of `ns_llm_request_params.set`: `logprobs` holds a value. */
#define NS_LLM_SET_LOGPROBS 512

/** A flag of `ns_llm_request_params`: the model's end tokens do not end the answer (for measurements). */
#define NS_LLM_REQUEST_IGNORE_EOS 1

/** A flag of `ns_llm_request_params`: KV of earlier prompts is not used for this one, nor its own for others. */
#define NS_LLM_REQUEST_NO_PREFIX_CACHE 2

/** A flag of `ns_llm_request_params`: the last event brings the logprob of each token of the prompt from the second on. */
#define NS_LLM_REQUEST_PROMPT_LOGPROBS 4

/**
 * A flag of `ns_llm_request_params`: ns_llm_generate() does not wait until the request is admitted, so it never blocks;
 * what it could not find out is told by NS_LLM_EVENT_FAILED. For event loops.
 */
#define NS_LLM_REQUEST_DO_NOT_WAIT 8

/** A flag of `ns_llm_request_params`: KV of earlier prompts is used for this one, but its own is not kept for others. */
#define NS_LLM_REQUEST_READ_PREFIX_CACHE_ONLY 16

/** For functions that wait: no limit. */
#define NS_LLM_FOREVER UINT64_MAX

/** Who goes first. Waiting raises a request's rank, so none waits for ever. */
typedef enum ns_llm_priority {
    /** The default. */
    NS_LLM_PRIORITY_NORMAL = 0,
    /** Before the others. */
    NS_LLM_PRIORITY_HIGH = 1,
    /** When there is room. */
    NS_LLM_PRIORITY_BACKGROUND = 2,
} ns_llm_priority;

/** What part the engine's response cache has in a request. */
typedef enum ns_llm_response_cache {
    /** As READ_WRITE where the answer is the same each time (greedy, or with a seed), else OFF. */
    NS_LLM_RESPONSE_CACHE_AUTO = 0,
    /** None. */
    NS_LLM_RESPONSE_CACHE_OFF = 1,
    /** A kept answer is given; a computed one is not kept. */
    NS_LLM_RESPONSE_CACHE_READ = 2,
    /**
     * A kept answer is given, and a computed one is kept; also if it is drawn without a seed, so that all such requests of a
     * namespace get the same.
     */
    NS_LLM_RESPONSE_CACHE_READ_WRITE = 3,
} ns_llm_response_cache;

/** One turn of a conversation. */
typedef struct ns_llm_message {
    /** "system", "user", "assistant", or what the model's chat template knows. */
    ns_llm_text role;
    /** What was said. Names of special tokens in here are plain text. */
    ns_llm_text content;
} ns_llm_message;

/** Added to the logit of one token. */
typedef struct ns_llm_logit_bias {
    /** The token. */
    uint32_t token_id;
    /** -100 to 100. */
    float bias;
} ns_llm_logit_bias;

/**
 * What to generate. Zero is the default of every field but `struct_size` and the prompt. Where zero is also a value of
 * its own, as in temperature 0, the field has a bit in `set`: with the bit the field is the value, also if it is zero;
 * without it the field must be zero, and the model's generation_config.json decides, or else the neutral value.
 */
typedef struct ns_llm_request_params {
    /** `sizeof(ns_llm_request_params)`. */
    size_t struct_size;
    /** Which of the fields that have a bit hold a value: any of the `NS_LLM_SET_` bits. */
    uint64_t set;
    /**
     * What to continue: a text, in which names of special tokens count as special tokens. Exactly one of
     * `prompt.data`, `prompt_token_ids` and `messages` is not NULL. At most 4 MiB.
     */
    ns_llm_text prompt;
    /** What to continue: tokens. */
    const uint32_t *prompt_token_ids;
    /** Number of `prompt_token_ids`. */
    size_t num_prompt_token_ids;
    /** What to answer: a conversation, rendered by the model's chat template. */
    const struct ns_llm_message *messages;
    /** Number of `messages`; at most 4096, and 4 MiB in all. */
    size_t num_messages;
    /** Most new tokens of each choice. Unset: 64. 0 computes the prompt only. */
    size_t max_tokens;
    /** Key of the draws. Unset: drawn, and reported in the summary. */
    uint64_t seed;
    /** 0 is greedy: the most likely token, always. 0 to 100. */
    float temperature;
    /** Keep the `top_k` most likely tokens; 0 keeps all. */
    uint32_t top_k;
    /** Keep the most likely tokens whose probabilities add up to this. Above 0, to 1. */
    float top_p;
    /** Keep tokens that have at least this share of the best one's probability. 0 to 1. */
    float min_p;
    /**
     * Divides positive and multiplies negative logits of tokens seen in prompt or answer. Above 0, to 100; 1 is
     * neutral.
     */
    float repetition_penalty;
    /** Taken from the logit of each token seen in the answer. -2 to 2. */
    float presence_penalty;
    /** Taken from the logit of each token, as often as it was seen in the answer. -2 to 2. */
    float frequency_penalty;
    /** A value of `ns_llm_priority`. */
    uint32_t priority;
    /** Number of choices, 1 to 8. 0: 1. */
    uint32_t n;
    /** Any of the `NS_LLM_REQUEST_` flags. */
    uint32_t flags;
    /**
     * Limit from submission to the end, milliseconds, after which the request fails with NS_LLM_DEADLINE_EXCEEDED. 0:
     * none.
     */
    uint64_t timeout_ms;
    /** Texts that end a choice; they are not part of the answer. */
    const ns_llm_text *stop;
    /** Number of `stop`; at most 16, of at most 256 bytes each. */
    size_t num_stop;
    /** Tokens that end a choice, besides the model's own end tokens. */
    const uint32_t *stop_token_ids;
    /** Number of `stop_token_ids`; at most 64. */
    size_t num_stop_token_ids;
    /** Biases of tokens. */
    const struct ns_llm_logit_bias *logit_bias;
    /** Number of `logit_bias`; at most 1024. */
    size_t num_logit_bias;
    /**
     * Requests share KV of common prefixes only within one namespace; what stands before its first line break is its owner, by
     * whom `kv_namespace_share` counts. NULL: the namespace of the engine. At most 512
     * bytes.
     */
    ns_llm_text cache_namespace;
    /**
     * How many of the likeliest tokens to report in each new token's place, 0 to 20; with 0, the chosen one's logprob
     * alone. Unset: no logprobs.
     */
    size_t logprobs;
    /** A value of `ns_llm_response_cache`. */
    uint32_t response_cache;
    /** 0. */
    uint32_t reserved;
    /** How long the kept answer is given, milliseconds. 0: as the engine's parameters say. */
    uint64_t response_ttl_ms;
    /** Names under which the kept answer can be forgotten: see ns_llm_responses_invalidate(). */
    const ns_llm_text *response_tags;
    /** Number of `response_tags`; at most 16, of at most 512 bytes each. */
    size_t num_response_tags;
} ns_llm_request_params;

/**
 * Submits one request. Returns when it is checked, turned into tokens and queued, so what is wrong with it is said
 * here, unless NS_LLM_REQUEST_DO_NOT_WAIT is among its flags. With a `callback` the answer arrives there, the first events
 * perhaps before this function has returned. Without, fetch it with ns_llm_request_next().
 *
 * Ownership:  `params` and what it points to are copied. `user_data` is the program's, and must stay valid until the
 *             last event has returned. `*out_request` is a new handle; free it with ns_llm_request_free(), before or
 *             after the engine, as you like.
 * Threads:    any, also concurrently on one engine, also inside a callback.
 * NULL:       `callback` and `user_data` may be NULL; `params` and `out_request` must not be.
 * Returns:    NS_LLM_OK; NS_LLM_OVERLOADED (try later); NS_LLM_PROMPT_TOO_LONG; NS_LLM_EXCEEDS_KV_POOL;
 *             NS_LLM_DEADLINE_EXCEEDED; NS_LLM_TEMPLATE, NS_LLM_NO_CHAT_TEMPLATE or NS_LLM_TOKENIZER about the prompt; NS_LLM_NOT_SUPPORTED if the
 *             model makes vectors only; NS_LLM_NULL_ARGUMENT, NS_LLM_MISALIGNED_POINTER, NS_LLM_INVALID_UTF8,
 *             NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the parameters; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if
 *             the engine is being freed; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_request` is 0, and `callback` was not and will not be called.
 *
 * The caller promises:
 * `params` points to a `size_t` and to as many readable bytes as that says, and its texts and arrays are readable.
 * `callback` may be called with `user_data` on the engine's callback thread until the last event has returned.
 * `out_request` points to a writable `ns_llm_request`.
 */
ns_llm_status ns_llm_generate(ns_llm_engine engine,
                              const struct ns_llm_request_params *params,
                              ns_llm_event_callback callback,
                              void *user_data,
                              ns_llm_request *out_request);

/**
 * Fetches the next event of a request that was submitted without a callback, and waits for it if need be. A FAILED event
 * is fetched like any other: the status says how fetching went, not how the request did. After the last event there is
 * NS_LLM_ENDED for ever, so a program reads until this returns anything but NS_LLM_OK.
 *
 * Ownership:  `*out_event` is the caller's; what it points to is the library's, and valid until the next call for the same
 *             request, whatever that returns, or until the request is freed.
 * Threads:    any, also inside a callback, which then holds up the other events of its engine; one at a time for one
 *             request. If another thread frees the request meanwhile, NS_LLM_BAD_HANDLE.
 * NULL:       `out_event` must not be NULL, and its `struct_size` must be set.
 * Returns:    NS_LLM_OK; NS_LLM_ENDED; NS_LLM_TIMEOUT if nothing came within `timeout_ms` (NS_LLM_FOREVER: wait on; 0:
 *             just ask); NS_LLM_BUSY if another thread is in this function for the same request; NS_LLM_WRONG_READER if
 *             the request has a callback; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
 *             NS_LLM_INVALID_ARGUMENT about `struct_size`; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_event` is unchanged, and no event is lost.
 *
 * The caller promises:
 * `out_event` points to a `size_t` and to as many writable bytes as that says.
 */
ns_llm_status ns_llm_request_next(ns_llm_request request,
                                  uint64_t timeout_ms,
                                  ns_llm_event *out_event);

/**
 * Waits until the last event of a request has been told to its callback, and says how it ended.
 *
 * Ownership:  `*out_summary` is the caller's.
 * Threads:    any but a callback, also several for one request.
 * NULL:       `out_summary` may be NULL; otherwise its `struct_size` must be set.
 * Returns:    how the request ended: NS_LLM_OK, or the `status` of its NS_LLM_EVENT_FAILED, such as NS_LLM_CANCELLED;
 *             NS_LLM_TIMEOUT if it has not ended within `timeout_ms` (NS_LLM_FOREVER: wait on; 0: just ask);
 *             NS_LLM_IN_CALLBACK inside a callback; NS_LLM_WRONG_READER if the request has no callback;
 *             NS_LLM_BAD_HANDLE; NS_LLM_MISALIGNED_POINTER; NS_LLM_INVALID_ARGUMENT about `struct_size`;
 *             NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_summary` is unchanged.
 *
 * The caller promises:
 * `out_summary` is NULL, or points to a `size_t` and to as many writable bytes as that says.
 */
ns_llm_status ns_llm_request_wait(ns_llm_request request, uint64_t timeout_ms, ns_llm_summary *out_summary);

/**
 * Asks a request to end. Returns at once; the last event comes within about one step, with NS_LLM_CANCELLED unless the
 * request had ended already. Cancelling again, or after the end, changes nothing.
 *
 * Threads:    any, also inside a callback.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE (also for 0); NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 */
ns_llm_status ns_llm_request_cancel(ns_llm_request request);

/**
 * Cancels a request that has not ended, and frees its handle.
 *
 * If it has a callback: outside of callbacks this returns when the last event has been told, so `user_data` is the
 * program's own again; this takes about one step, and as long as the callback that is running, so do not hold a lock that
 * the callback takes. Inside a callback it returns at once, and the last event comes after that callback has returned.
 * Without a callback it returns at once, and what the last event pointed to is gone.
 *
 * Ownership:  `request` is dead afterwards.
 * Threads:    any, also inside a callback. Other threads that are in ns_llm_request_wait() go on waiting, for its end;
 *             one that is in ns_llm_request_next() gets NS_LLM_BAD_HANDLE.
 * NULL:       0 is allowed and does nothing.
 * Returns:    NS_LLM_OK; NS_LLM_BAD_HANDLE if it is not a request or was freed before; NS_LLM_FORKED_PROCESS;
 *             NS_LLM_INTERNAL.
 * On failure: nothing changed.
 */
ns_llm_status ns_llm_request_free(ns_llm_request request);

/*
 * Embeddings ----------------------------------------------------------------------------------------------------
 *
 * An embedding is the vector of a text: texts of like meaning have vectors that point the same way. Any model makes them:
 * one that was made for it, or one that writes, whose final states are averaged. Each input of a request is computed for
 * itself: what else is in the request changes no bit of its vector.
 */

/**
 * A flag of `ns_llm_embedding_params`: an input that is longer than the model's `max_embedding_tokens` is refused with
 * NS_LLM_PROMPT_TOO_LONG, and not cut.
 */
#define NS_LLM_EMBEDDING_NO_TRUNCATE 1

/** A flag of `ns_llm_embedding_params`: vectors keep the length that the model gives them, which is else 1 (L2). */
#define NS_LLM_EMBEDDING_NO_NORMALIZE 2

/** One input: exactly one of `text.data` and `token_ids` is not NULL. */
typedef struct ns_llm_embedding_input {
    /** A text, turned into tokens as the model's configuration says. */
    ns_llm_text text;
    /** Tokens, taken as they are. */
    const uint32_t *token_ids;
    /** Number of `token_ids`. */
    size_t num_token_ids;
} ns_llm_embedding_input;

/** What to turn into vectors. Zero is the default of every field but `struct_size` and the inputs. */
typedef struct ns_llm_embedding_params {
    /** `sizeof(ns_llm_embedding_params)`. */
    size_t struct_size;
    /** The inputs. */
    const struct ns_llm_embedding_input *inputs;
    /** Number of `inputs`, 1 to 2048; 4 MiB in all. */
    size_t num_inputs;
    /** How many of a vector's leading elements to keep, for models that were trained for it. 0: all. */
    size_t dimensions;
    /** A value of `ns_llm_priority`. */
    uint32_t priority;
    /** Any of the `NS_LLM_EMBEDDING_` flags. */
    uint32_t flags;
    /**
     * Limit from submission to the end, milliseconds, after which the request fails with NS_LLM_DEADLINE_EXCEEDED. 0:
     * none.
     */
    uint64_t timeout_ms;
} ns_llm_embedding_params;

/**
 * Turns inputs into vectors and waits for all of them. The vectors lie in `buffer` one behind the other, in the order of
 * the inputs, each of `dimensions` numbers, or of the model's `embedding_dimensions` (ns_llm_engine_info()). To stop it
 * from another thread, or to hear of an input that was cut, use ns_llm_submit_embedding().
 *
 * Ownership:  `params` and what it points to are read until this function returns; `buffer` and `*out_summary` are the
 *             caller's.
 * Threads:    any, also concurrently, also inside a callback, which then holds up the other events of its engine.
 * NULL:       `buffer` may be NULL if `capacity` is 0, to ask for the number of floats; `out_summary` may be NULL, else
 *             its `struct_size` must be set; `params` and `out_num` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_BUFFER_TOO_SMALL, before anything is computed; NS_LLM_OVERLOADED (try later);
 *             NS_LLM_PROMPT_TOO_LONG or NS_LLM_TOKENIZER about an input; NS_LLM_DEADLINE_EXCEEDED;
 *             NS_LLM_NON_FINITE_EMBEDDING; NS_LLM_NULL_ARGUMENT, NS_LLM_MISALIGNED_POINTER, NS_LLM_INVALID_UTF8,
 *             NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the parameters; NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the
 *             engine is being freed; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `buffer` and `*out_summary` are unchanged. `*out_num` is the number of floats that are needed after
 *             NS_LLM_BUFFER_TOO_SMALL, else 0.
 *
 * The caller promises:
 * `params` points to a `size_t` and to as many readable bytes as that says, and its inputs are readable. `buffer` points
 * to `capacity` writable floats, `out_num` to a writable `size_t`. `out_summary` is NULL, or points to a `size_t` and to
 * as many writable bytes as that says.
 */
ns_llm_status ns_llm_embed(ns_llm_engine engine,
                           const struct ns_llm_embedding_params *params,
                           float *buffer,
                           size_t capacity,
                           size_t *out_num,
                           ns_llm_summary *out_summary);

/**
 * Submits inputs to be turned into vectors, and returns at once: it never waits, so what is wrong with the text of an
 * input is told by NS_LLM_EVENT_FAILED. Each vector comes as an NS_LLM_EVENT_EMBEDDING, to the `callback` or to
 * ns_llm_request_next().
 *
 * Ownership:  `params` and what it points to are copied. `user_data` is the program's, and must stay valid until the
 *             last event has returned. `*out_request` is a new handle; free it with ns_llm_request_free().
 * Threads:    any, also concurrently on one engine, also inside a callback.
 * NULL:       `callback` and `user_data` may be NULL; `params` and `out_request` must not be.
 * Returns:    NS_LLM_OK; NS_LLM_OVERLOADED (try later); NS_LLM_NULL_ARGUMENT, NS_LLM_MISALIGNED_POINTER,
 *             NS_LLM_INVALID_UTF8, NS_LLM_INVALID_ARGUMENT or NS_LLM_UNSUPPORTED about the parameters;
 *             NS_LLM_BAD_HANDLE; NS_LLM_CLOSED if the engine is being freed; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `*out_request` is 0, and `callback` was not and will not be called.
 *
 * The caller promises:
 * As ns_llm_generate(), for `ns_llm_embedding_params`.
 */
ns_llm_status ns_llm_submit_embedding(ns_llm_engine engine,
                                      const struct ns_llm_embedding_params *params,
                                      ns_llm_event_callback callback,
                                      void *user_data,
                                      ns_llm_request *out_request);

/*
 * Tokenizer -----------------------------------------------------------------------------------------------------
 *
 * Text to token ids and back, with the tokenizer of an engine's model.
 */

/** A flag of ns_llm_tokenize(): adds the tokens that the model's configuration puts around a prompt. */
#define NS_LLM_TOKENIZE_ADD_SPECIAL 1

/**
 * Writes the tokens of a text. Names of special tokens in it become special tokens.
 *
 * Ownership:  `text` and `buffer` are the caller's.
 * Threads:    any, also concurrently, also inside a callback.
 * NULL:       `text` may be NULL if `text_size` is 0, `buffer` if `capacity` is 0 (to ask for the number of tokens);
 *             `out_num` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_BUFFER_TOO_SMALL; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
 *             NS_LLM_INVALID_UTF8; NS_LLM_INVALID_ARGUMENT if the text has more than 4 MiB; NS_LLM_UNSUPPORTED about
 *             `flags`; NS_LLM_TOKENIZER; NS_LLM_CLOSED; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `buffer` is unchanged. `*out_num` is the number of tokens after NS_LLM_BUFFER_TOO_SMALL, else 0.
 *
 * The caller promises:
 * `text` points to `text_size` readable bytes, `buffer` to `capacity` writable values and `out_num` to a writable
 * `size_t`.
 */
ns_llm_status ns_llm_tokenize(ns_llm_engine engine,
                              const char *text,
                              size_t text_size,
                              uint32_t flags,
                              uint32_t *buffer,
                              size_t capacity,
                              size_t *out_num);

/**
 * Writes the text of tokens. Bytes that are not UTF-8 become U+FFFD.
 *
 * Ownership:  `token_ids` and `buffer` are the caller's; the text has no NUL at its end.
 * Threads:    any, also concurrently, also inside a callback.
 * NULL:       `token_ids` may be NULL if `num_token_ids` is 0, `buffer` if `capacity` is 0 (to ask for the size);
 *             `out_size` must not be NULL.
 * Returns:    NS_LLM_OK; NS_LLM_BUFFER_TOO_SMALL; NS_LLM_BAD_HANDLE; NS_LLM_NULL_ARGUMENT; NS_LLM_MISALIGNED_POINTER;
 *             NS_LLM_INVALID_ARGUMENT if there are more than 1048576 tokens or one is not in the vocabulary;
 *             NS_LLM_TOKENIZER; NS_LLM_CLOSED; NS_LLM_FORKED_PROCESS; NS_LLM_INTERNAL.
 * On failure: `buffer` is unchanged. `*out_size` is the size that is needed after NS_LLM_BUFFER_TOO_SMALL, else 0.
 *
 * The caller promises:
 * `token_ids` points to `num_token_ids` readable values, `buffer` to `capacity` writable bytes and `out_size` to a
 * writable `size_t`.
 */
ns_llm_status ns_llm_detokenize(ns_llm_engine engine,
                                const uint32_t *token_ids,
                                size_t num_token_ids,
                                char *buffer,
                                size_t capacity,
                                size_t *out_size);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* NS_LLM_H */

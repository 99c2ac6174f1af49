//! Every limit and every default, with its unit, its reason and what happens beyond it.

/// Tokens in one KV block.
pub const DEFAULT_BLOCK_TOKENS: usize = 16;
/// Tokens one step may compute while no sequence is decoding.
pub const DEFAULT_PREFILL_BUDGET_TOKENS: usize = 512;
/// Tokens one step may compute while some sequence is decoding: a long prompt must not stall the streams.
pub const DEFAULT_MIXED_BUDGET_TOKENS: usize = 128;
/// Sequences that may run at once; more wait.
pub const DEFAULT_MAX_RUNNING_SEQUENCES: usize = 64;
/// Steps that a CUDA device keeps captured: numbers of rows (up to 9) times lengths of contexts, of which a few are in
/// use at a time.
pub const DEFAULT_MAX_CUDA_GRAPHS: usize = 32;
/// Most that can be asked for.
pub const MAX_CUDA_GRAPHS: usize = 256;
/// Steps of waiting that lift a class of waiting sequences by one rank.
pub const AGE_STEPS: u64 = 256;
/// Share of the available memory that the KV pool takes by default.
pub const DEFAULT_KV_MEMORY_SHARE: f64 = 0.25;
/// Upper bound of the default KV pool.
pub const DEFAULT_KV_MAX_BYTES: u64 = 2 << 30;
/// The default pool holds at least one sequence of this many tokens.
pub const DEFAULT_KV_MIN_TOKENS: usize = 4096;

/// Longest segment file of the disk tier, bytes: the disk tier forgets a whole segment at a time.
pub const DISK_SEGMENT_BYTES: u64 = 256 << 20;
/// Segments that the disk tier's budget is divided into at least: what one eviction forgets is a small share of all.
pub const DISK_MIN_SEGMENTS: u64 = 16;
/// Segment files of one disk tier; beyond it the least recently used one goes.
pub const MAX_DISK_SEGMENTS: usize = 4_096;
/// Blocks that one disk tier remembers (some 250 bytes of memory each); beyond it the least recently used segment goes.
pub const MAX_DISK_ENTRIES: usize = 1 << 20;
/// Blocks whose use led to an error and that the tiers therefore avoid; beyond it the oldest is forgotten.
pub const MAX_QUARANTINED_BLOCKS: usize = 1_024;
/// Reads that a tier is given at once: it need not wait for the next step of the model after each block.
pub const MAX_TIER_READS: usize = 16;
/// Blocks that may wait to be written to one tier, bytes, but at least those of one step and [`MIN_WRITE_QUEUE_BLOCKS`] more;
/// what comes beyond is not stored.
pub const WRITE_QUEUE_BYTES: u64 = 64 << 20;
/// Blocks that may wait to be written to one tier beside those of one step, however large they are.
pub const MIN_WRITE_QUEUE_BLOCKS: u64 = 4;
/// How long a sequence waits by default for blocks from a tier that makes no progress, milliseconds; it computes them then.
pub const DEFAULT_KV_LOAD_BUDGET_MS: u64 = 50;
/// Longest such wait, milliseconds.
pub const MAX_KV_LOAD_BUDGET_MS: u64 = 60_000;
/// How long closing waits for blocks that are still to be written, milliseconds.
pub const CLOSE_WRITES_MS: u64 = 5_000;
/// How long [`Engine::flush`](crate::Engine::flush) waits, milliseconds.
pub const FLUSH_MS: u64 = 60_000;
/// Events of a trace that [`Engine::start_trace`](crate::Engine::start_trace) may be asked to keep, some 200 bytes each.
pub const MAX_TRACE_EVENTS: usize = 1_000_000;
/// Bytes of the disk tier when a directory is given without a size.
pub const DEFAULT_KV_DISK_BYTES: u64 = 8 << 30;
/// Blocks of which the KV cache remembers that it had them, and who gave them up: some 2 MiB.
pub const MAX_LOST_BLOCKS: usize = 16_384;
/// Blocks of which an engine remembers that a store that nodes share has them: some 16 MiB. Of more it may store some again.
pub const MAX_REMOTE_KNOWN_BLOCKS: usize = 1 << 17;
/// Owners of whom it is remembered what they have stored in a place that nodes share, some 200 bytes each; of more the one who
/// stored longest ago begins anew.
pub const MAX_KNOWN_OWNERS: usize = 16_384;
/// Things that a tier was to have and has not, of which it is remembered which they are, until somebody asks: some 2 MiB. More
/// are only counted.
pub const MAX_UNSTORED: usize = 16_384;
/// Most bytes that a tier of the KV cache may be told to keep.
pub const MAX_KV_TIER_BYTES: u64 = 1 << 50;
/// Blocks that leave the pool and are read back together: more wait for the device once more.
pub const MAX_BLOCKS_READ_TOGETHER: usize = 16;
/// Smallest step that tells how fast prompts are computed, tokens.
pub const MIN_MEASURED_PREFILL_TOKENS: usize = 32;
/// Segment files that are held open at once.
pub const MAX_OPEN_SEGMENTS: usize = 64;
/// How long one call to the remote tier may take, connecting included, milliseconds.
pub const DEFAULT_REMOTE_TIMEOUT_MS: u64 = 500;
/// The longest that may be chosen for it.
pub const MAX_REMOTE_TIMEOUT_MS: u64 = 10_000;
/// How long the remote tier keeps a block that nobody stores again, seconds (one day).
pub const DEFAULT_REMOTE_TTL_S: u64 = 86_400;
/// The longest that may be chosen for it (thirty days).
pub const MAX_REMOTE_TTL_S: u64 = 30 * 86_400;
/// What all names in the remote tier begin with.
pub const DEFAULT_REMOTE_PREFIX: &str = "ns-llm";
/// Longest beginning that may be chosen for them, bytes.
pub const MAX_REMOTE_PREFIX_BYTES: usize = 64;
/// Shortest secret that records in the remote tier may be authenticated with, bytes.
pub const MIN_REMOTE_SECRET_BYTES: usize = 16;
/// Longest one.
pub const MAX_REMOTE_SECRET_BYTES: usize = 1_024;
/// Longest URL of a remote tier, bytes.
pub const MAX_REMOTE_URL_BYTES: usize = 2_048;
/// Longest line of a server's reply, bytes: errors are the longest.
pub const MAX_REMOTE_LINE_BYTES: u64 = 4_096;

/// How long the response cache finds an entry unless told otherwise, milliseconds (one hour).
pub const DEFAULT_RESPONSE_TTL_MS: u64 = 3_600_000;
/// Longest time that the response cache may be told to find an entry, milliseconds (one year).
pub const MAX_RESPONSE_TTL_MS: u64 = 31_536_000_000;
/// Largest budget of a response cache, bytes.
pub const MAX_RESPONSE_CACHE_BYTES: u64 = 1 << 40;
/// Largest answer or value in the response cache, bytes; what is larger is not kept.
pub const MAX_RESPONSE_BYTES: usize = 2 << 20;
/// Name of a value that a caller keeps in the response cache, bytes.
pub const MAX_RESPONSE_KEY_BYTES: usize = 4_096;
/// Tags of one entry of the response cache.
pub const MAX_RESPONSE_TAGS: usize = 16;
/// What an entry of the response cache counts for beside its value and tags, bytes: its places in the maps.
pub const RESPONSE_ENTRY_BYTES: u64 = 512;
/// What a tag of an entry counts for beside its text, bytes.
pub const RESPONSE_TAG_BYTES: u64 = 128;
/// Invalidated tags that the response cache remembers; an answer whose computation began before the oldest is not kept.
pub const MAX_REMEMBERED_INVALIDATIONS: usize = 1_024;
/// Requests of which an engine remembers which answer they ask for (some 150 bytes each), so that one that is kept needs
/// neither template nor tokenizer.
pub const MAX_KNOWN_REQUESTS: usize = 1 << 14;

/// Bytes that the files of the response cache take at most, beneath a directory for KV, unless told otherwise.
pub const DEFAULT_RESPONSE_DISK_BYTES: u64 = 256 << 20;
/// Answers that may wait to be written to one tier, bytes; what comes beyond is not written.
pub const RESPONSE_WRITE_QUEUE_BYTES: u64 = 16 << 20;
/// Requests that may wait for one tier's look-up; what comes beyond is computed.
pub const MAX_RESPONSE_LOOKUPS: usize = 256;
/// Tags whose invalidation a tier remembers at once, while it cannot be written or as long as it lies on disk; beyond it
/// everything in the tier is given up.
pub const MAX_RESPONSE_MARKS: usize = 65_536;
/// How far the clocks of those who share answers may be apart, milliseconds: an answer that was stored later than that
/// from now is not used.
pub const MAX_CLOCK_SKEW_MS: u64 = 60_000;

/// Requests that may wait; the next one is [`Error::Overloaded`](crate::Error::Overloaded).
pub const DEFAULT_MAX_WAITING_REQUESTS: usize = 1_000;
/// Prompt tokens that may wait in all, beyond the first request.
pub const MAX_WAITING_TOKENS: usize = 4_000_000;
/// Bytes of prompts that may be between submission and admission, beyond the first request.
pub const MAX_PENDING_PROMPT_BYTES: usize = 64 << 20;
/// Choices of one request.
pub const MAX_CHOICES: usize = 8;
/// Alternatives reported with each token.
pub const MAX_LOGPROBS: usize = 20;
/// Stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Length of one stop string, bytes.
pub const MAX_STOP_STRING_BYTES: usize = 256;
/// Stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 64;
/// Entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1_024;
/// Text of a prompt or of all messages together, bytes.
pub const MAX_PROMPT_BYTES: usize = 4 << 20;
/// Messages of one conversation.
pub const MAX_MESSAGES: usize = 4_096;
/// Inputs of one embedding request.
pub const MAX_EMBEDDING_INPUTS: usize = 2_048;
/// Longest input that a decoder turns into a vector, tokens: it is computed in one step, while nobody else is served.
pub const MAX_DECODER_EMBEDDING_TOKENS: usize = 512;
/// Sequences that one step turns into vectors at most.
pub const MAX_ENCODE_STEP_SEQUENCES: usize = 64;
/// Namespace strings, bytes.
pub const MAX_NAME_BYTES: usize = 512;
/// New tokens of one request, before the context bounds them.
pub const MAX_NEW_TOKENS: usize = 1 << 20;
/// New tokens when the request does not say: a prompt alone must not run to the end of the context.
pub const DEFAULT_MAX_TOKENS: usize = 64;
/// Longest timeout of a request, milliseconds (one day).
pub const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// Output of a chat template, bytes per token of the context. Tokens of plain English have four; those of long words and
/// indented code more, and a prompt that has too many tokens is to be told so by their number.
pub const TEMPLATE_OUTPUT_BYTES_PER_CONTEXT_TOKEN: usize = 32;
/// Wall-clock limit of one template rendering, milliseconds. A rendering takes well under one; the rest is room for a
/// machine that is busy with other things.
pub const TEMPLATE_TIME_MS: u64 = 250;
/// Instructions one template rendering may take.
pub const TEMPLATE_FUEL: u64 = 2_000_000;
/// Source text of a chat template, bytes.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Header of a safetensors file, bytes (the format's own cap).
pub const MAX_SAFETENSORS_HEADER_BYTES: u64 = 100_000_000;
/// Header of a GGUF file (metadata, vocabulary, tensor infos), bytes: several times that of the largest vocabularies.
pub const MAX_GGUF_HEADER_BYTES: u64 = 64 << 20;
/// Keys in the metadata of a GGUF file.
pub const MAX_GGUF_KEYS: u64 = 1 << 16;
/// Name of a key or tensor of a GGUF file, bytes (the format's own cap for keys).
pub const MAX_GGUF_NAME_BYTES: u64 = (1 << 16) - 1;
/// Tensors in one GGUF file.
pub const MAX_GGUF_TENSORS: u64 = 100_000;
/// Axes of a tensor in a GGUF file (the format's own cap).
pub const MAX_GGUF_AXES: u32 = 4;
/// Text of a token of a SentencePiece vocabulary, bytes: the longest in use are rows of some 30 spaces.
pub const MAX_PIECE_BYTES: usize = 256;
/// Pairs of tokens that become one, where a file has none and each cut of each token may be one; the largest vocabularies in
/// use have some 600,000.
pub const MAX_MERGES: usize = 1 << 22;
/// Token ids of one vocabulary; the largest in use have some 260,000.
pub const MAX_TOKEN_IDS: u32 = 1 << 22;
/// JSON files of a model folder (configuration, index, tokenizer), bytes.
pub const MAX_JSON_BYTES: u64 = 256 << 20;
/// JSON files that are kept as a tree while they are read (`config.json`, `generation_config.json`,
/// `tokenizer_config.json`, the index of shards), bytes. A tree takes up to sixteen times its text.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Files a checkpoint may be split into: each is held open while the model loads.
pub const MAX_SHARDS: usize = 512;
/// Axes of a tensor.
pub const MAX_TENSOR_AXES: usize = 8;
/// End tokens a model may name.
pub const MAX_EOS_TOKENS: usize = 64;
/// Compute threads.
pub const MAX_THREADS: usize = 256;

/// Blocks are whole vectors of keys: their tokens are a multiple of this.
pub const BLOCK_TOKENS_MULTIPLE: usize = 16;
/// Largest block, tokens.
pub const MAX_BLOCK_TOKENS: usize = 1_024;
/// Most sequences that an engine may be told to run at once.
pub const MAX_RUNNING_SEQUENCES: usize = 4_096;
/// Largest token budget of a step.
pub const MAX_BUDGET_TOKENS: usize = 65_536;
/// Longest waiting queue that an engine may be told to keep, requests.
pub const MAX_WAITING_REQUESTS_LIMIT: usize = 1_000_000;

/// Share of a CUDA device's free memory that an engine takes: the rest is for its driver, and for whoever else uses the device.
pub const DEVICE_MEMORY_SHARE: f64 = 0.9;

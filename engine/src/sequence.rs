//! One sequence inside the engine (one choice of one request): its tokens, how far it is computed, its block table.
//! Plain state; who computes what and when is decided by the scheduler, which blocks it gets by the KV cache.
//!
//! Invariants, in tokens: `num_computed <= num_scheduled <= tokens + num_pending`; the block table covers
//! `num_scheduled`; a waiting sequence has an empty table and nothing scheduled.

use std::ops::Range;
use std::sync::Arc;

use crate::ids::{BlockId, BlockKey, NamespaceKey, OwnerKey, RestoreId, SeqId};
use crate::request::{CacheUse, CachedTokens, PrefixMiss, Priority, SamplingParams, Usage};

/// What a sequence is asked to do; fixed for its life. A request of `n` choices is `n` of these.
#[derive(Debug, Clone)]
pub struct SequenceSpec {
    /// Its class.
    pub priority: Priority,
    /// At least one token.
    pub prompt: Arc<[u32]>,
    /// Most new tokens; 0 computes the prompt and ends.
    pub max_new_tokens: usize,
    /// Tokens that end the answer, the model's own end tokens among them unless they are ignored.
    pub stop_token_ids: Arc<[u32]>,
    /// When it fails if it has not ended, milliseconds on the caller's clock.
    pub deadline_ms: Option<u64>,
    /// The limit that gave the deadline, milliseconds: only named in the error.
    pub timeout_ms: u64,
    /// Blocks are shared only within one namespace.
    pub namespace: NamespaceKey,
    /// Whom its cached blocks count for.
    pub owner: OwnerKey,
    /// Whether blocks of others may be read, and its own be offered to them.
    pub prefix_cache: CacheUse,
    /// Alternatives to report with each prompt token from the second on; `None`: no prompt logprobs. Cached blocks
    /// hold no logits, so such a sequence computes its whole prompt.
    pub prompt_logprobs: Option<usize>,
    /// Alternatives to report with each new token; `None`: no logprobs.
    pub logprobs: Option<usize>,
    /// How tokens are chosen.
    pub sampling: Arc<SamplingParams>,
}

impl SequenceSpec {
    /// Tokens whose KV is computed if the sequence runs to its full length. The last new token is never computed.
    pub fn max_kv_tokens(&self) -> usize {
        self.prompt.len() + self.max_new_tokens.saturating_sub(1)
    }
}

/// A sequence that is to become one vector.
#[derive(Debug, Clone)]
pub struct EncodeSpec {
    /// Its class.
    pub priority: Priority,
    /// At least one token, at most the scheduler's `max_encode_tokens`.
    pub tokens: Arc<[u32]>,
    /// When it fails if it has not ended, milliseconds on the caller's clock.
    pub deadline_ms: Option<u64>,
    /// The limit that gave the deadline, milliseconds: only named in the error.
    pub timeout_ms: u64,
}

/// The part of a sequence that one step computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Whose it is.
    pub seq: SeqId,
    /// Positions that are computed.
    pub positions: Range<usize>,
    /// Set when the only token of the chunk is not known yet: row of the previous step's outputs that gives it.
    pub feedback: Option<usize>,
    /// Positions of the prompt tokens whose logprobs are reported; each is scored by the row before it.
    pub scores: Range<usize>,
    /// Whether the last row chooses the next token.
    pub samples: bool,
    /// Which run of the sequence this is: a preemption ends one run, and what its steps computed is gone.
    pub run: u32,
}

impl Chunk {
    /// Rows that reach the output matrix.
    pub fn num_outputs(&self) -> usize {
        self.scores.len() + usize::from(self.samples)
    }
}

/// A live sequence.
#[derive(Debug)]
pub struct Sequence {
    /// Its identity; grows with arrival.
    pub id: SeqId,
    /// Identity of the first choice of its request.
    pub request: SeqId,
    /// What it is asked to do.
    pub spec: SequenceSpec,
    /// Prompt and known new tokens.
    pub tokens: Vec<u32>,
    /// New tokens that launched steps choose and nobody has seen yet: at most one while a step is scheduled.
    pub num_pending: usize,
    /// Tokens whose KV is computed, or will be when the launched steps have run.
    pub num_scheduled: usize,
    /// Tokens whose KV is computed.
    pub num_computed: usize,
    /// Largest `num_computed` of all runs: what is computed below it is computed again.
    pub most_computed: usize,
    /// Launched steps that hold a chunk of it, of any run.
    pub num_in_flight: usize,
    /// Its block table: block `i` holds positions `i * block_tokens..`.
    pub blocks: Vec<BlockId>,
    /// Keys of the leading full blocks of `tokens`, as far as they were needed.
    pub block_keys: Vec<BlockKey>,
    /// Leading blocks of the table that were taken from the prefix index or offered to it.
    pub num_published: usize,
    /// Position of the next prompt token to be scored.
    pub next_score: usize,
    /// Row of the latest step's outputs that chooses its next token.
    pub output_row: Option<usize>,
    /// Rank with which it was admitted last: its class, lifted by waiting. 0 is the best.
    pub rank: usize,
    /// The rest of its prefix is on its way from the tiers: nothing of it is computed before that has ended.
    pub restore: Option<RestoreId>,
    /// Blocks of the table that came from the tiers in this run.
    pub restored: Range<usize>,
    /// Prompt tokens found in the caches when it was first admitted, by place.
    pub cached: CachedTokens,
    /// Why that was not all.
    pub prefix_miss: Option<PrefixMiss>,
    /// Whether a step has computed any of it.
    pub has_started: bool,
    /// How often it lost its blocks.
    pub num_preemptions: u32,
    /// Whether it ever waited for a block that another sequence was computing.
    pub waited_for_prefix: bool,
}

impl Sequence {
    /// A sequence that has not run.
    pub fn new(id: SeqId, request: SeqId, spec: SequenceSpec) -> Self {
        let rank = spec.priority as usize;
        Sequence {
            id,
            request,
            tokens: spec.prompt.to_vec(),
            spec,
            num_pending: 0,
            num_scheduled: 0,
            num_computed: 0,
            most_computed: 0,
            num_in_flight: 0,
            blocks: Vec::new(),
            block_keys: Vec::new(),
            num_published: 0,
            next_score: 1,
            output_row: None,
            rank,
            restore: None,
            restored: 0..0,
            cached: CachedTokens::default(),
            prefix_miss: None,
            has_started: false,
            num_preemptions: 0,
            waited_for_prefix: false,
        }
    }

    /// New tokens, known and pending.
    pub fn num_new_tokens(&self) -> usize {
        self.tokens.len() + self.num_pending - self.spec.prompt.len()
    }

    /// Whether the prompt lies behind it and its next token is all that there is to compute.
    pub fn is_decoding(&self) -> bool {
        self.num_new_tokens() > 0 && self.num_remaining() <= 1
    }

    /// Tokens that are to be computed and not scheduled yet.
    pub fn num_remaining(&self) -> usize {
        let end = (self.tokens.len() + self.num_pending).min(self.spec.max_kv_tokens());
        end.saturating_sub(self.num_scheduled)
    }

    /// Whether its next chunk can be built now: a prefix that is on its way is not computed; penalties read all tokens so
    /// far on the host, so a sequence that has them waits until the step that chooses its last token is applied.
    pub fn can_be_scheduled(&self) -> bool {
        self.restore.is_none()
            && self.num_remaining() > 0
            && (self.num_pending == 0 || !self.spec.sampling.reads_history())
    }

    /// Leading tokens whose KV may come from the cache: the last token is always computed (it gives the logits), and
    /// so is every prompt token that has yet to be scored.
    pub fn max_cached_tokens(&self) -> usize {
        let last = self.tokens.len() - 1;
        match self.spec.prompt_logprobs {
            _ if self.spec.prefix_cache == CacheUse::Off => 0,
            Some(_) => last.min(self.next_score - 1),
            None => last,
        }
    }

    /// The next `num_tokens` tokens as a chunk.
    pub fn next_chunk(&self, num_tokens: usize) -> Chunk {
        let end = self.num_scheduled + num_tokens;
        let scores = match self.spec.prompt_logprobs {
            Some(_) => {
                let targets_end = (end + 1).min(self.spec.prompt.len());
                self.next_score.max(self.num_scheduled + 1).min(targets_end)..targets_end
            }
            None => 0..0,
        };
        let feedback = (end > self.tokens.len()).then(|| self.output_row.expect("a pending token has an output row"));
        let samples = end == self.tokens.len() + self.num_pending && self.num_new_tokens() < self.spec.max_new_tokens;
        debug_assert!(feedback.is_none() || num_tokens == 1, "only the last token can be unknown");
        Chunk { seq: self.id, positions: self.num_scheduled..end, feedback, scores, samples, run: self.num_preemptions }
    }

    /// Forgets everything computed; tokens stay.
    pub fn reset_progress(&mut self) {
        debug_assert!(self.blocks.is_empty() && self.restore.is_none(), "the blocks are released first");
        self.num_scheduled = 0;
        self.num_computed = 0;
        self.num_published = 0;
        self.restored = 0..0;
        self.output_row = None;
    }

    /// Its token counts so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.spec.prompt.len(),
            completion_tokens: self.tokens.len() - self.spec.prompt.len(),
            cached_tokens: self.cached.total(),
            cached_by_tier: self.cached,
            preemptions: self.num_preemptions as usize,
            prefix_miss: self.prefix_miss,
        }
    }
}

//! How many KV blocks an engine gets and how long a sequence may become, decided before any weight is read. Pure: memory
//! that is available is an argument.

mod stored_blocks;

use crate::backend::KvLayout;
use crate::config::{DEFAULT_KV_MAX_BYTES, DEFAULT_KV_MEMORY_SHARE, DEFAULT_KV_MIN_TOKENS, EngineOptions};
use crate::error::{Error, Result};
pub(crate) use stored_blocks::StoredBlocks;

/// What an engine will hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, packed: exactly what loading then takes.
    pub weights_bytes: u64,
    /// What steps need beside, on a device whose memory is planned in full; 0 on the CPU.
    pub workspace_bytes: u64,
    /// One KV block over all layers.
    pub block_bytes: u64,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Longest sequence, tokens.
    pub context_tokens: usize,
}

/// The memory that a plan divides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryRoom {
    /// For weights, pool and working memory together.
    pub available_bytes: u64,
    /// What steps need of it.
    pub workspace_bytes: u64,
    /// Share of what weights and steps leave that the pool gets by default.
    pub pool_share: f64,
    /// The pool gets no more by default.
    pub max_pool_bytes: u64,
}

impl MemoryRoom {
    /// The host's memory, which others want too.
    pub fn host(available_bytes: u64) -> MemoryRoom {
        let (pool_share, max_pool_bytes) = (DEFAULT_KV_MEMORY_SHARE, DEFAULT_KV_MAX_BYTES);
        MemoryRoom { available_bytes, workspace_bytes: 0, pool_share, max_pool_bytes }
    }

    /// A device's memory, which is there for this.
    pub fn device(available_bytes: u64, workspace_bytes: u64) -> MemoryRoom {
        MemoryRoom { available_bytes, workspace_bytes, pool_share: 1.0, max_pool_bytes: u64::MAX }
    }
}

impl MemoryPlan {
    /// Plans the pool. `layout.num_blocks` is ignored; `model_context_tokens` is the model's own limit.
    pub fn new(
        options: &EngineOptions,
        layout: &KvLayout,
        weights_bytes: u64,
        model_context_tokens: usize,
        room: MemoryRoom,
    ) -> Result<MemoryPlan> {
        let block_tokens = layout.block_tokens;
        let block_bytes = layout.block_bytes();
        let wanted_context = wanted_context(options, model_context_tokens)?;
        let taken_bytes = weights_bytes.saturating_add(room.workspace_bytes);
        let free_bytes = room.available_bytes.saturating_sub(taken_bytes);
        let pool_bytes = match options.kv_bytes {
            Some(bytes) if bytes < block_bytes => {
                return Err(Error::InvalidArgument {
                    field: "kv_bytes",
                    value: bytes.to_string(),
                    expected: format!("at least {block_bytes}, the size of one block"),
                });
            }
            Some(bytes) => bytes,
            None => default_pool_bytes(options, wanted_context, (block_tokens, block_bytes), free_bytes, room),
        };
        // Slots are numbered in 32 bits.
        let num_blocks = (pool_bytes / block_bytes).min(u64::from(u32::MAX) / block_tokens as u64) as usize;
        let context_tokens = wanted_context.min(num_blocks * block_tokens);
        let workspace_bytes = room.workspace_bytes;
        Ok(MemoryPlan { weights_bytes, workspace_bytes, block_bytes, num_blocks, context_tokens })
    }

    /// The plan of a model that only encodes. It keeps no keys and values from step to step: its pool is the smallest
    /// there can be, whatever the options say of its size.
    pub fn for_encoder(
        options: &EngineOptions,
        layout: &KvLayout,
        weights_bytes: u64,
        model_context_tokens: usize,
    ) -> Result<MemoryPlan> {
        let context_tokens = wanted_context(options, model_context_tokens)?;
        let (block_bytes, num_blocks) = (layout.block_bytes(), 1);
        Ok(MemoryPlan { weights_bytes, workspace_bytes: 0, block_bytes, num_blocks, context_tokens })
    }

    /// The pool.
    pub fn kv_bytes(&self) -> u64 {
        self.block_bytes.saturating_mul(self.num_blocks as u64)
    }

    /// Weights, pool and working memory together.
    pub fn needed_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.workspace_bytes).saturating_add(self.kv_bytes())
    }

    /// Fails when the plan does not fit what is available.
    pub fn check(&self, available_bytes: u64) -> Result<()> {
        if self.needed_bytes() <= available_bytes {
            return Ok(());
        }
        let needed_bytes = self.needed_bytes();
        Err(Error::OutOfMemory { purpose: "weights and KV pool", needed_bytes, available_bytes })
    }
}

/// Longest sequence that is asked for, which the model must allow.
fn wanted_context(options: &EngineOptions, model_context_tokens: usize) -> Result<usize> {
    match options.context_tokens {
        Some(context) if context == 0 || context > model_context_tokens => Err(Error::InvalidArgument {
            field: "context_tokens",
            value: context.to_string(),
            expected: format!("1 to {model_context_tokens}, the model's own limit"),
        }),
        wanted => Ok(wanted.unwrap_or(model_context_tokens)),
    }
}

/// A share of what is free, bounded above by a constant and by what all sequences together could use, and below by one
/// sequence of useful length.
fn default_pool_bytes(
    options: &EngineOptions,
    context_tokens: usize,
    (block_tokens, block_bytes): (usize, u64),
    free_bytes: u64,
    room: MemoryRoom,
) -> u64 {
    let bytes_of = |tokens: usize| tokens.div_ceil(block_tokens) as u64 * block_bytes;
    let share = (free_bytes as f64 * room.pool_share) as u64;
    let all_sequences = bytes_of(context_tokens).saturating_mul(options.max_running_sequences as u64);
    let one_sequence = bytes_of(context_tokens.min(DEFAULT_KV_MIN_TOKENS));
    share.min(room.max_pool_bytes).min(all_sequences).max(one_sequence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::KvDtype;

    const GIB: u64 = 1 << 30;

    fn layout() -> KvLayout {
        // 2 * 2 bytes * 28 * 16 * 8 * 128 = 1,835,008 bytes a block
        KvLayout {
            num_layers: 28,
            num_blocks: 0,
            block_tokens: 16,
            num_kv_heads: 8,
            head_dim: 128,
            dtype: KvDtype::F16,
        }
    }

    fn plan(change: impl FnOnce(&mut EngineOptions), context: usize, available: u64) -> Result<MemoryPlan> {
        let mut options = EngineOptions::new("");
        change(&mut options);
        let plan = MemoryPlan::new(&options, &layout(), GIB, context, MemoryRoom::host(available))?;
        plan.check(available)?;
        Ok(plan)
    }

    /// By default the pool is a quarter of what the weights leave, at most 2 GiB, and at least one useful sequence.
    #[test]
    fn default_pool() {
        let block = layout().block_bytes();
        assert_eq!(block, 1_835_008);
        let int8 = KvLayout { dtype: KvDtype::Int8, ..layout() };
        assert_eq!(int8.block_bytes(), block / 2 + 2 * 4 * 28 * 16 * 8, "two scales a token and head");
        let odd = KvLayout { head_dim: 100, ..layout() };
        assert_eq!(odd.block_bytes(), 2 * 28 * 16 * 8 * (100 + 104), "values are padded to whole vectors");
        let roomy = plan(|_| (), 40_960, 64 * GIB).expect("fits");
        assert_eq!(roomy.num_blocks as u64, 2 * GIB / block);
        assert_eq!(roomy.context_tokens, roomy.num_blocks * 16, "the pool bounds the context");
        let middling = plan(|_| (), 40_960, 5 * GIB).expect("fits");
        assert_eq!(middling.num_blocks as u64, GIB / block);
        let tight = plan(|_| (), 40_960, GIB + GIB / 2).expect("fits");
        assert_eq!(tight.num_blocks, 4096 / 16);
        let small_model = plan(|o| o.max_running_sequences = 2, 100, 64 * GIB).expect("fits");
        assert_eq!((small_model.num_blocks, small_model.context_tokens), (14, 100));
    }

    /// On a device the pool gets all that weights and steps leave, up to what all sequences together could use.
    #[test]
    fn pool_of_a_device() {
        let (options, block) = (EngineOptions::new(""), layout().block_bytes());
        let on_device =
            |available| MemoryPlan::new(&options, &layout(), GIB, 40_960, MemoryRoom::device(available, GIB));
        let plan = on_device(10 * GIB).expect("fits");
        assert_eq!((plan.num_blocks as u64, plan.workspace_bytes), (8 * GIB / block, GIB));
        assert!(plan.needed_bytes() <= 10 * GIB && plan.check(10 * GIB).is_ok());
        assert!(plan.check(plan.needed_bytes() - 1).is_err());
        let most = 40_960 / 16 * options.max_running_sequences;
        assert_eq!(on_device(1000 * GIB).expect("fits").num_blocks, most);
        let tight = on_device(2 * GIB + GIB / 8).expect("planned");
        assert_eq!(tight.num_blocks, 4096 / 16, "one sequence of useful length, whether it fits or not");
        assert!(tight.check(2 * GIB + GIB / 8).is_err());
    }

    /// An encoder gets one block, however much memory there is or is offered, and its model's whole context.
    #[test]
    fn encoders_need_no_pool() {
        let mut options = EngineOptions::new("");
        options.kv_bytes = Some(64 * GIB);
        let plan = MemoryPlan::for_encoder(&options, &layout(), GIB, 512).expect("fits");
        assert_eq!((plan.num_blocks, plan.context_tokens), (1, 512));
        assert_eq!(plan.needed_bytes(), GIB + layout().block_bytes());
        options.context_tokens = Some(513);
        assert!(MemoryPlan::for_encoder(&options, &layout(), GIB, 512).is_err());
    }

    /// What cannot be is refused by name before anything is read.
    #[test]
    fn impossible_plans_are_typed_errors() {
        let code = |result: Result<MemoryPlan>| result.expect_err("must be refused").code();
        assert_eq!(code(plan(|o| o.kv_bytes = Some(1000), 4096, 64 * GIB)), "invalid_argument");
        assert_eq!(code(plan(|o| o.context_tokens = Some(4097), 4096, 64 * GIB)), "invalid_argument");
        assert_eq!(code(plan(|o| o.context_tokens = Some(0), 4096, 64 * GIB)), "invalid_argument");
        assert_eq!(code(plan(|o| o.kv_bytes = Some(64 * GIB), 4096, 64 * GIB)), "out_of_memory");
        assert_eq!(code(plan(|_| (), 4096, GIB)), "out_of_memory");
    }
}

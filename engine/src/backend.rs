//! The fused operations that a device offers to models, and nothing else: no tensor library. Each is called by a model,
//! enqueues its work and never waits for it (a CPU's queue has length zero); only what ends a step (logits, tokens,
//! vectors) or moves a KV block reads back. Weights are packed when they are loaded, into a layout that only the backend
//! knows.
//!
//! Row invariance (ARCHITECTURE.md): each element of a result depends only on its own row, its position and the
//! model; never on the other rows of the batch, on how a prompt was cut into chunks, or on the number of threads.

pub mod cpu;
pub mod cuda;
pub mod measure;

use std::sync::Arc;

use crate::batch::{Batch, Outcome, OutputRow, Sampled};
pub use crate::config::KvDtype;
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::stats::CudaGraphStats;
use crate::tensor::Tensor;
use ns_llm_kernels::cpu::pooling;
pub use ns_llm_kernels::kv_int8::Int8Blocks;

/// Sizes of one attention layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Keys further back than this are not seen (Mistral); `None`: all are.
    pub sliding_window_tokens: Option<usize>,
    /// Whether a token sees no later one. Otherwise it sees all of its sequence that the batch has (BERT).
    pub causal: bool,
}

/// The forms of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// `x * Phi(x)`, with the error function.
    Erf,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`
    Tanh,
}

/// How the final states of a sequence's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean (Reimers & Gurevych 2019, arXiv:1908.10084).
    Mean,
    /// That of the first token (BERT's `[CLS]`).
    First,
    /// That of the last token.
    Last,
}

/// Version of how the numbers of a block lie in its bytes, on any device. It changes when any of them moves; what was stored
/// in another layout is not read.
pub const KV_LAYOUT_VERSION: u32 = 1;

/// Sizes of the KV blocks of all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub num_layers: usize,
    /// Blocks of the pool.
    pub num_blocks: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How keys and values are kept.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one block over all layers, keys and values, as the backend lays them out.
    pub fn block_bytes(&self) -> u64 {
        cpu::kv_blocks_layout(*self).block_bytes() as u64
    }
}

/// Cosines and sines of rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the "rotate half" form:
/// dimension `i` pairs with `i + rotary_dim / 2`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Leading dimensions of a head that are rotated.
    pub rotary_dim: usize,
    /// `[positions, rotary_dim / 2]`
    pub cos: Vec<f32>,
    /// `[positions, rotary_dim / 2]`
    pub sin: Vec<f32>,
}

/// What is fixed about the attention of one layer.
pub struct AttentionLayer<B: Backend> {
    /// Which layer's KV blocks it reads and writes.
    pub layer_idx: usize,
    /// Its sizes.
    pub shape: AttentionShape,
    /// Norms of each head of q and of k, `[head_dim]` (Qwen3).
    pub qk_norm: Option<(B::Norm, B::Norm)>,
    /// Rotary embedding, shared by all layers; `None`: positions were added to the embedding (GPT-2, BERT).
    pub rope: Option<Arc<B::Rope>>,
}

/// What the steps of an engine are at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens of a step.
    pub max_tokens: usize,
    /// Sequences that decode together.
    pub max_sequences: usize,
    /// Tokens of a sequence.
    pub context_tokens: usize,
    /// Tokens of a KV block.
    pub block_tokens: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Steps that a CUDA device keeps captured; 0: none is captured.
    pub max_graphs: usize,
}

/// A step that was launched.
pub enum Launched {
    /// Its results are there.
    Sampled(Vec<Sampled>),
    /// Its tokens are on their way, in the order in which steps were launched.
    UnderWay(Vec<UnderWay>),
}

/// A row of the outputs of a step that is under way.
pub struct UnderWay {
    /// Whose it is.
    pub seq: SeqId,
    /// Position of the token.
    pub position: usize,
    /// What came out, where the host knows already.
    pub outcome: Option<Outcome>,
}

/// A matrix as the checkpoint has it, or several that are multiplied with the same input.
pub enum LinearWeight<'a> {
    /// `parts` stacked along the output axis (q, k and v for example): each `[out_i, in]`; biases `[out_i]`, where a
    /// missing one counts as zeros when another part has one.
    Stacked(&'a [LinearPart<'a>]),
    /// Gate and up projection of a SwiGLU feed-forward, both `[intermediate, in]`.
    GateUp {
        /// Goes through SiLU.
        gate: LinearPart<'a>,
        /// Is multiplied with it.
        up: LinearPart<'a>,
    },
}

/// One matrix and its bias.
#[derive(Clone, Copy)]
pub struct LinearPart<'a> {
    /// `[out, in]`
    pub weight: &'a Tensor,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
}

/// A device and its operations.
pub trait Backend: Sized + Send + 'static {
    /// f32 activations `[rows, width]`: the residual stream, projections.
    type Rows;
    /// Activations `[rows, width]` in the form that matrix products read (f32, bf16, 8 bits with scales).
    type Operand;
    /// A packed matrix with its bias. The token embedding is one too: an embedding row is a row of the matrix.
    type Linear: Send;
    /// A norm's weight `[width]` and epsilon.
    type Norm: Send;
    /// Weight `[width]`, bias `[width]` and epsilon of a LayerNorm.
    type LayerNorm: Send;
    /// A [`RopeTable`] on the device.
    type Rope: Send + Sync;
    /// K and V blocks of all layers.
    type Kv: Send;

    // ---- loading -------------------------------------------------------------------------------------------------

    /// Packs a matrix (in parallel).
    fn load_linear(&self, weight: LinearWeight<'_>) -> Result<Self::Linear>;
    /// Takes a norm's weight `[width]`.
    fn load_norm(&self, weight: &Tensor, eps: f32) -> Result<Self::Norm>;
    /// Takes a LayerNorm's weight and bias, both `[width]`.
    fn load_layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Self::LayerNorm>;
    /// Takes a rotary table.
    fn load_rope(&self, table: RopeTable) -> Result<Self::Rope>;
    /// Allocates the KV blocks. Memory is touched only when a block is first written.
    fn allocate_kv(&self, layout: KvLayout) -> Result<Self::Kv>;

    /// Hears what steps will be, once everything is loaded and before the first of them.
    fn prepare(&mut self, _: &StepLimits) -> Result<()> {
        Ok(())
    }

    // ---- one step, in the order of a layer -----------------------------------------------------------------------

    /// Embedding of the batch's tokens: `[tokens, hidden_size]`.
    fn embed(&self, embedding: &Self::Linear, batch: &Batch) -> Result<Self::Rows>;
    /// Adds row `indices[i]` of an embedding of positions or token types to row `i` of `hidden` `[tokens, hidden_size]`.
    fn add_embedding(&self, hidden: &mut Self::Rows, embedding: &Self::Linear, indices: &[u32]) -> Result<()>;
    /// Adds the embedding of each token's position.
    fn add_position_embedding(&self, hidden: &mut Self::Rows, embedding: &Self::Linear, batch: &Batch) -> Result<()> {
        self.add_embedding(hidden, embedding, &batch.positions)
    }
    /// `x / rms(x) * weight` of each row (Zhang & Sennrich 2019, arXiv:1910.07467).
    fn rms_norm(&self, hidden: &Self::Rows, norm: &Self::Norm) -> Result<Self::Operand>;
    /// The same in f32, for results that no product reads.
    fn rms_norm_rows(&self, hidden: &Self::Rows, norm: &Self::Norm) -> Result<Self::Rows>;
    /// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` of each row (Ba et al. 2016, arXiv:1607.06450).
    fn layer_norm(&self, hidden: &Self::Rows, norm: &Self::LayerNorm) -> Result<Self::Operand>;
    /// The same in place, for norms on the residual stream itself; the result in the form of an operand too.
    fn layer_norm_in_place(&self, hidden: &mut Self::Rows, norm: &Self::LayerNorm) -> Result<Self::Operand>;
    /// `x W^T + bias`: `[rows, out]`.
    fn linear(&self, x: &Self::Operand, weight: &Self::Linear) -> Result<Self::Rows>;
    /// `hidden += x W^T + bias`.
    fn linear_add(&self, hidden: &mut Self::Rows, x: &Self::Operand, weight: &Self::Linear) -> Result<()>;
    /// `silu(x W_gate^T) * (x W_up^T)`: `[rows, intermediate]` (Shazeer 2020, arXiv:2002.05202).
    fn linear_swiglu(&self, x: &Self::Operand, gate_up: &Self::Linear) -> Result<Self::Operand>;
    /// `gelu(x W^T + bias)`: `[rows, intermediate]`.
    fn linear_gelu(&self, x: &Self::Operand, weight: &Self::Linear, gelu: Gelu) -> Result<Self::Operand>;
    /// Splits `qkv` `[tokens, (heads + 2 kv_heads) * head_dim]`; normalises each head of q and k where the model does
    /// (Qwen3); rotates q and k where positions are rotary; stores k and v into the batch's slots of this layer (of the
    /// only layer that `kv` has, where whole sequences are encoded). Returns q `[tokens, heads * head_dim]`.
    fn rope_and_store(
        &self,
        qkv: Self::Rows,
        layer: &AttentionLayer<Self>,
        batch: &Batch,
        kv: &mut Self::Kv,
    ) -> Result<Self::Rows>;
    /// Attention of `q` over the blocks of each row's own sequence: `[tokens, heads * head_dim]`.
    fn paged_attention(
        &self,
        q: &Self::Rows,
        layer: &AttentionLayer<Self>,
        batch: &Batch,
        kv: &Self::Kv,
    ) -> Result<Self::Operand>;
    /// The rows that reach the output matrix: `[outputs, hidden_size]`.
    fn select_outputs(&self, hidden: &Self::Rows, batch: &Batch) -> Result<Self::Rows>;

    // ---- a whole step --------------------------------------------------------------------------------------------

    /// Starts the step that `batch` is: the states that `forward` gives for it, `[outputs, hidden_size]`, and what its
    /// outputs ask of them.
    /// `forward` may be called with a batch that has more rows, which are nobody's, or not at all where what it enqueues is known.
    fn launch(
        &self,
        batch: &Batch,
        output: &Self::Linear,
        forward: &mut dyn FnMut(&Batch) -> Result<Self::Operand>,
    ) -> Result<Launched> {
        Ok(Launched::Sampled(self.sample(&forward(batch)?, output, &batch.outputs)?))
    }
    /// Waits for the results of the oldest step that was launched.
    fn collect(&self, launched: Launched) -> Result<Vec<Sampled>> {
        match launched {
            Launched::Sampled(sampled) => Ok(sampled),
            Launched::UnderWay(_) => unreachable!("a backend that is done when it returns has nothing under way"),
        }
    }
    /// Steps that may be launched and not collected. With 2 a step's `feedback` names tokens of the one before.
    fn max_in_flight(&self) -> usize {
        1
    }
    /// What became of captured steps; `None`: there is no such thing here.
    fn graph_stats(&self) -> Option<CudaGraphStats> {
        None
    }

    // ---- the end of a step ---------------------------------------------------------------------------------------

    /// Logits of `x` `[outputs, hidden_size]` and what `outputs` asks of them, one result per row, in order.
    fn sample(&self, x: &Self::Operand, output: &Self::Linear, outputs: &[OutputRow]) -> Result<Vec<Sampled>>;
    /// Logits `[rows, vocab_size]`, read back: for tests and evaluation only.
    fn read_logits(&self, x: &Self::Operand, output: &Self::Linear) -> Result<Vec<f32>>;
    /// One vector `[width]` per sequence of the batch from the rows of `hidden` `[tokens, width]` that are its own, read
    /// back.
    fn pool(&self, hidden: &Self::Rows, batch: &Batch, pooling: Pooling) -> Result<Vec<Vec<f32>>>;

    // ---- between steps -------------------------------------------------------------------------------------------

    /// What blocks hold, each all layers in one piece of [`KvLayout::block_bytes`], read back together.
    fn read_blocks(&self, kv: &Self::Kv, blocks: &[BlockId]) -> Result<Vec<Arc<[u8]>>>;
    /// How the blocks of a layout are written in 8 bits; `None`: they are.
    fn int8_blocks(layout: KvLayout) -> Result<Option<Int8Blocks>>;
    /// Gives a block what [`Backend::read_blocks`] gave.
    /// [`Error::Internal`](crate::Error::Internal) for bytes of another length.
    fn write_block(&self, kv: &mut Self::Kv, block: BlockId, bytes: &[u8]) -> Result<()>;
}

/// One vector `[width]` per sequence of the batch from `states` `[tokens, width]`, which are in the host's memory.
fn pooled_on_host(states: &[f32], width: usize, batch: &Batch, pooling: Pooling) -> Result<Vec<Vec<f32>>> {
    let row = |idx: usize| states[idx * width..(idx + 1) * width].to_vec();
    let vectors = batch.sequences.iter().map(|sequence| match pooling {
        Pooling::First => Ok(row(sequence.rows.start)),
        Pooling::Last => Ok(row(sequence.rows.end - 1)),
        Pooling::Mean => {
            let mut mean = vec![0.0; width];
            let own = &states[sequence.rows.start * width..sequence.rows.end * width];
            pooling::mean_rows(own, &mut mean).map_err(|error| Error::Internal { reason: error.to_string() })?;
            Ok(mean)
        }
    });
    vectors.collect()
}

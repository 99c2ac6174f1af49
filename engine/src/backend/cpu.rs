//! The fused operations on the CPU, through `ns_llm_kernels::cpu`. This file checks nothing that a kernel checks and
//! computes nothing: it finds buffers, translates shapes and errors, and keeps the layout of what it returns.
//!
//! An error of a kernel in the middle of a step means that two parts of this engine disagree about a shape:
//! [`Error::Internal`]. What comes from a checkpoint is checked when it is loaded.

mod arena;
mod format;
mod sample;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ns_llm_kernels as kernels;
use ns_llm_kernels::cpu::linear::{MatrixSource, OperandFormat, PackedLinear};
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};
use ns_llm_kernels::cpu::{Cpu, attention, embedding, kv_blocks, linear, norm, rope};

use crate::backend::{
    AttentionLayer, AttentionShape, Backend, Gelu, Int8Blocks, KvDtype, KvLayout, LinearPart, LinearWeight, Pooling,
    RopeTable, pooled_on_host,
};
use crate::batch::{Batch, OutputRow, Sampled};
use crate::config::{ThreadPriority, WeightFormat};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::tensor::{Encoding, Tensor};
pub use arena::CpuOperand;
use arena::{Arena, Floats};
use format::{gate_up_format, packed_format};
use sample::SamplerScratches;

/// Bytes of a matrix as [`CpuBackend`] keeps it when the user wants `weights`; `None` if nothing can count them.
pub(super) fn packed_bytes(weights: WeightFormat, weight: &LinearWeight<'_>) -> Option<u64> {
    format::packed_bytes(weights, weight)
}

/// How to start a [`CpuBackend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuBackendOptions {
    /// Compute threads, the caller's among them.
    pub threads: usize,
    /// Priority of the threads that are started.
    pub priority: ThreadPriority,
    /// Form of the matrices. Norms are always f32.
    pub weights: WeightFormat,
}

/// The CPU as a device.
pub struct CpuBackend {
    cpu: Cpu,
    weights: WeightFormat,
    arena: Arc<Arena>,
    scratches: SamplerScratches,
    /// The attention rows of the step at hand, kept for their allocation.
    sequences: Mutex<Sequences>,
    weights_bytes: AtomicU64,
    /// What the matrices that were loaded so far want of activations: those of a model have one form.
    operand_format: Mutex<Option<OperandFormat>>,
}

#[derive(Default)]
struct Sequences {
    list: Vec<attention::AttentionSequence>,
    block_tables: Vec<u32>,
}

/// f32 activations `[rows, width]`, rows `stride` elements apart.
pub struct CpuRows {
    values: Floats,
    rows: usize,
    width: usize,
    stride: usize,
}

/// A norm's weight and epsilon.
pub struct CpuNorm {
    weight: Vec<f32>,
    eps: f32,
}

/// Weight, bias and epsilon of a LayerNorm.
pub struct CpuLayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl CpuLayerNorm {
    fn parameters(&self) -> norm::LayerNorm<'_> {
        norm::LayerNorm { weight: &self.weight, bias: &self.bias, eps: self.eps }
    }
}

impl CpuBackend {
    /// Starts the threads.
    pub fn new(options: CpuBackendOptions) -> Result<Self> {
        let priority = match options.priority {
            ThreadPriority::BelowNormal => PoolPriority::BelowNormal,
            ThreadPriority::Normal => PoolPriority::Normal,
        };
        let pool = Arc::new(Pool::new(options.threads, priority).map_err(start_error)?);
        Ok(CpuBackend::on(Cpu::new(pool).map_err(start_error)?, options.weights))
    }

    /// The same on threads that are already there.
    pub fn on(cpu: Cpu, weights: WeightFormat) -> Self {
        CpuBackend {
            cpu,
            weights,
            arena: Arc::default(),
            scratches: SamplerScratches::default(),
            sequences: Mutex::default(),
            weights_bytes: AtomicU64::new(0),
            operand_format: Mutex::default(),
        }
    }

    /// Instruction set in use, as in [`ModelInfo::isa`](crate::ModelInfo::isa).
    pub fn isa_name(&self) -> &'static str {
        self.cpu.isa().name()
    }

    /// Bytes of all packed matrices and norms so far.
    pub fn weights_bytes(&self) -> u64 {
        self.weights_bytes.load(Ordering::Relaxed)
    }

    /// The form in which a matrix `[_, in_features]` that is stored as `stored` is kept and multiplied.
    pub fn weight_format(&self, stored: Encoding, in_features: usize) -> linear::WeightFormat {
        packed_format(self.weights, stored, in_features)
    }

    /// What the products of all matrices that were loaded want.
    fn operand_format(&self) -> OperandFormat {
        let format = *self.operand_format.lock().unwrap_or_else(PoisonError::into_inner);
        format.unwrap_or(OperandFormat::F32)
    }

    fn packed(&self, packed: PackedLinear) -> PackedLinear {
        self.weights_bytes.fetch_add(packed.len_bytes() as u64, Ordering::Relaxed);
        let mut wanted = self.operand_format.lock().unwrap_or_else(PoisonError::into_inner);
        for format in packed.formats() {
            let format = OperandFormat::for_weights(&self.cpu, format);
            *wanted = Some(wanted.map_or(format, |wanted| wanted.and(format)));
        }
        packed
    }

    fn rows(&self, rows: usize, width: usize) -> CpuRows {
        CpuRows { values: self.arena.floats(rows * width), rows, width, stride: width }
    }

    fn operand(&self, rows: usize, width: usize) -> CpuOperand {
        self.arena.operand(self.operand_format(), rows, width)
    }
}

impl Backend for CpuBackend {
    type Rows = CpuRows;
    type Operand = CpuOperand;
    type Linear = PackedLinear;
    type Norm = CpuNorm;
    type LayerNorm = CpuLayerNorm;
    type Rope = RopeTable;
    type Kv = kv_blocks::KvBlocks;

    fn load_linear(&self, weight: LinearWeight<'_>) -> Result<PackedLinear> {
        let names = || match weight {
            LinearWeight::Stacked(parts) => parts.iter().map(|part| part.weight.name.as_str()).collect::<Vec<_>>(),
            LinearWeight::GateUp { gate, up } => vec![gate.weight.name.as_str(), up.weight.name.as_str()],
        };
        let packed = match weight {
            LinearWeight::Stacked(parts) => {
                let biases = parts.iter().map(read_bias).collect::<Result<Vec<_>>>()?;
                let sources = parts.iter().zip(&biases).map(|(part, bias)| {
                    let source = matrix_source(part, bias.as_deref())?;
                    Ok((source, self.weight_format(source.encoding, source.in_features)))
                });
                PackedLinear::pack(&self.cpu, &sources.collect::<Result<Vec<_>>>()?)
            }
            LinearWeight::GateUp { gate, up } => {
                let biases = (read_bias(&gate)?, read_bias(&up)?);
                let gate = matrix_source(&gate, biases.0.as_deref())?;
                let up = matrix_source(&up, biases.1.as_deref())?;
                let format = gate_up_format(self.weights, [gate, up].map(|part| (part.encoding, part.in_features)));
                PackedLinear::pack_gate_up(&self.cpu, gate, up, format)
            }
        };
        packed.map(|packed| self.packed(packed)).map_err(|error| match error {
            kernels::error::Error::NonFiniteValue { .. } => Error::NonFiniteWeights { name: names().join(", ") },
            error => start_error(error),
        })
    }

    fn load_norm(&self, weight: &Tensor, eps: f32) -> Result<CpuNorm> {
        let weight = read_vector(weight)?;
        self.weights_bytes.fetch_add(size_of_val(weight.as_slice()) as u64, Ordering::Relaxed);
        Ok(CpuNorm { weight, eps })
    }

    fn load_layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<CpuLayerNorm> {
        bias.expect_shape(&weight.shape)?;
        let (weight, bias) = (read_vector(weight)?, read_vector(bias)?);
        self.weights_bytes.fetch_add(2 * size_of_val(weight.as_slice()) as u64, Ordering::Relaxed);
        Ok(CpuLayerNorm { weight, bias, eps })
    }

    fn load_rope(&self, table: RopeTable) -> Result<RopeTable> {
        Ok(table)
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<kv_blocks::KvBlocks> {
        kv_blocks::KvBlocks::new(kv_blocks_layout(layout)).map_err(start_error)
    }

    fn embed(&self, embedding: &PackedLinear, batch: &Batch) -> Result<CpuRows> {
        assert!(batch.feedback.is_empty(), "a CPU step is collected before the next is launched");
        let mut rows = self.rows(batch.num_tokens(), embedding.in_features());
        embedding::embed(&self.cpu, embedding, &batch.token_ids, &mut rows.values).map_err(internal)?;
        Ok(rows)
    }

    fn add_embedding(&self, hidden: &mut CpuRows, embedding: &PackedLinear, indices: &[u32]) -> Result<()> {
        embedding::add_embedding(&self.cpu, embedding, indices, hidden.dense_mut()).map_err(internal)
    }

    fn rms_norm(&self, hidden: &CpuRows, norm: &CpuNorm) -> Result<CpuOperand> {
        let mut out = self.operand(hidden.rows, hidden.width);
        norm::rms_norm(&self.cpu, hidden.dense(), &norm.weight, norm.eps, &mut out).map_err(internal)?;
        Ok(out)
    }

    fn rms_norm_rows(&self, hidden: &CpuRows, norm: &CpuNorm) -> Result<CpuRows> {
        let mut out = self.arena.operand(OperandFormat::F32, hidden.rows, hidden.width);
        norm::rms_norm(&self.cpu, hidden.dense(), &norm.weight, norm.eps, &mut out).map_err(internal)?;
        let mut rows = self.rows(hidden.rows, hidden.width);
        for (idx, row) in rows.values.chunks_exact_mut(hidden.width.max(1)).enumerate() {
            out.row_into(idx, row);
        }
        Ok(rows)
    }

    fn layer_norm(&self, hidden: &CpuRows, norm: &CpuLayerNorm) -> Result<CpuOperand> {
        let mut out = self.operand(hidden.rows, hidden.width);
        norm::layer_norm(&self.cpu, hidden.dense(), &norm.parameters(), &mut out).map_err(internal)?;
        Ok(out)
    }

    fn layer_norm_in_place(&self, hidden: &mut CpuRows, norm: &CpuLayerNorm) -> Result<CpuOperand> {
        let mut out = self.operand(hidden.rows, hidden.width);
        norm::layer_norm_in_place(&self.cpu, hidden.dense_mut(), &norm.parameters(), &mut out).map_err(internal)?;
        Ok(out)
    }

    fn linear(&self, x: &CpuOperand, weight: &PackedLinear) -> Result<CpuRows> {
        let mut out = self.rows(x.rows(), weight.out_features());
        linear::matmul(&self.cpu, x, weight, &mut out.values).map_err(internal)?;
        Ok(out)
    }

    fn linear_add(&self, hidden: &mut CpuRows, x: &CpuOperand, weight: &PackedLinear) -> Result<()> {
        linear::matmul_add(&self.cpu, x, weight, hidden.dense_mut()).map_err(internal)
    }

    fn linear_swiglu(&self, x: &CpuOperand, gate_up: &PackedLinear) -> Result<CpuOperand> {
        let mut out = self.operand(x.rows(), gate_up.out_features());
        linear::matmul_swiglu(&self.cpu, x, gate_up, &mut out).map_err(internal)?;
        Ok(out)
    }

    fn linear_gelu(&self, x: &CpuOperand, weight: &PackedLinear, gelu: Gelu) -> Result<CpuOperand> {
        let gelu = match gelu {
            Gelu::Erf => linear::Gelu::Erf,
            Gelu::Tanh => linear::Gelu::Tanh,
        };
        let mut out = self.operand(x.rows(), weight.out_features());
        linear::matmul_gelu(&self.cpu, x, weight, gelu, &mut out).map_err(internal)?;
        Ok(out)
    }

    /// q stays where it is: the result is the first columns of `qkv`.
    fn rope_and_store(
        &self,
        mut qkv: CpuRows,
        layer: &AttentionLayer<Self>,
        batch: &Batch,
        kv: &mut kv_blocks::KvBlocks,
    ) -> Result<CpuRows> {
        fn head_norm(norm: &CpuNorm) -> rope::HeadNorm<'_> {
            rope::HeadNorm { weight: &norm.weight, eps: norm.eps }
        }
        let rope_layer = rope::RopeLayer {
            layer_idx: kv_layer(layer, kv),
            shape: attention_shape(&layer.shape),
            qk_norm: layer.qk_norm.as_ref().map(|(q, k)| (head_norm(q), head_norm(k))),
            rope: layer.rope.as_ref().map_or(NO_ROTATION, |table| rope_table(table)),
        };
        rope::rope_and_store(&self.cpu, qkv.dense_mut(), &rope_layer, &batch.positions, &batch.slots, kv)
            .map_err(internal)?;
        qkv.width = layer.shape.num_heads * layer.shape.head_dim;
        Ok(qkv)
    }

    fn paged_attention(
        &self,
        q: &CpuRows,
        layer: &AttentionLayer<Self>,
        batch: &Batch,
        kv: &kv_blocks::KvBlocks,
    ) -> Result<CpuOperand> {
        // Heads narrower than a group of 8-bit activations cannot be stored one by one.
        let heads_are_groups = layer.shape.head_dim.is_multiple_of(32);
        let mut out = match self.operand_format() {
            OperandFormat::Int8 | OperandFormat::F32AndInt8 if !heads_are_groups => {
                self.arena.operand(OperandFormat::F32, q.rows, q.width)
            }
            format => self.arena.operand(format, q.rows, q.width),
        };
        let mut sequences = self.sequences.lock().unwrap_or_else(PoisonError::into_inner);
        sequences.take_from(batch);
        let Sequences { list: sequences, block_tables } = &*sequences;
        let attention_batch = attention::AttentionBatch { q: &q.values, q_stride: q.stride, sequences, block_tables };
        let shape = attention_shape(&layer.shape);
        attention::paged_attention(&self.cpu, (kv_layer(layer, kv), &shape), &attention_batch, kv, &mut out)
            .map_err(internal)?;
        if out.format() == self.operand_format() {
            return Ok(out);
        }
        let mut converted = self.operand(out.rows(), out.width());
        let mut values = self.arena.floats(out.rows() * out.width());
        for (idx, row) in values.chunks_exact_mut(out.width().max(1)).enumerate() {
            out.row_into(idx, row);
        }
        converted.store_rows(&values);
        Ok(converted)
    }

    fn select_outputs(&self, hidden: &CpuRows, batch: &Batch) -> Result<CpuRows> {
        let mut selected = self.rows(batch.outputs.len(), hidden.width);
        for (row, output) in selected.values.chunks_exact_mut(hidden.width.max(1)).zip(&batch.outputs) {
            row.copy_from_slice(&hidden.values[output.token_row * hidden.stride..][..hidden.width]);
        }
        Ok(selected)
    }

    fn sample(&self, x: &CpuOperand, output: &PackedLinear, outputs: &[OutputRow]) -> Result<Vec<Sampled>> {
        sample::sample(&self.cpu, &self.arena, &self.scratches, (x, output), outputs)
    }

    fn read_logits(&self, x: &CpuOperand, output: &PackedLinear) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; x.rows() * output.out_features()];
        linear::matmul(&self.cpu, x, output, &mut logits).map_err(internal)?;
        Ok(logits)
    }

    fn pool(&self, hidden: &CpuRows, batch: &Batch, pooling: Pooling) -> Result<Vec<Vec<f32>>> {
        pooled_on_host(hidden.dense(), hidden.width, batch, pooling)
    }

    fn int8_blocks(layout: KvLayout) -> Result<Option<Int8Blocks>> {
        Ok(kv_blocks_layout(layout).int8_blocks())
    }

    fn read_blocks(&self, kv: &kv_blocks::KvBlocks, blocks: &[BlockId]) -> Result<Vec<Arc<[u8]>>> {
        Ok(blocks.iter().map(|block| kv.block(block.0).into()).collect())
    }

    fn write_block(&self, kv: &mut kv_blocks::KvBlocks, block: BlockId, bytes: &[u8]) -> Result<()> {
        let place = kv.block_mut(block.0);
        if place.len() != bytes.len() {
            let reason = format!("{} bytes for a block of {}", bytes.len(), place.len());
            return Err(Error::Internal { reason });
        }
        place.copy_from_slice(bytes);
        Ok(())
    }
}

/// The same sizes, and as many bytes as they take here.
pub(super) fn kv_blocks_layout(layout: KvLayout) -> kv_blocks::KvBlocksLayout {
    let KvLayout { num_layers, num_blocks, block_tokens, num_kv_heads, head_dim, dtype } = layout;
    let dtype = match dtype {
        KvDtype::F32 => kv_blocks::KvDtype::F32,
        KvDtype::F16 => kv_blocks::KvDtype::F16,
        KvDtype::Bf16 => kv_blocks::KvDtype::Bf16,
        KvDtype::Int8 => kv_blocks::KvDtype::Int8,
    };
    kv_blocks::KvBlocksLayout { num_layers, num_blocks, block_tokens, num_kv_heads, head_dim, dtype }
}

/// Where a layer's keys and values are: blocks of one layer are used by each layer in turn.
fn kv_layer(layer: &AttentionLayer<CpuBackend>, kv: &kv_blocks::KvBlocks) -> usize {
    layer.layer_idx.min(kv.layout().num_layers - 1)
}

impl CpuRows {
    /// All elements; the rows must lie one behind the other.
    fn dense(&self) -> &[f32] {
        assert_eq!(self.stride, self.width, "only attention reads the queries out of q, k and v");
        &self.values
    }

    fn dense_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.stride, self.width, "only attention reads the queries out of q, k and v");
        &mut self.values
    }
}

impl Sequences {
    fn take_from(&mut self, batch: &Batch) {
        self.block_tables.clear();
        self.block_tables.extend(batch.block_tables.iter().map(|block| block.0));
        self.list.clear();
        self.list.extend(batch.sequences.iter().map(|sequence| attention::AttentionSequence {
            rows: sequence.rows.clone(),
            first_position: sequence.context_tokens - sequence.rows.len(),
            blocks: sequence.blocks.clone(),
        }));
    }
}

fn attention_shape(shape: &AttentionShape) -> attention::AttentionShape {
    let &AttentionShape { num_heads, num_kv_heads, head_dim, scale, sliding_window_tokens, causal } = shape;
    attention::AttentionShape { num_heads, num_kv_heads, head_dim, scale, sliding_window_tokens, causal }
}

/// Keys and values are stored as they are.
const NO_ROTATION: rope::RopeTable<'static> = rope::RopeTable { rotary_dim: 0, cos: &[], sin: &[] };

fn rope_table(table: &RopeTable) -> rope::RopeTable<'_> {
    rope::RopeTable { rotary_dim: table.rotary_dim, cos: &table.cos, sin: &table.sin }
}

fn matrix_source<'a>(part: &LinearPart<'a>, bias: Option<&'a [f32]>) -> Result<MatrixSource<'a>> {
    let Tensor { name, shape, encoding, data } = part.weight;
    let &[out_features, in_features] = shape.as_slice() else {
        return Err(Error::TensorShape { name: name.clone(), expected: vec![0, 0], actual: shape.clone() });
    };
    Ok(MatrixSource { bytes: data, encoding: *encoding, out_features, in_features, bias })
}

fn read_bias(part: &LinearPart<'_>) -> Result<Option<Vec<f32>>> {
    let out_features = part.weight.shape.first().copied().unwrap_or(0);
    let Some(bias) = part.bias else { return Ok(None) };
    bias.expect_shape(&[out_features])?;
    read_vector(bias).map(Some)
}

/// A tensor with one axis, as f32.
fn read_vector(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.expect_shape(&[tensor.shape.iter().product()])?;
    Ok(tensor.to_f32())
}

/// A refusal while the backend starts or a model is loaded.
fn start_error(error: kernels::error::Error) -> Error {
    use kernels::error::Error as Kernel;
    match error {
        Kernel::OutOfMemory { purpose, needed_bytes, available_bytes } => {
            Error::OutOfMemory { purpose, needed_bytes, available_bytes }
        }
        Kernel::InvalidSize { dimension, value, expected, .. } => {
            Error::InvalidArgument { field: dimension, value: value.to_string(), expected: expected.to_owned() }
        }
        Kernel::UnknownIsa { name, available } => Error::InvalidArgument {
            field: kernels::cpu::dispatch::ISA_VARIABLE,
            value: name,
            expected: format!("one of {available}"),
        },
        other => internal(other),
    }
}

/// A refusal in the middle of a step.
fn internal(error: kernels::error::Error) -> Error {
    Error::Internal { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{BatchSequence, Outcome, OutputKind, RowSampling};
    use crate::ids::{BlockId, SeqId};
    use crate::request::SamplingParams;
    use crate::tensor::DType;
    use crate::tensor::QuantType;

    const HIDDEN: usize = 24;
    const VOCAB: usize = 50;

    fn backend(threads: usize, weights: WeightFormat) -> CpuBackend {
        let priority = ThreadPriority::Normal;
        CpuBackend::new(CpuBackendOptions { threads, priority, weights }).expect("threads")
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        let len = shape.iter().product::<usize>();
        let values = (0..len).map(|i| ((i * 7919 + name.len()) % 101) as f32 / 101.0 - 0.5);
        let data = values.flat_map(f32::to_le_bytes).collect();
        Tensor { name: name.to_owned(), shape: shape.to_vec(), encoding: DType::F32.into(), data }
    }

    /// A model of one layer: enough to call every operation.
    struct Layer {
        embedding: PackedLinear,
        norm: CpuNorm,
        qkv: PackedLinear,
        o: PackedLinear,
        gate_up: PackedLinear,
        down: PackedLinear,
        attention: AttentionLayer<CpuBackend>,
    }

    impl Layer {
        fn load(b: &CpuBackend) -> Layer {
            let stacked = |name: &str, out, width| {
                let weight = tensor(name, &[out, width]);
                b.load_linear(LinearWeight::Stacked(&[LinearPart { weight: &weight, bias: None }])).expect("loads")
            };
            let (gate, up) = (tensor("gate", &[40, HIDDEN]), tensor("up_proj", &[40, HIDDEN]));
            let part = |weight| LinearPart { weight, bias: None };
            let (num_heads, num_kv_heads, head_dim, scale) = (4, 2, 8, 0.3);
            let shape =
                AttentionShape { num_heads, num_kv_heads, head_dim, scale, sliding_window_tokens: None, causal: true };
            let (cos, sin) = (0..64 * 4).map(|i| ((i as f32).cos(), (i as f32).sin())).unzip();
            let rope = Arc::new(b.load_rope(RopeTable { rotary_dim: 8, cos, sin }).expect("loads"));
            Layer {
                embedding: stacked("embedding", VOCAB, HIDDEN),
                norm: b.load_norm(&tensor("norm", &[HIDDEN]), 1e-6).expect("loads"),
                qkv: stacked("qkv", 64, HIDDEN),
                o: stacked("o", HIDDEN, 32),
                gate_up: b.load_linear(LinearWeight::GateUp { gate: part(&gate), up: part(&up) }).expect("loads"),
                down: stacked("down_projection", HIDDEN, 40),
                attention: AttentionLayer { layer_idx: 0, shape, qk_norm: None, rope: Some(rope) },
            }
        }

        fn step(
            &self,
            b: &CpuBackend,
            batch: &Batch,
            kv: &mut kv_blocks::KvBlocks,
        ) -> Result<(Vec<Sampled>, Vec<f32>)> {
            let mut hidden = b.embed(&self.embedding, batch)?;
            let qkv = b.linear(&b.rms_norm(&hidden, &self.norm)?, &self.qkv)?;
            let q = b.rope_and_store(qkv, &self.attention, batch, kv)?;
            b.linear_add(&mut hidden, &b.paged_attention(&q, &self.attention, batch, kv)?, &self.o)?;
            let inner = b.linear_swiglu(&b.rms_norm(&hidden, &self.norm)?, &self.gate_up)?;
            b.linear_add(&mut hidden, &inner, &self.down)?;
            let x = b.rms_norm(&b.select_outputs(&hidden, batch)?, &self.norm)?;
            Ok((b.sample(&x, &self.embedding, &batch.outputs)?, b.read_logits(&x, &self.embedding)?))
        }
    }

    /// Tokens `start..end` of each of `num_sequences` sequences, every row an output.
    fn batch(num_sequences: usize, start: usize, end: usize) -> Batch {
        let params = Arc::new(SamplingParams::greedy());
        let mut batch = Batch::default();
        for sequence in 0..num_sequences {
            let (first_row, first_block) = (batch.num_tokens(), batch.block_tables.len());
            for position in start..end {
                let sampling =
                    RowSampling { params: params.clone(), history: vec![], prompt_tokens: 0, logprobs: None };
                let kind = OutputKind::Sample(sampling);
                let (token_row, seq) = (batch.num_tokens(), SeqId(sequence as u64));
                batch.outputs.push(OutputRow { token_row, seq, position: position + 1, kind });
                batch.token_ids.push(((sequence * 31 + position * 17) % VOCAB) as u32);
                batch.positions.push(position as u32);
                batch.slots.push((sequence * 32 + position) as u32);
            }
            batch.block_tables.extend([BlockId(2 * sequence as u32), BlockId(2 * sequence as u32 + 1)]);
            batch.sequences.push(BatchSequence {
                seq: SeqId(sequence as u64),
                namespace: [0; 32],
                rows: first_row..batch.num_tokens(),
                context_tokens: end,
                blocks: first_block..batch.block_tables.len(),
            });
        }
        batch
    }

    fn pool(b: &CpuBackend) -> kv_blocks::KvBlocks {
        let (num_layers, num_blocks, block_tokens, dtype) = (1, 80, 16, KvDtype::F16);
        b.allocate_kv(KvLayout { num_layers, num_blocks, block_tokens, num_kv_heads: 2, head_dim: 8, dtype })
            .expect("small")
    }

    /// A row gives the same token and the same logit bits alone as in a batch whose outputs fill several tiles of
    /// logits, on any number of threads; the tokens are the largest logits.
    #[test]
    fn outputs_do_not_depend_on_the_batch() {
        let alone = backend(1, WeightFormat::Auto);
        let layer = Layer::load(&alone);
        let mut kv = pool(&alone);
        let mut want = Vec::new();
        for position in 0..20 {
            want.push(layer.step(&alone, &batch(1, position, position + 1), &mut kv).expect("runs"));
        }
        for threads in 1..=3 {
            let b = backend(threads, WeightFormat::Auto);
            let layer = Layer::load(&b);
            let (sampled, logits) = layer.step(&b, &batch(5, 0, 20), &mut pool(&b)).expect("runs");
            assert_eq!(sampled.len(), 100);
            for (row, (one, one_logits)) in want.iter().enumerate() {
                assert_eq!(sampled[row], one[0], "row {row}, {threads} threads");
                assert_eq!(logits[row * VOCAB..][..VOCAB], one_logits[..], "row {row}, {threads} threads");
                let Outcome::Token { token_id, .. } = one[0].outcome else { panic!("row {row} is not finite") };
                assert!(one_logits.iter().all(|&logit| logit <= one_logits[token_id as usize]), "row {row}");
            }
        }
    }

    /// After one step of each size no buffer is allocated any more.
    #[test]
    fn steady_state_allocates_no_buffers() {
        let b = backend(2, WeightFormat::Auto);
        let layer = Layer::load(&b);
        let mut kv = pool(&b);
        let mut round = || {
            for batch in [batch(1, 0, 20), batch(40, 0, 1), batch(3, 0, 1)] {
                layer.step(&b, &batch, &mut kv).expect("runs");
            }
            b.arena.num_allocations()
        };
        let warm = round();
        assert!(warm > 0);
        assert_eq!((round(), round()), (warm, warm));
    }

    /// The form of the weights is the checkpoint's unless the options say otherwise, part by part.
    #[test]
    fn weight_formats_are_resolved() {
        let auto = backend(1, WeightFormat::Auto);
        let (a, mut b) = (tensor("a", &[32, 4]), tensor("b", &[32, 4]));
        let part = |weight| LinearPart { weight, bias: None };
        let formats = |backend: &CpuBackend, parts: &[LinearPart<'_>]| {
            let packed = backend.load_linear(LinearWeight::Stacked(parts)).expect("loads");
            packed.formats().map(linear::WeightFormat::name).collect::<Vec<_>>()
        };
        assert_eq!(formats(&auto, &[part(&a)]), ["f32"]);
        b.encoding = DType::Bf16.into();
        b.data.truncate(32 * 4 * 2);
        assert_eq!(formats(&auto, &[part(&b)]), ["bf16"]);
        assert_eq!(formats(&auto, &[part(&a), part(&b)]), ["f32", "bf16"]);
        assert_eq!(formats(&backend(1, WeightFormat::F16), &[part(&a), part(&b)]), ["f16"]);
        assert_eq!(auto.weights_bytes(), 32 * 4 * (4 + 2 + 4 + 2));
        let quantized = backend(1, WeightFormat::Quant(QuantType::Q8_0));
        let wide = tensor("c", &[32, 64]);
        assert_eq!(formats(&quantized, &[part(&wide)]), ["q8_0"]);
        assert_eq!(quantized.operand_format(), OperandFormat::Int8);
        assert_eq!(formats(&quantized, &[part(&a)]), ["f16"], "no whole blocks");
        assert_eq!(quantized.operand_format(), OperandFormat::F32AndInt8);
    }

    /// Tensors and sizes that do not fit are typed errors that name them.
    #[test]
    fn misfits_are_errors() {
        let b = backend(1, WeightFormat::Auto);
        let load = |weight: &Tensor, bias: Option<&Tensor>| {
            b.load_linear(LinearWeight::Stacked(&[LinearPart { weight, bias }]))
        };
        let mut wide = tensor("wide", &[2, 32]);
        wide.data[4 * 40..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let quantized = backend(1, WeightFormat::Quant(QuantType::Q8_0));
        let part = LinearPart { weight: &wide, bias: None };
        let error = quantized.load_linear(LinearWeight::GateUp { gate: part, up: part }).err();
        assert_eq!(error, Some(Error::NonFiniteWeights { name: "wide, wide".to_string() }));
        let matrix = tensor("w", &[4, 6]);
        let error = load(&tensor("cube", &[2, 2, 2]), None).err();
        assert!(matches!(&error, Some(Error::TensorShape { name, .. }) if name == "cube"), "{error:?}");
        let error = load(&matrix, Some(&tensor("b", &[5]))).err();
        assert!(matches!(&error, Some(Error::TensorShape { name, .. }) if name == "b"), "{error:?}");
        let error = b.load_norm(&tensor("n", &[2, 3]), 0.0).err();
        assert!(matches!(&error, Some(Error::TensorShape { name, .. }) if name == "n"), "{error:?}");
        let layout = KvLayout {
            num_layers: 1,
            num_blocks: 1,
            block_tokens: 20,
            num_kv_heads: 1,
            head_dim: 8,
            dtype: KvDtype::F32,
        };
        let error = b.allocate_kv(layout).err();
        assert!(matches!(error, Some(Error::InvalidArgument { field: "block_tokens", .. })), "{error:?}");
        let mut wrong = batch(1, 0, 1);
        wrong.token_ids[0] = VOCAB as u32;
        let error = b.embed(&Layer::load(&b).embedding, &wrong).err();
        assert!(matches!(error, Some(Error::Internal { .. })), "{error:?}");
    }
}

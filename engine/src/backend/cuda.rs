//! The fused operations on a CUDA device, through `ns_llm_kernels::cuda`: buffers are found, shapes and errors
//! translated, kernels enqueued; nothing waits for the device but what reads back (tokens, logits, vectors, KV blocks).
//! The device is a [`Driver`]: a GPU, or in tests a CPU that plays one.
//!
//! Matrices are kept in bf16, Q8_0 or Q4_K (`weights.rs`); activations are f32 between operations and bf16 (or 8 bits
//! beside quantized weights) inside products; keys and values are f16 or bf16.
//!
//! What kernels read of a step (ids, positions, slots, block tables) is copied once, when its embedding is asked for.
//! Steps that decode are captured and launched as one, and the host is one step behind the device (`pipeline.rs`).

mod bucket;
mod device_rows;
mod pipeline;
pub(crate) mod plan;
mod sample;
mod step;
mod weights;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::bf16;
use ns_llm_kernels as kernels;
use ns_llm_kernels::cuda::attention::{
    ActivationRows, ActivationType, AttentionLayer as DeviceAttention, AttentionScratch, paged_attention,
};
use ns_llm_kernels::cuda::driver::{Driver, wait};
use ns_llm_kernels::cuda::forms::Forms;
use ns_llm_kernels::cuda::matmul_quant::{QuantOutput, QuantRows, QuantRowsMut, multiply_quant, quantize_rows};
use ns_llm_kernels::cuda::memory::{Buffer, Memory};
use ns_llm_kernels::cuda::norm::{
    LayerNorm, RmsNorm, layer_norm, layer_norm_both, layer_norm_rows, rms_norm, rms_norm_rows,
};
use ns_llm_kernels::cuda::product::{Gelu as DeviceGelu, Output, multiply, multiply_swiglu};
use ns_llm_kernels::cuda::{activation, embedding, kv_blocks, rope};

use crate::backend::{
    AttentionLayer, Backend, Gelu, Int8Blocks, KvDtype, KvLayout, Launched, LinearWeight, Pooling, RopeTable,
    StepLimits, pooled_on_host,
};
use crate::batch::{Batch, OutputRow, Sampled};
use crate::config::WeightFormat;
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::stats::CudaGraphStats;
use crate::tensor::Tensor;
use bucket::Bucket;
use pipeline::Pipeline;
use sample::HostSampler;
use step::Step;
pub(crate) use weights::packed_bytes;
pub use weights::{CudaLinear, DeviceWeights};

/// Columns of activations that share a scale when they are rounded to 8 bits.
const GROUP_COLUMNS: usize = kernels::cuda::matmul_quant::GROUP_COLUMNS;
/// What working memory is for, in errors.
const ACTIVATIONS: &str = "activations on the device";

/// A CUDA device.
pub struct CudaBackend {
    memory: Arc<Memory>,
    /// As the user named it, such as "cuda:0".
    name: String,
    weights: WeightFormat,
    /// Which forms of a product the device has.
    product_forms: Forms,
    weights_bytes: AtomicU64,
    /// What the matrices that were loaded so far multiply.
    wanted: Mutex<OperandForms>,
    /// The step at hand; its first operation makes it, or takes the one that was prepared.
    step: Mutex<Option<Step>>,
    prepared: Mutex<Option<Step>>,
    /// Counters that attention leaves at zero; those of captured steps are never replaced.
    arrivals: Mutex<Option<Buffer<u32>>>,
    captured_arrivals: Mutex<Option<Buffer<u32>>>,
    sampler: Mutex<HostSampler>,
    /// How steps overlap; `None` until it is known what steps there will be: each is then waited for. Not here while a
    /// step is launched.
    pipeline: Mutex<Option<Pipeline>>,
    /// The tokens of the step that was launched last, `[outputs]`.
    chosen: Mutex<Option<Buffer<u32>>>,
    limits: Option<StepLimits>,
}

/// In which forms products want their activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct OperandForms {
    bf16: bool,
    int8: bool,
}

/// f32 activations `[rows, width]`, rows `stride` elements apart.
pub struct CudaRows {
    values: Buffer<f32>,
    rows: usize,
    width: usize,
    stride: usize,
}

/// Activations `[rows, width]` as products read them: in each form that a matrix of the model wants.
pub struct CudaOperand {
    rows: usize,
    width: usize,
    bf16: Option<Buffer<bf16>>,
    int8: Option<Int8Rows>,
}

/// Codes `[rows, width]`, with scale and sum of each group of 32.
struct Int8Rows {
    codes: Buffer<i8>,
    scales: Buffer<f32>,
    sums: Buffer<i32>,
}

/// A norm's weight and epsilon.
pub struct CudaNorm {
    weight: Buffer<f32>,
    eps: f32,
}

/// A rotary table on the device.
pub struct CudaRope {
    rotary_dim: usize,
    cosines: Buffer<f32>,
    sines: Buffer<f32>,
}

/// KV blocks on the device.
pub struct CudaKv {
    /// Locked by the worker alone: attention only reads, but says so to no launcher.
    elements: Mutex<Buffer<u16>>,
    layout: kv_blocks::KvLayout,
}

/// A LayerNorm's weight, bias and epsilon.
pub struct CudaLayerNorm {
    weight: Buffer<f32>,
    bias: Buffer<f32>,
    eps: f32,
}

impl CudaBackend {
    /// On a device that is open. `name` is what the user calls it.
    pub fn new(driver: Arc<dyn Driver>, name: impl Into<String>, weights: WeightFormat) -> CudaBackend {
        let memory = Memory::new(driver);
        CudaBackend {
            product_forms: Forms::of(&memory),
            memory,
            name: name.into(),
            weights,
            weights_bytes: AtomicU64::new(0),
            wanted: Mutex::default(),
            step: Mutex::default(),
            prepared: Mutex::default(),
            arrivals: Mutex::default(),
            captured_arrivals: Mutex::default(),
            sampler: Mutex::default(),
            pipeline: Mutex::default(),
            chosen: Mutex::default(),
            limits: None,
        }
    }

    /// Whether products of many rows are those of warpgroups, Hopper's own instructions.
    pub fn has_warpgroups(&self) -> bool {
        self.product_forms.has_warpgroups()
    }

    /// Bytes of all matrices, biases and norms so far.
    pub fn weights_bytes(&self) -> u64 {
        self.weights_bytes.load(Ordering::Relaxed)
    }

    fn driver(&self) -> &Arc<dyn Driver> {
        self.memory.driver()
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What went wrong, for the engine.
    fn failed(&self, error: kernels::error::Error) -> Error {
        device_error(&self.name, error)
    }

    fn floats(&self, rows: usize, width: usize) -> Result<CudaRows> {
        let values = self.memory.scratch(ACTIVATIONS, rows * width).map_err(|error| self.failed(error))?;
        Ok(CudaRows { values, rows, width, stride: width })
    }

    fn halves(&self, rows: usize, width: usize) -> Result<Buffer<bf16>> {
        self.memory.scratch(ACTIVATIONS, rows * width).map_err(|error| self.failed(error))
    }

    /// The forms of rows of this width: those that are not whole groups have no 8-bit form, and no matrix that wants it.
    fn forms(&self, width: usize) -> OperandForms {
        let wanted = *self.lock(&self.wanted);
        let int8 = wanted.int8 && width.is_multiple_of(GROUP_COLUMNS);
        OperandForms { bf16: wanted.bf16 || !int8, int8 }
    }

    /// f32 rows in the forms that products want.
    fn operand(&self, x: &Buffer<f32>, rows: usize, width: usize) -> Result<CudaOperand> {
        let (forms, mut operand) = (self.forms(width), CudaOperand { rows, width, bf16: None, int8: None });
        if forms.bf16 {
            let mut out = self.halves(rows, width)?;
            activation::round_rows(self.driver(), x.all(), &mut out.all_mut()).map_err(|error| self.failed(error))?;
            operand.bf16 = Some(out);
        }
        if forms.int8 {
            operand.int8 = Some(self.rounded(x, rows, width)?);
        }
        Ok(operand)
    }

    /// f32 rows in 8 bits.
    fn rounded(&self, x: &Buffer<f32>, rows: usize, width: usize) -> Result<Int8Rows> {
        let groups = rows * width / GROUP_COLUMNS;
        let round = || {
            let mut int8 = Int8Rows {
                codes: self.memory.scratch(ACTIVATIONS, rows * width)?,
                scales: self.memory.scratch(ACTIVATIONS, groups)?,
                sums: self.memory.scratch(ACTIVATIONS, groups)?,
            };
            let mut out =
                QuantRowsMut { codes: int8.codes.all_mut(), scales: int8.scales.all_mut(), sums: int8.sums.all_mut() };
            quantize_rows(self.driver(), x.all(), width, &mut out)?;
            Ok(int8)
        };
        round().map_err(|error| self.failed(error))
    }

    /// `x W^T + bias` of the rows `rows` of `x`, written to `out` or added to it.
    fn product(
        &self,
        x: &CudaOperand,
        rows: std::ops::Range<usize>,
        weight: &CudaLinear,
        out: &mut Buffer<f32>,
        adds: bool,
    ) -> Result<()> {
        let columns = rows.start * x.width..rows.end * x.width;
        let mut out = out.all_mut();
        let launched = match weight.quantized() {
            None => {
                let x = x.bf16.as_ref().ok_or_else(|| no_form("bf16"))?;
                let output = if adds { Output::Add(&mut out) } else { Output::Store(&mut out) };
                let matrix = weight.bf16().ok_or_else(|| no_form("bf16"))?;
                let form = self.product_forms.for_sizes(rows.len(), matrix.features);
                multiply(self.driver(), form, x.slice(columns), &matrix, output)
            }
            Some(matrix) => {
                let x = x.int8.as_ref().ok_or_else(|| no_form("8 bits"))?;
                let groups = columns.start / GROUP_COLUMNS..columns.end / GROUP_COLUMNS;
                let rows = QuantRows {
                    codes: x.codes.slice(columns),
                    scales: x.scales.slice(groups.clone()),
                    sums: x.sums.slice(groups),
                };
                let output = if adds { QuantOutput::Add(&mut out) } else { QuantOutput::Store(&mut out) };
                multiply_quant(self.driver(), &rows, &matrix, output)
            }
        };
        launched.map_err(|error| self.failed(error))
    }

    fn filled<T: kernels::host::Plain>(&self, purpose: &'static str, values: &[T]) -> Result<Buffer<T>> {
        self.memory.filled(purpose, &[values]).map_err(|error| self.failed(error))
    }

    /// The step that `batch` is.
    fn with_step<R>(&self, batch: &Batch, body: impl FnOnce(&mut Step) -> Result<R>) -> Result<R> {
        let mut step = self.lock(&self.step);
        let step = step.as_mut().filter(|step| step.is_of(batch));
        body(step.expect("the embedding of a batch is the first operation on it"))
    }
}

impl Backend for CudaBackend {
    type Rows = CudaRows;
    type Operand = CudaOperand;
    type Linear = CudaLinear;
    type Norm = CudaNorm;
    type LayerNorm = CudaLayerNorm;
    type Rope = CudaRope;
    type Kv = CudaKv;

    fn load_linear(&self, weight: LinearWeight<'_>) -> Result<CudaLinear> {
        let linear = CudaLinear::load(&self.memory, self.weights, &weight, |error| self.failed(error))?;
        self.weights_bytes.fetch_add(linear.len_bytes(), Ordering::Relaxed);
        let mut wanted = self.lock(&self.wanted);
        match linear.quantized() {
            Some(_) => wanted.int8 = true,
            None => wanted.bf16 = true,
        }
        drop(wanted);
        Ok(linear)
    }

    fn load_norm(&self, weight: &Tensor, eps: f32) -> Result<CudaNorm> {
        weight.expect_shape(&[weight.num_elements()])?;
        let weight = self.filled("a norm on the device", &weight.to_f32())?;
        self.weights_bytes.fetch_add(weight.size_bytes() as u64, Ordering::Relaxed);
        Ok(CudaNorm { weight, eps })
    }

    fn load_layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<CudaLayerNorm> {
        weight.expect_shape(&[weight.num_elements()])?;
        bias.expect_shape(&[weight.num_elements()])?;
        let purpose = "a norm on the device";
        let (weight, bias) = (self.filled(purpose, &weight.to_f32())?, self.filled(purpose, &bias.to_f32())?);
        self.weights_bytes.fetch_add((weight.size_bytes() + bias.size_bytes()) as u64, Ordering::Relaxed);
        Ok(CudaLayerNorm { weight, bias, eps })
    }

    fn load_rope(&self, table: RopeTable) -> Result<CudaRope> {
        let purpose = "the rotary table on the device";
        let (cosines, sines) = (self.filled(purpose, &table.cos)?, self.filled(purpose, &table.sin)?);
        Ok(CudaRope { rotary_dim: table.rotary_dim, cosines, sines })
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<CudaKv> {
        let device_layout = kv_layout(layout)?;
        debug_assert_eq!(device_layout.block_bytes() as u64, layout.block_bytes(), "the plan counts what is allocated");
        let elements = self.memory.zeroed("KV pool on the device", device_layout.block_len() * layout.num_blocks);
        let elements = Mutex::new(elements.map_err(|error| self.failed(error))?);
        Ok(CudaKv { elements, layout: device_layout })
    }

    fn embed(&self, embedding: &CudaLinear, batch: &Batch) -> Result<CudaRows> {
        let prepared = self.lock(&self.prepared).take();
        let begin = || {
            let mut step = prepared.map_or_else(|| Step::new(&self.memory, batch), Ok)?;
            step.feed_back(&self.memory, self.lock(&self.chosen).as_ref())?;
            Ok(step)
        };
        let step = begin().map_err(|error| self.failed(error))?;
        assert!(step.is_of(batch), "a step was prepared for another batch");
        let mut rows = self.floats(batch.num_tokens(), embedding.columns)?;
        embedding.embed(self.driver(), step.token_ids(), &mut rows.values).map_err(|error| self.failed(error))?;
        *self.lock(&self.step) = Some(step);
        Ok(rows)
    }

    fn add_embedding(&self, hidden: &mut CudaRows, embedding: &CudaLinear, indices: &[u32]) -> Result<()> {
        let mut add = || {
            let mut on_device = self.memory.scratch(ACTIVATIONS, indices.len())?;
            on_device.upload(0, indices)?;
            embedding.add_embedding(&self.memory, on_device.all(), &mut hidden.values)
        };
        add().map_err(|error| self.failed(error))
    }

    fn add_position_embedding(&self, hidden: &mut CudaRows, embedding: &CudaLinear, batch: &Batch) -> Result<()> {
        self.with_step(batch, |step| {
            embedding
                .add_embedding(&self.memory, step.positions(), &mut hidden.values)
                .map_err(|error| self.failed(error))
        })
    }

    fn rms_norm(&self, hidden: &CudaRows, norm: &CudaNorm) -> Result<CudaOperand> {
        let &CudaRows { rows, width, .. } = hidden;
        if self.forms(width).int8 {
            let normed = self.rms_norm_rows(hidden, norm)?;
            return self.operand(&normed.values, rows, width);
        }
        let mut out = self.halves(rows, width)?;
        rms_norm(self.driver(), hidden.values.all(), &norm.parameters(), &mut out.all_mut())
            .map_err(|error| self.failed(error))?;
        Ok(CudaOperand { rows, width, bf16: Some(out), int8: None })
    }

    fn rms_norm_rows(&self, hidden: &CudaRows, norm: &CudaNorm) -> Result<CudaRows> {
        let mut rows = self.floats(hidden.rows, hidden.width)?;
        rms_norm_rows(self.driver(), hidden.values.all(), &norm.parameters(), &mut rows.values.all_mut())
            .map_err(|error| self.failed(error))?;
        Ok(rows)
    }

    fn layer_norm(&self, hidden: &CudaRows, norm: &CudaLayerNorm) -> Result<CudaOperand> {
        let &CudaRows { rows, width, .. } = hidden;
        if self.forms(width).int8 {
            let normed = self.layer_norm_rows(hidden, norm)?;
            return self.operand(&normed.values, rows, width);
        }
        let mut out = self.halves(rows, width)?;
        layer_norm(self.driver(), hidden.values.all(), &norm.parameters(), &mut out.all_mut())
            .map_err(|error| self.failed(error))?;
        Ok(CudaOperand { rows, width, bf16: Some(out), int8: None })
    }

    /// The rows get other memory: what was theirs is read until the last of them is normed.
    fn layer_norm_in_place(&self, hidden: &mut CudaRows, norm: &CudaLayerNorm) -> Result<CudaOperand> {
        let &mut CudaRows { rows, width, .. } = hidden;
        if self.forms(width).int8 {
            *hidden = self.layer_norm_rows(hidden, norm)?;
            return self.operand(&hidden.values, rows, width);
        }
        let (mut normed, mut out) = (self.floats(rows, width)?, self.halves(rows, width)?);
        let (x, to) = (hidden.values.all(), &mut normed.values.all_mut());
        layer_norm_both(self.driver(), x, &norm.parameters(), to, &mut out.all_mut())
            .map_err(|error| self.failed(error))?;
        *hidden = normed;
        Ok(CudaOperand { rows, width, bf16: Some(out), int8: None })
    }

    fn linear(&self, x: &CudaOperand, weight: &CudaLinear) -> Result<CudaRows> {
        let mut out = self.floats(x.rows, weight.features)?;
        self.product(x, 0..x.rows, weight, &mut out.values, false)?;
        Ok(out)
    }

    fn linear_add(&self, hidden: &mut CudaRows, x: &CudaOperand, weight: &CudaLinear) -> Result<()> {
        self.product(x, 0..x.rows, weight, &mut hidden.values, true)
    }

    fn linear_swiglu(&self, x: &CudaOperand, gate_up: &CudaLinear) -> Result<CudaOperand> {
        let (rows, width) = (x.rows, gate_up.features / 2);
        // Fused where the product has it and its result is what the next one reads.
        if let (Some([gate, up]), Some(x), false) = (gate_up.gate_and_up(), &x.bf16, self.forms(width).int8) {
            let mut out = self.halves(rows, width)?;
            let form = self.product_forms.for_sizes(rows, gate_up.features);
            multiply_swiglu(self.driver(), form, x.all(), [&gate, &up], &mut out.all_mut())
                .map_err(|error| self.failed(error))?;
            return Ok(CudaOperand { rows, width, bf16: Some(out), int8: None });
        }
        let both = self.linear(x, gate_up)?;
        let mut inner = self.floats(rows, width)?;
        activation::swiglu_rows(self.driver(), both.values.all(), width, &mut inner.values.all_mut())
            .map_err(|error| self.failed(error))?;
        self.operand(&inner.values, rows, width)
    }

    fn linear_gelu(&self, x: &CudaOperand, weight: &CudaLinear, gelu: Gelu) -> Result<CudaOperand> {
        let (rows, width) = (x.rows, weight.features);
        let gelu = match gelu {
            Gelu::Erf => DeviceGelu::Erf,
            Gelu::Tanh => DeviceGelu::Tanh,
        };
        // Fused where the product has it and its result is what the next one reads.
        if let (Some(matrix), Some(x), false) = (weight.bf16(), &x.bf16, self.forms(width).int8) {
            let mut out = self.halves(rows, width)?;
            let form = self.product_forms.for_sizes(rows, width);
            multiply(self.driver(), form, x.all(), &matrix, Output::Gelu(gelu, &mut out.all_mut()))
                .map_err(|error| self.failed(error))?;
            return Ok(CudaOperand { rows, width, bf16: Some(out), int8: None });
        }
        let sums = self.linear(x, weight)?;
        let mut inner = self.floats(rows, width)?;
        activation::gelu_rows(self.driver(), gelu, sums.values.all(), &mut inner.values.all_mut())
            .map_err(|error| self.failed(error))?;
        self.operand(&inner.values, rows, width)
    }

    /// q stays where it is: the result is the first columns of `qkv`.
    fn rope_and_store(
        &self,
        mut qkv: CudaRows,
        layer: &AttentionLayer<Self>,
        batch: &Batch,
        kv: &mut CudaKv,
    ) -> Result<CudaRows> {
        // Where nothing rotates, k and v are stored as they are.
        let table = layer.rope.as_ref().map(|table| rope::RopeTable {
            rotary_dim: table.rotary_dim,
            cosines: table.cosines.all(),
            sines: table.sines.all(),
        });
        let rope_layer = rope::RopeLayer {
            layer_idx: kv.layer_idx(layer),
            num_heads: layer.shape.num_heads,
            qk_norm: layer.qk_norm.as_ref().map(|(q, k)| (q.parameters(), k.parameters())),
            rope: table.unwrap_or(rope::RopeTable::NONE),
        };
        let mut elements = self.lock(&kv.elements);
        self.with_step(batch, |step| {
            let mut blocks = kv_blocks::KvBlocks { elements: elements.all_mut(), layout: kv.layout };
            let (positions, slots) = (step.positions(), step.slots());
            rope::rope_and_store(self.driver(), &mut qkv.values.all_mut(), &rope_layer, positions, slots, &mut blocks)
                .map_err(|error| self.failed(error))
        })?;
        qkv.width = layer.shape.num_heads * layer.shape.head_dim;
        Ok(qkv)
    }

    fn paged_attention(
        &self,
        q: &CudaRows,
        layer: &AttentionLayer<Self>,
        batch: &Batch,
        kv: &CudaKv,
    ) -> Result<CudaOperand> {
        let (rows, width, shape) = (q.rows, q.width, &layer.shape);
        let device_layer = DeviceAttention {
            layer_idx: kv.layer_idx(layer),
            num_heads: shape.num_heads,
            scale: shape.scale,
            sliding_window_tokens: shape.sliding_window_tokens,
            causal: shape.causal,
        };
        let queries =
            ActivationRows { bytes: q.values.bytes(), activation_type: ActivationType::F32, stride: q.stride };
        let mut elements = self.lock(&kv.elements);
        let blocks = kv_blocks::KvBlocks { elements: elements.all_mut(), layout: kv.layout };
        self.with_step(batch, |step| {
            let step_bucket = step.bucket();
            let plan = step.attention(&self.memory, batch, shape).map_err(|error| self.failed(error))?;
            let (num_partials, num_arrivals) = plan.plan.scratch_len();
            let mut partials = self.memory.scratch(ACTIVATIONS, num_partials).map_err(|error| self.failed(error))?;
            let mut arrivals = self.arrivals(num_arrivals, step_bucket)?;
            let mut attend = |out: &mut kernels::cuda::launch::SliceMut<'_, u8>, out_type| {
                let arrivals = arrivals.as_mut().expect("there are some now").all_mut();
                let mut scratch = AttentionScratch { partials: partials.all_mut(), arrivals };
                paged_attention(self.driver(), &device_layer, &plan, &queries, &blocks, &mut scratch, (out, out_type))
                    .map_err(|error| self.failed(error))
            };
            if self.forms(width).int8 {
                let mut out = self.floats(rows, width)?;
                attend(&mut out.values.bytes_mut(), ActivationType::F32)?;
                return self.operand(&out.values, rows, width);
            }
            let mut out = self.halves(rows, width)?;
            attend(&mut out.bytes_mut(), ActivationType::Bf16)?;
            Ok(CudaOperand { rows, width, bf16: Some(out), int8: None })
        })
    }

    fn select_outputs(&self, hidden: &CudaRows, batch: &Batch) -> Result<CudaRows> {
        let mut selected = self.floats(batch.outputs.len(), hidden.width)?;
        self.with_step(batch, |step| {
            let table = embedding::Table { rows: hidden.values.all(), width: hidden.width };
            embedding::select_rows(self.driver(), &table, step.output_rows(), &mut selected.values.all_mut())
                .map_err(|error| self.failed(error))
        })?;
        Ok(selected)
    }

    fn sample(&self, x: &CudaOperand, output: &CudaLinear, outputs: &[OutputRow]) -> Result<Vec<Sampled>> {
        assert_eq!(x.rows, outputs.len(), "one row per output");
        sample::sample(self, x, output, outputs)
    }

    fn prepare(&mut self, limits: &StepLimits) -> Result<()> {
        let (pipeline, chosen) = Pipeline::new(&self.memory, *limits).map_err(|error| self.failed(error))?;
        self.limits = Some(*limits);
        *self.lock(&self.pipeline) = Some(pipeline);
        *self.lock(&self.chosen) = Some(chosen);
        Ok(())
    }

    fn launch(
        &self,
        batch: &Batch,
        output: &CudaLinear,
        forward: &mut dyn FnMut(&Batch) -> Result<CudaOperand>,
    ) -> Result<Launched> {
        let Some(mut pipeline) = self.lock(&self.pipeline).take() else {
            return Ok(Launched::Sampled(self.sample(&forward(batch)?, output, &batch.outputs)?));
        };
        let launched = pipeline.launch(self, batch, output, forward);
        *self.lock(&self.pipeline) = Some(pipeline);
        launched
    }

    fn collect(&self, launched: Launched) -> Result<Vec<Sampled>> {
        match launched {
            Launched::Sampled(sampled) => Ok(sampled),
            Launched::UnderWay(rows) => {
                self.lock(&self.pipeline).as_mut().expect("it launched the step").collect(self, rows)
            }
        }
    }

    fn max_in_flight(&self) -> usize {
        if self.limits.is_some() { pipeline::MAX_IN_FLIGHT } else { 1 }
    }

    fn graph_stats(&self) -> Option<CudaGraphStats> {
        self.lock(&self.pipeline).as_ref().map(Pipeline::graph_stats)
    }

    fn read_logits(&self, x: &CudaOperand, output: &CudaLinear) -> Result<Vec<f32>> {
        let rows = self.linear(x, output)?;
        self.read(&rows.values, 0..rows.values.len())
    }

    fn pool(&self, hidden: &CudaRows, batch: &Batch, pooling: Pooling) -> Result<Vec<Vec<f32>>> {
        let states = self.read(&hidden.values, 0..hidden.values.len())?;
        pooled_on_host(&states, hidden.width, batch, pooling)
    }

    fn int8_blocks(layout: KvLayout) -> Result<Option<Int8Blocks>> {
        Ok(Some(kv_layout(layout)?.int8_blocks()))
    }

    fn read_blocks(&self, kv: &CudaKv, blocks: &[BlockId]) -> Result<Vec<Arc<[u8]>>> {
        let block_bytes = kv.layout.block_bytes();
        let starts: Vec<usize> = blocks.iter().map(|block| block.0 as usize * block_bytes).collect();
        let elements = self.lock(&kv.elements);
        elements.download_pieces(&starts, block_bytes).map_err(|error| self.failed(error))
    }

    fn write_block(&self, kv: &mut CudaKv, block: BlockId, bytes: &[u8]) -> Result<()> {
        let block_bytes = kv.layout.block_bytes();
        if bytes.len() != block_bytes {
            let reason = format!("{} bytes for a block of {block_bytes}", bytes.len());
            return Err(Error::Internal { reason });
        }
        let mut elements = self.lock(&kv.elements);
        elements.upload_bytes(block.0 as usize * block_bytes, bytes).map_err(|error| self.failed(error))
    }
}

impl CudaBackend {
    fn read(&self, values: &Buffer<f32>, range: std::ops::Range<usize>) -> Result<Vec<f32>> {
        let mut out = vec![0.0; range.len()];
        values.download(range.start, &mut out).map_err(|error| self.failed(error))?;
        Ok(out)
    }

    fn layer_norm_rows(&self, hidden: &CudaRows, norm: &CudaLayerNorm) -> Result<CudaRows> {
        let mut rows = self.floats(hidden.rows, hidden.width)?;
        layer_norm_rows(self.driver(), hidden.values.all(), &norm.parameters(), &mut rows.values.all_mut())
            .map_err(|error| self.failed(error))?;
        Ok(rows)
    }

    /// At least `len` counters, all of them zero. Steps of buckets have their own, as many as the largest bucket needs.
    fn arrivals(&self, len: usize, bucket: Option<Bucket>) -> Result<MutexGuard<'_, Option<Buffer<u32>>>> {
        let (mut arrivals, len) = match (bucket, self.limits) {
            (Some(bucket), Some(limits)) => {
                (self.lock(&self.captured_arrivals), len.div_ceil(bucket.rows) * bucket::max_rows(&limits))
            }
            _ => (self.lock(&self.arrivals), len.next_power_of_two()),
        };
        if arrivals.as_ref().is_none_or(|arrivals| arrivals.len() < len) {
            if arrivals.is_some() {
                // A driver frees behind what runs, and would wait for ever for a step that hangs.
                wait(&**self.driver()).map_err(|error| self.failed(error))?;
            }
            *arrivals = Some(self.memory.zeroed(ACTIVATIONS, len).map_err(|error| self.failed(error))?);
        }
        Ok(arrivals)
    }
}

impl CudaLayerNorm {
    fn parameters(&self) -> LayerNorm<'_> {
        LayerNorm { weight: self.weight.all(), bias: self.bias.all(), eps: self.eps }
    }
}

impl CudaNorm {
    fn parameters(&self) -> RmsNorm<'_> {
        RmsNorm { weight: self.weight.all(), eps: self.eps }
    }
}

impl CudaKv {
    /// Where a layer's keys and values are: blocks of one layer are used by each layer in turn.
    fn layer_idx(&self, layer: &AttentionLayer<CudaBackend>) -> usize {
        layer.layer_idx.min(self.layout.num_layers - 1)
    }
}

/// The same sizes, as the kernels have them.
fn kv_layout(layout: KvLayout) -> Result<kv_blocks::KvLayout> {
    let KvLayout { num_layers, num_blocks, block_tokens, num_kv_heads, head_dim, dtype } = layout;
    let dtype = match dtype {
        KvDtype::F16 => kv_blocks::KvDtype::F16,
        KvDtype::Bf16 => kv_blocks::KvDtype::Bf16,
        KvDtype::F32 | KvDtype::Int8 => {
            let (value, expected) = (dtype.name().to_owned(), plan::KV_DTYPES.to_owned());
            return Err(Error::InvalidArgument { field: "kv_dtype", value, expected });
        }
    };
    Ok(kv_blocks::KvLayout { num_layers, num_blocks, block_tokens, num_kv_heads, head_dim, dtype })
}

/// Activations were made for matrices that the model does not have: a defect.
fn no_form(form: &'static str) -> Error {
    Error::Internal { reason: format!("activations are not there in {form}") }
}

/// What a device said, for the engine: its memory is full, it is gone, or two parts of this engine disagree.
pub(crate) fn device_error(device: &str, error: kernels::error::Error) -> Error {
    use kernels::error::Error as Kernel;
    match error {
        Kernel::OutOfMemory { purpose, needed_bytes, available_bytes } => {
            Error::OutOfMemory { purpose, needed_bytes, available_bytes }
        }
        Kernel::DeviceLost { .. } => Error::DeviceLost { device: device.to_owned(), reason: error.to_string() },
        other => Error::Internal { reason: format!("{device}: {other}") },
    }
}

//! A backend that only counts: loading a model on it, from the outline of its weights, tells the bytes that a device would
//! take, exactly and without reading any. It goes the same way as a real load, so it also finds what is missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{
    AttentionLayer, Backend, Gelu, Int8Blocks, KvLayout, LinearWeight, Pooling, RopeTable, cpu, cuda,
};
use crate::batch::{Batch, OutputRow, Sampled};
use crate::config::WeightFormat;
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::tensor::Tensor;

/// Counts the bytes of matrices and norms.
pub struct Measure {
    weights: WeightFormat,
    /// Bytes of a matrix in that form; `None` if nothing can count them.
    packed_bytes: fn(WeightFormat, &LinearWeight<'_>) -> Option<u64>,
    bytes: AtomicU64,
}

impl Measure {
    /// For matrices in the form that a user who wants `weights` gets on the CPU.
    pub fn cpu(weights: WeightFormat) -> Measure {
        Measure { weights, packed_bytes: cpu::packed_bytes, bytes: AtomicU64::new(0) }
    }

    /// The same on a CUDA device.
    pub fn cuda(weights: WeightFormat) -> Measure {
        Measure { weights, packed_bytes: cuda::packed_bytes, bytes: AtomicU64::new(0) }
    }

    /// What was loaded so far.
    pub fn weights_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn add(&self, num_bytes: u64) {
        self.bytes.fetch_add(num_bytes, Ordering::Relaxed);
    }

    /// Norms are f32.
    fn add_vector(&self, vector: &Tensor) {
        self.add(4 * vector.num_elements() as u64);
    }
}

/// Nobody computes with what was only counted.
macro_rules! never {
    () => {
        unreachable!("a model that was only measured is not run")
    };
}

impl Backend for Measure {
    type Rows = ();
    type Operand = ();
    type Linear = ();
    type Norm = ();
    type LayerNorm = ();
    type Rope = ();
    type Kv = ();

    fn load_linear(&self, weight: LinearWeight<'_>) -> Result<()> {
        let num_bytes = (self.packed_bytes)(self.weights, &weight).ok_or(Error::OutOfMemory {
            purpose: "a matrix of the model",
            needed_bytes: u64::MAX,
            available_bytes: 0,
        })?;
        self.add(num_bytes);
        Ok(())
    }
    fn load_norm(&self, weight: &Tensor, _: f32) -> Result<()> {
        self.add_vector(weight);
        Ok(())
    }
    fn load_layer_norm(&self, weight: &Tensor, bias: &Tensor, _: f32) -> Result<()> {
        self.add_vector(weight);
        self.add_vector(bias);
        Ok(())
    }
    fn load_rope(&self, _: RopeTable) -> Result<()> {
        Ok(())
    }
    fn allocate_kv(&self, _: KvLayout) -> Result<()> {
        Ok(())
    }

    fn embed(&self, (): &(), _: &Batch) -> Result<()> {
        never!()
    }
    fn add_embedding(&self, (): &mut (), (): &(), _: &[u32]) -> Result<()> {
        never!()
    }
    fn rms_norm(&self, (): &(), (): &()) -> Result<()> {
        never!()
    }
    fn rms_norm_rows(&self, (): &(), (): &()) -> Result<()> {
        never!()
    }
    fn layer_norm(&self, (): &(), (): &()) -> Result<()> {
        never!()
    }
    fn layer_norm_in_place(&self, (): &mut (), (): &()) -> Result<()> {
        never!()
    }
    fn linear(&self, (): &(), (): &()) -> Result<()> {
        never!()
    }
    fn linear_add(&self, (): &mut (), (): &(), (): &()) -> Result<()> {
        never!()
    }
    fn linear_swiglu(&self, (): &(), (): &()) -> Result<()> {
        never!()
    }
    fn linear_gelu(&self, (): &(), (): &(), _: Gelu) -> Result<()> {
        never!()
    }
    fn rope_and_store(&self, (): (), _: &AttentionLayer<Self>, _: &Batch, (): &mut ()) -> Result<()> {
        never!()
    }
    fn paged_attention(&self, (): &(), _: &AttentionLayer<Self>, _: &Batch, (): &()) -> Result<()> {
        never!()
    }
    fn select_outputs(&self, (): &(), _: &Batch) -> Result<()> {
        never!()
    }
    fn sample(&self, (): &(), (): &(), _: &[OutputRow]) -> Result<Vec<Sampled>> {
        never!()
    }
    fn read_logits(&self, (): &(), (): &()) -> Result<Vec<f32>> {
        never!()
    }
    fn pool(&self, (): &(), _: &Batch, _: Pooling) -> Result<Vec<Vec<f32>>> {
        never!()
    }
    fn int8_blocks(_: KvLayout) -> Result<Option<Int8Blocks>> {
        Ok(None)
    }
    fn read_blocks(&self, (): &(), _: &[BlockId]) -> Result<Vec<Arc<[u8]>>> {
        never!()
    }
    fn write_block(&self, (): &mut (), _: BlockId, _: &[u8]) -> Result<()> {
        never!()
    }
}

//! What the worker knows of compute: launch a batch, collect its tokens. [`ModelExecutor`] runs a model on a backend;
//! in the scheduler's tests a fake takes its place that checks who reads whose KV.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::backend::{Backend, Int8Blocks, KvLayout, Launched, Pooling};
use crate::batch::{Batch, Sampled};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::model::Model;
use crate::stats::CudaGraphStats;

/// Runs batches, in the order in which they are launched.
pub trait Executor: Send {
    /// Starts a step. At most [`Executor::max_in_flight`] steps may be launched and not collected.
    fn launch(&mut self, batch: &Batch) -> Result<()>;
    /// Waits for the oldest launched step; one result per row of its `outputs`, in their order.
    fn collect(&mut self) -> Result<Vec<Sampled>>;
    /// Computes whole sequences, over blocks of their own, and waits for it: one vector per sequence, in their order.
    /// Called while no step is launched.
    fn encode(&mut self, batch: &Batch) -> Result<Vec<Vec<f32>>>;
    /// Tokens of a block of [`Executor::encode`]'s batches.
    fn encode_block_tokens(&self) -> usize;
    /// What blocks hold, each all layers in one piece, for a tier to keep. Ordered with the launches.
    fn read_blocks(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<[u8]>>>;
    /// Gives a block what [`Executor::read_blocks`] gave, in this process or an earlier one. Ordered with the launches.
    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()>;
    /// 1: a step must be collected before the next is launched. 2: the next may be launched first, with
    /// [`Feedback`](crate::batch::Feedback) for tokens that are not collected yet.
    fn max_in_flight(&self) -> usize {
        1
    }
    /// What became of captured steps, where there are some.
    fn graph_stats(&self) -> Option<CudaGraphStats> {
        None
    }
}

impl<E: Executor + ?Sized> Executor for Box<E> {
    fn launch(&mut self, batch: &Batch) -> Result<()> {
        (**self).launch(batch)
    }
    fn collect(&mut self) -> Result<Vec<Sampled>> {
        (**self).collect()
    }
    fn encode(&mut self, batch: &Batch) -> Result<Vec<Vec<f32>>> {
        (**self).encode(batch)
    }
    fn encode_block_tokens(&self) -> usize {
        (**self).encode_block_tokens()
    }
    fn read_blocks(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<[u8]>>> {
        (**self).read_blocks(blocks)
    }
    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()> {
        (**self).write_block(block, bytes)
    }
    fn max_in_flight(&self) -> usize {
        (**self).max_in_flight()
    }
    fn graph_stats(&self) -> Option<CudaGraphStats> {
        (**self).graph_stats()
    }
}

/// Runs one model on one backend. Owns the weights, the KV blocks and the device.
pub struct ModelExecutor<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    kv: B::Kv,
    /// Keys and values of one layer of the sequences that are being encoded; each layer takes the place of the last.
    encode_kv: B::Kv,
    encode_block_tokens: usize,
    pooling: Pooling,
    /// How blocks are written for the tiers; `None`: as they are.
    int8: Option<Int8Blocks>,
    /// Oldest first.
    launched: VecDeque<Launched>,
}

impl<B: Backend> ModelExecutor<B> {
    /// Takes over a loaded model and its KV blocks. `encode_kv`: blocks of one layer, for whole sequences; `pooling`: how
    /// their states become vectors.
    pub fn new(backend: B, model: Box<dyn Model<B>>, kv: B::Kv, encode_kv: KvLayout, pooling: Pooling) -> Result<Self> {
        let encode_block_tokens = encode_kv.block_tokens;
        let encode_kv = backend.allocate_kv(encode_kv)?;
        let (int8, launched) = (None, VecDeque::new());
        Ok(ModelExecutor { backend, model, kv, encode_kv, encode_block_tokens, pooling, int8, launched })
    }

    /// Blocks that leave the pool are written like this.
    pub fn written_as(mut self, int8: Option<Int8Blocks>) -> Self {
        self.int8 = int8;
        self
    }
}

impl<B: Backend> Executor for ModelExecutor<B> {
    fn launch(&mut self, batch: &Batch) -> Result<()> {
        assert!(self.launched.len() < self.max_in_flight(), "a step was launched before an older one was collected");
        let ModelExecutor { backend, model, kv, .. } = self;
        let launched = backend.launch(batch, model.output()?, &mut |batch| model.forward(backend, batch, kv))?;
        self.launched.push_back(launched);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Sampled>> {
        self.backend.collect(self.launched.pop_front().expect("collect() follows launch()"))
    }

    fn encode(&mut self, batch: &Batch) -> Result<Vec<Vec<f32>>> {
        assert!(self.launched.is_empty(), "sequences were encoded before the last step was collected");
        let hidden = self.model.encode(&self.backend, batch, &mut self.encode_kv)?;
        self.backend.pool(&hidden, batch, self.pooling)
    }

    fn encode_block_tokens(&self) -> usize {
        self.encode_block_tokens
    }

    fn max_in_flight(&self) -> usize {
        self.backend.max_in_flight()
    }

    fn graph_stats(&self) -> Option<CudaGraphStats> {
        self.backend.graph_stats()
    }

    fn read_blocks(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<[u8]>>> {
        let read = self.backend.read_blocks(&self.kv, blocks)?;
        Ok(match self.int8 {
            Some(int8) => read.iter().map(|bytes| int8.encode(bytes).into()).collect(),
            None => read,
        })
    }

    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()> {
        let Some(int8) = self.int8 else { return self.backend.write_block(&mut self.kv, block, bytes) };
        if bytes.len() != int8.encoded_bytes() {
            let reason = format!("{} bytes for an encoded block of {}", bytes.len(), int8.encoded_bytes());
            return Err(Error::Internal { reason });
        }
        let mut decoded = vec![0; int8.block_bytes()];
        int8.decode(bytes, &mut decoded);
        self.backend.write_block(&mut self.kv, block, &decoded)
    }
}

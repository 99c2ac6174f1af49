//! Runs a model without scheduler, worker or sampler: the test says which sequence computes which tokens in each step,
//! and reads the logits of every row. Blocks are dealt out of order, so that no block table is contiguous.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::Path;
use std::sync::Arc;

use ns_llm::backend::{Backend, KvDtype, KvLayout, Pooling};
use ns_llm::batch::{Batch, BatchSequence, OutputKind, OutputRow, RowSampling};
use ns_llm::ids::{BlockId, SeqId};
use ns_llm::loader::ModelSource;
use ns_llm::model::config::ModelConfig;
use ns_llm::model::{self, Model};
use ns_llm::{Result, SamplingParams};

const BLOCK_TOKENS: usize = 16;

/// A loaded model with its KV blocks and the sequences that were begun.
pub struct DirectRun<B: Backend> {
    pub config: ModelConfig,
    /// How keys and values of [`DirectRun::encode`] are kept.
    pub encode_dtype: KvDtype,
    backend: B,
    model: Box<dyn Model<B>>,
    kv: B::Kv,
    free: Vec<BlockId>,
    sequences: Vec<Sequence>,
}

#[derive(Default)]
struct Sequence {
    blocks: Vec<BlockId>,
    num_computed_tokens: usize,
}

/// Which rows of a step the test wants to see.
#[derive(Clone, Copy, PartialEq)]
pub enum Rows {
    All,
    Last,
}

impl<B: Backend> DirectRun<B> {
    /// Opens the model folder or file `path`, with room for `tokens` tokens in all.
    pub fn open(path: &Path, backend: B, kv_dtype: KvDtype, tokens: usize) -> Result<DirectRun<B>> {
        let source = ModelSource::open(path)?;
        let config = ModelConfig::from_json(&source.config()?)?;
        let context_tokens = config.max_position_embeddings;
        let loaded = model::load(&backend, source.weights()?, &config, context_tokens, &mut |_| true)?;
        let num_blocks = tokens.div_ceil(BLOCK_TOKENS);
        let kv = backend.allocate_kv(config.kv_layout(num_blocks, BLOCK_TOKENS, kv_dtype))?;
        let mut free: Vec<_> = (0..num_blocks as u32).map(BlockId).collect();
        free.sort_by_key(|block| block.0.wrapping_mul(0x9E37_79B9));
        Ok(DirectRun {
            config,
            encode_dtype: KvDtype::F32,
            backend,
            model: loaded.model,
            kv,
            free,
            sequences: Vec::new(),
        })
    }

    /// Begins a sequence.
    pub fn begin(&mut self) -> usize {
        self.sequences.push(Sequence::default());
        self.sequences.len() - 1
    }

    /// The vectors of whole sequences that are computed together.
    pub fn encode(&mut self, sequences: &[&[u32]], pooling: Pooling) -> Result<Vec<Vec<f32>>> {
        let numbered = sequences.iter().enumerate().map(|(idx, tokens)| (SeqId(idx as u64), *tokens));
        let batch = Batch::whole_sequences(numbered, BLOCK_TOKENS);
        let layout = self.config.kv_layout(batch.block_tables.len(), BLOCK_TOKENS, self.encode_dtype);
        let mut kv = self.backend.allocate_kv(KvLayout { num_layers: 1, ..layout })?;
        let hidden = self.model.encode(&self.backend, &batch, &mut kv)?;
        self.backend.pool(&hidden, &batch, pooling)
    }

    /// Gives the blocks of all sequences back.
    pub fn clear(&mut self) {
        self.free.extend(self.sequences.drain(..).flat_map(|sequence| sequence.blocks));
    }

    /// Computes the next tokens of some sequences in one step. Returns the logits of their rows, `[vocab_size]` each,
    /// sequence after sequence.
    pub fn step(&mut self, chunks: &[(usize, &[u32])], rows: Rows) -> Result<Vec<Vec<f32>>> {
        let mut batch = Batch::default();
        for &(sequence, tokens) in chunks {
            self.append(&mut batch, sequence, tokens, rows);
        }
        let hidden = self.model.forward(&self.backend, &batch, &mut self.kv)?;
        let logits = self.backend.read_logits(&hidden, self.model.output()?)?;
        assert_eq!(logits.len(), batch.outputs.len() * self.config.vocab_size);
        Ok(logits.chunks(self.config.vocab_size).map(<[f32]>::to_vec).collect())
    }

    fn append(&mut self, batch: &mut Batch, idx: usize, tokens: &[u32], rows: Rows) {
        let sequence = &mut self.sequences[idx];
        let (first_row, first_block) = (batch.token_ids.len(), batch.block_tables.len());
        for &token_id in tokens {
            let position = sequence.num_computed_tokens;
            if position.is_multiple_of(BLOCK_TOKENS) {
                sequence.blocks.push(self.free.pop().expect("the test asked for enough blocks"));
            }
            let block = sequence.blocks[position / BLOCK_TOKENS].0 as usize;
            batch.token_ids.push(token_id);
            batch.positions.push(position as u32);
            batch.slots.push((block * BLOCK_TOKENS + position % BLOCK_TOKENS) as u32);
            sequence.num_computed_tokens += 1;
        }
        batch.block_tables.extend(&sequence.blocks);
        let seq = SeqId(idx as u64);
        let shown = match rows {
            Rows::All => first_row..batch.token_ids.len(),
            Rows::Last => batch.token_ids.len() - 1..batch.token_ids.len(),
        };
        for token_row in shown {
            let sampling = RowSampling {
                params: Arc::new(SamplingParams::greedy()),
                history: Vec::new(),
                prompt_tokens: 0,
                logprobs: None,
            };
            let position = batch.positions[token_row] as usize + 1;
            batch.outputs.push(OutputRow { token_row, seq, position, kind: OutputKind::Sample(sampling) });
        }
        batch.sequences.push(BatchSequence {
            seq,
            namespace: [0; 32],
            rows: first_row..batch.token_ids.len(),
            context_tokens: sequence.num_computed_tokens,
            blocks: first_block..batch.block_tables.len(),
        });
    }
}

//! A step as flat arrays: what a device needs to compute the chunks of several sequences at once, and nothing else.
//! The tokens of all sequences lie one behind the other (no padding); each sequence knows its range of rows, its
//! context and its block table. A batch is plain data: it can be logged, compared, and copied to a device.

use std::ops::Range;
use std::sync::Arc;

use crate::ids::{BlockId, NamespaceKey, SeqId};
use crate::request::{SamplingParams, TokenLogprobs};
use crate::sequence::{Chunk, Sequence};

/// The work of one step.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// `[tokens]` input ids. A row named in `feedback` holds 0 here.
    pub token_ids: Vec<u32>,
    /// Input ids that are outputs of the step launched before this one and not yet collected.
    pub feedback: Vec<Feedback>,
    /// `[tokens]` position of each token in its sequence, from 0.
    pub positions: Vec<u32>,
    /// `[tokens]` where the token's K and V go: `block * block_tokens + offset`.
    pub slots: Vec<u32>,
    /// The sequences, in the order of their rows.
    pub sequences: Vec<BatchSequence>,
    /// Block tables of all sequences, one behind the other.
    pub block_tables: Vec<BlockId>,
    /// Rows that reach the output matrix, in ascending order of `token_row`.
    pub outputs: Vec<OutputRow>,
}

/// One sequence's part of a [`Batch`].
#[derive(Debug, Clone, PartialEq)]
pub struct BatchSequence {
    /// Whose it is.
    pub seq: SeqId,
    /// Its namespace.
    pub namespace: NamespaceKey,
    /// Its rows in the token arrays. Their positions are contiguous.
    pub rows: Range<usize>,
    /// Tokens of the sequence up to and with the last row of this step: how many keys that row may see.
    pub context_tokens: usize,
    /// Its entries of `block_tables`; they cover `context_tokens`.
    pub blocks: Range<usize>,
}

/// Row `token_row` takes its id from row `output_row` of the outputs of the step before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feedback {
    /// Row in this batch.
    pub token_row: usize,
    /// Index into the previous batch's `outputs`.
    pub output_row: usize,
}

/// A row whose logits are needed, and what for.
#[derive(Debug, Clone)]
pub struct OutputRow {
    /// Row in the token arrays.
    pub token_row: usize,
    /// Whose it is.
    pub seq: SeqId,
    /// Position of the token that these logits predict: `positions[token_row] + 1`. Counter of the draws.
    pub position: usize,
    /// What to do with the logits.
    pub kind: OutputKind,
}

/// What is done with a row of logits.
#[derive(Debug, Clone)]
pub enum OutputKind {
    /// Choose the next token.
    Sample(RowSampling),
    /// Report the logprob of the token that is already there (prompt logprobs).
    Score {
        /// The token at `position`.
        target: u32,
        /// How many of the most likely tokens to report.
        top: usize,
    },
}

/// How to choose one token.
#[derive(Debug, Clone)]
pub struct RowSampling {
    /// Parameters of the choice.
    pub params: Arc<SamplingParams>,
    /// Tokens so far, prompt first; empty when no penalty reads them.
    pub history: Vec<u32>,
    /// How many of `history` are the prompt.
    pub prompt_tokens: usize,
    /// Alternatives to report; `None`: no logprobs.
    pub logprobs: Option<usize>,
}

/// Result of one [`OutputRow`].
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Whose it is.
    pub seq: SeqId,
    /// Position of the token.
    pub position: usize,
    /// What came out.
    pub outcome: Outcome,
}

/// What came out of a row of logits.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The next token.
    Token {
        /// The chosen token.
        token_id: u32,
        /// Present when asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// Logprobs of a given token.
    Scored(TokenLogprobs),
    /// The logits held a NaN or an infinity. This sequence ends; its batch mates do not notice.
    NonFinite,
}

impl Batch {
    /// The chunks of one step, in their order.
    pub fn build<'a>(chunks: impl Iterator<Item = (&'a Chunk, &'a Sequence)>, block_tokens: usize) -> Batch {
        let mut batch = Batch::default();
        for (chunk, sequence) in chunks {
            batch.push_outputs(chunk, sequence);
            batch.push_rows(chunk, sequence, block_tokens);
        }
        batch
    }

    /// Whole sequences, one behind the other, over blocks that are theirs for this step alone: block 0 is the first of the
    /// first sequence. No row reaches the output matrix.
    pub fn whole_sequences<'a>(sequences: impl Iterator<Item = (SeqId, &'a [u32])>, block_tokens: usize) -> Batch {
        let mut batch = Batch::default();
        for (seq, tokens) in sequences {
            let rows = batch.token_ids.len()..batch.token_ids.len() + tokens.len();
            let first_block = batch.block_tables.len();
            let blocks = first_block..first_block + tokens.len().div_ceil(block_tokens);
            batch.token_ids.extend_from_slice(tokens);
            batch.positions.extend((0..tokens.len()).map(index32));
            batch.slots.extend((0..tokens.len()).map(|position| index32(first_block * block_tokens + position)));
            batch.block_tables.extend(blocks.clone().map(|block| BlockId(index32(block))));
            let (namespace, context_tokens) = (NamespaceKey::default(), tokens.len());
            batch.sequences.push(BatchSequence { seq, namespace, rows, context_tokens, blocks });
        }
        batch
    }

    fn push_rows(&mut self, chunk: &Chunk, sequence: &Sequence, block_tokens: usize) {
        let rows = self.token_ids.len()..self.token_ids.len() + chunk.positions.len();
        match chunk.feedback {
            Some(output_row) => {
                self.token_ids.push(0);
                self.feedback.push(Feedback { token_row: rows.start, output_row });
            }
            None => self.token_ids.extend_from_slice(&sequence.tokens[chunk.positions.clone()]),
        }
        for position in chunk.positions.clone() {
            let block = sequence.blocks[position / block_tokens].0 as usize;
            self.positions.push(index32(position));
            self.slots.push(index32(block * block_tokens + position % block_tokens));
        }
        let context_tokens = chunk.positions.end;
        let table = &sequence.blocks[..context_tokens.div_ceil(block_tokens)];
        let blocks = self.block_tables.len()..self.block_tables.len() + table.len();
        self.block_tables.extend_from_slice(table);
        let namespace = sequence.spec.namespace;
        self.sequences.push(BatchSequence { seq: chunk.seq, namespace, rows, context_tokens, blocks });
    }

    /// Called before the chunk's rows are there: the first of them will be row `self.token_ids.len()`.
    fn push_outputs(&mut self, chunk: &Chunk, sequence: &Sequence) {
        let first_row = self.token_ids.len();
        let spec = &sequence.spec;
        for position in chunk.scores.clone() {
            let token_row = first_row + position - 1 - chunk.positions.start;
            let kind = OutputKind::Score { target: spec.prompt[position], top: spec.prompt_logprobs.unwrap_or(0) };
            self.outputs.push(OutputRow { token_row, seq: chunk.seq, position, kind });
        }
        if chunk.samples {
            let token_row = first_row + chunk.positions.len() - 1;
            let history = if spec.sampling.reads_history() { sequence.tokens.clone() } else { Vec::new() };
            let kind = OutputKind::Sample(RowSampling {
                params: spec.sampling.clone(),
                history,
                prompt_tokens: spec.prompt.len(),
                logprobs: spec.logprobs,
            });
            self.outputs.push(OutputRow { token_row, seq: chunk.seq, position: chunk.positions.end, kind });
        }
    }

    /// Rows of the token arrays.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }
    /// Block table of one sequence of this batch.
    pub fn block_table(&self, sequence: &BatchSequence) -> &[BlockId] {
        &self.block_tables[sequence.blocks.clone()]
    }
}

/// Positions are below the context length and slots below the size of the pool; both are bounded when an engine opens.
fn index32(value: usize) -> u32 {
    u32::try_from(value).expect("positions and slots fit 32 bits")
}

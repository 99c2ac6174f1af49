//! An executor without a model that checks who reads whose KV. Each KV slot stores where its contents come from
//! (namespace, hash of the writer's tokens so far, position, token, and how often its block had been allocated), and
//! "attention" demands that every slot it reads is filled, belongs to the reader's own history, and was written after
//! its block was last allocated. The next token is a hash of what was read. So wrong sharing, use after free and lost
//! blocks are exact failures, and [`Digest`] tells from the tokens alone what must come out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use ns_llm::batch::{Batch, BatchSequence, Outcome, OutputKind, OutputRow, Sampled};
use ns_llm::executor::Executor;
use ns_llm::ids::{BlockId, NamespaceKey, SeqId};
use ns_llm::kv_cache::KvCache;
use ns_llm::{Logprob, Result, SamplingParams, TokenLogprobs};

/// Tokens are below this.
pub const VOCAB_SIZE: u32 = 40;

/// Bijective mixer of 64 bits (the finalizer of SplitMix64, Steele et al. 2014).
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// State of a token list: what a row has seen when it has read all of `tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// Before the first token.
    pub fn new(namespace: &NamespaceKey) -> Self {
        namespace.chunks_exact(8).fold(Digest(1), |digest, bytes| {
            Digest(mix(digest.0.wrapping_mul(31) ^ u64::from_le_bytes(bytes.try_into().expect("8 bytes"))))
        })
    }
    /// One token more.
    pub fn push(self, token: u32) -> Self {
        Digest(mix(self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(token) + 1)))
    }
    /// The token that follows, for a choice with `seed`.
    pub fn next_token(self, seed: u64) -> u32 {
        (mix(self.0 ^ mix(seed)) % u64::from(VOCAB_SIZE)) as u32
    }
    /// The "logprob" of `token` after these tokens.
    pub fn logprob(self, token: u32) -> f32 {
        -((mix(self.0 ^ u64::from(token)) >> 44) as f32)
    }
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    namespace: NamespaceKey,
    /// The writer's tokens up to and with this one.
    history: Digest,
    position: u32,
    token: u32,
    /// Allocations of its block when it was written.
    num_allocations: u64,
}

/// A slot as a tier keeps it.
const SLOT_BYTES: usize = 32 + 8 + 4 + 4;

/// Bytes of a block as a tier keeps it.
pub fn block_bytes(block_tokens: usize) -> usize {
    block_tokens * SLOT_BYTES
}

fn slot_bytes(slot: &Option<Slot>) -> Vec<u8> {
    let slot = slot.expect("a block that is kept is full");
    let parts: [&[u8]; 4] =
        [&slot.namespace, &slot.history.0.to_le_bytes(), &slot.position.to_le_bytes(), &slot.token.to_le_bytes()];
    parts.concat()
}

fn slot_of(bytes: &[u8], num_allocations: u64) -> Slot {
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    Slot {
        namespace: bytes[..32].try_into().expect("32 bytes"),
        history: Digest(u64::from_le_bytes(bytes[32..40].try_into().expect("8 bytes"))),
        position: number(40),
        token: number(44),
        num_allocations,
    }
}

/// What the executor knows of a sequence from elsewhere than the batches.
#[derive(Debug)]
struct Reader {
    namespace: NamespaceKey,
    tokens: Vec<u32>,
    digests: Vec<Digest>,
    prompt_tokens: usize,
    non_finite_at: Option<usize>,
}

impl Reader {
    fn push(&mut self, token: u32) {
        let before = self.digests.last().copied().unwrap_or_else(|| Digest::new(&self.namespace));
        self.digests.push(before.push(token));
        self.tokens.push(token);
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct FakeExecutor {
    block_tokens: usize,
    max_in_flight: usize,
    slots: Vec<Option<Slot>>,
    num_allocations: Vec<u64>,
    readers: HashMap<SeqId, Reader>,
    /// Results of the last launch: what `Feedback` refers to.
    last_outputs: Vec<Sampled>,
    launched: VecDeque<Vec<Sampled>>,
    /// Slots read so far: a test of isolation that read nothing has shown nothing.
    pub num_reads: u64,
    /// Blocks that came back from a tier.
    pub num_block_writes: u64,
}

impl FakeExecutor {
    /// An executor with empty blocks.
    pub fn new(num_blocks: usize, block_tokens: usize, max_in_flight: usize) -> Self {
        FakeExecutor {
            block_tokens,
            max_in_flight,
            slots: vec![None; num_blocks * block_tokens],
            num_allocations: vec![0; num_blocks],
            readers: HashMap::new(),
            last_outputs: Vec::new(),
            launched: VecDeque::new(),
            num_reads: 0,
            num_block_writes: 0,
        }
    }

    /// Tells whose prompt is whose. Logits at position `non_finite_at` will not be finite.
    pub fn register(&mut self, seq: SeqId, namespace: NamespaceKey, prompt: &[u32], non_finite_at: Option<usize>) {
        let (tokens, digests) = (Vec::new(), Vec::new());
        let mut reader = Reader { namespace, tokens, digests, prompt_tokens: prompt.len(), non_finite_at };
        prompt.iter().for_each(|&token| reader.push(token));
        self.readers.insert(seq, reader);
    }

    /// Takes over how often each block was allocated; to be called before each launch.
    pub fn note_allocations(&mut self, kv: &KvCache) {
        for (block, count) in self.num_allocations.iter_mut().enumerate() {
            *count = kv.num_allocations(BlockId(block as u32));
        }
    }

    /// The batch's token ids, with those filled in that come from the last step.
    fn input_ids(&self, batch: &Batch) -> Vec<u32> {
        let mut ids = batch.token_ids.clone();
        for feedback in &batch.feedback {
            let source = &self.last_outputs[feedback.output_row];
            let sequence = batch.sequences.iter().find(|sequence| sequence.rows.contains(&feedback.token_row));
            assert_eq!(sequence.expect("a row has a sequence").seq, source.seq, "feedback of another sequence");
            assert_eq!(source.position, batch.positions[feedback.token_row] as usize, "feedback of another position");
            // After logits that are not finite there is no token; the sequence ends when that step is applied.
            ids[feedback.token_row] = match &source.outcome {
                Outcome::Token { token_id, .. } => *token_id,
                _ => 0,
            };
        }
        ids
    }

    fn write(&mut self, batch: &Batch, sequence: &BatchSequence, ids: &[u32], written: &mut HashSet<u32>) {
        let reader = &self.readers[&sequence.seq];
        let table = batch.block_table(sequence);
        assert_eq!(reader.namespace, sequence.namespace);
        for row in sequence.rows.clone() {
            let position = batch.positions[row] as usize;
            let (block, slot) = (table[position / self.block_tokens], batch.slots[row]);
            assert_eq!(slot as usize, block.0 as usize * self.block_tokens + position % self.block_tokens);
            assert!(written.insert(slot), "slot {slot} is written twice in one step");
            assert_eq!(ids[row], reader.tokens[position], "{:?} computes another token than its own", sequence.seq);
            self.slots[slot as usize] = Some(Slot {
                namespace: sequence.namespace,
                history: reader.digests[position],
                position: position as u32,
                token: ids[row],
                num_allocations: self.num_allocations[block.0 as usize],
            });
        }
    }

    /// Reads the slots of all positions that the sequence's last row sees, checks each one's origin, and returns the
    /// digest after each position, made from what was read.
    fn read(&mut self, batch: &Batch, sequence: &BatchSequence) -> Vec<Digest> {
        let reader = &self.readers[&sequence.seq];
        let table = batch.block_table(sequence);
        let mut digest = Digest::new(&sequence.namespace);
        let mut digests = Vec::with_capacity(sequence.context_tokens);
        for position in 0..sequence.context_tokens {
            let block = table[position / self.block_tokens].0 as usize;
            let slot = self.slots[block * self.block_tokens + position % self.block_tokens];
            let slot = slot.unwrap_or_else(|| panic!("{:?} reads an empty slot at {position}", sequence.seq));
            let whose = |what| format!("{:?} reads {what} at {position}: {slot:?}", sequence.seq);
            assert_eq!(slot.namespace, sequence.namespace, "{}", whose("another namespace"));
            assert_eq!(slot.position as usize, position, "{}", whose("another position"));
            assert_eq!(slot.token, reader.tokens[position], "{}", whose("another token"));
            assert_eq!(slot.history, reader.digests[position], "{}", whose("another history"));
            assert_eq!(slot.num_allocations, self.num_allocations[block], "{}", whose("KV from before allocation"));
            digest = digest.push(slot.token);
            digests.push(digest);
        }
        self.num_reads += sequence.context_tokens as u64;
        digests
    }

    fn output(&mut self, row: &OutputRow, digest: Digest) -> Sampled {
        let reader = self.readers.get_mut(&row.seq).expect("registered");
        let outcome = match &row.kind {
            OutputKind::Score { target, top } => {
                assert_eq!(*target, reader.tokens[row.position]);
                Outcome::Scored(logprobs(digest, *target, *top))
            }
            OutputKind::Sample(_) if reader.non_finite_at == Some(row.position) => {
                reader.push(0);
                Outcome::NonFinite
            }
            OutputKind::Sample(sampling) => {
                check_history(&sampling.params, &sampling.history, reader, row.position);
                assert_eq!(row.position, reader.tokens.len(), "{:?}: a token is chosen again", row.seq);
                let token_id = digest.next_token(sampling.params.seed);
                reader.push(token_id);
                Outcome::Token { token_id, logprobs: sampling.logprobs.map(|top| logprobs(digest, token_id, top)) }
            }
        };
        Sampled { seq: row.seq, position: row.position, outcome }
    }
}

fn check_history(params: &SamplingParams, history: &[u32], reader: &Reader, position: usize) {
    if params.reads_history() {
        assert_eq!(history, &reader.tokens[..position], "penalties see other tokens than the sequence has");
    } else {
        assert!(history.is_empty(), "a history that nobody reads");
    }
    assert!(reader.prompt_tokens <= position);
}

fn logprobs(digest: Digest, token_id: u32, top: usize) -> TokenLogprobs {
    let of = |token_id| Logprob { token_id, logprob: digest.logprob(token_id) };
    TokenLogprobs { chosen: of(token_id), top: (0..top as u32).map(of).collect::<Arc<[_]>>() }
}

impl Executor for FakeExecutor {
    fn launch(&mut self, batch: &Batch) -> Result<()> {
        assert!(self.launched.len() < self.max_in_flight, "too many steps in flight");
        let ids = self.input_ids(batch);
        let mut written = HashSet::new();
        for sequence in &batch.sequences {
            self.write(batch, sequence, &ids, &mut written);
        }
        let mut outputs = Vec::new();
        let mut rows = batch.outputs.iter().peekable();
        for sequence in &batch.sequences {
            let digests = self.read(batch, sequence);
            while let Some(row) = rows.next_if(|row| sequence.rows.contains(&row.token_row)) {
                assert_eq!((row.seq, row.position), (sequence.seq, batch.positions[row.token_row] as usize + 1));
                outputs.push(self.output(row, digests[row.position - 1]));
            }
        }
        assert!(rows.next().is_none(), "output rows are in the order of the rows");
        self.last_outputs = outputs.clone();
        self.launched.push_back(outputs);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Sampled>> {
        Ok(self.launched.pop_front().expect("collect() follows launch()"))
    }

    /// The vector says which tokens were read: two numbers of the digest of all of them.
    fn encode(&mut self, batch: &Batch) -> Result<Vec<Vec<f32>>> {
        let mut blocks = HashSet::new();
        let encode = |sequence: &BatchSequence| {
            assert!(batch.block_table(sequence).iter().all(|block| blocks.insert(*block)), "a block is used twice");
            let mut digest = Digest::new(&sequence.namespace);
            for (position, row) in sequence.rows.clone().enumerate() {
                assert_eq!(batch.positions[row] as usize, position, "a whole sequence begins at 0");
                digest = digest.push(batch.token_ids[row]);
            }
            vec![digest.logprob(0), digest.logprob(1)]
        };
        Ok(batch.sequences.iter().map(encode).collect())
    }

    fn encode_block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Where the contents of each slot come from, but not when its block was allocated.
    fn read_blocks(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<[u8]>>> {
        let read = |block: &BlockId| {
            let first = block.0 as usize * self.block_tokens;
            self.slots[first..first + self.block_tokens].iter().flat_map(slot_bytes).collect()
        };
        Ok(blocks.iter().map(read).collect())
    }

    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), block_bytes(self.block_tokens));
        let num_allocations = self.num_allocations[block.0 as usize];
        let first = block.0 as usize * self.block_tokens;
        for (slot, bytes) in self.slots[first..].iter_mut().zip(bytes.chunks_exact(SLOT_BYTES)) {
            *slot = Some(slot_of(bytes, num_allocations));
        }
        self.num_block_writes += 1;
        Ok(())
    }

    fn max_in_flight(&self) -> usize {
        self.max_in_flight
    }
}

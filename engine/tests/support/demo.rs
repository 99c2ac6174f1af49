//! The model that ships, opened for a test, and the ways in which tests read its answers.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::{Path, PathBuf};

use ns_llm::{Completion, Engine, EngineOptions, Request};

/// Folder of the demo model.
pub fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

/// Opens the demo model with two threads and what `change` says.
pub fn open(change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = EngineOptions::new(path()).threads(2);
    change(&mut options);
    Engine::open(options).expect("the demo model opens")
}

/// Everything of an answer that must not depend on what else the engine does: tokens, text, and the bits of the
/// logprobs of the chosen and of the 20 most likely tokens at each position (each of them is made from all logits of
/// its row).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    pub text: Vec<String>,
    pub token_ids: Vec<Vec<u32>>,
    pub logprob_bits: Vec<Vec<(u32, u32)>>,
}

pub fn fingerprint(completion: &Completion) -> Fingerprint {
    let bits = |choice: &ns_llm::Choice| {
        let entries = choice.logprobs.iter().flat_map(|entry| std::iter::once(&entry.chosen).chain(entry.top.iter()));
        entries.map(|logprob| (logprob.token_id, logprob.logprob.to_bits())).collect()
    };
    Fingerprint {
        text: completion.choices.iter().map(|choice| choice.text.clone()).collect(),
        token_ids: completion.choices.iter().map(|choice| choice.token_ids.clone()).collect(),
        logprob_bits: completion.choices.iter().map(bits).collect(),
    }
}

/// `request`, with all logprobs that a [`Fingerprint`] compares.
pub fn with_logprobs(mut request: Request) -> Request {
    request.logprobs = Some(20);
    request
}

/// A seeded stream of numbers (SplitMix64) for tests.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
    /// A prompt of `tokens` ids of the demo vocabulary, control tokens left out.
    pub fn prompt(&mut self, tokens: usize) -> Vec<u32> {
        (0..tokens).map(|_| 3 + self.below(2045) as u32).collect()
    }
}

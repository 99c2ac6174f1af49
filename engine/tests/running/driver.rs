//! Drives scheduler and executor step by step, without a worker thread, so that a test can act between any two steps.

use std::sync::Arc;

use ns_llm::executor::Executor;
use ns_llm::ids::{NamespaceKey, SeqId};
use ns_llm::open::{Loaded, load};
use ns_llm::scheduler::{Scheduler, SequenceEvent};
use ns_llm::sequence::SequenceSpec;
use ns_llm::{CacheUse, EngineOptions, Priority, SamplingParams};

/// A loaded model without a worker.
pub struct Driver {
    pub loaded: Loaded,
    now_ms: u64,
}

/// Tokens of one sequence, and the bits of the logprobs of the 20 most likely tokens at each of its positions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    pub token_ids: Vec<u32>,
    pub logprob_bits: Vec<(u32, u32)>,
}

/// A sequence of `prompt` that reports everything.
pub fn spec(prompt: &[u32], max_new_tokens: usize, sampling: SamplingParams) -> SequenceSpec {
    SequenceSpec {
        priority: Priority::Normal,
        prompt: prompt.into(),
        max_new_tokens,
        stop_token_ids: Arc::new([]),
        deadline_ms: None,
        timeout_ms: 0,
        namespace: NamespaceKey::default(),
        owner: [0; 32],
        prefix_cache: CacheUse::ReadWrite,
        prompt_logprobs: None,
        logprobs: Some(20),
        sampling: Arc::new(sampling),
    }
}

impl Driver {
    pub fn open(options: EngineOptions) -> Driver {
        Driver { loaded: load(options).expect("the demo model loads"), now_ms: 0 }
    }

    /// Runs `specs` to their ends; `before_step` may do anything to the scheduler before each step. Invariants are
    /// checked after each.
    pub fn run(
        &mut self,
        specs: Vec<SequenceSpec>,
        mut before_step: impl FnMut(&mut Scheduler, &[SeqId], usize),
    ) -> Vec<Trace> {
        let Loaded { scheduler, executor, .. } = &mut self.loaded;
        let seqs: Vec<SeqId> =
            specs.into_iter().map(|spec| scheduler.add(vec![spec], self.now_ms).expect("admitted")[0]).collect();
        let mut traces = vec![Trace::default(); seqs.len()];
        let mut step_idx = 0;
        while scheduler.has_work() {
            before_step(scheduler, &seqs, step_idx);
            step_idx += 1;
            assert!(step_idx < 1_000_000, "no progress");
            self.now_ms += 1;
            let Some(step) = scheduler.schedule(self.now_ms) else { continue };
            let batch = scheduler.batch(&step);
            executor.launch(&batch).expect("the step runs");
            let sampled = executor.collect().expect("the step ran");
            for event in scheduler.apply(step, &sampled, self.now_ms) {
                record(&mut traces, &seqs, event);
            }
            scheduler.check_invariants().expect("invariants hold after every step");
        }
        traces
    }
}

fn record(traces: &mut [Trace], seqs: &[SeqId], event: SequenceEvent) {
    match event {
        SequenceEvent::Token { seq, token_id, logprobs } => {
            let idx = seqs.iter().position(|&other| other == seq).expect("one of ours");
            traces[idx].token_ids.push(token_id);
            let logprobs = logprobs.expect("asked for");
            traces[idx].logprob_bits.extend(logprobs.top.iter().map(|entry| (entry.token_id, entry.logprob.to_bits())));
        }
        SequenceEvent::Failed { error, .. } => panic!("{error}"),
        _ => {}
    }
}

//! The engine's sampler as an oracle: its files that know numbers only are compiled in here, because this crate cannot depend on
//! the engine.

// Not all is asked for here, and the unit tests of these files run in the engine.
#![allow(dead_code, unreachable_pub, unused_imports)]

#[path = "../../../engine/src/sampler/rng.rs"]
mod rng;
#[path = "../../../engine/src/sampler/truncate.rs"]
mod truncate;
#[path = "../../../engine/src/sampler/weights.rs"]
mod weights;

use ns_llm_kernels::cuda::sampling::SamplingRow;

/// Steps 5 to 10 of the sampler (`choose` in engine/src/sampler.rs), over logits that have their bias and penalties.
pub(crate) fn choose(logits: &[f32], row: &SamplingRow) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if row.temperature == 0.0 {
        return logits.iter().position(|&logit| logit == max).expect("one of them") as u32;
    }
    let (softmax, mut kept) = (weights::Softmax::new(max, row.temperature), Vec::new());
    let top_k = row.top_k as usize;
    let mut total = if top_k > 0 && top_k < logits.len() {
        truncate::top_k(logits, top_k, &mut kept);
        truncate::weigh(&mut kept, softmax)
    } else {
        truncate::keep_all(logits, softmax, &mut kept)
    };
    if row.top_p < 1.0 {
        total = truncate::top_p(&mut kept, total, row.top_p);
    }
    if row.min_p > 0.0 {
        total = truncate::min_p(&mut kept, row.min_p);
    }
    let target = (u128::from(rng::random_at(row.seed, row.position)) * u128::from(total)) >> 64;
    truncate::token_at(&mut kept, target as u64)
}

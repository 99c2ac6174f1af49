//! Question: can one namespace tell from the time to its first token whether another has sent the same prompt? 2,000 probes,
//! half of them prompts that the other has just sent; the answer is the area under the ROC curve of "it was faster, so it was
//! known": 0.5 is a coin, 1.0 is certainty. The same for probes within one namespace, to show that the method sees a hit.
//!
//! `cargo bench -p ns-llm --bench tenant_timing -- [PROBES]`. Prints one JSON object last.

use std::path::Path;

use ns_llm::{Engine, EngineOptions, Request};

/// Milliseconds to the first token of prompt `name` in `namespace`.
fn first_token_ms(engine: &Engine, namespace: &str, name: u64) -> f64 {
    // SplitMix64 (Steele et al. 2014): prompts whose tokens depended on their names in a simpler way would share blocks.
    let draw = |i: u64| {
        let z = (name << 8 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33
    };
    let vocab_size = engine.info().vocab_size as u64;
    let prompt: Vec<u32> = (0..64).map(|i| (vocab_size / 4 + draw(i) % (vocab_size / 2)) as u32).collect();
    let mut request = Request::tokens(prompt).max_tokens(1).temperature(0.0);
    request.namespace = Some(namespace.to_string());
    engine.complete(request).expect("runs").summary.timings.first_token_ms
}

/// How often a known prompt was faster than a new one, over all pairs.
fn area(known: &[f64], new: &[f64]) -> f64 {
    let score = |known: f64, new: f64| {
        if known < new {
            1.0
        } else if known == new {
            0.5
        } else {
            0.0
        }
    };
    let sum: f64 = known.iter().flat_map(|&known| new.iter().map(move |&new| score(known, new))).sum();
    sum / (known.len() * new.len()) as f64
}

fn main() {
    let probes: u64 = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(2_000);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let engine = Engine::open(EngineOptions::new(model).kv_bytes(64 << 20).kv_host_bytes(64 << 20)).expect("opens");
    let mut areas = Vec::new();
    for (case, attacker) in [("another namespace", "attacker"), ("the same namespace", "victim")] {
        let (mut known, mut new) = (Vec::new(), Vec::new());
        let base = areas.len() as u64 * 1_000_000;
        for probe in 0..probes / 2 {
            first_token_ms(&engine, "victim", base + probe);
            // In turn, so that whatever else the machine does meets both alike.
            let (first, second) = (base + probe, base + 500_000 + probe);
            if probe % 2 == 0 {
                known.push(first_token_ms(&engine, attacker, first));
                new.push(first_token_ms(&engine, attacker, second));
            } else {
                new.push(first_token_ms(&engine, attacker, second));
                known.push(first_token_ms(&engine, attacker, first));
            }
        }
        let area = area(&known, &new);
        println!("{case}: area {area:.3} over {probes} probes");
        areas.push((case, area));
    }
    println!("{{\"probes\":{probes},\"other_namespace\":{:.4},\"same_namespace\":{:.4}}}", areas[0].1, areas[1].1);
}

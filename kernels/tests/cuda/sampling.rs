//! `sampling.cu` against the engine's sampler: the same logits give the same token ids.
//!
//! The oracle is the sampler's own code where it is pure numbers (`sampler.rs`), and written again for the eye where it knows
//! requests (bias and penalties).

use ns_llm_kernels::cuda::sampling::{LogitBias, NO_TOKEN, SamplingBatch, SamplingRow, sample_rows};

use crate::Test;
use crate::check::Random;
use crate::mirror::{slice, slice_mut};
use crate::sampler;
use crate::shim::{Schedule, Shim, schedules};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("drawn tokens are those of the sampler", tokens_are_the_samplers),
    ("ties, masks and rows that are not finite", ties_masks_and_non_finite_rows),
    ("bias and penalties are those of the sampler", bias_and_penalties),
    ("sampling refuses sizes that do not fit", sizes_are_checked),
];
/// Those that need the shim.
pub(crate) const PLANTED: &[Test] = &[("a tie that is drawn too often shows", a_planted_tie_shows)];

const PLAIN: SamplingRow = SamplingRow {
    seed: 0,
    position: 0,
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    first_bias: 0,
    num_bias: 0,
    first_history: 0,
    num_history: 0,
    prompt_tokens: 0,
};

/// One of the schedules that there are, another for every `idx` where there are several.
fn schedule_at(idx: usize) -> Schedule {
    let all: Vec<Schedule> = schedules().collect();
    all[idx % all.len()]
}

/// Chooses on the shim; `logits` are `[rows, vocab_size]`.
fn run(shim: &Shim, logits: &[f32], rows: &[SamplingRow], bias: &[LogitBias], history: &[u32]) -> Vec<u32> {
    let mut logits = logits.to_vec();
    let mut occurrences = vec![0; if history.is_empty() { 0 } else { logits.len() }];
    let mut tokens = vec![7; rows.len()];
    let batch = SamplingBatch { rows: slice(rows), bias: slice(bias), history: slice(history) };
    let (logits, occurrences_slice) = (&mut slice_mut(&mut logits), &mut slice_mut(&mut occurrences));
    sample_rows(shim, logits, &batch, occurrences_slice, &mut slice_mut(&mut tokens)).expect("sizes fit");
    assert!(occurrences.iter().all(|&count| count == 0), "occurrences are left as they were found");
    tokens
}

/// Logits of `levels` values, so that many are equal where there are few; one in ten is masked.
fn random_logits(random: &mut Random, len: usize, levels: f32) -> Vec<f32> {
    let level = |x: f32| (x * levels).round() / levels * 10.0;
    let masked = random.floats(len);
    random
        .floats(len)
        .into_iter()
        .zip(masked)
        .map(|(x, m)| if m < -0.8 { f32::NEG_INFINITY } else { level(x) })
        .collect()
}

/// Every truncation alone and together, hot and cold, over ragged vocabularies with few and with many ties: the token ids are the
/// sampler's, for the seeds and positions that occur.
fn tokens_are_the_samplers() {
    let mut random = Random(3);
    let mut distinct = std::collections::HashSet::new();
    for (case, vocab_size) in [1, 31, 257, 1500, 4099].into_iter().enumerate() {
        for levels in [2.0, 40.0, 1e6] {
            let (mut logits, mut rows) = (Vec::new(), Vec::new());
            for (i, (top_k, top_p, min_p)) in [
                (0, 1.0, 0.0),
                (1, 1.0, 0.0),
                (40, 1.0, 0.0),
                (0, 0.9, 0.0),
                (0, 0.1, 0.0),
                (0, 1.0, 0.3),
                (200, 0.8, 0.01),
                (5, f32::MIN_POSITIVE, 1.0),
                (3000, 0.999, 1e-6),
            ]
            .into_iter()
            .enumerate()
            {
                let temperature = [1.0, 0.3, 30.0, 1e-30][(i + case) % 4];
                let (seed, position) = (random.floats(1)[0].to_bits().into(), (i * 1000 + case) as u64);
                let mut row = random_logits(&mut random, vocab_size, levels);
                row[vocab_size / 2] = 3.0;
                logits.extend(row);
                rows.push(SamplingRow { seed, position, temperature, top_k, top_p, min_p, ..PLAIN });
            }
            let want: Vec<u32> =
                logits.chunks_exact(vocab_size).zip(&rows).map(|(logits, row)| sampler::choose(logits, row)).collect();
            distinct.extend(want.iter().copied());
            let schedule = schedule_at((case + levels as usize) % 4);
            assert_eq!(run(&Shim::new(schedule), &logits, &rows, &[], &[]), want, "{vocab_size} tokens, {schedule:?}");
        }
    }
    assert!(distinct.len() > 50, "only {} different tokens", distinct.len());
}

/// Greedy takes the lowest id among equals, 0 and -0 are equal, masked tokens are never taken; rows with NaN, `+inf` or
/// nothing but
/// `-inf` have no token, whatever bias says, and their neighbours have theirs.
fn ties_masks_and_non_finite_rows() {
    let vocab_size = 1100;
    let (mut logits, mut want) = (Vec::new(), Vec::new());
    let mut row = |fill: f32, changes: &[(usize, f32)], token| {
        let mut row = vec![fill; vocab_size];
        changes.iter().for_each(|&(id, logit)| row[id] = logit);
        logits.extend(row);
        want.push(token);
    };
    row(1.0, &[], 0);
    row(-1.0, &[(1030, -0.0), (1040, 0.0)], 1030);
    row(-3.0, &[(5, 0.0), (1040, -0.0)], 5);
    row(f32::NEG_INFINITY, &[(1099, -1e30)], 1099);
    row(0.0, &[(1099, f32::NAN)], NO_TOKEN);
    row(0.0, &[(3, f32::INFINITY)], NO_TOKEN);
    row(f32::NEG_INFINITY, &[], NO_TOKEN);
    row(f32::MIN, &[(77, f32::MAX)], 77);
    let greedy = SamplingRow { temperature: 0.0, num_bias: 1, ..PLAIN };
    let drawn = SamplingRow { top_k: 1, ..PLAIN };
    for (rows, schedule) in [(greedy, 0), (drawn, 1), (greedy, 3)] {
        let shim = Shim::new(schedule_at(schedule));
        let bias = [LogitBias { token_id: 3, bias: -100.0 }];
        assert_eq!(run(&shim, &logits, &vec![rows; want.len()], &bias, &[]), want);
    }
}

/// The three penalties and the bias, as documented: each token once, repetition for all that occurs, the others for the
/// answer; what is masked stays so, and nothing becomes infinite.
fn bias_and_penalties() {
    let mut random = Random(11);
    let vocab_size = 300;
    let (mut logits, mut rows, mut history, mut bias, mut want) = (vec![], vec![], vec![], vec![], vec![]);
    for i in 0..12_u32 {
        let mut row_logits = random_logits(&mut random, vocab_size, 1e6);
        row_logits[17] = if i == 3 { f32::MAX } else { 9.5 };
        logits.extend_from_slice(&row_logits);
        let tokens: Vec<u32> =
            random.floats(400).iter().map(|x| (x.abs() * 200.0) as u32 % 60).chain([17, 17]).collect();
        let biases: Vec<LogitBias> = (0..i).map(|j| LogitBias { token_id: 13 * j, bias: 4.0 - j as f32 }).collect();
        let row = SamplingRow {
            seed: i.into(),
            position: 100 + u64::from(i),
            temperature: [0.0, 0.7][i as usize % 2],
            repetition_penalty: [1.0, 1.3, 0.5, f32::MIN_POSITIVE][i as usize % 4],
            presence_penalty: [0.0, 0.5, -2.0][i as usize % 3],
            frequency_penalty: [0.01, 0.0, -1.0][i as usize % 3],
            first_bias: bias.len() as u32,
            num_bias: i,
            first_history: history.len() as u32,
            num_history: tokens.len() as u32,
            prompt_tokens: 350,
            ..PLAIN
        };
        let change = |logits: &mut [f32], id: u32, f: &dyn Fn(f32) -> f32| {
            let logit = &mut logits[id as usize];
            *logit = if *logit == f32::NEG_INFINITY { *logit } else { f(*logit).clamp(f32::MIN, f32::MAX) };
        };
        for entry in &biases {
            change(&mut row_logits, entry.token_id, &|logit| logit + entry.bias);
        }
        for id in 0..60 {
            let in_all = tokens.iter().filter(|&&token| token == id).count();
            let in_answer = tokens[350..].iter().filter(|&&token| token == id).count();
            let penalty = row.repetition_penalty;
            let repeated = |logit: f32| if logit > 0.0 { logit / penalty } else { logit * penalty };
            let answered = |logit: f32| logit - row.frequency_penalty * in_answer as f32 - row.presence_penalty;
            if in_answer > 0 {
                change(&mut row_logits, id, &|logit| answered(repeated(logit)));
            } else if in_all > 0 {
                change(&mut row_logits, id, &repeated);
            }
        }
        want.push(sampler::choose(&row_logits, &row));
        rows.push(row);
        history.extend(tokens);
        bias.extend(biases);
    }
    for schedule in schedules().take(4) {
        assert_eq!(run(&Shim::new(schedule), &logits, &rows, &bias, &history), want, "{schedule:?}");
    }
    let mut without = rows.clone();
    without.iter_mut().for_each(|row| (row.num_bias, row.num_history) = (0, 0));
    assert_ne!(run(&Shim::new(Schedule::TAME), &logits, &without, &[], &[]), want, "they change something");
}

/// Four equal logits in front of a larger one, of which top-k keeps two: keeping three is noticed.
fn a_planted_tie_shows() {
    // A warp's part of the vocabulary holds all five.
    let mut logits = vec![f32::NEG_INFINITY; 32 * 6];
    logits[..6].copy_from_slice(&[2.0, 5.0, 5.0, 5.0, 5.0, 5.5]);
    let differs = |shim: &Shim| {
        (0..20).any(|position| {
            let row = SamplingRow { position, top_k: 3, ..PLAIN };
            run(shim, &logits, &[row], &[], &[]) != [sampler::choose(&logits, &row)]
        })
    };
    assert!(!differs(&Shim::new(Schedule::TAME)));
    assert!(differs(&Shim::with_planted(Schedule::TAME, "PLANT_ONE_TIE_MORE")), "a tie too many went unseen");
}

/// Each size that does not fit is refused by name.
fn sizes_are_checked() {
    let refused = |logits: usize, rows: usize, tokens: usize, history: &[u32]| {
        let (mut logits, mut tokens, rows) = (vec![0.0; logits], vec![0; tokens], vec![PLAIN; rows]);
        let batch = SamplingBatch { rows: slice(&rows), bias: slice(&[]), history: slice(history) };
        let (logits, tokens) = (&mut slice_mut(&mut logits), &mut slice_mut(&mut tokens));
        let shim = Shim::new(Schedule::TAME);
        sample_rows(&shim, logits, &batch, &mut slice_mut(&mut []), tokens).expect_err("refused").to_string()
    };
    assert_eq!(refused(6, 2, 1, &[]), "sample_rows: tokens is 1, must be 2");
    assert_eq!(refused(7, 2, 2, &[]), "sample_rows: logits is 7, must be 6");
    assert_eq!(refused(1, 2, 2, &[]), "sample_rows: logits is 1, must be 0");
    assert_eq!(refused(6, 2, 2, &[1]), "sample_rows: occurrences is 0, must be 6");
}

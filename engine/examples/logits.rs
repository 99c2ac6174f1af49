//! Logits of a model at every position, for comparing engines: `logits MODEL IDS OUTPUT` reads one sequence of token ids from
//! each line of the file IDS and writes f32 `[tokens, vocab_size]` of all sequences, little-endian, to the file OUTPUT.
//! Weights are multiplied in the form in which the model stores them; keys and values are kept as f32.

#[path = "../tests/support/direct_run.rs"]
mod direct_run;

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use direct_run::{DirectRun, Rows};
use ns_llm::WeightFormat;
use ns_llm::backend::KvDtype;
use ns_llm::backend::cpu::CpuBackend;
use ns_llm_kernels::cpu::Cpu;
use ns_llm_kernels::cpu::dispatch::Isa;
use ns_llm_kernels::cpu::pool::{Pool, PoolPriority};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, ids, output] = arguments.as_slice() else { return Err("usage: logits MODEL IDS OUTPUT".into()) };
    let parse = |line: &str| line.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>();
    let sequences = fs::read_to_string(ids)?.lines().map(parse).collect::<Result<Vec<_>, _>>()?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);

    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let pool = Arc::new(Pool::new(threads, PoolPriority::Normal)?);
    let isa = Isa::detect()?;
    let backend = CpuBackend::on(Cpu::with_isa(isa, pool)?, WeightFormat::Auto);
    let mut run = DirectRun::open(Path::new(model), backend, KvDtype::F32, longest)?;
    let too_large = sequences.iter().flatten().find(|&&id| id as usize >= run.config.vocab_size);
    if let Some(id) = too_large {
        return Err(format!("token id {id} is outside the vocabulary of {} entries", run.config.vocab_size).into());
    }
    let mut file = BufWriter::new(File::create(output)?);
    for ids in sequences.iter().filter(|ids| !ids.is_empty()) {
        let sequence = run.begin();
        for row in run.step(&[(sequence, ids)], Rows::All)? {
            row.iter().try_for_each(|logit| file.write_all(&logit.to_le_bytes()))?;
        }
        run.clear();
    }
    Ok(file.flush()?)
}

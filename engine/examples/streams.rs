//! Many streams read by one thread, and the processor time that a token costs: the Rust side of the Node package's
//! `npm run bench:boundary`, which does the same work through Node and shows the difference.
//!
//! `streams MODEL STREAMS TOKENS ROUNDS` prints one JSON object per round.

use std::fs;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use ns_llm::{Engine, EngineOptions, Event, Request, RequestStream, Result, ThreadPriority};

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, streams, tokens, rounds] = arguments.as_slice() else {
        return Err("usage: streams MODEL STREAMS TOKENS ROUNDS".into());
    };
    let (streams, tokens, rounds): (u64, usize, usize) = (streams.parse()?, tokens.parse()?, rounds.parse()?);
    let mut options = EngineOptions::new(model);
    options.threads = Some(1);
    options.thread_priority = ThreadPriority::Normal;
    options.kv_bytes = Some(256 << 20);
    let engine = Engine::open(options)?;
    round(&engine, streams, tokens)?; // first touch of buffers and threads
    for _ in 0..rounds {
        let (before, steps, started) = (CpuTimes::now()?, engine.stats().steps_total, Instant::now());
        let read = round(&engine, streams, tokens)?;
        let after = CpuTimes::now()?;
        println!(
            "{{\"tokens\":{},\"chunks\":{},\"steps\":{},\"engine_us\":{},\"reader_us\":{},\"wall_ms\":{:.1}}}",
            read.tokens,
            read.chunks,
            engine.stats().steps_total - steps,
            after.engine_us - before.engine_us,
            after.reader_us - before.reader_us,
            started.elapsed().as_secs_f64() * 1e3,
        );
    }
    Ok(())
}

#[derive(Default)]
struct Read {
    tokens: usize,
    chunks: usize,
    text: String,
}

/// The same prompts and seeds as `bindings-node/bench/streams.mjs`.
fn round(engine: &Engine, streams: u64, tokens: usize) -> Result<Read> {
    let submit = |seed| {
        let mut request = Request::prompt("Once upon a time").max_tokens(tokens).temperature(0.8).seed(seed);
        request.ignore_eos = true;
        engine.submit(request)
    };
    let mut streams = (0..streams).map(submit).collect::<Result<Vec<_>>>()?;
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut read = Read::default();
    while !streams.is_empty() {
        let mut fault = None;
        streams.retain_mut(|stream| match read_ready(stream, &mut context, &mut read) {
            Ok(is_open) => is_open,
            Err(error) => {
                fault = Some(error);
                false
            }
        });
        match fault {
            Some(error) => return Err(error),
            None if !streams.is_empty() => thread::park(),
            None => {}
        }
    }
    Ok(read)
}

/// Takes what is there; `false` at the end of the stream.
fn read_ready(stream: &mut RequestStream, context: &mut Context<'_>, read: &mut Read) -> Result<bool> {
    loop {
        match stream.poll_next(context) {
            Poll::Ready(Some(event)) => {
                if let Event::Delta(delta) = event? {
                    read.tokens += delta.token_ids.len();
                    read.chunks += 1;
                    read.text.push_str(&delta.text);
                }
            }
            Poll::Ready(None) => return Ok(false),
            Poll::Pending => return Ok(true),
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Processor time of the engine's threads and of all others (Linux).
#[derive(Default)]
struct CpuTimes {
    engine_us: u64,
    reader_us: u64,
}

impl CpuTimes {
    fn now() -> std::io::Result<Self> {
        let mut times = CpuTimes::default();
        for task in fs::read_dir("/proc/self/task")? {
            let path = task?.path();
            let read = |file| fs::read_to_string(path.join(file));
            // A thread may end between the listing and the reading.
            let (Ok(name), Ok(schedule)) = (read("comm"), read("schedstat")) else { continue };
            let nanoseconds = schedule.split(' ').next().and_then(|time| time.parse::<u64>().ok()).unwrap_or(0);
            let time = if name.starts_with("ns-llm") { &mut times.engine_us } else { &mut times.reader_us };
            *time += nanoseconds / 1_000;
        }
        Ok(times)
    }
}

//! `ns-llm bench serve`: how a server answers under load, whichever it is, as long as it speaks OpenAI's protocol. Prompts
//! are a mix in which some come far more often than others. A closed loop asks with so many callers at once; an open loop
//! asks when it is time to, whatever became of earlier requests, and every time counts from the moment at which a request was
//! to be sent, so that a server that stands still is charged for all who would have come meanwhile.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::arrivals::{End, Load, Profile, Rate, Stage};
use super::figures::Figures;
use super::prompt_mix::{Rng, Zipf, prompt};
use super::target::{Failure, ServerUrl, Target};
use crate::{CommandResult, show};

/// Distinct prompts, whose requests are kept: some 2.2 KB each.
const MAX_PROMPTS: u64 = 1_000_000;
/// Requests of an open loop that are due and have no connection yet; what comes on top is counted and never sent.
const MAX_DUE: usize = 100_000;
/// A timer may be late by so much: the last stretch before an arrival is waited out awake.
const TIMER_SLACK: Duration = Duration::from_millis(2);
/// What `--short` leaves of a profile.
const SHORT: Duration = Duration::from_secs(10);
const SHORT_PEAK: f64 = 20.0;

#[derive(Args)]
pub(crate) struct Options {
    /// Where the server is, such as http://127.0.0.1:8080
    #[arg(long, value_name = "URL")]
    url: ServerUrl,
    /// Model to ask for
    #[arg(long, value_name = "NAME", default_value = "demo")]
    model: String,
    /// Key to ask with (default: that of the environment variable NS_LLM_API_KEY)
    #[arg(long, value_name = "SECRET")]
    api_key: Option<String>,
    /// What to ask
    #[arg(long, value_enum, default_value_t)]
    route: Route,
    /// Ask for the whole answer at once, instead of a stream
    #[arg(long)]
    no_stream: bool,
    /// Closed loops, one after the other: numbers of callers at once
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,5,10,20,50", value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: Vec<u16>,
    /// Open loop instead: arrivals a second
    #[arg(long, value_name = "RATE", value_parser = positive)]
    rate: Option<f64>,
    /// A load with a name instead; --rate is then its highest rate
    #[arg(long, value_enum)]
    profile: Option<Profile>,
    /// The profile in ten seconds, at 20 requests a second if no --rate is given
    #[arg(long, requires = "profile", conflicts_with = "duration")]
    short: bool,
    /// Requests of each stage
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    requests: u64,
    /// Seconds of each stage, instead of a number of requests
    #[arg(long, value_name = "SECONDS", value_parser = positive, conflicts_with = "requests")]
    duration: Option<f64>,
    /// Requests before the first stage that are not counted
    #[arg(long, value_name = "N", default_value_t = 5)]
    warmup: u64,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 32)]
    max_tokens: u32,
    /// Go on where the model would end its answer
    #[arg(long)]
    ignore_eos: bool,
    /// Sampling temperature
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Distinct prompts, of 100 B to 10 KB, drawn by Zipf's law
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=MAX_PROMPTS))]
    prompts: u64,
    /// Longest prompt (bytes)
    #[arg(long, value_name = "BYTES", default_value_t = 10_000)]
    max_prompt_bytes: usize,
    /// Prompts from a file instead, one a line, the most frequent first
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompts", "max_prompt_bytes"])]
    prompt_file: Option<PathBuf>,
    /// Ask each prompt once, one after the other and from the start again, instead of by Zipf's law
    #[arg(long)]
    in_order: bool,
    /// Number that decides which prompt comes when
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    max_connections: u32,
    /// Longest time of a request (seconds)
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0, value_parser = positive)]
    timeout: f64,
    /// Fail when more than this share of a stage's requests failed
    #[arg(long, value_name = "SHARE")]
    max_failed_share: Option<f64>,
    /// Fail when the 95th percentile of a stage's whole times is longer (milliseconds)
    #[arg(long, value_name = "MS", value_parser = positive)]
    max_p95_ms: Option<f64>,
    /// Write the JSON object to a file too
    #[arg(long, value_name = "FILE")]
    output_file: Option<PathBuf>,
    /// Print the JSON object on one line
    #[arg(long)]
    json: bool,
}

/// Which of OpenAI's routes.
#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
enum Route {
    #[default]
    Chat,
    Completions,
}

impl Route {
    fn path(self) -> &'static str {
        match self {
            Route::Chat => "/v1/chat/completions",
            Route::Completions => "/v1/completions",
        }
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("must be a number above 0".to_string()),
    }
}

pub(crate) fn run(options: &Options) -> CommandResult {
    let lines = match &options.prompt_file {
        Some(path) => Some(read_prompts(path)?),
        None => None,
    };
    let key = options.api_key.clone().or_else(|| std::env::var("NS_LLM_API_KEY").ok().filter(|key| !key.is_empty()));
    let timeout = Duration::from_secs_f64(options.timeout);
    let target = Target::new(options.url.clone(), options.route.path(), key.as_deref(), timeout);
    let run = Arc::new(Run {
        target,
        mix: Mix::new(options, lines),
        connections: Arc::new(Semaphore::new(options.max_connections as usize)),
        next: AtomicU64::new(0),
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut reports = Vec::new();
    let mut broken = Vec::new();
    runtime.block_on(async {
        let warmup = Stage { name: "warmup".into(), load: Load::Closed(1), end: End::Requests(options.warmup) };
        if options.warmup > 0 {
            run.stage(&warmup).await;
        }
        for stage in stages(options) {
            let start = Instant::now();
            let figures = run.stage(&stage).await;
            let report = stage_report(&stage, &figures, start.elapsed().as_secs_f64());
            eprintln!("{}", line(&report));
            reports.push(report);
            broken.extend(broken_limits(options, &stage, &figures));
        }
    });
    let report = json!({
        "url": format!("http://{}{}", options.url.host, options.url.prefix),
        "route": options.route.path(),
        "stream": !options.no_stream,
        "model": options.model,
        "max_tokens": options.max_tokens,
        "prompts": run.mix.bodies.len(),
        "in_order": options.in_order,
        "seed": options.seed,
        "stages": reports,
    });
    if let Some(path) = &options.output_file {
        std::fs::write(path, format!("{report:#}\n")).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    show(format_args!("{}\n", if options.json { report.to_string() } else { format!("{report:#}") }))?;
    if broken.is_empty() { Ok(()) } else { Err(broken.join("; ").into()) }
}

fn read_prompts(path: &PathBuf) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_string).collect();
    if lines.is_empty() { Err(format!("{}: no prompts", path.display())) } else { Ok(lines) }
}

fn stages(options: &Options) -> Vec<Stage> {
    let end = match options.duration {
        Some(seconds) => End::After(Duration::from_secs_f64(seconds)),
        None => End::Requests(options.requests),
    };
    match (options.profile, options.rate) {
        (Some(profile), rate) if options.short => vec![profile.stage(rate.or(Some(SHORT_PEAK)), Some(SHORT))],
        (Some(profile), rate) => vec![profile.stage(rate, options.duration.map(Duration::from_secs_f64))],
        (None, Some(rate)) => vec![Stage { name: "open".into(), load: Load::Open(Rate::steady(rate)), end }],
        (None, None) => {
            let closed = |&callers: &u16| Stage { name: "closed".into(), load: Load::Closed(callers.into()), end };
            options.concurrency.iter().map(closed).collect()
        }
    }
}

fn stage_report(stage: &Stage, figures: &Figures, seconds: f64) -> Value {
    let mut report = figures.report(seconds);
    report["stage"] = stage.name.clone().into();
    match stage.load {
        Load::Closed(callers) => report["concurrency"] = callers.into(),
        Load::Open(rate) => report["rate_per_s"] = rate.peak.into(),
    }
    report
}

/// A stage, for people.
fn line(report: &Value) -> String {
    let load = match (&report["concurrency"], &report["rate_per_s"]) {
        (Value::Null, rate) => format!("up to {rate}/s"),
        (callers, _) => format!("{callers} at once"),
    };
    let times = |name: &str| {
        let times = ["p50", "p95", "p99"].map(|q| report[name][q].as_f64().map_or("-".into(), |ms| format!("{ms:.1}")));
        times.join("/")
    };
    format!(
        "{:<10} {load:<14} {} requests, {} failed, {}/s, {} tokens/s; ms p50/p95/p99: first {}, between {}, whole {}",
        report["stage"].as_str().unwrap_or_default(),
        report["requests"],
        report["failed"],
        report["requests_per_s"],
        report["completion_tokens_per_s"],
        times("first_token_ms"),
        times("between_tokens_ms"),
        times("whole_ms"),
    )
}

fn broken_limits(options: &Options, stage: &Stage, figures: &Figures) -> Vec<String> {
    let mut broken = Vec::new();
    let (share, p95) = (figures.failed_share(), figures.whole.ms(0.95));
    if let Some(limit) = options.max_failed_share.filter(|&limit| share > limit) {
        broken.push(format!("stage {}: {share:.4} of the requests failed, at most {limit} may", stage.name));
    }
    if let Some(limit) = options.max_p95_ms.filter(|&limit| p95 > limit) {
        broken.push(format!("stage {}: the 95th percentile is {p95} ms, at most {limit} ms are allowed", stage.name));
    }
    broken
}

/// The requests to draw from.
struct Mix {
    /// `None`: each after the other.
    zipf: Option<Zipf>,
    seed: u64,
    /// Made when first asked for, then kept: making them must not be what is measured.
    bodies: Vec<OnceLock<Bytes>>,
    prompts: Option<Vec<String>>,
    max_prompt_bytes: usize,
    route: Route,
    /// All of a body but its prompt.
    rest: Value,
}

impl Mix {
    fn new(options: &Options, prompts: Option<Vec<String>>) -> Mix {
        let num_prompts = prompts.as_ref().map_or(options.prompts as usize, Vec::len);
        let mut rest = json!({
            "model": options.model,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "stream": !options.no_stream,
        });
        if !options.no_stream {
            rest["stream_options"] = json!({ "include_usage": true });
        }
        if options.ignore_eos {
            rest["ignore_eos"] = true.into();
        }
        Mix {
            zipf: (!options.in_order).then(|| Zipf::new(num_prompts)),
            seed: options.seed,
            bodies: (0..num_prompts).map(|_| OnceLock::new()).collect(),
            prompts,
            max_prompt_bytes: options.max_prompt_bytes,
            route: options.route,
            rest,
        }
    }

    /// The body of request `idx`.
    fn body(&self, idx: u64) -> Bytes {
        let name = match &self.zipf {
            Some(zipf) => zipf.draw(&mut Rng(idx ^ self.seed.rotate_left(32))),
            None => idx % self.bodies.len() as u64,
        };
        let body = || {
            let text = match &self.prompts {
                Some(prompts) => prompts[name as usize].clone(),
                None => prompt(name, self.max_prompt_bytes),
            };
            let mut body = self.rest.clone();
            match self.route {
                Route::Chat => body["messages"] = json!([{ "role": "user", "content": text }]),
                Route::Completions => body["prompt"] = text.into(),
            }
            Bytes::from(body.to_string())
        };
        self.bodies[name as usize].get_or_init(body).clone()
    }
}

/// What all requests share.
struct Run {
    target: Target,
    mix: Mix,
    connections: Arc<Semaphore>,
    /// Number of the next request.
    next: AtomicU64,
}

impl Run {
    /// Runs a stage until the last of its requests has ended.
    async fn stage(self: &Arc<Self>, stage: &Stage) -> Figures {
        let figures = Arc::new(Mutex::new(Figures::new()));
        match stage.load {
            Load::Closed(callers) => self.closed(callers, stage.end, &figures).await,
            Load::Open(rate) => self.open(rate, stage.end, &figures).await,
        }
        std::mem::replace(&mut *figures.lock().unwrap_or_else(PoisonError::into_inner), Figures::new())
    }

    async fn closed(self: &Arc<Self>, callers: usize, end: End, figures: &Arc<Mutex<Figures>>) {
        let (start, num_begun) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let mut all = JoinSet::new();
        for _ in 0..callers {
            let (run, figures, num_begun) = (self.clone(), figures.clone(), num_begun.clone());
            all.spawn(async move {
                while !end.is_reached(num_begun.fetch_add(1, Ordering::Relaxed), start.elapsed()) {
                    run.ask(Instant::now(), &figures).await;
                }
            });
        }
        while all.join_next().await.is_some() {}
    }

    async fn open(self: &Arc<Self>, rate: Rate, end: End, figures: &Arc<Mutex<Figures>>) {
        let (start, mut at, mut num_begun) = (Instant::now(), 0.0, 0);
        let mut rng = Rng(self.mix.seed);
        let mut all = JoinSet::new();
        loop {
            at = rate.next_arrival(at, &mut rng);
            let after = Duration::from_secs_f64(at);
            if end.is_reached(num_begun, after) {
                break;
            }
            num_begun += 1;
            let intended = start + after;
            wait_until(intended).await;
            while all.try_join_next().is_some() {}
            if all.len() >= MAX_DUE {
                figures.lock().unwrap_or_else(PoisonError::into_inner).add(&Err(Failure::NotSent));
                continue;
            }
            let (run, figures) = (self.clone(), figures.clone());
            all.spawn(async move { run.ask(intended, &figures).await });
        }
        while all.join_next().await.is_some() {}
    }

    async fn ask(&self, intended: Instant, figures: &Mutex<Figures>) {
        let _connection = self.connections.acquire().await;
        let body = self.mix.body(self.next.fetch_add(1, Ordering::Relaxed));
        let outcome = self.target.ask(body, intended).await;
        figures.lock().unwrap_or_else(PoisonError::into_inner).add(&outcome);
    }
}

impl End {
    fn is_reached(self, num_begun: u64, elapsed: Duration) -> bool {
        match self {
            End::Requests(num) => num_begun >= num,
            End::After(length) => elapsed >= length,
        }
    }
}

/// Sleeps, and at last only lets others run: a timer alone would be late by a millisecond.
async fn wait_until(moment: Instant) {
    let left = moment.saturating_duration_since(Instant::now());
    if left > TIMER_SLACK {
        tokio::time::sleep(left - TIMER_SLACK).await;
    }
    while Instant::now() < moment {
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    /// In order each prompt comes once in a round; by Zipf's law some come again before others have come at all.
    #[test]
    fn prompts_come_in_order_where_that_is_asked() {
        let bodies = |arguments: &[&str]| -> Vec<Bytes> {
            let line = ["serve", "--url", "http://127.0.0.1:1", "--prompts", "50", "--max-prompt-bytes", "100"];
            let mix = Mix::new(&Line::parse_from(line.iter().chain(arguments)).options, None);
            (0..100).map(|idx| mix.body(idx)).collect()
        };
        let distinct = |bodies: &[Bytes]| bodies.iter().collect::<HashSet<_>>().len();
        let in_order = bodies(&["--in-order"]);
        assert_eq!((distinct(&in_order[..50]), &in_order[..50]), (50, &in_order[50..]));
        assert!(distinct(&bodies(&[])[..50]) < 40);
    }
}

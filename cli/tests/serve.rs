//! `ns-llm serve` as its operator runs it: it says where it listens, answers, and ends when it is told to. And `ns-llm bench
//! serve`, which loads such a server, or any other.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ns_llm::{Engine, EngineOptions, Stats};
use ns_llm_server::{Model, Server, ServerOptions};
use serde_json::{Value, json};

fn serve(arguments: &[&str]) -> Child {
    let demo = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ns-llm"));
    command.arg("serve").arg("--model").arg(demo).args(arguments).env_remove("NS_LLM_API_KEY");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
}

fn ask(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

/// It listens where it says, under the name it was given, with the key it was given; and ends with success on SIGTERM.
#[test]
fn serve_listens_and_ends() {
    let key = "a-secret-of-some-length";
    let mut child = serve(&["--port", "0", "--threads", "1", "--kv-mib", "16", "--name", "little", "--api-key", key]);
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let line = lines.next().expect("a line").expect("text");
    let address = line.rsplit_once("http://").unwrap_or_else(|| panic!("no address: {line}")).1.to_string();
    let get = |path: &str, header: &str| {
        ask(&address, &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}\r\n"))
    };
    let answer = get("/v1/models", &format!("Authorization: Bearer {key}\r\n"));
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"id\":\"little\""), "{answer}");
    assert!(get("/v1/models", "").starts_with("HTTP/1.1 401 "));
    let told = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill is there");
    assert!(told.success());
    assert!(child.wait().expect("it ends").success());
    let mut said = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut said).expect("text");
    assert_eq!(said, "", "standard output is for results");
}

/// M9: nothing of what is asked or answered is written anywhere: no prompt, answer, salt, user or key, of requests that work and
/// of those that are refused.
#[test]
fn what_is_asked_is_not_logged() {
    let key = "canary-of-the-key-itself";
    let mut child = serve(&["--port", "0", "--threads", "1", "--kv-mib", "16", "--name", "little", "--api-key", key]);
    let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut said = String::new();
    stderr.read_line(&mut said).expect("text");
    let address = said.rsplit_once("http://").unwrap_or_else(|| panic!("no address: {said}")).1.trim().to_string();
    let asked = json!({ "model": "little", "prompt": "canary prompt", "cache_salt": "canary-salt", "user": "canary-user",
                        "max_tokens": 8, "temperature": 0 });
    let refused = json!({ "model": "canary-model", "prompt": "canary", "stop": [["canary"]], "canary": 1 });
    for (path, body, status) in
        [("completions", &asked, "200"), ("completions", &refused, "4"), ("canary", &asked, "404")]
    {
        let body = body.to_string();
        let head = format!("POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n");
        let rest =
            format!("Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let answer = ask(&address, &format!("{head}{rest}{body}"));
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    let told = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill is there");
    assert!(told.success() && child.wait().expect("it ends").success());
    stderr.read_to_string(&mut said).expect("text");
    child.stdout.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(said.contains("http://") && !said.contains("canary"), "{said}");
}

/// The first signal lets a request finish that is on its way; the second one ends the process at once.
#[test]
fn the_second_signal_ends_at_once() {
    let mut child = serve(&["--port", "0", "--threads", "1", "--kv-mib", "16", "--grace", "3600"]);
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let line = lines.next().expect("a line").expect("text");
    let address = line.rsplit_once("http://").unwrap_or_else(|| panic!("no address: {line}")).1.to_string();
    // Its body is asked for, and does not come.
    let mut late = TcpStream::connect(&address).expect("it listens");
    let head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\nExpect: 100-continue\r\n\r\n";
    late.write_all(head.as_bytes()).expect("sent");
    late.read_exact(&mut [0; 25]).expect("it is asked for");
    let tell = |pid: u32| Command::new("kill").args(["-TERM", &pid.to_string()]).status().expect("kill is there");
    assert!(tell(child.id()).success());
    let ready = "GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    while !ask(&address, ready).contains("the server is stopping") {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(child.try_wait().expect("it can be asked").is_none(), "it waits for what is on its way");
    let status = loop {
        // Whoever waits for it may not be there yet.
        tell(child.id());
        std::thread::sleep(std::time::Duration::from_millis(20));
        if let Some(status) = child.try_wait().expect("it can be asked") {
            break status;
        }
    };
    assert_eq!(status.code(), Some(130));
}

/// A file of keys without a key is an error, and not a server that is open to all.
#[test]
fn a_file_without_keys_is_refused() {
    let path = std::env::temp_dir().join(format!("ns-llm-no-keys-{}", std::process::id()));
    std::fs::write(&path, "# one a-secret-of-some-length\n").expect("written");
    let output = serve(&["--port", "0", "--api-key-file", path.to_str().expect("text")]).wait_with_output();
    let _ = std::fs::remove_file(&path);
    let output = output.expect("it ends");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("there is no key in it"), "{stderr}");
}

/// An address that others reach is refused without a key, before the model is loaded.
#[test]
fn serve_is_not_open_to_all() {
    let output = serve(&["--host", "0.0.0.0", "--port", "0"]).wait_with_output().expect("it ends");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("0.0.0.0") && stderr.contains("API key"), "{stderr}");
}

/// The report of `ns-llm bench serve` with these arguments, and whether it succeeded.
fn bench(url: &str, arguments: &[&str]) -> (bool, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ns-llm"));
    command.args(["bench", "serve", "--json", "--url", url]).args(arguments).env_remove("NS_LLM_API_KEY");
    let output = command.output().expect("the program starts");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&stdout);
    (output.status.success(), report.unwrap_or_else(|error| panic!("{error}: {output:?}")))
}

/// What the tool says of `num` stages against a server in this process, and what the server's engine counted.
fn bench_here(arguments: &[&str]) -> (Vec<Value>, Stats) {
    let demo = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let engine = Engine::open(EngineOptions::new(demo).threads(1).kv_bytes(32 << 20)).expect("the model is there");
    let options = ServerOptions { timer: Some(Server::tokio_timer()), ..ServerOptions::default() };
    let server = Server::new(vec![Model::new(engine.clone())], options).expect("valid options");
    let listener = server.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
    let url = format!("http://{}/v1", listener.local_addr().expect("bound"));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let stopped = async {
            let _ = stopped.await;
        };
        runtime.block_on(server.serve(listener, stopped)).expect("it serves");
    });
    let (succeeded, report) = bench(&url, arguments);
    assert!(succeeded, "{report}");
    drop(stop);
    serving.join().expect("no panic");
    let stats = engine.stats();
    engine.close();
    (report["stages"].as_array().expect("stages").clone(), stats)
}

/// Percentiles of a time are there, and in order.
fn check_times(report: &Value, name: &str) {
    let [p50, p95, p99, max] = ["p50", "p95", "p99", "max"].map(|q| report[name][q].as_f64().expect("a time"));
    assert!(0.0 < p50 && p50 <= p95 && p95 <= p99 && p99 <= max * 1.001, "{name}: {report}");
}

/// A ladder of closed loops: every request is made and answered once, its tokens are counted as the engine counts them, and
/// prompts come again, as is seen from what was cached.
#[test]
fn bench_serve_counts_what_the_engine_counts() {
    let ladder = ["--concurrency", "1,4", "--requests", "12", "--warmup", "2", "--max-tokens", "6", "--ignore-eos"];
    let mix = ["--prompts", "5", "--max-prompt-bytes", "300"];
    let (stages, stats) = bench_here(&[&ladder[..], &mix[..]].concat());
    assert_eq!(stages.iter().map(|stage| stage["concurrency"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(4)]);
    for stage in &stages {
        assert_eq!((&stage["succeeded"], &stage["failed"], &stage["errors"]), (&12.into(), &0.into(), &json!({})));
        assert_eq!(stage["completion_tokens"], 12 * 6, "{stage}");
        ["first_token_ms", "whole_ms", "overhead_ms"].iter().for_each(|name| check_times(stage, name));
    }
    let sum = |name: &str| stages.iter().map(|stage| stage[name].as_u64().expect("a count")).sum::<u64>();
    assert_eq!((stats.requests_total, stats.requests_finished), (26, 26));
    assert_eq!(sum("completion_tokens") + 12, stats.generation_tokens_total);
    assert!(0 < sum("cached_tokens") && sum("cached_tokens") <= stats.prefix_cache_hits_total, "{stats:?}");
}

/// Profiles and answers that come whole: as many requests as the rate makes, and a limit that is broken is a failure.
#[test]
fn bench_serve_runs_profiles() {
    let spike = ["--profile", "spike", "--duration", "2", "--rate", "30", "--no-stream", "--route", "completions"];
    let small = ["--prompts", "3", "--max-prompt-bytes", "100", "--max-tokens", "1", "--max-failed-share", "0"];
    let (stages, stats) = bench_here(&[&spike[..], &small[..]].concat());
    let [stage] = &stages[..] else { panic!("one stage: {stages:?}") };
    assert_eq!((&stage["stage"], &stage["failed"]), (&json!("spike"), &json!(0)));
    let requests = stage["requests"].as_u64().expect("a count");
    assert!((10..70).contains(&requests), "a mean of 15.75 a second: {stage}");
    assert_eq!(stats.requests_total, requests + 5, "with the warm-up");
    assert_eq!(stage["first_token_ms"], Value::Null, "no stream");
    check_times(stage, "whole_ms");
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let closed = ["--concurrency", "1", "--requests", "2", "--warmup", "0"];
    let url = format!("http://{nobody}");
    let (succeeded, report) = bench(&url, &[&closed[..], &["--max-failed-share", "0.5"]].concat());
    assert_eq!((succeeded, &report["stages"][0]["errors"]), (false, &json!({ "connect": 2 })));
    assert!(bench(&url, &closed).0, "without a limit it is a report");
}

/// Answers one request on each connection, with what `answer` says at its turn.
fn answer_all(answer: impl Fn(usize) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    std::thread::spawn(move || {
        for (idx, stream) in listener.incoming().enumerate() {
            let mut stream = stream.expect("a connection");
            let mut bytes = [0; 65_536];
            let _ = stream.read(&mut bytes);
            let _ = stream.write_all(answer(idx).as_bytes());
        }
    });
    url
}

fn with_head(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

/// A server that stands still is charged for everybody who would have come meanwhile, not for the one that it held up.
#[test]
fn bench_serve_omits_nothing() {
    const STILL: Duration = Duration::from_millis(1_500);
    let url = answer_all(move |idx| {
        if idx == 0 {
            std::thread::sleep(STILL);
        }
        with_head("200 OK", "application/json", r#"{"choices":[{"text":"x"}]}"#)
    });
    let open_loop = ["--rate", "60", "--duration", "1", "--warmup", "0", "--no-stream", "--max-prompt-bytes", "100"];
    let (_, report) = bench(&url, &open_loop);
    let stage = &report["stages"][0];
    assert!(stage["succeeded"].as_u64().is_some_and(|requests| requests > 25) && stage["failed"] == 0, "{stage}");
    let ms = |quantile: &str| stage["whole_ms"][quantile].as_f64().expect("a time");
    // They were due over one second, and answered after one and a half.
    assert!(ms("max") > 1_450.0 && ms("p50") > 450.0, "{stage}");
}

/// What goes wrong is told by its kind.
#[test]
fn bench_serve_tells_failures_apart() {
    let stream = |events: &str| with_head("200 OK", "text/event-stream", events);
    let answers = [
        with_head("503 Service Unavailable", "application/json", "{}"),
        stream("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n"),
        stream("data: {\"error\":{\"message\":\"no\"}}\n\ndata: [DONE]\n\n"),
        stream("data: nothing\n\n"),
        String::new(),
        stream(": ping\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\ndata: [DONE]\n\n"),
    ];
    let url = answer_all(move |idx| answers[idx % answers.len()].clone());
    let closed_loop = ["--concurrency", "1", "--requests", "6", "--warmup", "0", "--max-prompt-bytes", "100"];
    let (_, report) = bench(&url, &closed_loop);
    let errors = json!({ "status_503": 1, "closed": 2, "error_in_stream": 1, "malformed": 1 });
    let stage = &report["stages"][0];
    assert_eq!((&stage["errors"], &stage["succeeded"]), (&errors, &json!(1)), "{stage}");
}

//! Every command as its user runs it: arguments in, standard output and exit code out, with the model that ships.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn demo() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

fn command(name: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ns-llm"));
    command.arg(name).arg("--model").arg(demo()).stdin(Stdio::null());
    command
}

fn run(name: &str, arguments: &[&str]) -> Output {
    command(name).args(arguments).output().expect("the program starts")
}

fn succeed(name: &str, arguments: &[&str]) -> String {
    let output = run(name, arguments);
    let (stdout, stderr) = (String::from_utf8(output.stdout).expect("text"), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {arguments:?}: {stderr}");
    assert_eq!(stderr, "", "nothing but the result is said when it is no terminal");
    stdout
}

/// The last line is one JSON object.
fn json(name: &str, arguments: &[&str]) -> Value {
    let stdout = succeed(name, arguments);
    serde_json::from_str(stdout.lines().last().expect("a line")).expect("JSON")
}

fn feed(name: &str, arguments: &[&str], input: &str) -> Output {
    let mut child = command(name)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends")
}

const PROMPT: [&str; 4] = ["--prompt", "Once upon a time", "--temperature", "0"];

/// Streaming and JSON give the same text, standard input is a prompt too, and the counts fit.
#[test]
fn generate_streams_and_reports() {
    let text = succeed("generate", &[&PROMPT[..], &["--max-tokens", "24"]].concat());
    let report = json("generate", &[&PROMPT[..], &["--max-tokens", "24", "--json"]].concat());
    assert_eq!(text.strip_suffix('\n'), report["text"].as_str());
    let keeping = ["--max-tokens", "24", "--json", "--response-cache-mib", "1"];
    let kept = json("generate", &[&PROMPT[..], &keeping].concat());
    assert_eq!((&kept["text"], &kept["from_response_cache"]), (&report["text"], &false.into()));
    assert_eq!((&report["finish_reason"], &report["usage"]["completion_tokens"]), (&"length".into(), &24.into()));
    assert_eq!(report["token_ids"].as_array().map(Vec::len), Some(24));
    for time in ["load_ms", "queue_ms", "prompt_ms", "first_token_ms", "decode_ms"] {
        assert!(report["timings"][time].as_f64().is_some_and(|ms| ms >= 0.0), "{time}");
    }
    let piped =
        feed("generate", &["--prompt-file", "-", "--temperature", "0", "--max-tokens", "24"], "Once upon a time");
    assert_eq!(String::from_utf8_lossy(&piped.stdout), text);
}

/// A run finds the keys and values of an earlier one in its directory, and says so; the text is the same. The smallest size
/// that works is told, and a size without a directory is refused.
#[test]
fn kv_outlives_a_run() {
    let folder = std::env::temp_dir().join(format!("ns-llm-kv-{}", std::process::id()));
    let directory = folder.to_str().expect("UTF-8");
    let story =
        "Once upon a time there was a little dog who lived in a big house near the sea, and every day the dog ran.";
    // A busy machine is no reason to compute what is there.
    let cache = ["--kv-cache-dir", directory, "--kv-load-budget-ms", "60000"];
    let ask = ["--prompt", story, "--temperature", "0", "--max-tokens", "8", "--json"];
    let arguments = [&ask[..], &cache[..]].concat();
    let first = json("generate", &arguments);
    let second = json("generate", &arguments);
    let by_tier = |report: &Value| {
        let tiers = ["pool", "host", "disk", "remote"].map(|tier| report["usage"]["cached_by_tier"][tier].as_u64());
        tiers.map(|tokens| tokens.expect("a number"))
    };
    assert_eq!(by_tier(&first), [0; 4], "{first}");
    let [pool, host, disk, remote] = by_tier(&second);
    assert!((pool, host, remote) == (0, 0, 0) && disk >= 16, "{second}");
    assert_eq!(second["usage"]["cached_tokens"].as_u64(), Some(disk));
    assert_eq!(first["token_ids"], second["token_ids"]);
    let never_seen = serde_json::json!({ "token": 0, "reason": "never_seen", "tier": null });
    assert_eq!((&first["usage"]["prefix_miss"], &second["usage"]["prefix_miss"]), (&never_seen, &Value::Null));
    let chat = ["--temperature", "0", "--kv-cache-dir", directory];
    assert!(feed("chat", &chat, "Count to 3.\n").status.success());

    let bench = ["--prompt-tokens", "64", "--gen-tokens", "4", "--repeat", "1", "--kv-host-mib", "8", "--json"];
    let report = json("bench", &[&bench[..], &["--kv-cache-dir", directory]].concat());
    assert!(report["kv_tiers"]["disk"]["blocks"].as_u64().is_some_and(|blocks| blocks >= disk / 16), "{report}");
    assert_eq!((&report["kv_tiers"]["disk"]["hits"], &report["kv_tiers"]["host"]["faults"]), (&0.into(), &0.into()));
    // What a command computed is on disk when it has ended, be it by a reader that leaves.
    let blocks = || {
        let output = Command::new(env!("CARGO_BIN_EXE_ns-llm"))
            .args(["cache", "stat", "--json", "--kv-cache-dir", directory])
            .output();
        let report: Value = serde_json::from_slice(&output.expect("it runs").stdout).expect("JSON");
        report["records"].as_u64().expect("a number")
    };
    let before = blocks();
    let mut left = command("generate");
    left.args(["--prompt", &format!("Another day. {story}"), "--max-tokens", "8", "--temperature", "0"]).args(cache);
    let mut left = left.stdout(Stdio::piped()).spawn().expect("the program starts");
    drop(left.stdout.take());
    assert!(left.wait().expect("it ends").success());
    assert!(blocks() > before, "{before} blocks");
    std::fs::remove_dir_all(&folder).expect("it was made");

    let plan = json("inspect", &["--json", "--kv-cache-dir", directory, "--kv-disk-mib", "64", "--kv-host-mib", "8"]);
    let tiers = &plan["memory"]["kv_tiers"];
    assert_eq!((&tiers["disk"]["bytes"], &tiers["host"]["bytes"]), (&(64 << 20).into(), &(8 << 20).into()));
    assert!(tiers["disk"]["blocks"].as_u64().is_some_and(|blocks| blocks > 100), "{plan}");
    assert!(!folder.exists(), "inspect makes no directory");
    let table = succeed("inspect", &["--kv-cache-dir", directory]);
    assert!(table.contains("KV, disk        8192.0 MiB"), "{table}");
    let alone = run("generate", &["--prompt", "x", "--kv-disk-mib", "64"]);
    assert_eq!(alone.status.code(), Some(2));
    let small = run("generate", &["--prompt", "x", "--kv-cache-dir", directory, "--kv-disk-mib", "0"]);
    assert!(small.status.code() == Some(1) && String::from_utf8_lossy(&small.stderr).contains("kv_disk_bytes"));
}

/// A conversation: the second answer knows the first turn, an empty line ends it.
#[test]
fn chat_answers_turn_by_turn() {
    let output = feed("chat", &["--temperature", "0"], "What is the capital of France?\nCount to 3.\n\nnot read\n");
    let stdout = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success() && stdout.contains("Paris"), "{stdout}");
    assert_eq!(stdout.lines().filter(|line| !line.is_empty()).count(), 2, "{stdout}");
}

/// Vectors as lines and as JSON are the same numbers; lines of standard input are texts.
#[test]
fn embed_gives_vectors() {
    let lines = succeed("embed", &["--text", "a red fox", "--text", "rain"]);
    let report = json("embed", &["--text", "a red fox", "--text", "rain", "--json"]);
    let shown: Vec<Vec<f64>> = lines
        .lines()
        .map(|line| line.split(' ').map(|number| f64::from(number.parse::<f32>().expect("a number"))).collect())
        .collect();
    assert_eq!((shown.len(), shown[0].len() as u64), (2, report["dimensions"].as_u64().expect("a number")));
    for (vector, item) in shown.iter().zip(report["embeddings"].as_array().expect("a list")) {
        let numbers: Vec<f64> =
            item["embedding"].as_array().expect("a list").iter().filter_map(Value::as_f64).collect();
        assert!(numbers.iter().zip(vector).all(|(a, b)| (a - b).abs() < 1e-6));
    }
    let piped = feed("embed", &[], "a red fox\nrain\n");
    assert_eq!(String::from_utf8_lossy(&piped.stdout), lines);
}

/// One object with every figure that a comparison reads.
#[test]
fn bench_reports_every_figure() {
    let arguments = ["--prompt-tokens", "32", "--gen-tokens", "8", "--parallel", "1,2", "--repeat", "1", "--json"];
    let report = json("bench", &[&arguments[..], &["--threads", "1"]].concat());
    for figure in ["load_ms", "peak_rss_mib", "prompt_tps", "decode_tps", "ttft_ms", "decode_gb_per_s", "prompt_gops"] {
        assert!(report[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {report}");
    }
    let parallel = report["parallel"].as_array().expect("a list");
    assert_eq!(parallel.iter().map(|entry| entry["n"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2)]);
    assert!(parallel.iter().all(|entry| entry["gen_tps"].as_f64().is_some_and(|tps| tps > 0.0)));
}

/// Decoding starts after the context that is asked for, which the engine counted; the prompt is measured beside it or, of
/// the same length, with it; and what does not fit the context is refused.
#[test]
fn bench_decodes_at_depth() {
    let sizes = ["--prompt-tokens", "32", "--gen-tokens", "8", "--repeat", "1", "--threads", "1", "--context", "100"];
    let report = |depth: &str| json("bench", &[&sizes[..], &["--depth", depth, "--json"]].concat());
    for (depth, tokens) in [("1", 1), ("32", 32), ("90", 90)] {
        let report = report(depth);
        assert_eq!((&report["depth"], &report["prompt_tokens"]), (&tokens.into(), &32.into()), "{report}");
        assert!(report["decode_tps"].as_f64().is_some_and(|tps| tps > 0.0), "{report}");
        assert!(report["prompt_tps"].as_f64().is_some_and(|tps| tps > 0.0), "{report}");
        // What is read for a token: the weights, and keys and values up to the middle of what is generated.
        let figure = |name: &str| report[name].as_f64().expect("a number");
        let bytes = figure("weights_bytes") + (figure("depth") + 4.0) * figure("kv_token_bytes");
        let gb_per_s = bytes * figure("decode_tps") / 1e9;
        assert!((figure("decode_gb_per_s") - gb_per_s).abs() < 0.006 + 0.01 * gb_per_s, "{report}");
    }
    let output = run("bench", &[&sizes[..], &["--depth", "101"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && stderr.contains("101"), "{stderr}");
}

/// Architecture, tensors, tokenizer, template and memory plan, for people and as JSON.
#[test]
fn inspect_shows_the_model() {
    let report = json("inspect", &["--json"]);
    assert_eq!(report["architecture"], "Qwen3ForCausalLM");
    assert!(report["tensors"].as_array().is_some_and(|tensors| tensors.len() > 40));
    assert!(report["memory"]["kv_blocks"].as_u64().is_some_and(|blocks| blocks > 0));
    let limited = json("inspect", &["--json", "--kv-mib", "4", "--memory-limit-mib", "9"]);
    let levels = limited["memory"]["levels"].as_array().expect("a list");
    let chosen = levels.iter().find(|level| level["is_chosen"] == true).expect("one fits");
    assert_eq!((&levels[0]["weights"], &levels[0]["fits"]), (&"bf16".into(), &false.into()), "{limited}");
    assert_eq!(chosen["weights"], limited["memory"]["weights"]);
    assert!(chosen["total_bytes"].as_u64().is_some_and(|bytes| bytes <= 9 << 20), "{limited}");
    let table = succeed("inspect", &["--weights", "q4_k"]);
    assert!(table.contains("* q4_k"), "{table}");
    let unknown = run("inspect", &["--weights", "q9_9"]);
    assert!(unknown.status.code() == Some(2) && String::from_utf8_lossy(&unknown.stderr).contains("iq4_nl"));
    let table = succeed("inspect", &[]);
    assert!(table.contains("Qwen3ForCausalLM") && table.contains("model.embed_tokens.weight"), "{table}");
}

/// Perplexity of a text and exact match of tasks, from files of the user's own.
#[test]
fn eval_measures_own_files() {
    let folder = std::env::temp_dir().join(format!("ns-llm-eval-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    let (text, items) = (folder.join("text.txt"), folder.join("items.jsonl"));
    let evaluation = |name: &str| std::fs::read_to_string(demo().join("evaluation").join(name)).expect("it ships");
    std::fs::write(&text, evaluation("eval.txt").lines().take(20).collect::<Vec<_>>().join("\n")).expect("written");
    std::fs::write(&items, evaluation("eval.jsonl").lines().take(10).collect::<Vec<_>>().join("\n")).expect("written");
    let paths = [text.to_str().expect("UTF-8"), items.to_str().expect("UTF-8")];
    let report = json("eval", &["--text", paths[0], "--items", paths[1], "--json"]);
    std::fs::remove_dir_all(&folder).expect("removed");
    let perplexity = report["text"]["perplexity"].as_f64().expect("a number");
    assert!((1.0..3.0).contains(&perplexity), "{report}");
    assert_eq!(report["all"]["items"], 10, "{report}");
    assert!(report["all"]["right"].as_u64().is_some_and(|right| right >= 5), "{report}");
}

/// A model becomes one smaller file that answers; a file that is there is only replaced when that is asked for.
#[test]
fn quantize_writes_a_model() {
    let file = std::env::temp_dir().join(format!("ns-llm-quantize-{}.gguf", std::process::id()));
    let output = file.to_str().expect("UTF-8");
    let arguments = ["--type", "q4_k_m", "--output", output];
    let report = json("quantize", &[&arguments[..], &["--json"]].concat());
    assert_eq!((&report["type"], &report["tensors"]["f32"]), (&"q4_k_m".into(), &25.into()), "{report}");
    assert_eq!(report["file_bytes"].as_u64(), std::fs::metadata(&file).map(|file| file.len()).ok());
    assert!(report["bits_per_weight"].as_f64().is_some_and(|bits| (4.5..5.5).contains(&bits)), "{report}");
    let again = run("quantize", &arguments);
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("already there"));
    let text = succeed("quantize", &[&arguments[..], &["--force"]].concat());
    assert!(text.contains("bits a weight") && text.contains("q6_k"), "{text}");
    let question = ["--chat", "--prompt", "What is the capital of France?", "--temperature", "0"];
    let answer =
        Command::new(env!("CARGO_BIN_EXE_ns-llm")).args(["generate", "--model", output]).args(question).output();
    std::fs::remove_file(&file).expect("removed");
    assert!(String::from_utf8_lossy(&answer.expect("the program starts").stdout).contains("Paris"));
    let unknown = run("quantize", &["--type", "q9_9", "--output", output]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("q4_k_m"));
}

/// What cannot be done is one line on standard error and exit code 1 (2 for arguments that make no sense).
#[test]
fn faults_are_one_line() {
    let fault = |name: &str, arguments: &[&str]| {
        let output = run(name, arguments);
        assert!(output.stdout.is_empty(), "standard output carries only results");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = fault("generate", &["--prompt", "x", "--temperature=-1"]);
    assert!(code == Some(1) && text.contains("temperature") && text.lines().count() == 1, "{text}");
    let (code, text) = fault("embed", &["--text", "x", "--dimensions", "100000"]);
    assert!(code == Some(1) && text.contains("dimensions"), "{text}");
    let (code, text) = fault("generate", &["--prompt", "x", "--response-cache-mib", "1", "--response-ttl-ms", "0"]);
    assert!(code == Some(1) && text.contains("response_cache.ttl_ms"), "{text}");
    let (code, _) = fault("generate", &["--no-such-option"]);
    assert_eq!(code, Some(2));
    let nowhere = Command::new(env!("CARGO_BIN_EXE_ns-llm")).args(["inspect", "--model", "/nowhere"]).output();
    let nowhere = nowhere.expect("the program starts");
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("/nowhere"));
}

/// A reader that has read enough ends the program quietly.
#[test]
fn broken_pipe_is_no_fault() {
    let mut child = command("generate")
        .args([&PROMPT[..], &["--max-tokens", "200"]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Where no CUDA driver is (or this build has no CUDA), `auto` runs on the CPU and says why; who asks for CUDA is told
/// what is missing, by name, and nothing else happens. With a driver that works, the device is named.
#[test]
fn devices_are_chosen_and_named() {
    let plan = json("inspect", &["--json"]);
    let asked = run("generate", &[&PROMPT[..], &["--max-tokens", "2", "--device", "cuda:0"]].concat());
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    if plan["device"] == "cpu" {
        assert!(!asked.status.success() && asked.stdout.is_empty(), "{said}");
        let missing = match cfg!(feature = "cuda") {
            // A driver that is there may be too old, or have no device.
            true => ["no CUDA driver is installed", "CUDA"],
            false => ["this build has no CUDA support"; 2],
        };
        assert!(said.contains("`cuda:0` is not available") && missing.iter().any(|text| said.contains(text)), "{said}");
        let reason = plan["device_reason"].as_str().expect("a reason");
        assert!(reason.starts_with("no CUDA device: ") && missing.iter().any(|text| reason.contains(text)), "{reason}");
    } else {
        assert!(asked.status.success(), "{said}");
        assert!(plan["device"].as_str().expect("a name").starts_with("cuda:0 "), "{}", plan["device"]);
    }
    let text = succeed("generate", &[&PROMPT[..], &["--max-tokens", "2", "--device", "cpu"]].concat());
    assert!(!text.trim().is_empty());
    let wrong = run("generate", &[&PROMPT[..], &["--device", "cuda:one"]].concat());
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("auto, cpu, cuda or cuda:N"));
}

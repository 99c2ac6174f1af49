//! `ns-llm serve` as its operator runs it: it says where it listens, answers, and ends when it is told to.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

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

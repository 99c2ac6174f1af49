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

/// An address that others reach is refused without a key, before the model is loaded.
#[test]
fn serve_is_not_open_to_all() {
    let output = serve(&["--host", "0.0.0.0", "--port", "0"]).wait_with_output().expect("it ends");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("0.0.0.0") && stderr.contains("API key"), "{stderr}");
}

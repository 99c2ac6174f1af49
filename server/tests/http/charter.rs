//! The list of promises (`server/tests/README.md`) names tests that are there.

use std::path::Path;

/// Each row names a file and a test of it.
#[test]
fn every_promise_has_its_test() {
    let server = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read =
        |path: &Path| std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let table = read(&server.join("tests/README.md"));
    let mut promises = Vec::new();
    for row in table.lines().filter(|line| line.starts_with('|') && line.contains(".rs`")) {
        let mut quoted = row.split('`').skip(1).step_by(2);
        let (file, test) = (quoted.next().expect("a file"), quoted.next().expect("a test"));
        let path = if file.contains('/') { server.join("..").join(file) } else { server.join("tests/http").join(file) };
        assert!(
            read(&path).contains(&format!("#[test]\nfn {test}("))
                || read(&path).contains(&format!("#[test]\n    fn {test}(")),
            "{row}"
        );
        promises.extend(row.split('|').nth(1).map(str::trim).filter(|name| !name.is_empty()).map(str::to_string));
    }
    let expected: Vec<String> = (1..=10).map(|n| format!("C{n}")).chain((1..=8).map(|n| format!("V{n}"))).collect();
    assert_eq!(promises, expected);
}

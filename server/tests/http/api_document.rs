//! The OpenAPI document: it is served, its copy is the same, and what it says of bodies is what the routes read.

use std::path::PathBuf;

use ns_llm_server::Server;
use serde_json::{Value, json};

use crate::client::Running;

/// The document that is served is the one in `server/openapi.json`; `NS_LLM_UPDATE_OPENAPI=1` writes that.
#[test]
fn the_copy_is_current() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let document = Server::api_document();
    if std::env::var_os("NS_LLM_UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, format!("{document:#}\n")).expect("it can be written");
    }
    let copy = std::fs::read_to_string(&path).unwrap_or_default();
    let is_current = serde_json::from_str::<Value>(&copy).is_ok_and(|copy| copy == document);
    assert!(is_current, "{} is not current: run this test with NS_LLM_UPDATE_OPENAPI=1", path.display());
    assert_eq!(Running::start().get("/openapi.json").ok(), document);
}

/// Every documented parameter is read: a value of a wrong type is refused by its name, and the example itself is taken.
#[test]
fn parameters_are_what_it_says() {
    let running = Running::start();
    let document = Server::api_document();
    let mut num_checked = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        let content = &operations["post"]["requestBody"]["content"]["application/json"];
        let Some(properties) = content["schema"]["properties"].as_object() else { continue };
        for name in properties.keys() {
            let mut body = content["example"].clone();
            // Without these some routes do nothing, and read nothing else.
            let messages = json!([{ "role": "user", "content": "Once" }]);
            for (asked, value) in [("prompt", json!("Once")), ("input", json!("Once")), ("messages", messages)] {
                if properties.contains_key(asked) {
                    body[asked] = value;
                }
            }
            // No parameter is a list of this.
            body[name] = json!([[{ "x": 1 }]]);
            let answer = running.post(path, &body);
            let error = &answer.json()["error"];
            let told = error["message"].as_str().or(error.as_str()).unwrap_or_default();
            let is_named = told.starts_with(name) || (name == "options" && told.contains("options"));
            assert!(answer.status == 400 && is_named, "{path} {name}: {} {}", answer.status, answer.body);
            num_checked += 1;
        }
        for name in content["schema"]["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let mut body = content["example"].clone();
            body.as_object_mut().expect("an object").remove(name);
            assert_eq!(running.post(path, &body).status, 400, "{path} without {name}");
        }
    }
    assert!(num_checked > 90, "{num_checked}");
    assert_eq!(running.engine.stats().requests_total, 0, "nothing was computed");
}

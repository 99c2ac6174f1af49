//! Wrong calls of every function, generated from the header: each function with each argument NULL, 0, freed, of another
//! kind, random, misaligned and huge, and each field of the structs it reads likewise. Each call must return, with the
//! status that fits or at least one that the function's comment lists; never a signal. In the child of a fork the same
//! functions refuse. At the end the engine still tells the same story.

#[path = "support/header.rs"]
mod header;
#[path = "support/programs.rs"]
mod programs;
#[path = "support/project.rs"]
mod support;

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use header::{Field, Function, Header};
use programs::{Linkage, build, model, scratch, succeed};
use support::{crate_dir, declared_functions, header_path};

/// The part of the program that is the same for every function.
const FRAME: &str = include_str!("c/survives.h");

/// Statements that make one argument or field wrong, what that is called, and the status that must come (`None`: any that
/// the function's comment lists).
struct Hazard {
    name: String,
    change: String,
    expected: Option<&'static str>,
}

impl Hazard {
    fn new(name: impl Into<String>, change: impl Into<String>, expected: impl Into<Option<&'static str>>) -> Self {
        Hazard { name: name.into(), change: change.into(), expected: expected.into() }
    }
}

/// A local variable of the argument's name, with a value that is right.
fn right_value(function: &Function, argument: &Field) -> String {
    let (c_type, name) = (argument.c_type.as_str(), argument.name.as_str());
    match (c_type, name) {
        ("ns_llm_engine", _) => format!("ns_llm_engine {name} = live_engine;"),
        ("ns_llm_request", _) if function.name == "ns_llm_request_next" => {
            format!("ns_llm_request {name} = live_fetched;")
        }
        ("ns_llm_request", _) => format!("ns_llm_request {name} = live_called;"),
        ("ns_llm_event_callback", _) => format!("ns_llm_event_callback {name} = hear_nothing;"),
        ("void *", _) => format!("void *{name} = NULL;"),
        ("const char *", _) => format!("const char *{name} = \"a cat\";"),
        ("const uint32_t *", _) => format!("uint32_t room_{name}[5] = {{1}}; const uint32_t *{name} = room_{name};"),
        (_, "buffer") => {
            format!("{} room_{name}[4096]; {c_type} {name} = room_{name};", c_type.trim_end_matches([' ', '*']))
        }
        ("size_t", "capacity") => "size_t capacity = 4096;".to_string(),
        ("size_t", _) => format!("size_t {name} = 5;"),
        (_, "params") => {
            let value_type = c_type.trim_start_matches("const ").trim_end_matches([' ', '*']);
            format!("{value_type} value = right_{value_type}(); {c_type} params = &value;")
        }
        ("uint32_t" | "uint64_t" | "int", _) => format!("{c_type} {name} = 0;"),
        _ if c_type.ends_with('*') => {
            let value_type = c_type.trim_end_matches([' ', '*']);
            let size = if header::has_struct_size(value_type) { "{.struct_size = sizeof(room_out)}" } else { "7" };
            let room = format!("room_{name}");
            format!("{value_type} {room} = {}; {c_type} {name} = &{room};", size.replace("room_out", &room))
        }
        _ => panic!("{}: no value for {c_type} {name}", function.name),
    }
}

/// Everything that can be wrong with one argument.
fn hazards(header: &Header, function: &Function, argument: &Field) -> Vec<Hazard> {
    let (c_type, name) = (argument.c_type.as_str(), argument.name.as_str());
    let mut found = Vec::new();
    match c_type {
        "ns_llm_engine" | "ns_llm_request" => {
            let zero = if function.name.ends_with("_free") { "NS_LLM_OK" } else { "NS_LLM_BAD_HANDLE" };
            let (foreign, freed) = match c_type {
                "ns_llm_engine" => ("live_called", "freed_engine"),
                _ => ("live_engine", "freed_request"),
            };
            found.push(Hazard::new("0", format!("{name} = 0;"), zero));
            for value in [foreign, freed, "1", "UINT64_MAX", "INT64_MAX"] {
                found.push(Hazard::new(value, format!("{name} = {value};"), "NS_LLM_BAD_HANDLE"));
            }
            for round in 0..32 {
                found.push(Hazard::new(
                    format!("random {round}"),
                    format!("{name} = next_random();"),
                    "NS_LLM_BAD_HANDLE",
                ));
                let flipped = format!("{name} ^= (uint64_t)1 << {};", 2 * round);
                found.push(Hazard::new(format!("with bit {} flipped", 2 * round), flipped, "NS_LLM_BAD_HANDLE"));
            }
        }
        "size_t" if name == "capacity" => found.push(Hazard::new("huge", "capacity = SIZE_MAX;", "NS_LLM_OK")),
        "size_t" => {
            for huge in ["SIZE_MAX", "SIZE_MAX / 4", "((size_t)4 << 20) + 4"] {
                found.push(Hazard::new(huge, format!("{name} = {huge};"), "NS_LLM_INVALID_ARGUMENT"));
            }
        }
        "uint32_t" => found.push(Hazard::new("all ones", format!("{name} = UINT32_MAX;"), "NS_LLM_UNSUPPORTED")),
        "uint64_t" => found.push(Hazard::new("huge", format!("{name} = UINT64_MAX - 1;"), None)),
        "int" => {
            for value in ["INT_MIN", "INT_MAX", "-1", "99"] {
                found.push(Hazard::new(value, format!("{name} = {value};"), None));
            }
        }
        "const char *" => {
            found.push(Hazard::new("NULL", format!("{name} = NULL;"), "NS_LLM_NULL_ARGUMENT"));
            for bytes in ["\\xff    ", "a\\xc3   ", "\\xed\\xa0\\x80  ", "\\xc0\\x80   ", "    \\xf0"] {
                found.push(Hazard::new("no UTF-8", format!("{name} = \"{bytes}\";"), "NS_LLM_INVALID_UTF8"));
            }
        }
        "void *" => {}
        _ => {
            let must_not = function.must_not_be_null(name).then_some("NS_LLM_NULL_ARGUMENT");
            found.push(Hazard::new("NULL", format!("{name} = NULL;"), must_not));
            if c_type.ends_with('*') && c_type != "char *" {
                let change = format!("{name} = MISALIGNED({}, {name});", c_type.trim_end_matches('*'));
                found.push(Hazard::new("misaligned", change, "NS_LLM_MISALIGNED_POINTER"));
            }
            found.extend(struct_hazards(header, argument));
        }
    }
    found
}

/// Everything that can be wrong with the struct that an argument points to.
fn struct_hazards(header: &Header, argument: &Field) -> Vec<Hazard> {
    let value_type = argument.c_type.trim_start_matches("const ").trim_end_matches([' ', '*']);
    if !header::has_struct_size(value_type) {
        return Vec::new();
    }
    let is_read = argument.c_type.starts_with("const ");
    let value = if is_read { "value".to_string() } else { format!("room_{}", argument.name) };
    let mut found: Vec<Hazard> = ["0", "1", "7", "9", "4104", "SIZE_MAX", "SIZE_MAX - 7"]
        .map(|size| {
            Hazard::new(format!("of size {size}"), format!("{value}.struct_size = {size};"), "NS_LLM_INVALID_ARGUMENT")
        })
        .into();
    let name = &argument.name;
    let newer = format!(
        "struct {{ {value_type} known; uint64_t unknown; }} newer = {{ {value}, 1 }}; \
         newer.known.struct_size = sizeof newer; {name} = &newer.known;"
    );
    if !is_read {
        return found;
    }
    found.push(Hazard::new("newer and uses what is new", newer, "NS_LLM_UNSUPPORTED"));
    found.push(Hazard::new("of the smallest size", format!("{value}.struct_size = sizeof(size_t);"), None));
    for field in &header.structs[value_type] {
        found.extend(field_hazards(header, value_type, field));
    }
    found
}

/// Everything that can be wrong with one field of `value`, a struct that the library reads.
fn field_hazards(header: &Header, struct_name: &str, field: &Field) -> Vec<Hazard> {
    let name = &field.name;
    // A prompt is given in one of three ways; the way under test is the only one.
    let alone =
        if ["prompt_token_ids", "messages"].contains(&name.as_str()) { "value.prompt.data = NULL; " } else { "" };
    let hazard = |what: &str, change: String, expected: &'static str| {
        Hazard::new(format!("with {name} {what}"), format!("{alone}{change}"), expected)
    };
    let has_count = header.structs[struct_name].iter().any(|other| other.name == format!("num_{name}"));
    match field.c_type.as_str() {
        "ns_llm_text" => vec![
            hazard("NULL", format!("value.{name} = (ns_llm_text){{NULL, 1}};"), "NS_LLM_NULL_ARGUMENT"),
            hazard("huge", format!("value.{name} = (ns_llm_text){{NOWHERE, SIZE_MAX}};"), "NS_LLM_INVALID_ARGUMENT"),
            hazard("no UTF-8", format!("value.{name} = (ns_llm_text){{\"a\\xff\", 2}};"), "NS_LLM_INVALID_UTF8"),
        ],
        pointer if pointer.ends_with('*') && has_count => vec![
            hazard("NULL", format!("value.{name} = NULL, value.num_{name} = 1;"), "NS_LLM_NULL_ARGUMENT"),
            hazard("huge", format!("value.{name} = NOWHERE, value.num_{name} = SIZE_MAX;"), "NS_LLM_INVALID_ARGUMENT"),
            hazard(
                "misaligned",
                format!("value.{name} = MISALIGNED(const void, random_room), value.num_{name} = 1;"),
                "NS_LLM_MISALIGNED_POINTER",
            ),
        ],
        "float" => vec![hazard("NaN", format!("value.{name} = NAN;"), "NS_LLM_INVALID_ARGUMENT")],
        "uint32_t" | "uint64_t" if ["flags", "set"].contains(&name.as_str()) => {
            vec![hazard("all ones", format!("value.{name} = (uint32_t)-1 << 20;"), "NS_LLM_UNSUPPORTED")]
        }
        // Too much memory is another refusal than a number out of its range.
        "uint64_t" if name == "kv_bytes" => {
            vec![Hazard::new("with a huge pool", "value.kv_bytes = UINT64_MAX;", "NS_LLM_OUT_OF_MEMORY")]
        }
        // No number is out of the range of a limit; this one leaves no room for the smallest weights.
        "uint64_t" if name == "memory_limit_bytes" => {
            vec![hazard("of a byte", "value.memory_limit_bytes = 1;".to_string(), "NS_LLM_OUT_OF_MEMORY")]
        }
        // Any number will do.
        "uint64_t" if ["response_max_entries", "response_version"].contains(&name.as_str()) => Vec::new(),
        c_type @ ("uint32_t" | "uint64_t" | "size_t") if name != "struct_size" && !name.starts_with("num_") => {
            vec![hazard("all ones", format!("value.{name} = ({c_type})-1;"), "NS_LLM_INVALID_ARGUMENT")]
        }
        _ => Vec::new(),
    }
}

/// One call in a block of its own.
fn call(function: &Function, hazard: &Hazard, argument: &str, program: &mut String) {
    let values: String = function.arguments.iter().map(|argument| right_value(function, argument) + " ").collect();
    let names: Vec<&str> = function.arguments.iter().map(|argument| argument.name.as_str()).collect();
    let call = format!("{}({})", function.name, names.join(", "));
    let what = format!("\"{}, {argument} {}\"", function.name, hazard.name.replace('"', "'"));
    let check = match (function.has_status(), hazard.expected) {
        (false, _) => format!("RETURNS({what}, {call});"),
        (true, Some(expected)) => format!("ANSWERS({what}, {expected}, {call});"),
        (true, None) => format!("ANSWERS_LISTED({what}, listed_{}, {call});", function.name),
    };
    let release = match function.name.as_str() {
        "ns_llm_generate" | "ns_llm_submit_embedding" => "ns_llm_request_free(room_out_request);",
        _ => "",
    };
    writeln!(program, "    {{ {values}{}\n      {check} {release} }}", hazard.change).unwrap();
}

/// The whole program, and the number of calls in it.
fn program(header: &Header) -> (String, usize) {
    let mut program = FRAME.to_string();
    let mut num_calls = 0;
    let mut main = String::new();
    for function in &header.functions {
        let listed: String = function.listed_statuses(header).into_iter().map(|status| status + ", ").collect();
        writeln!(program, "static const int listed_{0}[] = {{{listed}-1}};", function.name).unwrap();
        writeln!(program, "static void try_{0}(void) {{\n    (void)listed_{0};", function.name).unwrap();
        for argument in &function.arguments {
            for hazard in hazards(header, function, argument) {
                call(function, &hazard, &argument.name, &mut program);
                num_calls += 1;
            }
        }
        program.push_str("}\n\n");
        writeln!(main, "    try_{}();", function.name).unwrap();
    }
    program.push_str("static void refuse_in_child(void) {\n");
    for function in header.functions.iter().filter(|function| function.has_status()) {
        call(function, &Hazard::new("", "", "NS_LLM_FORKED_PROCESS"), "in the child of a fork", &mut program);
    }
    write!(program, "}}\n\nstatic void try_every_function(void) {{\n{main}}}\n").unwrap();
    program.push_str(include_str!("c/survives_main.h"));
    (program, num_calls)
}

/// Writes and builds the program.
fn built() -> PathBuf {
    let text = fs::read_to_string(header_path()).unwrap();
    let header = Header::parse(&text);
    let mut names: Vec<String> = header.functions.iter().map(|function| function.name.clone()).collect();
    names.sort();
    assert_eq!(names, declared_functions(&text), "the generator misses a function");
    let (program, num_calls) = program(&header);
    assert!(num_calls > 700, "only {num_calls} calls were generated");
    let source = scratch("survives.c");
    // Two tests build it at the same time.
    let aside = scratch(&format!("survives-{:?}.c", std::thread::current().id()));
    fs::write(&aside, program).unwrap();
    fs::rename(&aside, &source).unwrap();
    build(&source, Linkage::Shared)
}

/// No wrong call ends the process or is answered by a status that does not fit.
#[test]
fn wrong_calls_are_answered() {
    let output = succeed(Command::new(built()).arg(model()).current_dir(crate_dir()));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.trim().ends_with("calls, 1 child") && !said.starts_with('0'), "{said}");
}

/// None of them touches memory that is not the library's or the call's.
#[test]
#[cfg_attr(not(has_valgrind), ignore = "needs valgrind")]
fn wrong_calls_are_clean_under_valgrind() {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(programs::VALGRIND).arg(built()).arg(model());
    succeed(valgrind.env("NS_LLM_ISA", "portable"));
}

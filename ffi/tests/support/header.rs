//! A reader of `include/ns_llm.h`, for the test that is generated from it: its functions with their arguments and comments,
//! its structs with their fields.

use std::collections::BTreeMap;

/// An argument of a function, or a field of a struct.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    /// Such as `const char *`.
    pub(crate) c_type: String,
    pub(crate) name: String,
}

/// A declared function.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) returns: String,
    pub(crate) arguments: Vec<Field>,
    /// The comment above it, without stars.
    comment: String,
}

/// What the header declares.
pub(crate) struct Header {
    pub(crate) functions: Vec<Function>,
    pub(crate) structs: BTreeMap<String, Vec<Field>>,
}

/// Whether a struct begins with its size, so that it may grow.
pub(crate) fn has_struct_size(name: &str) -> bool {
    let fixed = ["ns_llm_engine", "ns_llm_request", "ns_llm_text", "ns_llm_message", "ns_llm_logit_bias"];
    name.starts_with("ns_llm_") && !name.ends_with("_callback") && !fixed.contains(&name)
}

impl Header {
    pub(crate) fn parse(text: &str) -> Header {
        let mut header = Header { functions: Vec::new(), structs: BTreeMap::new() };
        let mut rest = text;
        let mut comment = String::new();
        while let Some(start) = rest.find(|c: char| !c.is_whitespace()) {
            rest = &rest[start..];
            let (item, after) = next_item(rest);
            if item.starts_with("/*") {
                comment =
                    item.lines().map(|line| line.trim_start_matches([' ', '*', '/'])).collect::<Vec<_>>().join("\n");
            } else if let Some(definition) = item.strip_prefix("typedef struct ") {
                let (name, fields) = definition.split_once('{').expect("a struct has fields");
                header.structs.insert(name.trim().to_string(), fields_of(fields));
            } else if !item.starts_with(['#', '}']) && !item.starts_with("typedef") && !item.starts_with("extern") {
                header.functions.push(function(item, std::mem::take(&mut comment)));
            }
            rest = after;
        }
        header
    }
}

/// A comment, a line of the preprocessor, or a declaration.
fn next_item(text: &str) -> (&str, &str) {
    let end = if text.starts_with("/*") {
        text.find("*/").map(|end| end + 2)
    } else if text.starts_with(['#', '}']) || text.starts_with("extern") {
        text.find('\n')
    } else if text.starts_with("typedef struct") || text.starts_with("typedef enum") {
        text.find("\n}").and_then(|brace| text[brace..].find(';').map(|end| brace + end + 1))
    } else {
        text.find(';').map(|end| end + 1)
    };
    text.split_at(end.expect("a header is whole"))
}

fn function(declaration: &str, comment: String) -> Function {
    let (head, arguments) = declaration.trim_end_matches(';').split_once('(').expect("a function has arguments");
    let Field { c_type: returns, name } = field(head);
    let arguments = arguments.trim_end().trim_end_matches(')');
    let arguments = if arguments == "void" { Vec::new() } else { arguments.split(',').map(field).collect() };
    Function { name, returns, arguments, comment }
}

fn fields_of(body: &str) -> Vec<Field> {
    let mut code = String::new();
    let mut rest = body.split("\n}").next().unwrap_or_default();
    while let Some((before, after)) = rest.split_once("/*") {
        code.push_str(before);
        rest = after.split_once("*/").expect("a comment ends").1;
    }
    code.push_str(rest);
    code.split(';').filter(|part| !part.trim().is_empty()).map(field).collect()
}

/// `const char *text` is of type `const char *`.
fn field(declaration: &str) -> Field {
    let words = declaration.split_whitespace().filter(|word| *word != "struct").collect::<Vec<_>>().join(" ");
    let name_start = words.rfind([' ', '*']).map_or(0, |at| at + 1);
    let (c_type, name) = words.split_at(name_start);
    Field { c_type: c_type.trim().to_string(), name: name.to_string() }
}

impl Function {
    pub(crate) fn has_status(&self) -> bool {
        self.returns == "ns_llm_status"
    }

    /// Whether the comment says so: "`a` and `b` must not be NULL", or "must not be" where NULL was said before.
    pub(crate) fn must_not_be_null(&self, argument: &str) -> bool {
        let flat = self.comment.replace('\n', " ");
        let Some((_, after)) = flat.split_once("NULL: ") else { return false };
        let section = after.split("Returns:").next().unwrap_or_default();
        let says = |part: &str| part.contains("must not be") && part.contains(&format!("`{argument}`"));
        // "and its `struct_size` must be set" is another thought.
        section.split([';', '.']).any(says)
    }

    /// The statuses that the comment says it returns.
    pub(crate) fn listed_statuses(&self, header: &Header) -> Vec<String> {
        let section = self.comment.split("Returns:").nth(1).unwrap_or_default();
        let section = section.split("On failure:").next().unwrap_or_default();
        let words = section.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let mut statuses: Vec<String> = words.filter(|word| word.starts_with("NS_LLM_")).map(str::to_string).collect();
        if let Some(other) = section.split("every status that ").nth(1).and_then(|rest| rest.split('(').next()) {
            let other = header.functions.iter().find(|function| function.name == other).expect("it is declared");
            statuses.extend(other.listed_statuses(header));
        }
        statuses.retain(|status| !["NS_LLM_FOREVER"].contains(&status.as_str()) && !status.contains("EVENT"));
        statuses.retain(|status| !status.contains("REQUEST"));
        statuses
    }
}

//! Messages to a prompt, through the model's Jinja template. Templates come from the model's author or the operator,
//! never from a request; still they run without host objects, with bounded work, memory, output, depth and time.
//! TODO: lists doubled by `+` some thirty times over are not charged for by the template engine (minijinja 3.1, strings
//! are), so their memory is not bounded; settled when it charges for them, or by a guard of ours.
//!
//! Knows no tokenizer and no clock: the caller says what time it is, and whether it is too late.
//!
//! **Who wrote what.** A user's message may hold the text of a special token, and that must stay text. So a rendered
//! prompt comes with the ranges that came from messages. They are found by rendering again with marks around each
//! message, characters that occur in none; without the marks the result must be the same. Templates that look into
//! messages (whether one begins with a certain tag, what stands behind another) can notice the marks, so there is a
//! second way: a mark *inside* each text of a special token in a message, and at ends that could complete one. What the
//! template then does not recognise as a token did not come from the template. A template that notices even that is
//! given no choice: its output for the marked messages is the prompt, since it is the one in which special tokens are
//! known to be the template's own.

mod functions;
mod provenance;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value};

use crate::config::{MAX_TEMPLATE_BYTES, TEMPLATE_FUEL, TEMPLATE_TIME_MS};
use crate::error::{Error, Result};
use crate::request::Message;
use provenance::Marks;

/// Depth to which macros and includes may nest.
const MAX_TEMPLATE_DEPTH: usize = 100;
/// Longest name of a role, bytes.
const MAX_ROLE_BYTES: usize = 64;
const NAME: &str = "chat";

/// Special tokens as a template needs them.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    /// What the template sees under a name, such as `bos_token`.
    pub named: BTreeMap<String, String>,
    /// The texts of all special tokens of the vocabulary.
    pub texts: Vec<String>,
}

/// Bounds and surroundings of one rendering.
pub struct RenderContext<'a> {
    /// What `strftime_now` tells, seconds since 1970 (UTC).
    pub unix_seconds: i64,
    /// Longest output.
    pub max_output_bytes: usize,
    /// Whether [`TEMPLATE_TIME_MS`] have passed; asked whenever something is written. Between two writes the fuel
    /// bounds the work.
    pub expired: &'a dyn Fn() -> bool,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The prompt.
    pub text: String,
    /// Byte ranges of it, in order and apart, in which special tokens are text. An empty one forbids tokens across its
    /// place.
    pub content: Vec<Range<usize>>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    tells_time: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("special", &self.special).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `source`, with the language's settings of transformers.
    pub fn new(source: &str, special: SpecialTokens) -> Result<Self> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(template_error(format!("has {} bytes, at most {MAX_TEMPLATE_BYTES}", source.len())));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the delimiters are the language's own"));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.set_recursion_limit(MAX_TEMPLATE_DEPTH);
        functions::register(&mut environment);
        environment.add_template_owned(NAME, source.to_string()).map_err(reason)?;
        Ok(ChatTemplate { environment, special, tells_time: source.contains("strftime_now") })
    }

    /// Whether the same conversation may be another text at another time.
    pub fn tells_time(&self) -> bool {
        self.tells_time
    }

    /// Renders a conversation and opens the assistant's turn.
    pub fn render(&self, messages: &[Message], context: &RenderContext<'_>) -> Result<Rendered> {
        messages.iter().try_for_each(check_role)?;
        let text = self.render_text(messages, context)?;
        let marks = Marks::unused_in(messages).ok_or_else(|| Error::InvalidArgument {
            field: "messages",
            value: "contents with every private-use character".to_string(),
            expected: "to leave two of them unused".to_string(),
        })?;
        // Twice as much output for the marks; a template that fails because of them is rendered in the second way.
        let marked_context = RenderContext { max_output_bytes: context.max_output_bytes.saturating_mul(2), ..*context };
        let wrapped = self.render_text(&marks.wrap(messages), &marked_context);
        if let Some(content) = wrapped.ok().and_then(|wrapped| marks.ranges(&wrapped, &text)) {
            return Ok(Rendered { text, content });
        }
        let broken = self.render_text(&marks.break_tokens(messages, &self.special.texts), &marked_context)?;
        let (text, content) = marks.places(&broken);
        Ok(Rendered { text, content })
    }

    fn render_text(&self, messages: &[Message], context: &RenderContext<'_>) -> Result<String> {
        let named = self.special.named.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let variables = [
            ("messages", messages.iter().map(message_value).collect()),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("strftime_now", functions::strftime_now(context.unix_seconds)),
        ];
        let variables = Value::from_pairs(named.chain(variables));
        let template = self.environment.get_template(NAME).map_err(reason)?;
        let mut output = BoundedOutput { bytes: Vec::new(), context, broken: None };
        let rendered = template.render_captured_to(variables, &mut output).map(drop);
        if let Some(bound) = output.broken {
            return Err(template_error(bound));
        }
        rendered.map_err(reason)?;
        String::from_utf8(output.bytes).map_err(|e| template_error(e.to_string()))
    }
}

fn message_value(message: &Message) -> Value {
    Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())])
}

/// A role becomes part of the prompt outside of what counts as content, so it is a plain word.
fn check_role(message: &Message) -> Result<()> {
    let role = &message.role;
    let is_word = role.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    if is_word && !role.is_empty() && role.len() <= MAX_ROLE_BYTES {
        return Ok(());
    }
    let shown: String = role.chars().take(MAX_ROLE_BYTES).collect();
    Err(Error::InvalidArgument {
        field: "messages.role",
        value: format!("{shown:?}"),
        expected: format!("1 to {MAX_ROLE_BYTES} letters, digits, '_', '-' or '.'"),
    })
}

/// Collects output until a bound is broken.
struct BoundedOutput<'a> {
    bytes: Vec<u8>,
    context: &'a RenderContext<'a>,
    /// The bound, in words.
    broken: Option<String>,
}

impl io::Write for BoundedOutput<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let limit = self.context.max_output_bytes;
        if self.bytes.len().saturating_add(bytes.len()) > limit {
            self.broken = Some(format!("output exceeds {limit} bytes"));
        } else if (self.context.expired)() {
            self.broken = Some(format!("rendering exceeds {TEMPLATE_TIME_MS} ms"));
        } else {
            self.bytes.extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        Err(io::Error::other("a bound of the template was broken"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn template_error(reason: String) -> Error {
    Error::Template { reason }
}

/// What the template engine said, and where in the template; no name of a file.
fn reason(error: minijinja::Error) -> Error {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("takes more than {TEMPLATE_FUEL} units of work"),
        // What a template raises by itself is its own words.
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    template_error(error.line().map_or(what.clone(), |line| format!("{what} (line {line})")))
}

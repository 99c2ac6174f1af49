//! From a [`Request`] to what the scheduler takes: renders messages, encodes text, fills in the model's defaults and
//! checks all that needs the vocabulary. Runs on its own bounded thread, so that neither an event loop nor the step
//! loop ever waits for a template or a tokenizer.

mod replay;
mod waiting;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::chat::RenderContext;
use crate::command::{Command, Prepared, PreparedInput, PreparedWork, Submission, VectorForm, Work};
use crate::config::{TEMPLATE_OUTPUT_BYTES_PER_CONTEXT_TOKEN, TEMPLATE_TIME_MS};
use crate::embedding::{EmbeddingInput, EmbeddingRequest};
use crate::error::{Error, Result, panic_text};
use crate::field_hash::{FieldHash, FieldTag};
use crate::ids::{NamespaceKey, OwnerKey};
use crate::instruments::Instruments;
use crate::request::{Prompt, Request, SamplingParams};
use crate::response_cache::CachedAnswer;
use crate::responses::{Asked, LookUp, Question, Responses};
use crate::sampler::{check_token_ids, choice_seed};
use crate::sequence::{EncodeSpec, SequenceSpec};
use crate::text_model::TextModel;
use crate::tokenizer::StopStrings;
pub(crate) use replay::replay;
use waiting::{Held, WaitingList};

/// What becomes of a submission.
enum Intake {
    /// It goes to the worker.
    Run(PreparedWork),
    /// Its answer is known. The seed is the one that was asked for.
    Answered(CachedAnswer, Option<u64>),
    /// Its answer may be kept beyond the process.
    Ask(PreparedWork, Asked),
}

/// The intake thread: prepares submissions in order until their channel closes. Once the engine `is_closing`, what is
/// left in the channel is only told so.
pub(crate) fn run(
    text: &TextModel,
    responses: &Responses,
    instruments: &Arc<Instruments>,
    epoch: Instant,
    submissions: &Receiver<Submission>,
    worker: &Sender<Command>,
    is_closing: &AtomicBool,
) {
    let mut waiting = WaitingList::new(responses, worker, instruments);
    while let Some(next) = receive(submissions, &waiting) {
        waiting.expire();
        let Some(Submission { id, work, sender, origin, slot }) = next else { continue };
        let given_up = match (is_closing.load(Ordering::Acquire), sender.is_cancelled()) {
            (true, _) => Some(sender.closed()),
            (_, true) => Some(Error::Cancelled),
            _ => None,
        };
        let since_epoch = origin.arrived.saturating_duration_since(epoch);
        // A defect in a template engine or a tokenizer ends this request, and nobody else's.
        let prepared = given_up.map_or_else(
            || {
                catch_unwind(AssertUnwindSafe(|| prepare(text, responses, &work, since_epoch)))
                    .unwrap_or_else(|panic| Err(Error::Internal { reason: panic_text(panic.as_ref()) }))
            },
            Err,
        );
        match prepared {
            Ok(Intake::Run(work)) => {
                let prepared = Prepared { id, work, sender, origin, slot };
                // A worker that is gone drops the request, which ends its stream with why.
                let _ = worker.send(Command::Run(Box::new(prepared)));
            }
            Ok(Intake::Ask(prepared, asked)) => {
                let Work::Generate(request) = work else { unreachable!("vectors are not kept") };
                let (prompt_tokens, max_tokens) = match &prepared {
                    PreparedWork::Generate { specs, .. } => (specs[0].prompt.len(), specs[0].max_new_tokens),
                    PreparedWork::Embed(..) => unreachable!("vectors are not kept"),
                };
                let prepared = Prepared { id, work: prepared, sender, origin, slot };
                let vocab_size = text.vocab_size;
                waiting.ask(Held { prepared, request, asked, prompt_tokens, max_tokens, vocab_size });
            }
            Ok(Intake::Answered(answer, seed)) => {
                // First: whoever has seen the last event may submit again.
                drop(slot);
                replay(sender, answer, seed, origin.arrived, &instruments.meters);
            }
            Err(error) => {
                sender.end(Err(error));
                let _ = worker.send(Command::Refused);
            }
        }
    }
    waiting.close();
}

/// The next submission, or `Some(None)` when one of those that wait has waited long enough; `None`: the engine closes.
fn receive(submissions: &Receiver<Submission>, waiting: &WaitingList) -> Option<Option<Submission>> {
    match waiting.longest_sleep() {
        None => submissions.recv().ok().map(Some),
        Some(longest) => match submissions.recv_timeout(longest) {
            Ok(submission) => Some(Some(submission)),
            Err(RecvTimeoutError::Timeout) => Some(None),
            Err(RecvTimeoutError::Disconnected) => None,
        },
    }
}

/// `submitted`: time since the worker's epoch.
fn prepare(text: &TextModel, responses: &Responses, work: &Work, submitted: Duration) -> Result<Intake> {
    match work {
        Work::Generate(request) => prepare_generation(text, responses, request, submitted),
        Work::Embed(request) => prepare_embedding(text, request, submitted).map(Intake::Run),
    }
}

/// One spec per choice, unless the response cache has the answer.
fn prepare_generation(
    text: &TextModel,
    responses: &Responses,
    request: &Request,
    submitted: Duration,
) -> Result<Intake> {
    let prompt: Arc<[u32]> = encode(text, &request.prompt)?.into();
    let seed = request.sampling.seed.unwrap_or_else(draw_seed);
    let mut stop_token_ids = request.stop_token_ids.clone();
    if !request.ignore_eos {
        stop_token_ids.extend(&text.eos_token_ids);
    }
    let stop_token_ids: Arc<[u32]> = stop_token_ids.into();
    let params = SamplingParams::resolve(&request.sampling, &text.sampling_defaults, seed);
    let max_new_tokens = request.max_new_tokens();
    let namespace = namespace_key(request.namespace.as_deref());
    let owner = owner_key(request.namespace.as_deref());
    let (recorder, asked) = match responses.look_up(&Question {
        request,
        identity: &text.identity,
        namespace: &namespace,
        owner,
        prompt: &prompt,
        stop_token_ids: &stop_token_ids,
        sampling: &params,
        max_tokens: max_new_tokens,
        vocab_size: text.vocab_size,
        is_timeless: is_timeless(text, &request.prompt),
    }) {
        LookUp::Off => (None, None),
        LookUp::Found(answer) => return Ok(Intake::Answered(answer, request.sampling.seed)),
        LookUp::Missing(recorder, asked) => (recorder, asked),
    };
    let specs = (0..request.n)
        .map(|choice| SequenceSpec {
            priority: request.priority,
            prompt: prompt.clone(),
            max_new_tokens,
            stop_token_ids: stop_token_ids.clone(),
            deadline_ms: deadline_ms(request.timeout_ms, submitted),
            timeout_ms: request.timeout_ms.unwrap_or_default(),
            namespace,
            owner,
            prefix_cache: request.prefix_cache,
            // The choices share their prompt; its logprobs are reported once.
            prompt_logprobs: (request.prompt_logprobs && choice == 0).then(|| request.logprobs.unwrap_or(0)),
            logprobs: request.logprobs,
            sampling: Arc::new(SamplingParams { seed: choice_seed(seed, choice), ..params.clone() }),
        })
        .collect();
    let work = PreparedWork::Generate { specs, stop: StopStrings::new(&request.stop), seed, recorder };
    Ok(match asked {
        Some(asked) => Intake::Ask(work, asked),
        None => Intake::Run(work),
    })
}

/// One spec per input, each cut to what the model takes at once if the request allows it.
fn prepare_embedding(text: &TextModel, request: &EmbeddingRequest, submitted: Duration) -> Result<PreparedWork> {
    let limit_tokens = text.max_embedding_tokens;
    let deadline_ms = deadline_ms(request.timeout_ms, submitted);
    let prepare_input = |input: &EmbeddingInput| {
        let (mut ids, whole_tokens) = match input {
            EmbeddingInput::Text(input) => text.tokenizer.encode_truncated(input, limit_tokens)?,
            EmbeddingInput::Tokens(ids) => (ids.clone(), ids.len()),
        };
        if whole_tokens > limit_tokens && !request.truncate {
            let context_tokens = text.context_tokens;
            return Err(Error::PromptTooLong { prompt_tokens: whole_tokens, limit_tokens, context_tokens });
        }
        ids.truncate(limit_tokens);
        check_prompt_ids("input", &ids, text.vocab_size)?;
        let timeout_ms = request.timeout_ms.unwrap_or_default();
        let spec = EncodeSpec { priority: request.priority, tokens: ids.into(), deadline_ms, timeout_ms };
        Ok(PreparedInput { spec, truncated: whole_tokens > limit_tokens })
    };
    let inputs = request.inputs.iter().map(prepare_input).collect::<Result<Vec<_>>>()?;
    let dimensions = request.dimensions.unwrap_or(text.embedding_dimensions);
    Ok(PreparedWork::Embed(inputs, VectorForm { dimensions, normalize: request.normalize }))
}

/// Milliseconds since the worker's epoch.
fn deadline_ms(timeout_ms: Option<u64>, submitted: Duration) -> Option<u64> {
    timeout_ms.map(|timeout_ms| submitted.as_millis() as u64 + timeout_ms)
}

fn encode(text: &TextModel, prompt: &Prompt) -> Result<Vec<u32>> {
    let ids = match prompt {
        Prompt::Text(prompt) => text.tokenizer.encode(prompt, true)?,
        Prompt::Tokens(ids) => ids.clone(),
        Prompt::Chat(messages) => {
            let template = text.chat_template.as_ref().ok_or(Error::NoChatTemplate)?;
            let start = Instant::now();
            let rendered = template.render(
                messages,
                &RenderContext {
                    unix_seconds: SystemTime::now()
                        .duration_since(UNIX_EPOCH)
                        .map_or(0, |since| since.as_secs() as i64),
                    max_output_bytes: text.context_tokens.saturating_mul(TEMPLATE_OUTPUT_BYTES_PER_CONTEXT_TOKEN),
                    expired: &|| start.elapsed() > Duration::from_millis(TEMPLATE_TIME_MS),
                },
            )?;
            text.tokenizer.encode_with_content(&rendered.text, &rendered.content)?
        }
    };
    check_prompt_ids("prompt", &ids, text.vocab_size)?;
    Ok(ids)
}

/// Whether the prompt is rendered and encoded alike at any time.
fn is_timeless(text: &TextModel, prompt: &Prompt) -> bool {
    !matches!(prompt, Prompt::Chat(_)) || text.chat_template.as_ref().is_some_and(|template| !template.tells_time())
}

/// There is something to compute, and the model has rows for it: a tokenizer can know more tokens than the model.
fn check_prompt_ids(field: &'static str, ids: &[u32], vocab_size: usize) -> Result<()> {
    check_token_ids(field, ids.iter().copied(), vocab_size)?;
    if !ids.is_empty() {
        return Ok(());
    }
    let (value, expected) = ("0 tokens".to_string(), "at least one token".to_string());
    Err(Error::InvalidArgument { field, value, expected })
}

/// Checks what an embedding request names; costs no tokenizing, so it runs on the caller's thread.
pub(crate) fn check_embedding_request(request: &EmbeddingRequest, vocab_size: usize, dimensions: usize) -> Result<()> {
    for input in &request.inputs {
        if let EmbeddingInput::Tokens(ids) = input {
            check_token_ids("input", ids.iter().copied(), vocab_size)?;
        }
    }
    match request.dimensions {
        Some(wanted) if wanted > dimensions => Err(Error::InvalidArgument {
            field: "dimensions",
            value: wanted.to_string(),
            expected: format!("at most {dimensions}"),
        }),
        _ => Ok(()),
    }
}

/// Checks the token ids that a request names; costs no tokenizing, so it runs on the caller's thread.
pub(crate) fn check_request_token_ids(request: &Request, vocab_size: usize) -> Result<()> {
    if let Prompt::Tokens(ids) = &request.prompt {
        check_token_ids("prompt", ids.iter().copied(), vocab_size)?;
    }
    check_token_ids("stop_token_ids", request.stop_token_ids.iter().copied(), vocab_size)?;
    check_token_ids("logit_bias", request.sampling.logit_bias.iter().map(|&(id, _)| id), vocab_size)
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum NamespaceTag {
    What = 1,
    Name,
}

impl FieldTag for NamespaceTag {
    fn number(self) -> u8 {
        self as u8
    }
}

/// Hash of a namespace: its text goes no further than here. `None` is the engine's own.
fn namespace_key(namespace: Option<&str>) -> NamespaceKey {
    let hash = FieldHash::new().text(NamespaceTag::What, "namespace");
    match namespace {
        None => hash.finish(),
        Some(name) => hash.text(NamespaceTag::Name, name).finish(),
    }
}

/// Hash of a namespace's owner: what stands before its first line break.
fn owner_key(namespace: Option<&str>) -> OwnerKey {
    namespace_key(namespace.map(|name| name.split_once('\n').map_or(name, |(owner, _)| owner)))
}

/// A seed for a request that gives none: the standard library's keyed hasher is keyed by the operating system.
fn draw_seed() -> u64 {
    // 53 bits, so that a JavaScript number holds the reported seed exactly.
    RandomState::new().build_hasher().finish() >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Namespaces are distinct keys, and the engine's own is none that a caller can name.
    #[test]
    fn namespaces_do_not_collide() {
        let keys = [None, Some(""), Some("a"), Some("\0"), Some("\u{1}a")].map(namespace_key);
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key), "namespace {i} collides");
        }
    }

    /// However its owner divides a namespace, it counts for him, and for nobody else.
    #[test]
    fn owners_do_not_gain_by_dividing() {
        let owners = ["key", "key\n", "key\nsalt", "key\nother\nsalt"].map(|name| owner_key(Some(name)));
        assert!(owners.iter().all(|owner| *owner == owners[0]));
        for other in [None, Some(""), Some("\nkey"), Some("key2\nsalt"), Some("other")] {
            assert_ne!(owner_key(other), owners[0], "{other:?}");
        }
    }

    /// An id outside the vocabulary is refused by name, wherever a request names ids.
    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        let mut bias = Request::prompt("x");
        bias.sampling.logit_bias = vec![(7, 1.0)];
        let mut stop = Request::prompt("x");
        stop.stop_token_ids = vec![7];
        for (request, name) in [(Request::tokens([1, 7]), "prompt"), (bias, "logit_bias"), (stop, "stop_token_ids")] {
            let Err(Error::InvalidArgument { field, value, .. }) = check_request_token_ids(&request, 7) else {
                panic!("{name} was not refused")
            };
            assert!(field.starts_with(name) && value == "7", "{field} {value}");
            assert_eq!(check_request_token_ids(&request, 8), Ok(()));
        }
    }
}

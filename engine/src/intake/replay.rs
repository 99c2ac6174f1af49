//! A kept answer as the events of a request: what its reader would have heard, with the deltas of each choice in one.

use std::time::Instant;

use crate::request::{CachedTokens, Delta, Event, Summary, Timings, Usage};
use crate::response_cache::CachedAnswer;
use crate::stream::{Delivery, EventSender};

/// Tells a reader everything, from admission to the last event. `seed` is what the request asked for, if it did.
pub(crate) fn replay(sender: EventSender, answer: CachedAnswer, seed: Option<u64>, submitted: Instant) {
    // A reader that polls is woken once, and then finds everything.
    let _delivery = Delivery::start();
    sender.admit();
    for (choice, kept) in answer.choices.into_iter().enumerate() {
        let (text, token_ids, logprobs) = (kept.text, kept.token_ids, kept.logprobs);
        if !token_ids.is_empty() || !text.is_empty() {
            sender.send(Event::Delta(Delta { choice, text, token_ids, logprobs }));
        }
        sender.send(Event::Finished { choice, reason: kept.reason });
    }
    let total_ms = submitted.elapsed().as_secs_f64() * 1e3;
    let prompt_tokens = answer.prompt_tokens as usize;
    sender.end(Ok(Event::Done(Summary {
        usage: Usage {
            prompt_tokens,
            completion_tokens: answer.completion_tokens as usize,
            cached_tokens: prompt_tokens,
            preemptions: 0,
            cached_by_tier: CachedTokens::default(),
            prefix_miss: None,
        },
        timings: Timings { queue_ms: total_ms, first_token_ms: total_ms, total_ms, ..Timings::default() },
        seed: seed.unwrap_or(answer.seed),
        prompt_logprobs: answer.prompt_logprobs,
        from_response_cache: true,
    })));
}

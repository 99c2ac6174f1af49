//! A kept answer as the events of a request: what its reader would have heard, with the deltas of each choice in one.

use std::time::Instant;

use crate::request::{CachedTokens, Delta, Event, Summary, Timings, Usage};
use crate::response_cache::CachedAnswer;
use crate::stats::Meters;
use crate::stream::{Delivery, EventSender};

/// Tells a reader everything, from admission to the last event. `seed` is what the request asked for, if it did.
pub(crate) fn replay(sender: EventSender, answer: CachedAnswer, seed: Option<u64>, arrived: Instant, meters: &Meters) {
    // A reader that polls is woken once, and then finds everything.
    let _delivery = Delivery::start();
    sender.admit();
    let num_choices = answer.choices.len();
    for (choice, kept) in answer.choices.into_iter().enumerate() {
        let (text, token_ids, logprobs) = (kept.text, kept.token_ids, kept.logprobs);
        if !token_ids.is_empty() || !text.is_empty() {
            sender.send(Event::Delta(Delta { choice, text, token_ids, logprobs }));
        }
        sender.send(Event::Finished { choice, reason: kept.reason });
    }
    let total = arrived.elapsed();
    let total_ms = total.as_secs_f64() * 1e3;
    let prompt_tokens = answer.prompt_tokens as usize;
    let summary = Summary {
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
    };
    if summary.usage.completion_tokens > 0 {
        meters.first_token(total);
    }
    meters.finished(&summary, num_choices);
    sender.end(Ok(Event::Done(summary)));
}

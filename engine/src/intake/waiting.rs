//! Requests whose answers may be kept beyond the process. Each waits for a bounded time, and nobody waits with it: the thread
//! of a tier brings the answer, or intake comes first and has it computed. Whoever takes what a request holds settles it,
//! once.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::replay::replay;
use crate::command::{Command, Prepared};
use crate::instruments::Instruments;
use crate::request::Request;
use crate::response_cache::StoredEntry;
use crate::response_tiers::Asker;
use crate::responses::{Asked, Responses};

/// Answered requests stay in the list until they are in front, or until it is as long as this.
const MIN_SWEEP: usize = 256;

/// A request that can be computed, and what its answer must fit.
pub(super) struct Held {
    pub(super) prepared: Prepared,
    pub(super) request: Box<Request>,
    pub(super) asked: Asked,
    pub(super) prompt_tokens: usize,
    pub(super) max_tokens: usize,
    pub(super) vocab_size: usize,
}

/// One such request, shared with the threads of the tiers.
struct Waiting {
    held: Mutex<Option<Held>>,
    responses: Responses,
    worker: Sender<Command>,
    instruments: Arc<Instruments>,
}

impl Waiting {
    fn take(&self) -> Option<Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_settled(&self) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn compute(&self, held: Held) {
        // A worker that is gone drops the request, which ends its stream as closed.
        let _ = self.worker.send(Command::Run(Box::new(held.prepared)));
    }
}

impl Asker for Waiting {
    fn waits(&self) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().is_some_and(|held| !held.prepared.sender.is_cancelled())
    }

    fn answer(&self, found: Option<StoredEntry>) {
        let Some(held) = self.take() else { return };
        let Held { request, asked, prompt_tokens, max_tokens, vocab_size, .. } = &held;
        let answer = found.and_then(|entry| {
            let fits = |answer: &crate::response_cache::CachedAnswer| {
                answer.fits(request, *prompt_tokens, *max_tokens, *vocab_size)
            };
            self.responses.take_back(asked, entry, fits)
        });
        let Some(answer) = answer else { return self.compute(held) };
        let seed = held.request.sampling.seed;
        let Prepared { sender, origin, slot, .. } = held.prepared;
        // First: whoever has seen the last event may submit again.
        drop(slot);
        replay(sender, answer, seed, origin.arrived, &self.instruments.meters);
    }
}

/// Intake's list of them, oldest first.
pub(super) struct WaitingList {
    requests: VecDeque<(Instant, Arc<Waiting>)>,
    responses: Responses,
    worker: Sender<Command>,
    instruments: Arc<Instruments>,
}

impl WaitingList {
    pub(super) fn new(responses: &Responses, worker: &Sender<Command>, instruments: &Arc<Instruments>) -> Self {
        let (responses, worker, instruments) = (responses.clone(), worker.clone(), instruments.clone());
        WaitingList { requests: VecDeque::new(), responses, worker, instruments }
    }

    /// Asks for the answer of a request; has it computed if nobody can be asked.
    pub(super) fn ask(&mut self, held: Held) {
        let timeout = held.request.timeout_ms.map_or(Duration::MAX, Duration::from_millis);
        let (responses, worker) = (self.responses.clone(), self.worker.clone());
        let instruments = self.instruments.clone();
        let waiting = Arc::new(Waiting { held: Mutex::new(None), responses, worker, instruments });
        let asked = held.asked.clone();
        *waiting.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
        match self.responses.ask(&asked, waiting.clone()) {
            Some(budget) => {
                if self.requests.len() >= MIN_SWEEP {
                    self.requests.retain(|(_, waiting)| !waiting.is_settled());
                }
                self.requests.push_back((Instant::now() + budget.min(timeout), waiting));
            }
            None => {
                if let Some(held) = waiting.take() {
                    waiting.compute(held);
                }
            }
        }
    }

    /// How long intake may sleep; `None`: nobody waits.
    pub(super) fn longest_sleep(&self) -> Option<Duration> {
        let next = self.requests.iter().map(|(deadline, _)| *deadline).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Has those computed that have waited long enough.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        self.requests.retain(|(deadline, waiting)| {
            if now < *deadline {
                return true;
            }
            if let Some(held) = waiting.take() {
                self.responses.note_gave_up();
                waiting.compute(held);
            }
            false
        });
    }

    /// The engine closes.
    pub(super) fn close(self) {
        for (_, waiting) in self.requests {
            if let Some(held) = waiting.take() {
                let sender = held.prepared.sender;
                let closed = sender.closed();
                sender.end(Err(closed));
            }
        }
    }
}

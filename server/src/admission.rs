//! Who goes next where only so many may at once: the rest waits in a bounded queue, shared fairly between callers.
//! Callers take turns within a class, so that one who asks for a hundred times as much waits for its own requests; a class
//! that was passed over [`MAX_PASSED_OVER`] times gets its turn; and a queue that one caller has filled has room for others,
//! at the cost of that one's newest. No thread, no clock: places are handed on by whoever gives one back.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ns_llm::Priority;
use tokio::sync::oneshot;

use crate::error::{ApiError, ApiResult};

/// Times that a class with waiting requests is passed over in favour of better ones.
const MAX_PASSED_OVER: usize = 8;
const NUM_CLASSES: usize = 3;

/// The gate before the engines, or before a thread.
pub(crate) struct Admission {
    /// What waits, as errors call it.
    queue: &'static str,
    max_running: usize,
    max_waiting: usize,
    /// Locked for a push or a pop; by whoever enters or leaves.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: usize,
    waiting: usize,
    classes: [Class; NUM_CLASSES],
}

/// The waiting requests of one class.
#[derive(Default)]
struct Class {
    /// By caller, the one whose turn it is first; none is empty.
    callers: VecDeque<(Option<String>, VecDeque<oneshot::Sender<Place>>)>,
    passed_over: usize,
}

/// A place at the engine; given to the next when dropped.
pub(crate) struct Place {
    /// `None` once it is given up without being handed on.
    admission: Option<Arc<Admission>>,
}

impl Admission {
    pub(crate) fn new(queue: &'static str, max_running: usize, max_waiting: usize) -> Arc<Admission> {
        Arc::new(Admission { queue, max_running, max_waiting, state: Mutex::default() })
    }

    /// A place for a request of `caller`, at once or when it is its turn. Who stops waiting loses nothing.
    pub(crate) async fn enter(self: &Arc<Self>, caller: Option<&str>, priority: Priority) -> ApiResult<Place> {
        // Woken, by being dropped, without the lock.
        let displaced;
        let turn = {
            let mut state = self.lock();
            if state.running < self.max_running {
                state.running += 1;
                return Ok(self.place());
            }
            if state.waiting >= self.max_waiting {
                state.forget_the_gone();
            }
            displaced = if state.waiting >= self.max_waiting { state.displace_for(caller) } else { None };
            if state.waiting >= self.max_waiting {
                return Err(self.full());
            }
            let (sender, turn) = oneshot::channel();
            state.waiting += 1;
            state.classes[class_idx(priority)].push(caller, sender);
            turn
        };
        drop(displaced);
        // The queue holds the sender until it is used, unless its room goes to another caller.
        turn.await.map_err(|_| self.full())
    }

    fn full(&self) -> ApiError {
        ApiError::overloaded(self.queue, self.max_waiting, self.max_waiting)
    }

    /// Requests that have a place, and requests that wait for one.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let mut state = self.lock();
        state.forget_the_gone();
        (state.running, state.waiting)
    }

    fn place(self: &Arc<Self>) -> Place {
        Place { admission: Some(self.clone()) }
    }

    /// Hands a place that is free to the next that still waits.
    fn hand_on(self: &Arc<Self>) {
        while let Some(next) = self.next_or_free() {
            match next.send(self.place()) {
                Ok(()) => return,
                // It has stopped waiting: the place goes to the one after it.
                Err(mut place) => place.admission = None,
            }
        }
    }

    fn next_or_free(&self) -> Option<oneshot::Sender<Place>> {
        let mut state = self.lock();
        let next = state.next();
        match next {
            Some(_) => state.waiting -= 1,
            None => state.running -= 1,
        }
        next
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(admission) = self.admission.take() {
            admission.hand_on();
        }
    }
}

impl State {
    /// Whose turn it is: of the best class, unless a lower one was passed over too often.
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        let is_due = |class: &Class| !class.callers.is_empty() && class.passed_over >= MAX_PASSED_OVER;
        let due = self.classes.iter().position(is_due);
        let chosen = due.or_else(|| self.classes.iter().position(|class| !class.callers.is_empty()))?;
        for (idx, class) in self.classes.iter_mut().enumerate() {
            let waits = !class.callers.is_empty();
            class.passed_over = if idx == chosen || !waits { 0 } else { class.passed_over + 1 };
        }
        self.classes[chosen].pop()
    }

    /// Gives up the newest request of the caller who has most in the queue, in the worst of its classes, if `caller` then has no
    /// more than that one.
    fn displace_for(&mut self, caller: Option<&str>) -> Option<oneshot::Sender<Place>> {
        let mut counts: HashMap<Option<&str>, usize> = HashMap::new();
        for (name, requests) in self.classes.iter().flat_map(|class| &class.callers) {
            *counts.entry(name.as_deref()).or_default() += requests.len();
        }
        let own = counts.get(&caller).copied().unwrap_or(0);
        let (crowd, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
        if count <= own + 1 {
            return None;
        }
        let crowd = crowd.map(str::to_string);
        let mut classes = self.classes.iter_mut().rev();
        let displaced = classes.find_map(|class| class.take_newest_of(&crowd));
        self.waiting -= usize::from(displaced.is_some());
        displaced
    }

    fn forget_the_gone(&mut self) {
        for class in &mut self.classes {
            for (_, requests) in &mut class.callers {
                requests.retain(|request| !request.is_closed());
            }
            class.callers.retain(|(_, requests)| !requests.is_empty());
        }
        self.waiting = self.classes.iter().flat_map(|class| &class.callers).map(|(_, requests)| requests.len()).sum();
    }
}

impl Class {
    fn push(&mut self, caller: Option<&str>, request: oneshot::Sender<Place>) {
        match self.callers.iter_mut().find(|(name, _)| name.as_deref() == caller) {
            Some((_, requests)) => requests.push_back(request),
            None => self.callers.push_back((caller.map(str::to_string), VecDeque::from([request]))),
        }
    }

    fn take_newest_of(&mut self, caller: &Option<String>) -> Option<oneshot::Sender<Place>> {
        let idx = self.callers.iter().position(|(name, _)| name == caller)?;
        let newest = self.callers[idx].1.pop_back();
        if self.callers[idx].1.is_empty() {
            self.callers.remove(idx);
        }
        newest
    }

    /// The first request of the caller whose turn it is, who then goes to the end.
    fn pop(&mut self) -> Option<oneshot::Sender<Place>> {
        let (caller, mut requests) = self.callers.pop_front()?;
        let request = requests.pop_front();
        if !requests.is_empty() {
            self.callers.push_back((caller, requests));
        }
        request
    }
}

/// Best first.
fn class_idx(priority: Priority) -> usize {
    match priority {
        Priority::High => 0,
        Priority::Normal => 1,
        Priority::Background => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    type Entering = Pin<Box<dyn Future<Output = ApiResult<Place>> + Send>>;

    fn enter(admission: &Arc<Admission>, caller: &'static str, priority: Priority) -> Entering {
        let admission = admission.clone();
        let mut entering: Entering = Box::pin(async move { admission.enter(Some(caller), priority).await });
        assert!(poll(&mut entering).is_none(), "the place was taken");
        entering
    }

    fn gate(max_running: usize, max_waiting: usize) -> Arc<Admission> {
        Admission::new("the queue", max_running, max_waiting)
    }

    fn poll(entering: &mut Entering) -> Option<Place> {
        match entering.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => Some(place.unwrap_or_else(|error| panic!("{}", error.message))),
            Poll::Pending => None,
        }
    }

    fn first(admission: &Arc<Admission>) -> Place {
        let mut entering: Entering = Box::pin({
            let admission = admission.clone();
            async move { admission.enter(None, Priority::Normal).await }
        });
        poll(&mut entering).expect("the engine is idle")
    }

    /// Order in which waiting requests get the one place, by their index.
    fn order(place: Place, mut waiting: Vec<Entering>) -> Vec<usize> {
        let (mut order, mut place) = (Vec::new(), Some(place));
        while order.len() < waiting.len() {
            drop(place.take());
            let found = (0..waiting.len())
                .filter(|idx| !order.contains(idx))
                .find_map(|idx| poll(&mut waiting[idx]).map(|place| (idx, place)));
            let (idx, next) = found.expect("somebody has the place");
            order.push(idx);
            place = Some(next);
        }
        order
    }

    /// One caller's hundred requests do not stand before another's first: they take turns.
    #[test]
    fn callers_take_turns() {
        let admission = gate(1, 1_000);
        let place = first(&admission);
        let mut waiting: Vec<Entering> = (0..100).map(|_| enter(&admission, "greedy", Priority::Normal)).collect();
        waiting.extend((0..3).map(|_| enter(&admission, "modest", Priority::Normal)));
        assert_eq!(admission.counts(), (1, 103));
        let order = order(place, waiting);
        let turns: Vec<usize> = (100..103).map(|idx| order.iter().position(|&at| at == idx).expect("served")).collect();
        assert_eq!(turns, [1, 3, 5], "every second turn is the modest one's");
        assert_eq!(admission.counts(), (0, 0));
    }

    /// A better class goes first, but not for ever.
    #[test]
    fn no_class_starves() {
        let admission = gate(1, 1_000);
        let place = first(&admission);
        let mut waiting = vec![enter(&admission, "a", Priority::Background)];
        waiting.extend((0..20).map(|_| enter(&admission, "a", Priority::High)));
        let order = order(place, waiting);
        assert_eq!(order.iter().position(|&idx| idx == 0), Some(MAX_PASSED_OVER));
    }

    /// A queue that one caller has filled has room for another, up to as much as the first one then has; who is displaced is told
    /// so, the newest first.
    #[test]
    fn a_full_queue_is_shared() {
        let admission = gate(1, 4);
        let place = first(&admission);
        let mut greedy: Vec<Entering> = (0..4).map(|_| enter(&admission, "greedy", Priority::Normal)).collect();
        let modest = [(); 2].map(|()| enter(&admission, "modest", Priority::Background));
        let outcome = |entering: &mut Entering| match entering.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => Some(place.err().map(|error| (error.status.as_u16(), error.code))),
            Poll::Pending => None,
        };
        let told = Some(Some((503, "overloaded")));
        assert_eq!(greedy.iter_mut().map(outcome).collect::<Vec<_>>(), [None, None, told, told]);
        let third = admission.clone();
        let mut third: Entering = Box::pin(async move { third.enter(Some("modest"), Priority::High).await });
        assert_eq!(outcome(&mut third), told, "it has as much as the other one");
        assert_eq!(admission.counts(), (1, 4));
        greedy.truncate(2);
        drop(third);
        assert_eq!(order(place, greedy.into_iter().chain(modest).collect()), [0, 1, 2, 3]);
        assert_eq!(admission.counts(), (0, 0));
    }

    /// The queue is bounded; those who stop waiting leave it, and a place is never lost with them.
    #[test]
    fn the_queue_is_bounded_and_leaks_nothing() {
        let admission = gate(1, 2);
        let place = first(&admission);
        let waiting = [enter(&admission, "a", Priority::Normal), enter(&admission, "b", Priority::Normal)];
        let refused = |admission: &Arc<Admission>| {
            let mut third: Pin<Box<dyn Future<Output = ApiResult<Place>>>> =
                Box::pin(admission.enter(None, Priority::High));
            match third.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Err(error)) => Some(error),
                _ => None,
            }
        };
        let error = refused(&admission).expect("the queue is full");
        assert_eq!((error.status.as_u16(), error.code, error.retry_after_s), (503, "overloaded", Some(1)));
        drop(waiting);
        assert!(refused(&admission).is_none(), "those who left made room");
        let mut next = enter(&admission, "c", Priority::Normal);
        // Handed over, and given up before it was taken.
        drop(place);
        let gone = enter_after(&admission);
        drop(poll(&mut next));
        drop(gone);
        assert_eq!(admission.counts(), (0, 0));
        drop(first(&admission));
    }

    fn enter_after(admission: &Arc<Admission>) -> Entering {
        enter(admission, "d", Priority::Normal)
    }
}

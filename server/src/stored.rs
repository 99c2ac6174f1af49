//! Answers of `/v1/responses` that their callers may ask for again, continue or cancel. In memory, bounded in number and
//! bytes; each belongs to the key that made it, and no other finds it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ns_llm::{Canceller, Message};
use serde_json::Value;

use crate::options::{MAX_STORED_BYTES_PER_KEY, MAX_STORED_RESPONSE_BYTES, MAX_STORED_RESPONSES};

/// One answer.
#[derive(Clone)]
pub(crate) struct StoredResponse {
    pub(crate) id: String,
    /// Name of the key that made it.
    pub(crate) owner: Option<String>,
    /// OpenAI's object, as far as it has come.
    pub(crate) object: Value,
    /// The conversation, with the answer once there is one.
    pub(crate) messages: Vec<Message>,
    /// While it is being made.
    pub(crate) canceller: Option<Canceller>,
}

impl StoredResponse {
    fn bytes(&self) -> usize {
        let messages = self.messages.iter().map(|message| message.role.len() + message.content.len());
        messages.sum::<usize>() + self.object.to_string().len()
    }
}

/// One answer, and what it counts for.
struct Kept {
    response: StoredResponse,
    bytes: usize,
}

impl Kept {
    fn is(&self, id: &str, owner: Option<&str>) -> bool {
        self.response.id == id && self.response.owner.as_deref() == owner
    }
}

/// All of them, oldest first. Locked for a search through a bounded list.
#[derive(Default)]
pub(crate) struct StoredResponses {
    list: Mutex<VecDeque<Kept>>,
}

impl StoredResponses {
    /// Keeps a new one.
    pub(crate) fn put(&self, response: StoredResponse) {
        let bytes = response.bytes();
        let mut list = self.lock();
        list.push_back(Kept { response, bytes });
        forget_oldest(&mut list);
    }

    /// Keeps one in place of its earlier state, if that is still there: what was removed meanwhile does not come back.
    pub(crate) fn replace(&self, response: StoredResponse) {
        let bytes = response.bytes();
        let mut list = self.lock();
        if let Some(idx) = list.iter().position(|kept| kept.is(&response.id, response.owner.as_deref())) {
            list.remove(idx);
            list.push_back(Kept { response, bytes });
            forget_oldest(&mut list);
        }
    }

    /// A copy of one, for its owner.
    pub(crate) fn get(&self, id: &str, owner: Option<&str>) -> Option<StoredResponse> {
        let list = self.lock();
        list.iter().find(|kept| kept.is(id, owner)).map(|kept| kept.response.clone())
    }

    /// Ends one that is still being made, and gives it as it is now; one that has ended stays what it is.
    pub(crate) fn cancel(&self, id: &str, owner: Option<&str>) -> Option<StoredResponse> {
        let mut list = self.lock();
        let stored = &mut list.iter_mut().find(|kept| kept.is(id, owner))?.response;
        if let Some(canceller) = stored.canceller.take() {
            canceller.cancel();
            stored.object["status"] = Value::from("cancelled");
        }
        Some(stored.clone())
    }

    /// Forgets one, if it is there, and ends it if it is still being made.
    pub(crate) fn remove(&self, id: &str, owner: Option<&str>) -> bool {
        let mut list = self.lock();
        let Some(idx) = list.iter().position(|kept| kept.is(id, owner)) else { return false };
        if let Some(canceller) = list.remove(idx).and_then(|kept| kept.response.canceller) {
            canceller.cancel();
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings the list within its limits: first those of the newest one's owner, then those of all, at the cost of the owner who has
/// most. The newest one stays.
fn forget_oldest(list: &mut VecDeque<Kept>) {
    let Some(owner) = list.back().map(|newest| newest.response.owner.clone()) else { return };
    let own = |kept: &Kept| kept.response.owner == owner;
    let mut own_bytes: usize = list.iter().filter(|kept| own(kept)).map(|kept| kept.bytes).sum();
    while own_bytes > MAX_STORED_BYTES_PER_KEY
        && let Some(idx) = list.iter().position(own).filter(|&idx| idx + 1 < list.len())
    {
        own_bytes -= list.remove(idx).map_or(0, |oldest| oldest.bytes);
    }
    while list.len() > MAX_STORED_RESPONSES && forget_of_most(list, |_| 1) {}
    while list.iter().map(|kept| kept.bytes).sum::<usize>() > MAX_STORED_RESPONSE_BYTES
        && forget_of_most(list, |kept| kept.bytes)
    {}
}

/// Forgets the oldest of the owner who has most, but not the newest of all. Whether there was one.
fn forget_of_most(list: &mut VecDeque<Kept>, weight: impl Fn(&Kept) -> usize) -> bool {
    let mut weights: HashMap<Option<&str>, usize> = HashMap::new();
    // Of several with as much it is the one whose oldest is oldest.
    let (mut most, mut oldest) = (0, None);
    for (idx, kept) in list.iter().enumerate().take(list.len().saturating_sub(1)).rev() {
        let sum = weights.entry(kept.response.owner.as_deref()).or_default();
        *sum += weight(kept);
        if *sum >= most {
            (most, oldest) = (*sum, Some(idx));
        }
    }
    oldest.and_then(|idx| list.remove(idx)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(number: usize, owner: &str, text: &str) -> StoredResponse {
        StoredResponse {
            id: format!("resp_{number}"),
            owner: Some(owner.to_string()),
            object: Value::from(number),
            messages: vec![Message::new("user", text)],
            canceller: None,
        }
    }

    /// Only its owner finds, replaces or removes an answer.
    #[test]
    fn answers_belong_to_their_owners() {
        let stored = StoredResponses::default();
        stored.put(response(1, "a", "x"));
        assert!(stored.get("resp_1", Some("b")).is_none() && stored.get("resp_1", None).is_none());
        assert!(!stored.remove("resp_1", Some("b")));
        assert!(stored.get("resp_1", Some("a")).is_some_and(|found| found.object == 1));
        assert!(stored.remove("resp_1", Some("a")) && stored.get("resp_1", Some("a")).is_none());
    }

    /// The oldest go when there are too many, or too many bytes.
    #[test]
    fn answers_are_bounded() {
        let stored = StoredResponses::default();
        (0..MAX_STORED_RESPONSES + 2).for_each(|number| stored.put(response(number, "a", "x")));
        assert_eq!(stored.lock().len(), MAX_STORED_RESPONSES);
        assert!(stored.get("resp_1", Some("a")).is_none() && stored.get("resp_2", Some("a")).is_some());
        // One key's flood is its own: another key's answers stay.
        stored.put(response(9_000, "b", "z"));
        (2_000..2_000 + MAX_STORED_RESPONSES).for_each(|number| stored.put(response(number, "a", "x")));
        assert!(stored.get("resp_9000", Some("b")).is_some() && stored.lock().len() == MAX_STORED_RESPONSES);
        let large = "y".repeat(MAX_STORED_BYTES_PER_KEY / 2);
        (0..3).for_each(|number| stored.put(response(10_000 + number, "a", &large)));
        let is_kept = |number: usize, owner| stored.get(&format!("resp_{number}"), Some(owner)).is_some();
        assert!(is_kept(9_000, "b") && is_kept(10_002, "a") && !is_kept(10_001, "a") && !is_kept(2_500, "a"));
        // All keys together have a limit, too.
        for number in 0..MAX_STORED_RESPONSE_BYTES / MAX_STORED_BYTES_PER_KEY * 2 {
            stored.put(response(20_000 + number, &format!("owner {number}"), &large));
        }
        assert!(!is_kept(10_002, "a") && !is_kept(20_000, "owner 0"), "the oldest of those with most went");
        assert!(is_kept(9_000, "b") && is_kept(20_001, "owner 1"), "and no more");
    }

    /// What the object holds counts as the texts do, whichever field it is in.
    #[test]
    fn objects_count_too() {
        let stored = StoredResponses::default();
        for number in 0..3 {
            let object = serde_json::json!({ "instructions": "i".repeat(MAX_STORED_BYTES_PER_KEY / 2) });
            stored.put(StoredResponse { object, ..response(number, "a", "") });
        }
        assert_eq!(stored.lock().len(), 1);
    }

    /// The end of an answer that was removed while it was made does not bring it back.
    #[test]
    fn what_was_removed_stays_so() {
        let stored = StoredResponses::default();
        stored.put(response(1, "a", "x"));
        stored.replace(response(1, "a", "xy"));
        assert!(stored.get("resp_1", Some("a")).is_some_and(|found| found.messages[0].content == "xy"));
        assert!(stored.remove("resp_1", Some("a")));
        stored.replace(response(1, "a", "xyz"));
        assert!(stored.get("resp_1", Some("a")).is_none());
    }
}

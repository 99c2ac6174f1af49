//! Answers of `/v1/responses` that their callers may ask for again, continue or cancel. In memory, bounded in number and
//! bytes; each belongs to the key that made it, and no other finds it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ns_llm::{Canceller, Message};
use serde_json::Value;

use crate::options::{MAX_STORED_RESPONSE_BYTES, MAX_STORED_RESPONSES};

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
        // The object repeats the answer.
        self.messages.iter().map(|message| message.role.len() + 2 * message.content.len()).sum()
    }
}

/// All of them, oldest first. Locked for a search through a bounded list.
#[derive(Default)]
pub(crate) struct StoredResponses {
    list: Mutex<VecDeque<StoredResponse>>,
}

impl StoredResponses {
    /// Keeps one, in place of an earlier state of it.
    pub(crate) fn put(&self, response: StoredResponse) {
        let mut list = self.lock();
        list.retain(|stored| stored.id != response.id);
        list.push_back(response);
        let mut bytes: usize = list.iter().map(StoredResponse::bytes).sum();
        while list.len() > MAX_STORED_RESPONSES || (bytes > MAX_STORED_RESPONSE_BYTES && list.len() > 1) {
            bytes -= list.pop_front().map_or(0, |oldest| oldest.bytes());
        }
    }

    /// A copy of one, for its owner.
    pub(crate) fn get(&self, id: &str, owner: Option<&str>) -> Option<StoredResponse> {
        let list = self.lock();
        list.iter().find(|stored| stored.id == id && stored.owner.as_deref() == owner).cloned()
    }

    /// Ends one that is still being made, and gives it as it is now; one that has ended stays what it is.
    pub(crate) fn cancel(&self, id: &str, owner: Option<&str>) -> Option<StoredResponse> {
        let mut list = self.lock();
        let stored = list.iter_mut().find(|stored| stored.id == id && stored.owner.as_deref() == owner)?;
        if let Some(canceller) = stored.canceller.take() {
            canceller.cancel();
            stored.object["status"] = Value::from("cancelled");
        }
        Some(stored.clone())
    }

    /// Forgets one, if it is there.
    pub(crate) fn remove(&self, id: &str, owner: Option<&str>) -> bool {
        let mut list = self.lock();
        let before = list.len();
        list.retain(|stored| stored.id != id || stored.owner.as_deref() != owner);
        list.len() < before
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<StoredResponse>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        let large = "y".repeat(MAX_STORED_RESPONSE_BYTES / 4);
        (0..3).for_each(|number| stored.put(response(10_000 + number, "a", &large)));
        assert_eq!(stored.lock().len(), 1, "three are more than the limit, as is the last two with their roles");
    }
}

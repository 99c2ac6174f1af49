//! How busy the GPUs of this machine are, as far as they tell: they are looked at when somebody asks, by a thread of their own,
//! and a driver that hangs holds up whoever asks for a bounded time. Then the last look counts.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use ns_llm::Gpu;

use crate::app::App;
use crate::clock::unix_millis;
use crate::options::GPU_LOOK_TIMEOUT;
use crate::side_thread::SideThread;

/// Looks at the devices that are remembered: with one in five seconds those of an hour.
const MAX_SAMPLES: usize = 720;

/// The thread that looks, and what it saw.
pub(crate) struct GpuWatch {
    side_thread: SideThread,
    look: Arc<dyn Fn() -> Vec<Gpu> + Send + Sync>,
    /// Locked for a copy.
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    last: Vec<Gpu>,
    /// Milliseconds since 1970, and percent, of each look.
    utilization: VecDeque<(u64, f64)>,
}

impl GpuWatch {
    /// Of what `look` gives, which may take its time.
    pub(crate) fn new(look: impl Fn() -> Vec<Gpu> + Send + Sync + 'static) -> GpuWatch {
        GpuWatch { side_thread: SideThread::new("ns-llm-gpus"), look: Arc::new(look), seen: Mutex::default() }
    }

    /// The devices now, or when they could last be looked at.
    pub(crate) async fn look(&self, app: &App) -> Vec<Gpu> {
        self.look_until(app.sleep(GPU_LOOK_TIMEOUT)).await
    }

    async fn look_until(&self, timeout: impl Future<Output = ()>) -> Vec<Gpu> {
        let look = self.look.clone();
        let (mut looking, mut timeout) = (pin!(self.side_thread.run(None, move || look())), pin!(timeout));
        let looked = poll_fn(|cx| match looking.as_mut().poll(cx) {
            Poll::Ready(looked) => Poll::Ready(Some(looked)),
            Poll::Pending => timeout.as_mut().poll(cx).map(|()| None),
        })
        .await;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Ok(gpus)) = looked {
            if !gpus.is_empty() {
                if seen.utilization.len() == MAX_SAMPLES {
                    seen.utilization.pop_front();
                }
                seen.utilization.push_back((unix_millis(), mean_utilization(&gpus)));
            }
            seen.last = gpus;
        }
        seen.last.clone()
    }

    /// Percent of each look since then, milliseconds since 1970.
    pub(crate) fn utilization_since(&self, millis: u64) -> Vec<f64> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.utilization.iter().filter(|(at, _)| *at >= millis).map(|(_, utilization)| *utilization).collect()
    }
}

/// Percent, the mean over all devices; 0 without one.
pub(crate) fn mean_utilization(gpus: &[Gpu]) -> f64 {
    let sum: f64 = gpus.iter().filter_map(|gpu| gpu.utilization_percent).sum();
    if gpus.is_empty() { 0.0 } else { sum / gpus.len() as f64 }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::mpsc::channel;
    use std::task::{Context, Waker};

    use ns_llm::GpuVendor;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return value;
            }
            std::thread::yield_now();
        }
    }

    /// A driver that hangs costs those who ask their time limit and nothing more: they get what was seen last, until it
    /// answers again.
    #[test]
    fn a_driver_that_hangs_holds_up_nobody() {
        let (answer, asked) = channel::<f64>();
        let asked = Mutex::new(asked);
        let watch = GpuWatch::new(move || {
            let percent = asked.lock().expect("one thread").recv().expect("the test answers");
            vec![Gpu {
                vendor: GpuVendor::Nvidia,
                index: 0,
                name: "a device".to_string(),
                memory_total_bytes: None,
                memory_used_bytes: None,
                utilization_percent: Some(percent),
                temperature_celsius: None,
                power_watts: None,
                compute_capability: None,
            }]
        });
        let seen = |gpus: Vec<Gpu>| gpus.first().and_then(|gpu| gpu.utilization_percent);
        assert_eq!(seen(block_on(watch.look_until(ready(())))), None, "nothing was seen yet");
        // The look that hung is answered, and the next one behind it.
        answer.send(10.0).expect("it asks");
        answer.send(20.0).expect("it asks");
        assert_eq!(seen(block_on(watch.look_until(pending()))), Some(20.0));
        for _ in 0..100 {
            assert_eq!(seen(block_on(watch.look_until(ready(())))), Some(20.0), "more than could wait");
        }
        (0..2).for_each(|_| answer.send(30.0).expect("it asks"));
        assert_eq!(seen(block_on(watch.look_until(pending()))), Some(30.0));
        assert_eq!(watch.utilization_since(0), [20.0, 30.0], "those that somebody waited for");
    }
}

//! A step as one launch: what is enqueued while a graph is captured runs again, with the same addresses, each time the graph is
//! launched. That takes the launches of some two hundred kernels off the host.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::Device;
use super::driver::Replay;
use super::driver_error::failed;
use crate::error::{Error, Result};

/// Kernels that were captured. Their buffers are the caller's to keep: the graph knows addresses only.
pub struct Graph {
    device: Arc<Device>,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: a graph may be used by any thread, by one at a time; `launch` takes it exclusively.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `enqueue` launches on the device; nothing of it runs yet. It may not wait, read back or allocate.
    pub fn capture(device: &Arc<Device>, enqueue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        device.enter()?;
        let stream = device.stream();
        // Other threads may go on allocating on devices of theirs.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(failed("cuStreamBeginCapture"))?;
        let end = || {
            // SAFETY: the capture began above, and is ended once.
            unsafe { result::stream::end_capture(stream) }.map_err(failed("cuStreamEndCapture"))
        };
        let destroy = |graph: sys::CUgraph| {
            // SAFETY: nothing has taken the graph.
            let _ = (!graph.is_null()).then(|| unsafe { result::graph::destroy(graph) });
        };
        let graph = captured(enqueue, end, destroy)?;
        if graph.is_null() {
            return Err(Error::CudaDriver { call: "cuStreamEndCapture", reason: "nothing was captured".to_owned() });
        }
        // SAFETY: the graph was just made.
        let executable = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        let executable = executable.map_err(|error| {
            // SAFETY: the graph is destroyed once, here; nothing has taken it.
            let _ = unsafe { result::graph::destroy(graph) };
            failed("cuGraphInstantiate")(error)
        })?;
        Ok(Graph { device: device.clone(), graph, executable })
    }
}

impl Replay for Graph {
    unsafe fn launch(&mut self) -> Result<()> {
        self.device.enter()?;
        // SAFETY: graph and stream are this device's; the caller promises the buffers.
        unsafe { result::graph::launch(self.executable, self.device.stream()) }.map_err(failed("cuGraphLaunch"))
    }
}

/// Runs `enqueue` in a capture that has begun, and ends the capture in any case, once: a stream that still captures runs
/// nothing, for whoever uses it next. What was captured up to an error or a panic goes to `destroy`.
fn captured<G>(enqueue: impl FnOnce() -> Result<()>, end: impl Fn() -> Result<G>, destroy: impl Fn(G)) -> Result<G> {
    /// Calls it when it is dropped.
    struct OnDrop<'a>(&'a dyn Fn());
    impl Drop for OnDrop<'_> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    // There is nobody to tell an error of the end to: another is on its way.
    let abandon = || end().map_or((), &destroy);
    let open = OnDrop(&abandon);
    enqueue()?;
    std::mem::forget(open);
    end()
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.device.is_abandoned() && self.device.enter().is_ok() {
            // SAFETY: both are destroyed once; the driver keeps what still runs. There is nobody to tell an error to.
            unsafe {
                let _ = result::graph::exec_destroy(self.executable);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// However the work inside ends, its capture is ended once, and what was captured is either returned or destroyed.
    #[test]
    fn a_capture_is_ended_in_any_case() {
        let run = |enqueue: &dyn Fn() -> Result<()>, ends: bool| {
            let (ended, destroyed) = (Cell::new(0), Cell::new(0));
            let invalid = || Error::CudaDriver { call: "cuStreamEndCapture", reason: "invalidated".to_owned() };
            let end = || {
                ended.set(ended.get() + 1);
                if ends { Ok(7) } else { Err(invalid()) }
            };
            let destroy = |graph| {
                assert_eq!(graph, 7);
                destroyed.set(destroyed.get() + 1);
            };
            let result = catch_unwind(AssertUnwindSafe(|| captured(enqueue, end, destroy)));
            (result.ok(), ended.get(), destroyed.get())
        };
        let lost = || Error::DeviceLost { call: "norm", reason: "gone".to_owned() };
        assert_eq!(run(&|| Ok(()), true), (Some(Ok(7)), 1, 0));
        assert!(matches!(run(&|| Ok(()), false), (Some(Err(Error::CudaDriver { .. })), 1, 0)));
        assert_eq!(run(&|| Err(lost()), true), (Some(Err(lost())), 1, 1));
        // The capture was broken off by the same error: there is nothing to destroy.
        assert_eq!(run(&|| Err(lost()), false), (Some(Err(lost())), 1, 0));
        assert_eq!(run(&|| panic!("in the middle of a capture"), true), (None, 1, 1));
    }
}

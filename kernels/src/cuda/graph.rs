//! A step as one launch: what is enqueued while a graph is captured runs again, with the same addresses, each time the graph is
//! launched. That takes the launches of some two hundred kernels off the host.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::{Device, failed};
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
        let enqueued = enqueue();
        // Ended in any case: a stream that still captures runs nothing.
        // SAFETY: the capture began above.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(failed("cuStreamEndCapture"));
        enqueued?;
        let graph = graph?;
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

    /// Enqueues all kernels of the graph.
    ///
    /// # Safety
    /// Every buffer that the captured kernels were launched with is still there, and lent to nobody else.
    pub unsafe fn launch(&mut self) -> Result<()> {
        self.device.enter()?;
        // SAFETY: graph and stream are this device's; the caller promises the buffers.
        unsafe { result::graph::launch(self.executable, self.device.stream()) }.map_err(failed("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: both are destroyed once; the driver keeps what still runs. There is nobody to tell an error to.
            unsafe {
                let _ = result::graph::exec_destroy(self.executable);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

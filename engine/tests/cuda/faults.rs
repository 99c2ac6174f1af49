//! A device that fails, at every call: full, gone, or refusing kernels. A load fails with a typed error and leaves
//! nothing; a step that fails ends its requests with a typed error; an engine whose device is gone closes, and another
//! one in this process goes on.

use std::sync::Arc;

use ns_llm::{Device, Engine, Error, Event, Request};
use ns_llm_cuda_shim::{Fault, FaultyDevice, IdleDevice};

use crate::{Test, demo, shim};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("a load that fails at any call leaves nothing", loads_fail_clean),
    ("a full device fails requests, and serves again when there is room", a_full_device_lives),
    ("a lost device ends its engine at any call, and no other", a_lost_device_ends_its_engine),
    ("a step that never ends ends its engine, and no call waits for it", a_step_that_hangs_ends_its_engine),
];

fn faulty(fault: Fault) -> (Arc<IdleDevice>, Arc<FaultyDevice>) {
    let idle = IdleDevice::new(shim::MEMORY_BYTES);
    (idle.clone(), FaultyDevice::new(idle, fault))
}

/// The first calls of a load and every eleventh of the others in turn meet each fault: the error is the fault's, and no
/// byte is left on the device.
fn loads_fail_clean() {
    for fault in [Fault::OutOfMemory, Fault::Lost] {
        let num_calls = {
            let (_, device) = faulty(fault);
            drop(ns_llm::open::load_among(shim::options(|_| ()), &shim::One(device.clone())).expect("loads"));
            device.num_calls()
        };
        assert!(num_calls > 50, "{num_calls} calls");
        for call in (0..4).chain((4..num_calls).step_by(11)) {
            let (idle, device) = faulty(fault);
            device.fail_from(Some(call));
            match ns_llm::open::load_among(shim::options(|_| ()), &shim::One(device.clone())) {
                Ok(loaded) => {
                    // No memory was asked for any more.
                    assert_eq!((fault, device.num_faults()), (Fault::OutOfMemory, 0), "call {call}");
                    drop(loaded);
                }
                Err(error) => {
                    let is_typed = match fault {
                        Fault::OutOfMemory => matches!(error, Error::OutOfMemory { .. }),
                        _ => matches!(&error, Error::DeviceLost { device, .. } if device == "cuda:0"),
                    };
                    assert!(is_typed, "call {call}, {fault:?}: {error}");
                    assert!(device.num_faults() > 0);
                }
            }
            assert_eq!(idle.used_bytes(), 0, "call {call}, {fault:?}");
        }
    }
}

/// Of another length for each seed. A device that does nothing draws token 0, which ends the demo model's texts.
fn request(seed: u64) -> Request {
    let mut request = Request::tokens(demo::Rng(seed).prompt(20 + seed as usize % 60)).max_tokens(3);
    request.ignore_eos = true;
    request
}

/// How a request ended.
fn end(engine: &Engine, request: Request) -> Result<(), Error> {
    for event in engine.generate(request)? {
        if let Event::Done(_) = event? {
            return Ok(());
        }
    }
    panic!("a stream ended without an end")
}

/// From each call of the first requests on the device is full, or takes no kernel: whoever meets that gets a typed error,
/// and when it has passed the same engine serves again, with all its blocks.
fn a_full_device_lives() {
    for fault in [Fault::OutOfMemory, Fault::Launch] {
        let (_, device) = faulty(fault);
        let engine = Engine::open_among(shim::options(|_| ()), shim::One(device.clone())).expect("opens");
        let mut failed = 0;
        for step in 0..40 {
            // Nothing is idle that the next step could use: sizes differ from round to round.
            device.fail_from(Some(device.num_calls() + 3 * step));
            if let Err(error) = end(&engine, request(step)) {
                failed += 1;
                let is_typed = match fault {
                    Fault::OutOfMemory => matches!(error, Error::OutOfMemory { .. }),
                    _ => matches!(error, Error::Internal { .. }),
                };
                assert!(is_typed, "{error}");
            }
            device.fail_from(None);
            assert_eq!(end(&engine, request(step)), Ok(()), "{fault:?}, step {step}");
        }
        assert!(failed > 3, "{fault:?}: {failed} requests failed");
        let stats = engine.stats();
        assert_eq!((stats.kv_blocks_used, stats.requests_failed), (0, failed), "{fault:?}");
    }
}

/// At each of many calls the device is lost for ever: every live request ends with that error, the engine says so to
/// later ones, closing and dropping it does no harm, and an engine on the CPU beside it goes on.
fn a_lost_device_ends_its_engine() {
    let beside = Engine::open(shim::options(|options| options.device = Device::Cpu)).expect("opens");
    for call in [0, 1, 2, 5, 11, 23, 47, 95, 150] {
        let (idle, device) = faulty(Fault::Lost);
        let engine = Engine::open_among(shim::options(|_| ()), shim::One(device.clone())).expect("opens");
        // The engine is idle: what it calls from now on is for these.
        device.fail_from(Some(device.num_calls() + call));
        let streams: Vec<_> = (0..3).map(|seed| engine.submit(request(seed).max_tokens(200))).collect();
        for stream in streams {
            let last = stream.and_then(|stream| stream.into_iter().last().expect("an end"));
            // Whoever sees the end finds the engine closed.
            assert!(matches!(engine.health(), Err(Error::DeviceLost { .. })), "call {call}: {:?}", engine.health());
            // Also one that reaches a worker that is just leaving.
            assert!(matches!(&last, Err(Error::DeviceLost { .. })), "call {call}: {last:?}");
        }
        let later = end(&engine, request(9)).expect_err("the engine has ended");
        assert!(matches!(later, Error::DeviceLost { .. }), "call {call}: {later}");
        assert_eq!(later.code(), "device_lost");
        assert!(matches!(engine.flush(), Err(Error::DeviceLost { .. })), "call {call}: {:?}", engine.flush());
        engine.close();
        let closed = end(&engine, request(9)).expect_err("the engine is closed");
        assert!(matches!(closed, Error::DeviceLost { .. }), "call {call}: {closed}");
        drop(engine);
        assert_eq!(idle.used_bytes(), 0, "call {call}");
    }
    assert_eq!(end(&beside, request(1)), Ok(()));
}

/// From each of several calls on nothing ends on the device any more: every live request gets a typed error that says so,
/// closing returns, no call was made that waits for the device (which would be for ever), and an engine beside it goes
/// on.
fn a_step_that_hangs_ends_its_engine() {
    let beside = Engine::open(shim::options(|options| options.device = Device::Cpu)).expect("opens");
    for call in [0, 3, 30, 90] {
        let (_, device) = faulty(Fault::Hang);
        let engine = Engine::open_among(shim::options(|_| ()), shim::One(device.clone())).expect("opens");
        device.fail_from(Some(device.num_calls() + call));
        let streams: Vec<_> = (0..3).map(|seed| engine.submit(request(seed).max_tokens(200))).collect();
        for stream in streams {
            let last = stream.and_then(|stream| stream.into_iter().last().expect("an end"));
            let Err(Error::DeviceLost { device, reason }) = last else { panic!("call {call}: {last:?}") };
            assert!(device == "cuda:0" && reason.contains("has not ended after"), "call {call}: {reason}");
        }
        assert!(device.num_faults() > 0 && device.is_abandoned(), "call {call}");
        assert!(matches!(engine.health(), Err(Error::DeviceLost { .. })), "call {call}: {:?}", engine.health());
        engine.close();
        assert_eq!(device.num_endless_calls(), 0, "call {call}");
    }
    assert_eq!(end(&beside, request(1)), Ok(()));
}

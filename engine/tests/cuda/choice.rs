//! Which device an engine runs on, and why: asked for or found, refused with a typed error or left for the CPU with the reason.

use std::sync::Arc;

use ns_llm::device::CudaDevices;
use ns_llm::inspect::inspect_among;
use ns_llm::{Device, DeviceRefusal, Engine, EngineOptions, Error, KvDtype, QuantType, Request, WeightFormat};
use ns_llm_cuda_shim::IdleDevice;
use ns_llm_kernels::cuda::driver::Driver;
use ns_llm_kernels::error::Error as KernelError;

use crate::{Test, demo, shim};

/// The tests of this file.
pub(crate) const TESTS: &[Test] = &[
    ("a device is named as users write it", devices_have_names),
    ("what has no device is refused by its kind, and auto takes the CPU", missing_devices_are_typed),
    ("auto takes a device that the model fits", auto_takes_what_fits),
    ("what has no kernel is refused by its name, and auto takes the CPU", missing_kernels_are_typed),
    ("the plan of a device is what is then allocated", plans_are_exact),
];

/// A machine on which nothing opens.
struct Refused(KernelError);

impl CudaDevices for Refused {
    fn open(&self, _: usize) -> Result<Arc<dyn Driver>, KernelError> {
        Err(self.0.clone())
    }
}

/// A build without CUDA support.
struct NotBuilt;

impl CudaDevices for NotBuilt {
    fn open(&self, _: usize) -> Result<Arc<dyn Driver>, KernelError> {
        panic!("there is nothing to open")
    }
    fn is_built(&self) -> bool {
        false
    }
}

fn options(device: Device) -> EngineOptions {
    shim::options(|options| options.device = device)
}

fn idle() -> shim::One {
    shim::One(IdleDevice::new(shim::MEMORY_BYTES))
}

/// Every name, and none that is nearly one.
fn devices_have_names() {
    for (name, device) in
        [("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda", Device::Cuda(0)), ("cuda:3", Device::Cuda(3))]
    {
        assert_eq!(Device::from_name(name), Ok(device));
        assert_eq!(Device::from_name(&device.to_string()), Ok(device));
    }
    for name in ["", "CUDA", "cuda:", "cuda:-1", "cuda:+1", "cuda: 1", "cuda:99999999999999999999", "gpu"] {
        let error = Device::from_name(name).expect_err("refused");
        assert!(matches!(error, Error::InvalidArgument { field: "device", .. }), "{name}: {error}");
    }
}

/// No build, no driver, an old driver, no such device, an old device, a driver that fails: each is its own typed error
/// for who asks for CUDA; with `auto` the engine runs on the CPU and says so.
fn missing_devices_are_typed() {
    let text = str::to_owned;
    type Machine = Box<dyn Fn() -> Box<dyn CudaDevices>>;
    let cases: [(Machine, DeviceRefusal); 6] = [
        (Box::new(|| Box::new(NotBuilt)), DeviceRefusal::NotBuilt),
        (Box::new(|| Box::new(Refused(KernelError::NoCudaDriver))), DeviceRefusal::NoDriver),
        (
            Box::new(move || {
                Box::new(Refused(KernelError::CudaDriverTooOld { found: text("12.4"), needed: text("13.0") }))
            }),
            DeviceRefusal::DriverTooOld { found: text("12.4"), needed: text("13.0") },
        ),
        (
            Box::new(|| Box::new(Refused(KernelError::NoCudaDevice { ordinal: 0, count: 0 }))),
            DeviceRefusal::NoSuchDevice { ordinal: 0, count: 0 },
        ),
        (
            Box::new(move || {
                let (name, found, needed) = (text("Old"), text("7.5"), text("8.0"));
                Box::new(Refused(KernelError::UnsupportedCudaDevice { name, found, needed }))
            }),
            DeviceRefusal::DeviceTooOld { name: text("Old"), found: text("7.5"), needed: text("8.0") },
        ),
        (
            Box::new(move || Box::new(Refused(KernelError::CudaDriver { call: "cuInit", reason: text("no") }))),
            DeviceRefusal::Driver { reason: text("cuInit: no") },
        ),
    ];
    for (devices, refusal) in cases {
        let error = ns_llm::open::load_among(options(Device::Cuda(0)), &*devices()).err();
        let want = Error::DeviceUnavailable { device: text("cuda:0"), reason: refusal.clone() };
        assert_eq!(error, Some(want.clone()));
        assert_eq!(want.code(), "device_unavailable");
        let loaded = ns_llm::open::load_among(options(Device::Auto), &*devices()).expect("runs on the CPU");
        assert_eq!((loaded.info.device, loaded.info.device_name.as_str()), ("cpu", "cpu"));
        assert_eq!(loaded.info.device_reason, format!("no CUDA device: {refusal}"));
        assert!(loaded.info.threads > 0);
    }
    let error = ns_llm::open::load_among(options(Device::Cuda(1)), &idle()).err();
    let reason = DeviceRefusal::NoSuchDevice { ordinal: 1, count: 1 };
    assert_eq!(error, Some(Error::DeviceUnavailable { device: text("cuda:1"), reason }));
}

/// With room enough an engine runs on the device, and answers; with too little on the CPU, unless it was told where.
fn auto_takes_what_fits() {
    let engine = Engine::open_among(options(Device::Auto), idle()).expect("opens");
    let info = engine.info();
    assert_eq!((info.device, info.device_name.as_str()), ("cuda", "cuda:0 a device that does nothing"));
    assert_eq!((info.device_reason.as_str(), info.threads), ("the first CUDA device, which the model fits", 0));
    let mut request = Request::tokens(vec![9, 8]).max_tokens(3);
    request.ignore_eos = true;
    let answer = engine.complete(request).expect("runs");
    assert_eq!(answer.choices[0].token_ids, [0; 3], "a device that does nothing has zeros alone");

    let tiny = || shim::One(IdleDevice::new(11 << 20));
    let error = ns_llm::open::load_among(options(Device::Cuda(0)), &tiny()).err();
    let Some(Error::OutOfMemory { needed_bytes, available_bytes, .. }) = error else { panic!("{error:?}") };
    assert!(available_bytes < 11 << 20 && needed_bytes > available_bytes);
    let loaded = ns_llm::open::load_among(options(Device::Auto), &tiny()).expect("runs on the CPU");
    assert_eq!(loaded.info.device, "cpu");
    assert!(loaded.info.device_reason.starts_with("not on the CUDA device: weights and KV pool needs"));

    let on_cpu = ns_llm::open::load_among(options(Device::Cpu), &idle()).expect("runs on the CPU");
    assert_eq!((on_cpu.info.device, on_cpu.info.device_reason.as_str()), ("cpu", "it was asked for"));
}

/// Types and sizes that no kernel takes are refused before anything is loaded; with `auto` the CPU takes them.
fn missing_kernels_are_typed() {
    let refused = |change: fn(&mut EngineOptions), expected: &str| {
        let error = ns_llm::open::load_among(shim::options(change), &idle()).err().expect("refused").to_string();
        assert!(error.contains(expected), "{error}");
        let auto = shim::options(|options| {
            change(options);
            options.device = Device::Auto;
        });
        let loaded = ns_llm::open::load_among(auto, &idle()).expect("runs on the CPU");
        assert_eq!(loaded.info.device, "cpu");
        assert!(loaded.info.device_reason.contains(expected), "{}", loaded.info.device_reason);
    };
    refused(|options| options.kv_dtype = Some(KvDtype::Int8), "kv_dtype is int8, must be f16 or bf16 on CUDA");
    refused(|options| options.weights = WeightFormat::F32, "weights is f32, must be auto, bf16, q8_0 or q4_k on CUDA");
    refused(|options| options.weights = WeightFormat::Quant(QuantType::Q6_K), "weights is q6_k");
    refused(|options| options.block_tokens = 48, "there is no CUDA kernel for KV blocks of 48 tokens");
}

/// What `inspect` says a device will hold is what it holds: weights to the byte, pool to the byte, and no more beside
/// than the plan's working memory.
fn plans_are_exact() {
    for weights in [WeightFormat::Auto, WeightFormat::Quant(QuantType::Q8_0), WeightFormat::Quant(QuantType::Q4_K)] {
        let device = IdleDevice::new(shim::MEMORY_BYTES);
        let options = || {
            shim::options(|options| {
                options.weights = weights;
                options.kv_bytes = None;
                options.context_tokens = Some(256);
            })
        };
        let inspection = inspect_among(&options(), &shim::One(device.clone())).expect("is inspected");
        assert_eq!(inspection.device_name, "cuda:0 a device that does nothing");
        let engine = Engine::open_among(options(), shim::One(device.clone())).expect("opens");
        let (plan, memory) = (inspection.plan, engine.memory());
        assert_eq!((memory.weights_bytes, memory.kv_reserved_bytes), (plan.weights_bytes, plan.kv_bytes()));
        assert!(plan.needed_bytes() <= shim::MEMORY_BYTES * 9 / 10);
        // All sequences at once, with long prompts; every size of step occurs.
        let requests = (0..8).map(|idx| Request::tokens(demo::Rng(idx).prompt(30 + 20 * idx as usize)).max_tokens(8));
        let streams: Vec<_> = requests.map(|request| engine.submit(request).expect("admitted")).collect();
        streams.into_iter().for_each(|stream| assert!(stream.into_iter().all(|event| event.is_ok())));
        let used = device.used_bytes();
        assert!(used >= plan.weights_bytes + plan.kv_bytes(), "{used} of {plan:?}");
        assert!(used <= plan.needed_bytes(), "{used} bytes in use, planned {} ({plan:?})", plan.needed_bytes());
    }
}

//! What a GPU can do at most, measured with the kernels of this crate: bytes a second while a matrix is read once, and
//! operations a second of a large product, in the form that is taken on this device and in the one that every device has.
//! One JSON object on standard output. `gpu/check e2e` puts the speed of whole models beside it.
//!
//! Needs the feature `cuda` and a GPU: `gpu_ceilings [DEVICE]`.

#[cfg(not(feature = "cuda"))]
fn main() {
    eprintln!("built without the feature `cuda`");
    std::process::exit(2);
}

#[cfg(feature = "cuda")]
fn main() {
    if let Err(error) = measure::run() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod measure {
    use std::sync::Arc;
    use std::time::Instant;

    use half::bf16;
    use ns_llm_kernels::cuda::device::Device;
    use ns_llm_kernels::cuda::driver::Driver;
    use ns_llm_kernels::cuda::forms::Forms;
    use ns_llm_kernels::cuda::memory::Memory;
    use ns_llm_kernels::cuda::product::{Matrix, Output, multiply};
    use ns_llm_kernels::error::Result;

    /// Launches of one figure; the first ones are not counted.
    const ROUNDS: usize = 50;
    const WARM_UP: usize = 5;

    pub(super) fn run() -> Result<()> {
        let ordinal = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
        let device = Device::open(ordinal)?;
        // A matrix of 600 MB: no cache holds a part of it that matters.
        let forms = Forms::of(&Memory::new(device.clone()));
        let one_row = seconds(&device, forms, [1, 8_192, 36_864])?;
        let read_bytes = 8_192.0 * 36_864.0 * 2.0;
        let tflop_s = |forms, sizes: [usize; 3]| -> Result<f64> {
            let operations = 2.0 * sizes.iter().map(|&size| size as f64).product::<f64>();
            Ok(operations / seconds(&device, forms, sizes)? / 1e12)
        };
        let (large, layer) = ([4_096; 3], [2_048, 1_024, 4_096]);
        let info = device.info();
        println!(
            "{{\"device\": {:?}, \"compute_capability\": \"{}.{}\", \"multiprocessors\": {}, \"memory_bytes\": {}, \
             \"matvec_gb_s\": {:.1}, \"matmul_4096_tflop_s\": {:.1}, \"matmul_2048_tflop_s\": {:.1}, \
             \"mma_4096_tflop_s\": {:.1}, \"warpgroups_same_bits\": {}}}",
            info.name,
            info.compute_capability.0,
            info.compute_capability.1,
            info.num_multiprocessors,
            info.memory_bytes,
            read_bytes / one_row / 1e9,
            tflop_s(forms, large)?,
            tflop_s(forms, layer)?,
            tflop_s(Forms::PORTABLE, large)?,
            forms.has_warpgroups(),
        );
        Ok(())
    }

    /// Of one product of `rows` rows with a matrix `[features, columns]` of numbers that are not zero.
    fn seconds(device: &Arc<Device>, forms: Forms, [rows, columns, features]: [usize; 3]) -> Result<f64> {
        let memory = Memory::new(device.clone());
        let numbers: Vec<bf16> =
            (0..1_000_003).map(|i| bf16::from_f32((i * 7_919 % 2_003) as f32 / 1_001.5 - 1.0)).collect();
        let filled = |len: usize| {
            let parts: Vec<&[bf16]> =
                (0..len).step_by(numbers.len()).map(|start| &numbers[..numbers.len().min(len - start)]).collect();
            memory.filled("a measurement", &parts)
        };
        let (x, weight) = (filled(rows * columns)?, filled(features * columns)?);
        let mut out = memory.zeroed::<f32>("a measurement", rows * features)?;
        let matrix = Matrix { weight: weight.all(), bias: None, features, columns };
        let mut start = Instant::now();
        for round in 0..WARM_UP + ROUNDS {
            if round == WARM_UP {
                device.synchronize()?;
                start = Instant::now();
            }
            let output = &mut out.all_mut();
            multiply(device, forms.for_sizes(rows, features), x.all(), &matrix, Output::Store(output))?;
        }
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / ROUNDS as f64)
    }
}

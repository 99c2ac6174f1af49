//! Operations on CUDA devices: the mirror of [`cpu`](crate::cpu). A kernel is three files with one stem: `kernels/cuda/x.cu`,
//! its only launcher `x.rs` here, and its test in `kernels/tests/cuda/`.
//!
//! A launcher checks sizes, chooses the grid and hands a [`launch::Launch`] to a [`launch::Stream`]; it knows neither
//! driver nor device. So launchers and kernels run in tests on a stream that executes kernels on the CPU
//! (`kernels/shim/`), and nothing here but `device` and what follows it needs the feature `cuda`.

pub mod launch;
pub mod norm;

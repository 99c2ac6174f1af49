//! What the driver's errors are here.

use cudarc::driver::result::DriverError;
use cudarc::driver::sys;

use crate::error::Error;

/// An error of the driver, for `map_err`.
pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| match is_lost(error.0) {
        true => Error::DeviceLost { call, reason: describe(error) },
        false => Error::CudaDriver { call, reason: describe(error) },
    }
}

/// Whether the driver answers everything in this context with the same error from now on.
pub(super) fn is_lost(error: sys::CUresult) -> bool {
    use sys::CUresult as Status;
    matches!(
        error,
        Status::CUDA_ERROR_ILLEGAL_ADDRESS
            | Status::CUDA_ERROR_LAUNCH_FAILED
            | Status::CUDA_ERROR_LAUNCH_TIMEOUT
            | Status::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | Status::CUDA_ERROR_MISALIGNED_ADDRESS
            | Status::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | Status::CUDA_ERROR_INVALID_PC
            | Status::CUDA_ERROR_HARDWARE_STACK_ERROR
            | Status::CUDA_ERROR_ASSERT
            | Status::CUDA_ERROR_ECC_UNCORRECTABLE
            | Status::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | Status::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | Status::CUDA_ERROR_DEVICE_UNAVAILABLE
            | Status::CUDA_ERROR_EXTERNAL_DEVICE
            | Status::CUDA_ERROR_DEINITIALIZED
            | Status::CUDA_ERROR_UNKNOWN
    )
}

/// The driver's name of an error and its sentence.
pub(super) fn describe(error: DriverError) -> String {
    let text = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| format!("error {}", error.0 as u32), |text| text.to_string_lossy().into_owned())
    };
    format!("{}: {}", text(error.error_name()), text(error.error_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ends a context is that error; a full memory or a wrong argument is not.
    #[test]
    fn a_lost_device_is_told_from_a_failed_call() {
        let error = |status| failed("cuMemAlloc")(DriverError(status));
        // Without a driver there is nobody to ask for the error's name.
        // SAFETY: looks for the library and calls nothing in it.
        if unsafe { sys::is_culib_present() } {
            assert!(matches!(error(sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS), Error::DeviceLost { .. }));
            assert!(matches!(error(sys::CUresult::CUDA_ERROR_INVALID_VALUE), Error::CudaDriver { .. }));
        }
        assert!(is_lost(sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE));
        assert!(!is_lost(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY));
    }
}

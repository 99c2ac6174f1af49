//! The only place that asks the CPU what it can do. The answer is a table of function pointers per instruction set;
//! each operation family adds one field to [`Kernels`] and one line to each table. The tables hold `unsafe fn`s whose
//! promise is "the CPU has the instruction set": a [`Cpu`] cannot be built otherwise.
//!
//! A table is never mixed from two instruction sets at run time: the same build on the same `Isa` gives the same bits.

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::sync::Arc;

use super::attention::AttentionKernels;
use super::linear::LinearKernels;
use super::logits::LogitsKernels;
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::norm::NormKernels;
use super::pool::Pool;
use super::rope::RopeKernels;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::error::{Error, Result};

/// Environment variable that forces an instruction set by name (`portable` for valgrind, for example). Read by
/// [`Isa::detect`] and nowhere else; a name that is not available is an error, not a silent fallback.
pub const ISA_VARIABLE: &str = "NS_LLM_ISA";

/// Instruction sets that kernels are written for, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust: any machine.
    Portable,
    /// 256-bit vectors with FMA and f16 conversion: Intel since Haswell (2013), AMD since Zen (2017).
    Avx2,
    /// 512-bit vectors, AVX-512 F, BW, VL and DQ: Intel since Skylake-SP (2017), AMD since Zen 4 (2022).
    Avx512,
    /// And dot products of bf16 and of bytes (VNNI): Intel since Cooper Lake (2020), AMD since Zen 4.
    Avx512Bf16,
    /// 128-bit vectors with FMA and f16 conversion: every 64-bit ARM processor.
    Neon,
    /// And dot products of bytes: Cortex-A55, A75 and A76, Neoverse N1 (2018), Apple since the A13 and the M1.
    NeonDotprod,
    /// And products of matrices of bytes: Neoverse V1 and N2 (2021), Apple since the A15 and the M2.
    NeonI8mm,
}

impl Isa {
    const ALL: &[Isa] =
        &[Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Neon, Isa::NeonDotprod, Isa::NeonI8mm];

    /// Name in reports, in [`ISA_VARIABLE`] and in the keys of stored KV blocks.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Neon => "neon",
            Isa::NeonDotprod => "neondotprod",
            Isa::NeonI8mm => "neoni8mm",
        }
    }
    /// All that this machine has, worst first. Never empty.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.iter().copied().filter(|isa| isa.is_available()).collect()
    }
    /// The one with this name, if this machine has it.
    pub fn from_name(name: &str) -> Result<Isa> {
        let available = Isa::available();
        available.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| Error::UnknownIsa {
            name: name.to_owned(),
            available: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }
    /// The best that this machine has, or what [`ISA_VARIABLE`] asks for.
    pub fn detect() -> Result<Isa> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) => Isa::from_name(&name),
            Err(_) => Ok(*Isa::available().last().expect("the portable path is available everywhere")),
        }
    }
    fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                Isa::Avx512.is_available()
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => false,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => Isa::Neon.is_available() && is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => Isa::NeonDotprod.is_available() && is_aarch64_feature_detected!("i8mm"),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm => false,
        }
    }
    fn kernels(self) -> &'static Kernels {
        match self {
            Isa::Portable => &PORTABLE,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => &AVX512_BF16,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &NEON,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => &NEON_DOTPROD,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => &NEON_I8MM,
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => unreachable!("`is_available` is false"),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm => unreachable!("`is_available` is false"),
        }
    }
}

/// Function pointers of one instruction set, by operation family.
pub(crate) struct Kernels {
    pub(crate) attention: AttentionKernels,
    pub(crate) linear: LinearKernels,
    pub(crate) logits: LogitsKernels,
    pub(crate) norm: NormKernels,
    pub(crate) rope: RopeKernels,
}

static PORTABLE: Kernels = Kernels {
    attention: scalar::attention::KERNELS,
    linear: scalar::linear::KERNELS,
    logits: scalar::logits::KERNELS,
    norm: scalar::norm::KERNELS,
    rope: scalar::rope::KERNELS,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = Kernels {
    attention: avx2::attention::KERNELS,
    linear: avx2::linear::KERNELS,
    logits: avx2::logits::KERNELS,
    norm: avx2::norm::KERNELS,
    rope: avx2::rope::KERNELS,
};

#[cfg(target_arch = "x86_64")]
static AVX512: Kernels = Kernels {
    attention: avx512::attention::KERNELS,
    linear: avx512::linear::KERNELS,
    logits: avx512::logits::KERNELS,
    norm: avx512::norm::KERNELS,
    rope: avx512::rope::KERNELS,
};

#[cfg(target_arch = "x86_64")]
static AVX512_BF16: Kernels = Kernels {
    attention: avx512::attention::KERNELS,
    linear: avx512::linear::BF16_KERNELS,
    logits: avx512::logits::KERNELS,
    norm: avx512::norm::KERNELS,
    rope: avx512::rope::KERNELS,
};

#[cfg(target_arch = "aarch64")]
static NEON: Kernels = Kernels {
    attention: neon::attention::KERNELS,
    linear: neon::linear::KERNELS,
    logits: neon::logits::KERNELS,
    norm: neon::norm::KERNELS,
    rope: neon::rope::KERNELS,
};

#[cfg(target_arch = "aarch64")]
static NEON_DOTPROD: Kernels = Kernels {
    attention: neon::attention::KERNELS,
    linear: neon::linear::DOTPROD_KERNELS,
    logits: neon::logits::KERNELS,
    norm: neon::norm::KERNELS,
    rope: neon::rope::KERNELS,
};

#[cfg(target_arch = "aarch64")]
static NEON_I8MM: Kernels = Kernels {
    attention: neon::attention::KERNELS,
    linear: neon::linear::I8MM_KERNELS,
    logits: neon::logits::KERNELS,
    norm: neon::norm::KERNELS,
    rope: neon::rope::KERNELS,
};

/// What an entry point needs to compute: the chosen kernels and the threads. Cheap to clone.
#[derive(Clone)]
pub struct Cpu {
    isa: Isa,
    kernels: &'static Kernels,
    pool: Arc<Pool>,
}

impl Cpu {
    /// The best instruction set of this machine (or the forced one, [`ISA_VARIABLE`]) on `pool`.
    pub fn new(pool: Arc<Pool>) -> Result<Cpu> {
        Cpu::with_isa(Isa::detect()?, pool)
    }
    /// A given instruction set: tests compare each available one with the portable path.
    pub fn with_isa(isa: Isa, pool: Arc<Pool>) -> Result<Cpu> {
        let isa = Isa::from_name(isa.name())?;
        Ok(Cpu { isa, kernels: isa.kernels(), pool })
    }
    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
    /// The kernels. Their promise, that the CPU has [`isa`](Self::isa), is kept by construction.
    pub(crate) fn kernels(&self) -> &'static Kernels {
        self.kernels
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pool::PoolPriority;

    /// Names lead back to their instruction set, and an unknown one is an error that lists what there is.
    #[test]
    fn names_round_trip() {
        for isa in Isa::available() {
            assert_eq!(Isa::from_name(isa.name()), Ok(isa));
            let pool = Arc::new(Pool::new(1, PoolPriority::Normal).expect("no thread is started"));
            assert_eq!(Cpu::with_isa(isa, pool).expect("it is available").isa(), isa);
        }
        let error = Isa::from_name("mmx").expect_err("not written for");
        assert!(error.to_string().contains("portable"), "{error}");
    }
}

//! Matrix products of a few rows of 8-bit activations with quantized panels: decode, which memory should bound.
//!
//! Nothing is taken apart on the way: a vector of eight output columns of a group is finished before the next one, so that
//! its codes, scales and minimums go from the panel through registers only. For codes without sign; those with one have
//! nothing to take apart.

use std::arch::x86_64::*;

use super::linear_quant::{LANES, broadcast, codes_of_planes, sum_depth, zero};
use crate::cpu::linear::{CHUNK_GROUPS, CodeMeaning, Codes, Int8Group, PANEL_ROWS, PanelCodes, QuantProduct};
use crate::cpu::prefetch::Prefetch;

/// Rows that the products here are for, at most.
pub(super) const MAX_ROWS: usize = 6;
/// Vectors of a panel's columns.
const VECTORS: usize = PANEL_ROWS / LANES;

/// See [`QuantProduct`]; one to [`MAX_ROWS`] rows, codes without sign.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn panel_rows(product: &QuantProduct<'_>, sums: &mut [f32]) {
    let layout = product.layout;
    match (layout.meaning, layout.low_bits, layout.high_bits, layout.halves) {
        (CodeMeaning::Signed, ..) => panic!("codes with sign have products of their own"),
        (CodeMeaning::Offset(_), 4, 0, _) => panel::<Codes<false, 4, 0, 0>>(product, sums),
        (CodeMeaning::Offset(_), 4, 1, _) => panel::<Codes<false, 4, 1, 0>>(product, sums),
        (CodeMeaning::Offset(_), 4, ..) => panel::<Codes<false, 4, 2, 2>>(product, sums),
        (CodeMeaning::Offset(_), ..) => panel::<Codes<false, 2, 1, 2>>(product, sums),
        (CodeMeaning::Minimum, 4, 0, 0) => panel::<Codes<true, 4, 0, 0>>(product, sums),
        (CodeMeaning::Minimum, 4, 0, _) => panel::<Codes<true, 4, 0, 1>>(product, sums),
        (CodeMeaning::Minimum, 4, _, 0) => panel::<Codes<true, 4, 1, 0>>(product, sums),
        (CodeMeaning::Minimum, 4, ..) => panel::<Codes<true, 4, 1, 1>>(product, sums),
        (CodeMeaning::Minimum, ..) => panel::<Codes<true, 2, 0, 2>>(product, sums),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn panel<F: PanelCodes>(product: &QuantProduct<'_>, sums: &mut [f32]) {
    let &QuantProduct { x, groups_per_row, panel, layout, .. } = product;
    let num_rows = sums.len() / PANEL_ROWS;
    assert!(F::describes(layout), "{:?} is another format", layout.quant_type);
    assert_eq!(panel.len(), layout.panel_bytes(groups_per_row * 32), "bytes of a panel");
    assert_eq!(sums.len(), num_rows * PANEL_ROWS, "whole rows of sums");
    assert!(x.len() >= num_rows * groups_per_row, "activations of {num_rows} rows");
    sums.fill(0.0);
    let offset = i32::from(layout.offset());
    for (bytes, first_group) in panel.chunks(layout.chunk_bytes()).zip((0..groups_per_row).step_by(CHUNK_GROUPS)) {
        let num_groups = CHUNK_GROUPS.min(groups_per_row - first_group);
        let mut chunk = Chunk {
            x: x[first_group..].as_ptr(),
            groups_per_row,
            num_groups,
            bytes: bytes.as_ptr(),
            offset,
            prefetch: Prefetch::behind(bytes, num_groups),
        };
        // SAFETY: the CPU has the features of this function; activations, sums and bytes were checked.
        unsafe {
            match num_rows {
                1 => chunk.run::<F, 1>(sums.as_mut_ptr()),
                2 => chunk.run::<F, 2>(sums.as_mut_ptr()),
                3 => chunk.run::<F, 3>(sums.as_mut_ptr()),
                4 => chunk.run::<F, 4>(sums.as_mut_ptr()),
                5 => chunk.run::<F, 5>(sums.as_mut_ptr()),
                MAX_ROWS => chunk.run::<F, 6>(sums.as_mut_ptr()),
                _ => panic!("{num_rows} rows are not a few"),
            }
        }
    }
}

/// Operands of a chunk. Its functions trust the pointers.
struct Chunk {
    /// First group of the first row.
    x: *const Int8Group,
    groups_per_row: usize,
    num_groups: usize,
    bytes: *const u8,
    offset: i32,
    prefetch: Prefetch,
}

impl Chunk {
    /// Adds `ROWS` rows times the chunk to `sums` `[ROWS, 32]`.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C; `ROWS` rows have `num_groups` groups, `groups_per_row` apart; `bytes` points to as
    /// many groups of the format, with its header.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<F: PanelCodes, const ROWS: usize>(&mut self, sums: *mut f32) {
        for g in 0..self.num_groups {
            self.prefetch.step();
            let x: [&Int8Group; ROWS] =
                // SAFETY: promised by the caller.
                std::array::from_fn(|row| unsafe { &*self.x.add(row * self.groups_per_row + g) });
            for vector in 0..VECTORS {
                // SAFETY: promised by the caller.
                unsafe { self.add_vector::<F, ROWS>(g, vector, &x, sums.add(vector * LANES)) };
            }
        }
    }

    /// Eight columns of a group.
    ///
    /// # Safety
    /// As for [`run`](Self::run), for each row's group `x` and the first of the columns' `sums`.
    #[inline(always)]
    unsafe fn add_vector<F: PanelCodes, const ROWS: usize>(
        &self,
        g: usize,
        vector: usize,
        x: &[&Int8Group; ROWS],
        sums: *mut f32,
    ) {
        // SAFETY: promised by the caller: all places are inside the group or the header; the CPU has the instructions.
        unsafe {
            let group = self.bytes.add(F::HEADER_BYTES + g * F::GROUP_BYTES);
            let integers = group.add(F::PLANE_BYTES + vector * LANES);
            let halves = [0, F::HALVES.saturating_sub(1)].map(|half| match F::HALVES {
                0 => _mm256_set1_epi16(1),
                _ => doubled::<F>(integers.add(half * PANEL_ROWS)),
            });
            let mut dots = [zero(); ROWS];
            let mut pairs = [zero(); ROWS];
            let at = (group, vector);
            step::<F, ROWS, 0>(at, x, &halves[0], &mut pairs, &mut dots);
            step::<F, ROWS, 1>(at, x, &halves[0], &mut pairs, &mut dots);
            step::<F, ROWS, 2>(at, x, &halves[0], &mut pairs, &mut dots);
            step::<F, ROWS, 3>(at, x, &halves[0], &mut pairs, &mut dots);
            step::<F, ROWS, 4>(at, x, &halves[1], &mut pairs, &mut dots);
            step::<F, ROWS, 5>(at, x, &halves[1], &mut pairs, &mut dots);
            step::<F, ROWS, 6>(at, x, &halves[1], &mut pairs, &mut dots);
            step::<F, ROWS, 7>(at, x, &halves[1], &mut pairs, &mut dots);

            // Factors of the sums of activations over both halves; formats without minimums have their offset yet to come.
            let factors = match (F::MINIMUM, F::HALVES) {
                (_, 0) => _mm256_set1_epi16(1),
                (false, _) => _mm256_blend_epi16::<0xaa>(halves[0], halves[1]),
                (true, num_halves) => {
                    let mins = integers.add(num_halves * PANEL_ROWS);
                    let second = doubled::<F>(mins.add((num_halves - 1) * PANEL_ROWS));
                    _mm256_blend_epi16::<0xaa>(doubled::<F>(mins), second)
                }
            };
            let d_place = if F::HALVES == 0 { group.add(F::PLANE_BYTES) } else { self.bytes };
            let numbers = |place: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(place.add(2 * vector * LANES).cast()));
            let d = numbers(d_place);
            for (row, x) in x.iter().enumerate() {
                let min = _mm256_madd_epi16(factors, broadcast((&raw const x.sums).cast()));
                let part = if F::MINIMUM {
                    let d_min = numbers(d_place.add(2 * PANEL_ROWS));
                    let min = _mm256_mul_ps(d_min, _mm256_cvtepi32_ps(min));
                    _mm256_fmsub_ps(d, _mm256_cvtepi32_ps(dots[row]), min)
                } else {
                    let min = _mm256_sll_epi32(min, _mm_cvtsi32_si128(self.offset.trailing_zeros() as i32));
                    _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_sub_epi32(dots[row], min)))
                };
                let sum = sums.add(row * PANEL_ROWS);
                _mm256_storeu_ps(sum, _mm256_fmadd_ps(part, _mm256_broadcast_ss(&x.scale), _mm256_loadu_ps(sum)));
            }
        }
    }
}

/// Adds the products of one step of four columns; where 16 bits could overflow in the next, scales the sums.
///
/// # Safety
/// As for [`Chunk::add_vector`].
#[inline(always)]
unsafe fn step<F: PanelCodes, const ROWS: usize, const STEP: usize>(
    (group, vector): (*const u8, usize),
    x: &[&Int8Group; ROWS],
    scales: &__m256i,
    pairs: &mut [__m256i; ROWS],
    dots: &mut [__m256i; ROWS],
) {
    // SAFETY: promised by the caller.
    unsafe {
        let codes = codes_of_planes::<STEP>(group, vector, F::LOW, F::HIGH);
        let is_last = (STEP + 1).is_multiple_of(sum_depth(F::LOW + F::HIGH, F::HALVES));
        for ((x, pairs), dots) in x.iter().zip(pairs).zip(dots) {
            let products = _mm256_maddubs_epi16(codes, broadcast(x.codes.as_ptr().cast::<i32>().add(STEP)));
            *pairs = _mm256_add_epi16(*pairs, products);
            if is_last {
                *dots = _mm256_add_epi32(*dots, _mm256_madd_epi16(*pairs, *scales));
                *pairs = zero();
            }
        }
    }
}

/// Eight integers of a byte, each as a pair of 16-bit numbers: with sign in formats of an offset, else without.
///
/// # Safety
/// The CPU has AVX2; `bytes` points to eight.
#[inline(always)]
unsafe fn doubled<F: PanelCodes>(bytes: *const u8) -> __m256i {
    // Each 128-bit half takes four of the eight bytes, which it has twice.
    const fn places(upper: bool) -> [u8; 32] {
        let (mut places, mut i) = ([0x80; 32], 0);
        while i < 8 {
            places[4 * i + upper as usize] = i as u8;
            places[4 * i + 2 + upper as usize] = i as u8;
            i += 1;
        }
        places
    }
    const LOWER: [u8; 32] = places(false);
    const UPPER: [u8; 32] = places(true);
    // SAFETY: promised by the caller.
    unsafe {
        let bytes = _mm256_set1_epi64x(bytes.cast::<i64>().read_unaligned());
        if F::MINIMUM {
            // Of six bits at most.
            return _mm256_shuffle_epi8(bytes, _mm256_loadu_si256(LOWER.as_ptr().cast()));
        }
        _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(bytes, _mm256_loadu_si256(UPPER.as_ptr().cast())))
    }
}

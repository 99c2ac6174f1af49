//! Weights on their way from the checkpoint to a backend: taken by name, compared with the shape that the
//! configuration asks for, packed, and their memory used again. Reports progress and can be cancelled between tensors.

use crate::backend::{Backend, LinearPart, LinearWeight};
use crate::config::LoadProgress;
use crate::error::{Error, Result};
use crate::loader::Weights;
use crate::tensor::{DType, Encoding, Tensor};

/// Hears how far loading is; `false` cancels.
pub type OnProgress<'a> = &'a mut dyn FnMut(LoadProgress) -> bool;

/// Hands out packed weights. Names are those of the checkpoint without `.weight` and `.bias`, relative to a prefix.
pub struct WeightLoader<'a, B: Backend> {
    backend: &'a B,
    weights: Weights,
    on_progress: OnProgress<'a>,
    prefix: String,
    loaded: LoadProgress,
    num_parameters: u64,
}

impl<'a, B: Backend> WeightLoader<'a, B> {
    /// Begins with nothing taken.
    pub fn new(backend: &'a B, weights: Weights, on_progress: OnProgress<'a>) -> Result<Self> {
        let loaded = LoadProgress { loaded_bytes: 0, total_bytes: weights.total_bytes() };
        let mut loader =
            WeightLoader { backend, weights, on_progress, prefix: String::new(), loaded, num_parameters: 0 };
        loader.report()?;
        Ok(loader)
    }

    /// Where weights are packed.
    pub fn backend(&self) -> &'a B {
        self.backend
    }

    /// Runs `load` with `prefix` before every name, behind the prefixes around it.
    pub fn below<T>(&mut self, prefix: &str, load: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let outer = self.prefix.clone();
        self.prefix.push_str(prefix);
        let loaded = load(self);
        self.prefix = outer;
        loaded
    }

    /// The matrix `name` `[out, in]`, with its bias `[out]` if it has one.
    pub fn linear(&mut self, name: &str, [out, width]: [usize; 2], bias: bool) -> Result<B::Linear> {
        self.stacked(&[(name, out)], width, bias)
    }

    /// Several matrices `[out_i, in]` over the same input, given as names and `out_i`, as one.
    pub fn stacked(&mut self, parts: &[(&str, usize)], width: usize, bias: bool) -> Result<B::Linear> {
        let matrices = parts.iter().map(|(name, out)| self.matrix(name, [*out, width], bias));
        let matrices = matrices.collect::<Result<Vec<_>>>()?;
        let parts: Vec<_> = matrices.iter().map(Matrix::part).collect();
        let packed = self.backend.load_linear(LinearWeight::Stacked(&parts))?;
        self.done_with(matrices)?;
        Ok(packed)
    }

    /// Gate and up projection of a SwiGLU feed-forward, both `[intermediate, in]`.
    pub fn gate_up(&mut self, gate: &str, up: &str, shape: [usize; 2], bias: bool) -> Result<B::Linear> {
        let (gate, up) = (self.matrix(gate, shape, bias)?, self.matrix(up, shape, bias)?);
        let packed = self.backend.load_linear(LinearWeight::GateUp { gate: gate.part(), up: up.part() })?;
        self.done_with(vec![gate, up])?;
        Ok(packed)
    }

    /// The norm `name`, `[width]`.
    pub fn norm(&mut self, name: &str, width: usize, eps: f32) -> Result<B::Norm> {
        let weight = self.take(name, "weight", &[width])?;
        let norm = self.backend.load_norm(&weight, eps)?;
        self.done_with(vec![Matrix { weight, bias: None }])?;
        Ok(norm)
    }

    /// The LayerNorm `name`: weight and bias `[width]`, which the oldest checkpoints call gamma and beta.
    pub fn layer_norm(&mut self, name: &str, width: usize, eps: f32) -> Result<B::LayerNorm> {
        let is_old = self.contains(&format!("{name}.gamma"));
        let (weight, bias) = if is_old { ("gamma", "beta") } else { ("weight", "bias") };
        let (weight, bias) = (self.take(name, weight, &[width])?, self.take(name, bias, &[width])?);
        let norm = self.backend.load_layer_norm(&weight, &bias, eps)?;
        self.done_with(vec![Matrix { weight, bias: Some(bias) }])?;
        Ok(norm)
    }

    /// The matrix `name` with its bias `[out]`, stored the other way round: `[in, out]` (GPT-2's `Conv1D`), unless the
    /// checkpoint has been turned.
    pub fn conv1d(&mut self, name: &str, [width, out]: [usize; 2]) -> Result<B::Linear> {
        if self.weights.conv1d_is_linear() {
            return self.linear(name, [out, width], true);
        }
        let stored = self.take(name, "weight", &[width, out])?;
        let bias = self.take(name, "bias", &[out])?;
        let weight = transposed(&stored);
        let part = LinearPart { weight: &weight, bias: Some(&bias) };
        let packed = self.backend.load_linear(LinearWeight::Stacked(&[part]))?;
        self.done_with(vec![Matrix { weight: stored, bias: Some(bias) }])?;
        Ok(packed)
    }

    /// Whether the checkpoint has the tensor of this whole name.
    pub fn contains(&self, name: &str) -> bool {
        self.weights.contains(&format!("{}{name}", self.prefix))
    }

    /// Says that a tensor may be there without being used. Returns `None`, what stands in its place.
    pub fn ignore<T>(&mut self, name: &str) -> Option<T> {
        self.weights.ignore(&format!("{}{name}", self.prefix));
        None
    }

    /// Fails if tensors are left over. Returns the numbers in all weights that were taken.
    pub fn finish(self) -> Result<u64> {
        self.weights.finish()?;
        Ok(self.num_parameters)
    }

    fn matrix(&mut self, name: &str, [out, width]: [usize; 2], bias: bool) -> Result<Matrix> {
        let weight = self.take(name, "weight", &[out, width])?;
        let bias = if bias { Some(self.take(name, "bias", &[out])?) } else { None };
        Ok(Matrix { weight, bias })
    }

    fn take(&mut self, name: &str, kind: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.take(&format!("{}{name}.{kind}", self.prefix), shape)
    }

    /// Counts what was packed, gives its memory back and reports.
    fn done_with(&mut self, matrices: Vec<Matrix>) -> Result<()> {
        for tensor in matrices.into_iter().flat_map(|matrix| [Some(matrix.weight), matrix.bias]).flatten() {
            self.loaded.loaded_bytes += self.weights.stored_bytes(&tensor.name);
            self.num_parameters += tensor.num_elements() as u64;
            self.weights.recycle(tensor);
        }
        self.report()
    }

    fn report(&mut self) -> Result<()> {
        if (self.on_progress)(self.loaded) { Ok(()) } else { Err(Error::Cancelled) }
    }
}

/// A tensor and its bias, as read.
struct Matrix {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Matrix {
    fn part(&self) -> LinearPart<'_> {
        LinearPart { weight: &self.weight, bias: self.bias.as_ref() }
    }
}

/// A matrix `[rows, columns]` as `[columns, rows]`; blocks, which lie along the rows, become f32. In squares: going down a
/// column of a large matrix touches another page with each element.
fn transposed(matrix: &Tensor) -> Tensor {
    const SQUARE: usize = 32;
    let &[rows, columns] = matrix.shape.as_slice() else { unreachable!("taken with two axes") };
    let dtype = match matrix.encoding {
        // An outline of weights has no numbers.
        _ if matrix.data.is_empty() => {
            let encoding = match matrix.encoding {
                Encoding::Blocks(_) => DType::F32.into(),
                plain => plain,
            };
            return Tensor { shape: vec![columns, rows], encoding, ..matrix.clone() };
        }
        Encoding::Plain(dtype) => dtype,
        Encoding::Blocks(_) => {
            let data = matrix.to_f32().into_iter().flat_map(f32::to_le_bytes).collect();
            return transposed(&Tensor { encoding: DType::F32.into(), data, ..matrix.clone() });
        }
    };
    let size = dtype.size_bytes();
    let mut data = vec![0; matrix.data.len()];
    for (first_row, first_column) in
        (0..rows).step_by(SQUARE).flat_map(|row| (0..columns).step_by(SQUARE).map(move |column| (row, column)))
    {
        for row in first_row..rows.min(first_row + SQUARE) {
            for column in first_column..columns.min(first_column + SQUARE) {
                let element = &matrix.data[(row * columns + column) * size..][..size];
                data[(column * rows + row) * size..][..size].copy_from_slice(element);
            }
        }
    }
    Tensor { name: matrix.name.clone(), shape: vec![columns, rows], encoding: matrix.encoding, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Element `[i, j]` becomes `[j, i]`, over sizes around the edge of a square and both widths of an element.
    #[test]
    fn transposing_swaps_the_axes() {
        for (rows, columns) in [(1, 1), (1, 40), (31, 33), (32, 64), (65, 3)] {
            for dtype in [DType::F32, DType::F16] {
                let size = dtype.size_bytes();
                let data = (0..rows * columns * size).map(|i| (i * 37 % 251) as u8).collect();
                let matrix = Tensor { name: "m".to_string(), shape: vec![rows, columns], encoding: dtype.into(), data };
                let swapped = transposed(&matrix);
                assert_eq!((swapped.shape.as_slice(), swapped.encoding), ([columns, rows].as_slice(), dtype.into()));
                for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                    let at = |data: &[u8], idx: usize| data[idx * size..(idx + 1) * size].to_vec();
                    assert_eq!(at(&swapped.data, column * rows + row), at(&matrix.data, row * columns + column));
                }
            }
        }
    }
}

//! The operations of a model as the papers write them: double precision, one loop per sum, no packing, no tiles, no
//! threads. Slow on purpose; what it computes is what every other backend must come close to.
#![allow(dead_code, reason = "each test program uses a part")]

use ns_llm::Result;
use ns_llm::backend::{
    AttentionLayer, Backend, Gelu, Int8Blocks, KvLayout, LinearPart, LinearWeight, Pooling, RopeTable,
};
use std::sync::Arc;

use ns_llm::batch::{Batch, OutputRow, Sampled};
use ns_llm::ids::BlockId;
use ns_llm::sampler::{SamplerScratch, sample_row};
use ns_llm::tensor::Tensor;

/// The backend; it has no state.
pub struct Reference;

/// `[rows, width]`
#[derive(Clone)]
pub struct Matrix {
    width: usize,
    values: Vec<f64>,
}

/// `[out, in]` with bias `[out]`; for a SwiGLU the gate's rows, then the up projection's.
pub struct Linear {
    weight: Matrix,
    bias: Vec<f64>,
}

/// Weight `[width]` and epsilon.
pub struct Norm {
    weight: Vec<f64>,
    eps: f64,
}

/// Weight and bias `[width]` and epsilon.
pub struct LayerNorm {
    weight: Vec<f64>,
    bias: Vec<f64>,
    eps: f64,
}

/// Keys and values: `[layers][slots][kv_heads * head_dim]`.
pub struct Kv {
    layout: KvLayout,
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
}

impl Matrix {
    fn new(width: usize, values: Vec<f64>) -> Matrix {
        assert!(values.len().is_multiple_of(width));
        Matrix { width, values }
    }
    fn rows(&self) -> std::slice::Chunks<'_, f64> {
        self.values.chunks(self.width)
    }
    fn row(&self, idx: usize) -> &[f64] {
        &self.values[idx * self.width..][..self.width]
    }
    fn map_rows(&self, width: usize, map: impl FnMut(&[f64]) -> Vec<f64>) -> Matrix {
        Matrix::new(width, self.rows().flat_map(map).collect())
    }
}

impl Linear {
    /// `x W^T + bias` of one row.
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        self.weight.rows().zip(&self.bias).map(|(row, bias)| dot(row, x) + bias).collect()
    }
    fn num_outputs(&self) -> usize {
        self.bias.len()
    }
}

impl Norm {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mean_square = dot(x, x) / x.len() as f64;
        let scale = (mean_square + self.eps).sqrt().recip();
        x.iter().zip(&self.weight).map(|(x, w)| x * scale * w).collect()
    }
}

impl LayerNorm {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = (variance + self.eps).sqrt().recip();
        x.iter().zip(&self.weight).zip(&self.bias).map(|((x, w), b)| (x - mean) * scale * w + b).collect()
    }
}

fn gelu(x: f64, form: Gelu) -> f64 {
    match form {
        Gelu::Erf => 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())),
        Gelu::Tanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
    }
}

/// The Taylor series (Abramowitz & Stegun 1964, 7.1.5), which has lost ten digits at 5 and is 1 from there on.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..150 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// Blocks of one layer serve all layers in turn.
fn layer_of(layer: &AttentionLayer<Reference>, kv: &Kv) -> usize {
    layer.layer_idx.min(kv.keys.len() - 1)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f32().into_iter().map(f64::from).collect()
}

/// Rotates dimension `i` with `i + rotary_dim / 2` by the angle of `position`.
fn rotate(head: &mut [f64], rope: &RopeTable, position: usize) {
    let half = rope.rotary_dim / 2;
    for i in 0..half {
        let (cos, sin) = (f64::from(rope.cos[position * half + i]), f64::from(rope.sin[position * half + i]));
        let (a, b) = (head[i], head[i + half]);
        (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|x| x / sum).collect()
}

impl Backend for Reference {
    type Rows = Matrix;
    type Operand = Matrix;
    type Linear = Linear;
    type Norm = Norm;
    type LayerNorm = LayerNorm;
    type Rope = RopeTable;
    type Kv = Kv;

    fn load_linear(&self, weight: LinearWeight<'_>) -> Result<Linear> {
        let parts: Vec<LinearPart<'_>> = match weight {
            LinearWeight::Stacked(parts) => parts.to_vec(),
            LinearWeight::GateUp { gate, up } => vec![gate, up],
        };
        let bias = |part: &LinearPart<'_>| part.bias.map_or(vec![0.0; part.weight.shape[0]], numbers);
        Ok(Linear {
            weight: Matrix::new(parts[0].weight.shape[1], parts.iter().flat_map(|part| numbers(part.weight)).collect()),
            bias: parts.iter().flat_map(bias).collect(),
        })
    }

    fn load_norm(&self, weight: &Tensor, eps: f32) -> Result<Norm> {
        Ok(Norm { weight: numbers(weight), eps: eps.into() })
    }

    fn load_layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<LayerNorm> {
        Ok(LayerNorm { weight: numbers(weight), bias: numbers(bias), eps: eps.into() })
    }

    fn load_rope(&self, table: RopeTable) -> Result<RopeTable> {
        Ok(table)
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<Kv> {
        // A slot that was never written holds NaN: whoever reads it spoils its own answer.
        let slot = vec![f64::NAN; layout.num_kv_heads * layout.head_dim];
        let layers = vec![vec![slot; layout.num_blocks * layout.block_tokens]; layout.num_layers];
        Ok(Kv { layout, keys: layers.clone(), values: layers })
    }

    fn embed(&self, embedding: &Linear, batch: &Batch) -> Result<Matrix> {
        let rows = batch.token_ids.iter().flat_map(|&id| embedding.weight.row(id as usize).to_vec());
        Ok(Matrix::new(embedding.weight.width, rows.collect()))
    }

    fn add_embedding(&self, hidden: &mut Matrix, embedding: &Linear, indices: &[u32]) -> Result<()> {
        let added = indices.iter().flat_map(|&idx| embedding.weight.row(idx as usize));
        assert_eq!(hidden.values.len(), indices.len() * hidden.width);
        hidden.values.iter_mut().zip(added).for_each(|(x, added)| *x += added);
        Ok(())
    }

    fn rms_norm(&self, hidden: &Matrix, norm: &Norm) -> Result<Matrix> {
        Ok(hidden.map_rows(hidden.width, |row| norm.apply(row)))
    }

    fn rms_norm_rows(&self, hidden: &Matrix, norm: &Norm) -> Result<Matrix> {
        self.rms_norm(hidden, norm)
    }

    fn layer_norm(&self, hidden: &Matrix, norm: &LayerNorm) -> Result<Matrix> {
        Ok(hidden.map_rows(hidden.width, |row| norm.apply(row)))
    }

    fn layer_norm_in_place(&self, hidden: &mut Matrix, norm: &LayerNorm) -> Result<Matrix> {
        *hidden = self.layer_norm(hidden, norm)?;
        Ok(hidden.clone())
    }

    fn linear(&self, x: &Matrix, weight: &Linear) -> Result<Matrix> {
        Ok(x.map_rows(weight.num_outputs(), |row| weight.apply(row)))
    }

    fn linear_add(&self, hidden: &mut Matrix, x: &Matrix, weight: &Linear) -> Result<()> {
        let product = self.linear(x, weight)?;
        assert_eq!((hidden.width, hidden.values.len()), (product.width, product.values.len()));
        hidden.values.iter_mut().zip(product.values).for_each(|(h, p)| *h += p);
        Ok(())
    }

    fn linear_swiglu(&self, x: &Matrix, gate_up: &Linear) -> Result<Matrix> {
        let intermediate = gate_up.num_outputs() / 2;
        Ok(x.map_rows(intermediate, |row| {
            let both = gate_up.apply(row);
            let (gate, up) = both.split_at(intermediate);
            gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
        }))
    }

    fn linear_gelu(&self, x: &Matrix, weight: &Linear, form: Gelu) -> Result<Matrix> {
        Ok(x.map_rows(weight.num_outputs(), |row| weight.apply(row).into_iter().map(|x| gelu(x, form)).collect()))
    }

    fn rope_and_store(&self, qkv: Matrix, layer: &AttentionLayer<Self>, batch: &Batch, kv: &mut Kv) -> Result<Matrix> {
        let shape = &layer.shape;
        let (q_width, kv_width) = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim);
        let prepare = |heads: &[f64], norm: Option<&Norm>, position: usize| -> Vec<f64> {
            let head = |head: &[f64]| {
                let mut head = norm.map_or(head.to_vec(), |norm| norm.apply(head));
                if let Some(rope) = &layer.rope {
                    rotate(&mut head, rope, position);
                }
                head
            };
            heads.chunks(shape.head_dim).flat_map(head).collect()
        };
        let (q_norm, k_norm) = layer.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
        let mut queries = Vec::new();
        let layer_idx = layer_of(layer, kv);
        for ((row, &position), &slot) in qkv.rows().zip(&batch.positions).zip(&batch.slots) {
            let (q, rest) = row.split_at(q_width);
            let (k, v) = rest.split_at(kv_width);
            queries.extend(prepare(q, q_norm, position as usize));
            kv.keys[layer_idx][slot as usize] = prepare(k, k_norm, position as usize);
            kv.values[layer_idx][slot as usize] = v.to_vec();
        }
        Ok(Matrix::new(q_width, queries))
    }

    fn paged_attention(&self, q: &Matrix, layer: &AttentionLayer<Self>, batch: &Batch, kv: &Kv) -> Result<Matrix> {
        let shape = &layer.shape;
        let group = shape.num_heads / shape.num_kv_heads;
        let (keys, values) = (&kv.keys[layer_of(layer, kv)], &kv.values[layer_of(layer, kv)]);
        let mut out = vec![0.0; q.values.len()];
        for sequence in &batch.sequences {
            let table = batch.block_table(sequence);
            let slot = |position: usize| {
                table[position / kv.layout.block_tokens].0 as usize * kv.layout.block_tokens
                    + position % kv.layout.block_tokens
            };
            for row in sequence.rows.clone() {
                let position = batch.positions[row] as usize;
                let first = shape.sliding_window_tokens.map_or(0, |window| (position + 1).saturating_sub(window));
                let last = if shape.causal { position } else { sequence.context_tokens - 1 };
                for head in 0..shape.num_heads {
                    let of_kv_head = head / group * shape.head_dim..(head / group + 1) * shape.head_dim;
                    let query = &q.row(row)[head * shape.head_dim..][..shape.head_dim];
                    let score = |p| dot(query, &keys[slot(p)][of_kv_head.clone()]) * f64::from(shape.scale);
                    let shares = softmax(&(first..=last).map(score).collect::<Vec<_>>());
                    let sum = &mut out[row * q.width + head * shape.head_dim..][..shape.head_dim];
                    for (p, share) in (first..=last).zip(shares) {
                        let value = &values[slot(p)][of_kv_head.clone()];
                        sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += share * value);
                    }
                }
            }
        }
        Ok(Matrix::new(q.width, out))
    }

    fn select_outputs(&self, hidden: &Matrix, batch: &Batch) -> Result<Matrix> {
        let rows = batch.outputs.iter().flat_map(|output| hidden.row(output.token_row).to_vec());
        Ok(Matrix::new(hidden.width, rows.collect()))
    }

    fn sample(&self, x: &Matrix, output: &Linear, outputs: &[OutputRow]) -> Result<Vec<Sampled>> {
        let mut logits = self.read_logits(x, output)?;
        let mut scratch = SamplerScratch::default();
        let rows = logits.chunks_mut(output.num_outputs()).zip(outputs);
        let sample = |(logits, row): (&mut [f32], &OutputRow)| Sampled {
            seq: row.seq,
            position: row.position,
            outcome: sample_row(logits, row, &mut scratch),
        };
        Ok(rows.map(sample).collect())
    }

    fn read_logits(&self, x: &Matrix, output: &Linear) -> Result<Vec<f32>> {
        Ok(self.linear(x, output)?.values.into_iter().map(|logit| logit as f32).collect())
    }

    fn pool(&self, hidden: &Matrix, batch: &Batch, pooling: Pooling) -> Result<Vec<Vec<f32>>> {
        let vector = |rows: &std::ops::Range<usize>| {
            let rows = match pooling {
                Pooling::Mean => rows.clone(),
                Pooling::First => rows.start..rows.start + 1,
                Pooling::Last => rows.end - 1..rows.end,
            };
            let mean = |column| {
                let values = rows.clone().map(|row| hidden.values[row * hidden.width + column]);
                (values.sum::<f64>() / rows.len() as f64) as f32
            };
            (0..hidden.width).map(mean).collect()
        };
        Ok(batch.sequences.iter().map(|sequence| vector(&sequence.rows)).collect())
    }

    fn int8_blocks(_: KvLayout) -> Result<Option<Int8Blocks>> {
        Ok(None)
    }

    fn read_blocks(&self, _: &Kv, _: &[BlockId]) -> Result<Vec<Arc<[u8]>>> {
        unreachable!("no test keeps blocks of the reference")
    }

    fn write_block(&self, _: &mut Kv, _: BlockId, _: &[u8]) -> Result<()> {
        unreachable!("no test keeps blocks of the reference")
    }
}

//! How rows choose their tokens, in the words of the kernel that draws: of a step that is launched kernel by kernel as of one in a
//! bucket.

use ns_llm_kernels::cuda::sampling::{LogitBias, SamplingRow};

use crate::batch::{OutputKind, OutputRow, RowSampling};

/// How a row chooses its token, if the token is all that it asks for.
pub(super) fn on_device(asks: &OutputRow) -> Option<&RowSampling> {
    match &asks.kind {
        OutputKind::Sample(sampling) => sampling.logprobs.is_none().then_some(sampling),
        OutputKind::Score { .. } => None,
    }
}

/// Rows as the device takes them, with the biases and histories of all.
#[derive(Default)]
pub(super) struct DeviceRows {
    pub(super) rows: Vec<SamplingRow>,
    pub(super) bias: Vec<LogitBias>,
    pub(super) history: Vec<u32>,
}

impl DeviceRows {
    /// One row more. `None`: the device's choice for it is nobody's.
    pub(super) fn push(&mut self, sampling: Option<&RowSampling>, position: usize) {
        let (first_bias, first_history) = (self.bias.len(), self.history.len());
        let mut row = SamplingRow {
            position: position as u64,
            first_bias: first_bias as u32,
            first_history: first_history as u32,
            ..SamplingRow::GREEDY
        };
        if let Some(RowSampling { params, history, prompt_tokens, .. }) = sampling {
            self.bias.extend(params.logit_bias.iter().map(|&(token_id, bias)| LogitBias { token_id, bias }));
            self.history.extend_from_slice(history);
            row = SamplingRow {
                seed: params.seed,
                temperature: params.temperature,
                top_k: params.top_k,
                top_p: params.top_p,
                min_p: params.min_p,
                repetition_penalty: params.repetition_penalty,
                presence_penalty: params.presence_penalty,
                frequency_penalty: params.frequency_penalty,
                num_bias: (self.bias.len() - first_bias) as u32,
                num_history: history.len() as u32,
                prompt_tokens: *prompt_tokens as u32,
                ..row
            };
        }
        self.rows.push(row);
    }
}

//! From an architecture's name to a model that can run; the trait that the executor sees.

pub mod bert;
pub mod config;
pub mod gpt2;
pub mod layers;
pub mod llama;
pub mod load;
pub mod mistral;
pub mod qwen2;
pub mod qwen3;

use crate::backend::Backend;
use crate::batch::Batch;
use crate::error::Result;
use crate::loader::Weights;
use crate::model::config::{Architecture, ModelConfig};
use crate::model::load::{OnProgress, WeightLoader};

/// A language model on backend `B`.
pub trait Model<B: Backend>: Send {
    /// Runs all layers over the batch, writes its K and V, and returns the final, normalised hidden states of the
    /// batch's output rows: `[outputs, hidden_size]`.
    /// [`Error::NotSupported`](crate::Error::NotSupported) for a model that only encodes, as for [`Model::output`].
    fn forward(&self, backend: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Operand>;
    /// The output matrix `[vocab_size, hidden_size]`.
    fn output(&self) -> Result<&B::Linear>;
    /// Runs all layers over whole sequences and returns the final, normalised hidden states of all rows: `[tokens,
    /// hidden_size]`. `kv` has one layer, which each layer of the model overwrites.
    fn encode(&self, backend: &B, batch: &Batch, kv: &mut B::Kv) -> Result<B::Rows>;
}

/// A model with its weights.
pub struct LoadedModel<B: Backend> {
    /// The model.
    pub model: Box<dyn Model<B>>,
    /// Numbers in all weights; a matrix that is used twice counts once.
    pub num_parameters: u64,
}

/// Loads the model that `config` describes, for sequences of at most `context_tokens`. Every tensor of `weights` must
/// be used, and none may be missing or of another shape. `on_progress` is called before the first tensor and after
/// each one that is packed; when it returns `false`, the load ends with [`Error::Cancelled`](crate::Error::Cancelled).
pub fn load<B: Backend>(
    backend: &B,
    weights: Weights,
    config: &ModelConfig,
    context_tokens: usize,
    on_progress: OnProgress<'_>,
) -> Result<LoadedModel<B>> {
    let mut loader = WeightLoader::new(backend, weights, on_progress)?;
    let model: Box<dyn Model<B>> = match config.architecture {
        Architecture::Llama => Box::new(llama::Llama::load(&mut loader, config, context_tokens)?),
        Architecture::Mistral => Box::new(mistral::Mistral::load(&mut loader, config, context_tokens)?),
        Architecture::Qwen2 => Box::new(qwen2::Qwen2::load(&mut loader, config, context_tokens)?),
        Architecture::Qwen3 => Box::new(qwen3::Qwen3::load(&mut loader, config, context_tokens)?),
        Architecture::Gpt2 => Box::new(gpt2::Gpt2::load(&mut loader, config)?),
        Architecture::Bert => Box::new(bert::Bert::load(&mut loader, config)?),
    };
    let num_parameters = loader.finish()?;
    Ok(LoadedModel { model, num_parameters })
}

//! Promise: what a model's files say is what is loaded (golden values, formats, tokenizers, chat templates), and what is
//! wrong with them is a typed error that names it.

mod chat_templates;
mod embedding_models;
mod gguf_files;
mod gguf_models;
mod gguf_mutations;
mod gguf_tokenizers;
mod golden_embeddings;
mod golden_logits;
mod malformed_files;
mod model_fingerprint;
mod model_loading;
mod quantized_files;
mod tokenizer_vectors;

#[path = "../support/counting_allocator.rs"]
mod counting_allocator;
#[path = "../support/demo.rs"]
mod demo;
#[path = "../support/direct_run.rs"]
mod direct_run;
#[path = "../support/encoder_cases.rs"]
mod encoder_cases;
#[path = "../support/folder_cases.rs"]
mod folder_cases;
#[path = "../support/gguf_cases.rs"]
mod gguf_cases;
#[path = "../support/gguf_encoder_cases.rs"]
mod gguf_encoder_cases;
#[path = "../support/gguf_file.rs"]
mod gguf_file;
#[path = "../support/gguf_loading.rs"]
mod gguf_loading;
#[path = "../support/reference_backend.rs"]
mod reference_backend;
#[path = "../support/tiny_model.rs"]
mod tiny_model;

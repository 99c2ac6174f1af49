//! The HTTP face as its clients meet it: bytes through a socket in, bytes out, with the model that ships. One file per
//! promise.

mod access;
mod api_document;
mod bad_input;
mod charter;
mod chat;
mod client;
mod completions;
mod disconnect;
mod embeddings;
mod fuzz;
mod limits;
mod load;
mod mounted;
mod ns_node;
mod observe;
mod ollama;
mod open_webui;
mod page;
mod responses;
mod stop;
mod text;

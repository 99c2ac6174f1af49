//! libFuzzer's way into [`ns_llm_fuzz::chat_template`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = ns_llm_fuzz::chat_template(bytes);
});

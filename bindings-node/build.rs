//! Link settings of a Node addon, among them `-z nodelete`: Node unloads an addon when the worker thread that loaded it
//! ends, while threads of the engine may still run its code.

fn main() {
    napi_build::setup();
}

"""Compares this engine with llama.cpp on the same GGUF files of a model, type by type: logits, perplexity, and how many
tasks are answered exactly. Prints a table; exits with 1 when a limit is exceeded. See README.md beside this file."""

import argparse
import json
import math
import pathlib
import shlex
import subprocess
import sys
import tempfile

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

ROOT = pathlib.Path(__file__).resolve().parents[2]
TYPES = ["f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q5_1", "q4_k_m", "q4_0", "q4_1", "iq4_nl", "mxfp4", "q3_k_m", "q2_k"]

# Normalized mean squared error of logits, by what the matrices are multiplied with.
NMSE_LIMITS = {"f32": 1e-6}
NMSE_LIMIT_ROUNDED = 1e-4
# Of perplexity, relative.
PERPLEXITY_LIMIT = 0.005
# As `ns-llm eval` cuts a text: each token is predicted once, with at least half a window before it where there is one.
WINDOW_TOKENS = 1024
STRIDE_TOKENS = 512


def run(command, *arguments):
    """Output of a command of ours; what it says on standard error is shown."""
    done = subprocess.run([*shlex.split(command), *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def our_logits(command, model, sequences, folder):
    """`[tokens, vocab_size]` of all sequences, one behind the other."""
    ids, output = folder / "ids.txt", folder / "logits.f32"
    ids.write_text("".join(" ".join(map(str, sequence)) + "\n" for sequence in sequences))
    run(command, model, ids, output)
    logits = np.fromfile(output, dtype="<f4")
    return logits.reshape(sum(map(len, sequences)), -1)


def their_logits(llama, sequence):
    """`[tokens, vocab_size]` of one sequence."""
    llama.reset()
    llama.eval(sequence)
    return np.array(llama.scores[: len(sequence)], dtype=np.float32)


def their_perplexity(llama, ids):
    """Of the whole text, in the windows of `ns-llm eval`."""
    nats, tokens, seen = 0.0, 0, 0
    for start in range(0, len(ids), STRIDE_TOKENS):
        window = ids[start : start + WINDOW_TOKENS]
        logits = their_logits(llama, window)[:-1].astype(np.float64)
        top = logits.max(axis=1)
        log_sums = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses = log_sums - logits[np.arange(len(window) - 1), window[1:]]
        new = losses[max(seen - (start + 1), 0) :]
        nats, tokens = nats + new.sum(), tokens + len(new)
        seen = start + len(window)
        if seen == len(ids):
            break
    return math.exp(nats / max(tokens, 1)), tokens


def nmse(actual, expected):
    difference = actual.astype(np.float64) - expected
    return float((difference**2).sum() / (expected.astype(np.float64) ** 2).sum())


def compare(type_name, options, folder):
    """All figures of one type."""
    file = folder / f"{type_name}.gguf"
    if not file.exists():
        run(options.ns_llm, "quantize", "--model", options.model, "--type", type_name, "--output", file)
    llama = Llama(
        str(file), n_ctx=WINDOW_TOKENS, n_batch=WINDOW_TOKENS, logits_all=True, verbose=False,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False,
    )
    text = options.text.read_text()
    ids = llama.tokenize(text.encode(), add_bos=False, special=False)
    sequences = [ids[start : start + options.tokens] for start in range(0, len(ids), options.tokens)][: options.sequences]
    ours = our_logits(options.logits, file, sequences, folder)
    theirs = np.concatenate([their_logits(llama, sequence) for sequence in sequences])
    # The same numbers in f32: products without rounded activations.
    exact_file = folder / f"{type_name}-in-f32.gguf"
    if not exact_file.exists():
        run(options.ns_llm, "quantize", "--model", file, "--type", "f32", "--output", exact_file)
    exact = our_logits(options.logits, exact_file, sequences, folder)
    evaluated = json.loads(run(options.ns_llm, "eval", "--model", file, "--text", options.text, "--items", options.items, "--json"))
    perplexity, tokens = their_perplexity(llama, ids)
    if tokens != evaluated["text"]["tokens"]:
        sys.exit(f"{type_name}: llama.cpp predicts {tokens} tokens of the text, we {evaluated['text']['tokens']}")
    return {
        "type": type_name,
        "file_bytes": file.stat().st_size,
        "nmse": nmse(ours, theirs),
        "nmse_limit": NMSE_LIMITS.get(type_name, NMSE_LIMIT_ROUNDED),
        "nmse_to_exact": nmse(ours, exact),
        "nmse_to_exact_llama_cpp": nmse(theirs, exact),
        "same_first_choice": float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        "perplexity": evaluated["text"]["perplexity"],
        "perplexity_llama_cpp": perplexity,
        "right": evaluated["all"]["right"],
        "items": evaluated["all"]["items"],
    }


def is_good(row):
    drift = abs(row["perplexity"] / row["perplexity_llama_cpp"] - 1)
    return row["nmse"] <= row["nmse_limit"] and drift <= PERPLEXITY_LIMIT


def line(row):
    drift = 100 * (row["perplexity"] / row["perplexity_llama_cpp"] - 1)
    cells = [
        row["type"],
        f"{row['file_bytes'] / 2**20:.2f}",
        f"{row['nmse']:.1e} (<= {row['nmse_limit']:.0e})",
        f"{row['nmse_to_exact']:.1e}, {row['nmse_to_exact_llama_cpp']:.1e}",
        f"{100 * row['same_first_choice']:.2f} %",
        f"{row['perplexity']:.4f}",
        f"{row['perplexity_llama_cpp']:.4f}",
        f"{drift:+.3f} %",
        f"{row['right']} of {row['items']}",
        "" if is_good(row) else "**beyond a limit**",
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ns-llm", default="cargo run --quiet --release -p ns-llm-cli --", help="command that runs ns-llm")
    parser.add_argument("--logits", default="cargo run --quiet --release -p ns-llm --example logits --", help="command that runs the example")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models/demo")
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "models/demo/evaluation/eval.txt")
    parser.add_argument("--items", type=pathlib.Path, default=ROOT / "models/demo/evaluation/eval.jsonl")
    parser.add_argument("--types", default=",".join(TYPES), help="comma-separated, as `ns-llm quantize` calls them")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence whose logits are compared")
    parser.add_argument("--sequences", type=int, default=8, help="how many such sequences")
    parser.add_argument("--files", type=pathlib.Path, help="folder of the GGUF files, kept and used again (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    if options.tokens > WINDOW_TOKENS:
        parser.error(f"--tokens is at most {WINDOW_TOKENS}")

    all_good = True
    if not options.json:
        print("| type | MiB | NMSE of logits | to exact: ours, theirs | same first choice | perplexity | llama.cpp | difference | exact | |")
        print("| --- " * 10 + "|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files.resolve() if options.files else pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for type_name in options.types.split(","):
            row = compare(type_name, options, folder)
            all_good &= is_good(row)
            print(json.dumps(row) if options.json else line(row), flush=True)
    sys.exit(0 if all_good else 1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Golden logits of small random models, computed by transformers in float32 (torch 2.15, transformers 5.23).

  make_golden.py > tiny_models.json

The weights come from a counter-based generator keyed by the tensor's name, which the tests have too
(tests/support/tiny_model.rs): only configurations, token ids and some logits are stored. For every position of
every sequence: the logits of each eighth token, and the logarithm of the sum of all exponentials.
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, COLUMN_STEP = 200, 8
BASE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, hidden_act="silu", rms_norm_eps=1e-5,
            bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def models():
    """Name, stored element type and config.json of each model; both ways to write rotary parameters occur."""
    def model(name, dtype, architecture, model_type, **changes):
        return name, dtype, dict(architectures=[architecture], model_type=model_type, **BASE) | changes
    llama, mistral, qwen2, qwen3 = (
        (f"{a}ForCausalLM", a.lower()) for a in ("Llama", "Mistral", "Qwen2", "Qwen3"))
    yield model("llama, scaled frequencies, all biases", "F32", *llama, rope_theta=500000.0, rope_scaling=LLAMA3,
                attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    yield model("llama, plain, tied", "F32", *llama, rope_theta=10000.0, num_key_value_heads=4, tie_word_embeddings=True)
    yield model("llama, linear scaling, one key head", "F16", *llama, num_key_value_heads=1, tie_word_embeddings=False,
                rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))
    yield model("mistral, sliding window", "F32", *mistral, rope_theta=10000.0, sliding_window=8, num_hidden_layers=3,
                tie_word_embeddings=False)
    yield model("qwen2", "F32", *qwen2, rope_theta=1000000.0, tie_word_embeddings=True)
    yield model("qwen2, upper layers slide", "F32", *qwen2, rope_theta=10000.0, num_hidden_layers=3,
                use_sliding_window=True, sliding_window=8, max_window_layers=1, tie_word_embeddings=False)
    yield model("qwen3", "F32", *qwen3, rope_parameters=dict(rope_type="default", rope_theta=1000000.0), head_dim=32,
                tie_word_embeddings=True)
    yield model("qwen3, biases", "BF16", *qwen3, rope_theta=10000.0, head_dim=16, attention_bias=True,
                tie_word_embeddings=False)
    gpt2 = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4,
                n_positions=256, bos_token_id=1, eos_token_id=2)
    yield "gpt2", "F32", gpt2 | dict(n_ctx=256, layer_norm_epsilon=1e-5, activation_function="gelu_new")
    yield "gpt2, exact gelu, untied", "F16", gpt2 | dict(
        n_inner=112, n_head=5, n_embd=65, activation_function="gelu", tie_word_embeddings=False)


def draws(name, count):
    """Uniform numbers of [-1, 1): SplitMix64 of (FNV-1a of the name) + index, upper 24 bits."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = (np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def weights(name, shape):
    u = torch.from_numpy(draws(name, int(np.prod(shape)))).reshape(shape)
    if name.endswith(("norm.weight", "Norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
        return 1 + u / 8
    if name.endswith(".bias"):
        return u / 8
    return u if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")) else u / 4


@torch.no_grad()
def golden(name, dtype, config):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").float().eval()
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for tensor, parameter in model.named_parameters():
        parameter.copy_(weights(tensor, parameter.shape).to(stored).float())
    sequences = []
    for length in (5, 37):
        token_ids = ((draws(f"tokens {length}", length) + 1) * (VOCAB / 2)).astype(int).tolist()
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0].double()
        rounded = lambda rows: [[round(x, 5) for x in row] for row in rows]
        sequences.append(dict(token_ids=token_ids, logits=rounded(logits[:, ::COLUMN_STEP].tolist()),
                              log_sum_exp=rounded([logits.logsumexp(-1).tolist()])[0]))
    return dict(name=name, dtype=dtype, config=config, sequences=sequences)


def main():
    torch.set_num_threads(1)
    lines = [json.dumps(golden(*m), separators=(",", ":")) for m in models()]
    sys.stdout.write('{"column_step":%d,"models":[\n%s\n]}\n' % (COLUMN_STEP, ",\n".join(lines)))


if __name__ == "__main__":
    main()

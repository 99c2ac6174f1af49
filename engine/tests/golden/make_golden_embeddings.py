#!/usr/bin/env python3
"""Golden vectors of small random models, computed by transformers in float32 (torch 2.15, transformers 5.23).

  make_golden_embeddings.py > tiny_embeddings.json

Weights and token ids come from the generator of make_golden.py. For every sequence: the mean of its final states, the
first and the last of them.
"""

import json
import sys

import torch
from transformers import AutoConfig, AutoModel

from make_golden import BASE, VOCAB, draws, weights

BERT = dict(architectures=["BertModel"], model_type="bert", vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=112, max_position_embeddings=256, hidden_act="gelu",
            type_vocab_size=2, layer_norm_eps=1e-12, pad_token_id=0)
QWEN3 = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32, rope_theta=10000.0,
             tie_word_embeddings=True) | BASE
GPT2 = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4,
            n_positions=256, bos_token_id=1, eos_token_id=2)

# Name, config.json, and what stands before the tensors' names in the checkpoint of a model with a head.
MODELS = [
    ("bert", BERT, ""),
    ("bert, gelu_new, odd heads", BERT | dict(hidden_act="gelu_new", hidden_size=65, num_attention_heads=5,
                                              type_vocab_size=3, layer_norm_eps=1e-5), ""),
    ("qwen3", QWEN3, "model."),
    ("gpt2", GPT2, "transformer."),
]


@torch.no_grad()
def golden(name, config, prefix):
    model = AutoModel.from_config(AutoConfig.for_model(**config), attn_implementation="eager").float().eval()
    for tensor, parameter in model.named_parameters():
        parameter.copy_(weights(prefix + tensor, parameter.shape))
    sequences = []
    for length in (1, 5, 16, 37, 130):
        token_ids = ((draws(f"tokens {length}", length) + 1) * (VOCAB / 2)).astype(int).tolist()
        states = model(torch.tensor([token_ids])).last_hidden_state[0].double()
        rounded = lambda row: [round(x, 6) for x in row.tolist()]
        sequences.append(dict(token_ids=token_ids, mean=rounded(states.mean(0)), first=rounded(states[0]),
                              last=rounded(states[-1])))
    return dict(name=name, config=config, sequences=sequences)


def main():
    torch.set_num_threads(1)
    lines = [json.dumps(golden(*m), separators=(",", ":")) for m in MODELS]
    sys.stdout.write("[\n%s\n]\n" % ",\n".join(lines))


if __name__ == "__main__":
    main()

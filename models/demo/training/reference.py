#!/usr/bin/env python3
"""Golden values: greedy continuations in float32 by transformers for fixed prompts.

  reference.py --prompts ../evaluation/reference-prompts.json --out ../evaluation/reference.json

For every prompt: its ids, 64 greedy ids (the end of the answer is not obeyed; `stop` is the index
of the first end token, if any), the ten largest logits at the first new position, and `margin`:
for each new position the gap between the two largest logits. Where a margin is small, another
order of summation may rightly choose the other token.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="..")
    ap.add_argument("--prompts", default="../evaluation/reference-prompts.json")
    ap.add_argument("--out", default="../evaluation/reference.json")
    ap.add_argument("--tokens", type=int, default=64)
    a = ap.parse_args()
    torch.set_num_threads(1)
    tok = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    out = []
    for p in json.load(open(a.prompts)):
        text = p["text"] if "text" in p else tok.apply_chat_template(p["messages"], tokenize=False, add_generation_prompt=True)
        ids = tok(text, add_special_tokens=False).input_ids
        x, past, new, margin, top = torch.tensor([ids]), None, [], [], None
        for _ in range(a.tokens):
            r = model(x, past_key_values=past, use_cache=True)
            past, logits = r.past_key_values, r.logits[0, -1]
            v, i = logits.topk(10)
            top = top or dict(ids=i.tolist(), logits=[round(z, 6) for z in v.tolist()])
            margin.append(round((v[0] - v[1]).item(), 5))
            new.append(i[0].item())
            x = i[:1][None]
        full = model(torch.tensor([ids + new])).logits[0, len(ids) - 1:-1].argmax(-1).tolist()
        assert full == new or min(margin) < 1e-3, "cached and full runs differ"
        stop = next((j for j, t in enumerate(new) if t in (tok.eos_token_id, tok.pad_token_id)), None)
        out.append(dict(id=p["id"], **({"messages": p["messages"]} if "messages" in p else {}), text=text, prompt_ids=ids, greedy_ids=new,
                        greedy_text=tok.decode(new[:stop], skip_special_tokens=False), stop=stop, first_top10=top, margin=margin))
        print(p["id"], repr(out[-1]["greedy_text"][:100]), "least margin", min(margin[:stop + 1 if stop is not None else None]))
    with open(a.out, "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(o, ensure_ascii=False) for o in out) + "\n]\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Evaluates the demo model with transformers: exact match by kind of task, and perplexity.

  evaluate.py --model .. --items ../evaluation/eval.jsonl --text ../evaluation/eval.txt --out results.json

An item counts as right when the greedy answer equals the expected text exactly; a story counts
when it ends by itself, has at least 30 words and names everything the prompt asked for.
"""

import argparse
import json
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def right(item, text, ended):
    if "must_include" in item:
        return ended and len(text.split()) >= 30 and all(m in text for m in item["must_include"])
    return ended and text == item["answer"]


@torch.no_grad()
def answers(model, tok, items, batch):
    """Greedy answers, batched by length with padding on the left."""
    prompts = [tok.apply_chat_template(it["messages"], tokenize=False, add_generation_prompt=True) for it in items]
    ids = [tok(p, add_special_tokens=False).input_ids for p in prompts]
    room = [400 if "answer" not in it else len(tok(it["answer"], add_special_tokens=False).input_ids) + 12 for it in items]
    order = sorted(range(len(items)), key=lambda i: (room[i] // 16, len(ids[i])))
    out = [None] * len(items)
    for k in range(0, len(order), batch):
        part = order[k:k + batch]
        n = max(len(ids[i]) for i in part)
        x = torch.tensor([[tok.pad_token_id] * (n - len(ids[i])) + ids[i] for i in part])
        m = torch.tensor([[0] * (n - len(ids[i])) + [1] * len(ids[i]) for i in part])
        y = model.generate(input_ids=x, attention_mask=m, do_sample=False, max_new_tokens=max(room[i] for i in part))[:, n:].tolist()
        for i, row in zip(part, y):
            stop = next((j for j, t in enumerate(row) if t in (tok.eos_token_id, tok.pad_token_id)), None)
            out[i] = (tok.decode(row[:stop], skip_special_tokens=False), stop is not None)
    return out


@torch.no_grad()
def perplexity(model, tok, text, window=1024, stride=512):
    ids = torch.tensor([tok(text, add_special_tokens=False).input_ids])
    total, count, seen = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        x = ids[:, start:start + window]
        logp = torch.log_softmax(model(x).logits[0, :-1].float(), -1)
        nll = -logp.gather(1, x[0, 1:, None])[:, 0]
        new = nll[max(0, seen - start - 1):]
        total, count, seen = total + new.sum().item(), count + len(new), start + x.shape[1]
        if seen >= ids.shape[1]:
            break
    return dict(tokens=count, loss=total / count, perplexity=math.exp(total / count), bits_per_byte=total / math.log(2) / len(text.encode()))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="..")
    ap.add_argument("--items", default="../evaluation/eval.jsonl")
    ap.add_argument("--text", default="../evaluation/eval.txt")
    ap.add_argument("--out", default="")
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--per-kind", type=int, default=0, help="only the first items of each kind")
    ap.add_argument("--wrong", type=int, default=0, help="print some wrong answers of each kind")
    a = ap.parse_args()
    tok = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    res = {}
    if a.text:
        res["text"] = perplexity(model, tok, open(a.text).read())
        print("perplexity", json.dumps(res["text"]), flush=True)
    items, seen = [], {}
    for line in open(a.items):
        it = json.loads(line)
        seen[it["kind"]] = seen.get(it["kind"], 0) + 1
        if not a.per_kind or seen[it["kind"]] <= a.per_kind:
            items.append(it)
    got = answers(model, tok, items, a.batch)
    kinds, shown = {}, {}
    for it, (text, ended) in zip(items, got):
        k = kinds.setdefault(it["kind"], [0, 0])
        ok = right(it, text, ended)
        k[0] += ok
        k[1] += 1
        if not ok and shown.get(it["kind"], 0) < a.wrong:
            shown[it["kind"]] = shown.get(it["kind"], 0) + 1
            print(f"--- {it['id']}: {it['messages'][-1]['content'][-200:]!r}\n  want {str(it.get('answer', it.get('must_include')))[-200:]!r}\n  got  {text[-200:]!r} {'' if ended else '(no end)'}")
    res["kinds"] = {k: dict(right=r, items=n, share=round(r / n, 4)) for k, (r, n) in kinds.items()}
    r, n = sum(v[0] for v in kinds.values()), sum(v[1] for v in kinds.values())
    res["all"] = dict(right=r, items=n, share=round(r / n, 4))
    for k, v in res["kinds"].items():
        print(f"{k:14s} {v['right']:4d} / {v['items']:4d}  {100 * v['share']:5.1f} %")
    print(f"{'all':14s} {r:4d} / {n:4d}  {100 * r / n:5.1f} %")
    if a.out:
        json.dump(res, open(a.out, "w"), indent=1)


if __name__ == "__main__":
    main()

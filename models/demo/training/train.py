#!/usr/bin/env python3
"""Trains the demo model: a small Qwen3 (transformers' Qwen3ForCausalLM layout) in plain PyTorch.

The matrices of the blocks are trained with Muon (orthogonalised momentum), which needs clearly
fewer tokens than AdamW at this size; embedding and norms use AdamW. The schedule (warm-up,
cosine) runs over steps (--steps) or, where the machine's speed is unknown, over time
(--minutes). Checkpoints are written regularly; --resume goes on from the last one.
"""

import argparse
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    head_dim=64, hidden_act="silu", hidden_size=256, initializer_range=0.02, intermediate_size=768, max_position_embeddings=2048,
    max_window_layers=6, model_type="qwen3", num_attention_heads=4, num_hidden_layers=6, num_key_value_heads=2, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=10000.0, sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
    use_sliding_window=False, vocab_size=2048)


class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(x.dtype)


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class BlockAttention(torch.autograd.Function):
    """Causal attention in blocks of queries; on CPU faster than the built-in one, above all backwards."""

    @staticmethod
    def block(t):
        return max(128, t // 4)

    @staticmethod
    def forward(ctx, q, k, v):
        shape, t, n = q.shape, q.shape[2], BlockAttention.block(q.shape[2])
        s = 1 / math.sqrt(shape[3])
        q, k, v = (x.reshape(-1, t, shape[3]) for x in (q, k, v))
        out, probs = torch.empty_like(q), []
        mask = torch.full((n, n), float("-inf"), device=q.device).triu_(1)
        for i in range(0, t, n):
            m = min(n, t - i)
            a = torch.bmm(q[:, i:i + n], k[:, :i + m].mT).float().mul_(s)
            a[:, :, i:] += mask[:m, :m]
            probs.append(torch.softmax(a, -1).to(q.dtype))
            out[:, i:i + n] = torch.bmm(probs[-1], v[:, :i + m])
        ctx.save_for_backward(q, k, v, out, *probs)
        ctx.shape, ctx.scale = shape, s
        return out.view(shape)

    @staticmethod
    def backward(ctx, g):
        q, k, v, out, *probs = ctx.saved_tensors
        g, n = g.reshape(q.shape), BlockAttention.block(q.shape[1])
        delta = (g.float() * out.float()).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for p, i in zip(probs, range(0, q.shape[1], n)):
            gi, end = g[:, i:i + n], i + p.shape[1]
            dv[:, :end] += torch.bmm(p.mT, gi)
            ds = torch.bmm(gi, v[:, :end].mT).float().sub_(delta[:, i:i + n]).mul_(p).mul_(ctx.scale).to(q.dtype)
            dq[:, i:i + n] = torch.bmm(ds, k[:, :end])
            dk[:, :end] += torch.bmm(ds.mT, q[:, i:i + n])
        return dq.view(ctx.shape), dk.to(q.dtype).view(ctx.shape), dv.to(q.dtype).view(ctx.shape)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, d = c["hidden_size"], c["head_dim"]
        self.nh, self.nkv, self.d = c["num_attention_heads"], c["num_key_value_heads"], d
        self.q_proj = nn.Linear(h, self.nh * d, bias=False)
        self.k_proj = nn.Linear(h, self.nkv * d, bias=False)
        self.v_proj = nn.Linear(h, self.nkv * d, bias=False)
        self.o_proj = nn.Linear(self.nh * d, h, bias=False)
        self.q_norm, self.k_norm = RMSNorm(d, c["rms_norm_eps"]), RMSNorm(d, c["rms_norm_eps"])

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        # one product for q, k and v
        w = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        q, k, v = F.linear(x, w).view(b, t, -1, self.d).split((self.nh, self.nkv, self.nkv), 2)
        q = rope(self.q_norm(q), cos, sin).transpose(1, 2)
        k = rope(self.k_norm(k), cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        n = self.nh // self.nkv
        k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
        if x.device.type == "cpu":
            y = BlockAttention.apply(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, self.nh * self.d))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, m = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(h, m, bias=False), nn.Linear(h, m, bias=False)
        self.down_proj = nn.Linear(m, h, bias=False)

    def forward(self, x):
        g, u = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, -1)
        return self.down_proj(F.silu(g) * u)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])


class Qwen3(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model = Body(c)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = c["initializer_range"]
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * c["num_hidden_layers"])
                nn.init.normal_(p, std=std)
        d = c["head_dim"]
        freq = 1.0 / c["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
        ang = torch.outer(torch.arange(c["max_position_embeddings"]).float(), freq)
        ang = torch.cat((ang, ang), -1)[None, :, None]
        self.register_buffer("cos", ang.cos(), persistent=False)
        self.register_buffer("sin", ang.sin(), persistent=False)

    def forward(self, ids, targets=None, weights=None):
        t = ids.shape[1]
        x = self.model.embed_tokens(ids)
        dt = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else x.dtype
        x, cos, sin = x.to(dt), self.cos[:, :t].to(dt), self.sin[:, :t].to(dt)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        if targets is None:
            return logits
        ce = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        w = weights.flatten()
        return (ce * w).sum() / w.sum()


class Muon:
    """Momentum orthogonalised by Newton-Schulz, batched over matrices of one shape."""

    def __init__(self, params, momentum=0.95, decay=0.01, steps=5, dtype=torch.bfloat16):
        self.groups = {}
        for p in params:
            self.groups.setdefault(tuple(sorted(p.shape)), []).append(p)
        self.buf = {k: torch.zeros(len(ps), *k, device=ps[0].device) for k, ps in self.groups.items()}
        self.momentum, self.decay, self.steps, self.dtype = momentum, decay, steps, dtype

    @torch.no_grad()
    def step(self, lr, momentum):
        for k, ps in self.groups.items():
            g = torch.stack([p.grad if p.shape == k else p.grad.T for p in ps])  # all wide
            m = self.buf[k].lerp_(g, 1 - momentum)
            x = g.lerp_(m, momentum).to(self.dtype)
            x = x / (x.float().norm(dim=(1, 2), keepdim=True).to(self.dtype) + 1e-7)
            for _ in range(self.steps):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = x.float()
            for p, u in zip(ps, x):
                u = u if p.shape == k else u.T
                p.mul_(1 - lr * self.decay).add_(u, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def export(model, folder, tokenizer_dir=None):
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    sd = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    tmp = os.path.join(folder, "model.safetensors.tmp")
    save_file(sd, tmp, metadata={"format": "pt"})
    os.chmod(tmp, 0o644)
    os.replace(tmp, os.path.join(folder, "model.safetensors"))
    json.dump(CONFIG, open(os.path.join(folder, "config.json"), "w"), indent=2)
    json.dump(dict(do_sample=False, eos_token_id=[2, 0], pad_token_id=0, max_new_tokens=512), open(os.path.join(folder, "generation_config.json"), "w"), indent=2)


class Data:
    """Rows of the shards of one phase, in order."""

    def __init__(self, folder, phase):
        self.files = sorted(os.path.join(folder, f) for f in os.listdir(folder) if f.startswith(phase + "-"))
        self.file, self.row, self.cur, self.epoch = 0, 0, None, 0

    def batch(self, tokens):
        ids, ws, need = [], [], None
        while need is None or need:
            if self.cur is None:
                if self.file == len(self.files):
                    self.file, self.epoch = 0, self.epoch + 1
                z = np.load(self.files[self.file])
                self.cur = (z["ids"], z["weights"])
            x, w = self.cur
            if need is None:
                need = max(1, tokens // (x.shape[1] - 1))
            take = min(need, len(x) - self.row)
            ids.append(x[self.row:self.row + take])
            ws.append(w[self.row:self.row + take])
            self.row, need = self.row + take, need - take
            if self.row == len(x):
                self.file, self.row, self.cur = self.file + 1, 0, None
        return torch.from_numpy(np.concatenate(ids).astype(np.int64)), torch.from_numpy(np.concatenate(ws).astype(np.float32) / 10)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", default="data")
    ap.add_argument("--out", default="data/model")
    ap.add_argument("--state", default="data/checkpoint.pt")
    ap.add_argument("--phases", default="a:0.45,b:0.27,c:0.20,d:0.08", help="phase:share of the run, in order")
    ap.add_argument("--steps", type=int, default=0, help="length of the run in steps")
    ap.add_argument("--minutes", type=float, default=0, help="or in minutes")
    ap.add_argument("--batch-tokens", type=int, default=8192)
    ap.add_argument("--lr", type=float, default=0.012, help="Muon")
    ap.add_argument("--adam-lr", type=float, default=0.003)
    ap.add_argument("--adamw-only", action="store_true")
    ap.add_argument("--warmup", type=float, default=0.02)
    ap.add_argument("--final", type=float, default=0.01, help="last learning rate as a share of the peak")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--threads", type=int, default=0)
    ap.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    ap.add_argument("--compile", action="store_true")
    ap.add_argument("--log", type=int, default=20)
    ap.add_argument("--save-minutes", type=float, default=5)
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--stop-after", type=int, default=0, help="for timing: stop after this many steps without saving")
    a = ap.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3(CONFIG).to(device)
    mats = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    if a.adamw_only:
        mats, rest = [], mats + rest
    muon = Muon(mats)
    adam = torch.optim.AdamW([dict(params=[p for p in rest if p.ndim == 2], weight_decay=0.01), dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0)],
                             lr=a.adam_lr, betas=(0.9, 0.98), eps=1e-10, fused=True)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}, {torch.get_num_threads()} threads", flush=True)
    phases, at = [], 0.0
    for p in a.phases.split(","):
        name, share = p.split(":")
        phases.append((name, at, at + float(share), Data(a.data, name)))
        at += float(share)
    step, used, tokens = 0, 0.0, 0
    if a.resume and os.path.exists(a.state):
        s = torch.load(a.state, map_location=device, weights_only=False)
        model.load_state_dict(s["model"])
        adam.load_state_dict(s["adam"])
        for k, b in s["muon"].items():
            muon.buf[k].copy_(b)
        step, used, tokens = s["step"], s["used"], s["tokens"]
        for (name, _, _, d), (f, r, e) in zip(phases, s["data"]):
            d.file, d.row, d.epoch = f, r, e
            if r:
                z = np.load(d.files[f])
                d.cur = (z["ids"], z["weights"])
        print("resumed at step", step, flush=True)
    net = torch.compile(model, dynamic=False) if a.compile else model

    def save():
        os.makedirs(os.path.dirname(a.state) or ".", exist_ok=True)
        torch.save(dict(model=model.state_dict(), adam=adam.state_dict(), muon=muon.buf, step=step, used=used, tokens=tokens,
                        data=[(d.file, d.row, d.epoch) for _, _, _, d in phases]), a.state + ".tmp")
        os.replace(a.state + ".tmp", a.state)
        export(model, a.out)

    start, base, last_save, t_log, loss_sum, loss_n = time.time(), used, time.time(), time.time(), 0.0, 0
    while True:
        used = base + time.time() - start
        progress = step / a.steps if a.steps else used / 60 / a.minutes
        if progress >= 1 or (a.stop_after and step >= a.stop_after):
            break
        name, _, _, data = next((p for p in phases if progress < p[2]), phases[-1])
        ids, w = data.batch(a.batch_tokens)
        ids, w = ids.to(device), w.to(device)
        f = min(1.0, progress / a.warmup) if progress < a.warmup else \
            a.final + (1 - a.final) * 0.5 * (1 + math.cos(math.pi * (progress - a.warmup) / (1 - a.warmup)))
        f = max(f, 1e-3)
        x, y, yw = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), w[:, 1:].contiguous()
        with torch.autocast(device, torch.bfloat16, enabled=not a.fp32):
            loss = (net if x.shape[1] <= 512 else model)(x, y, yw)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        for g in adam.param_groups:
            g["lr"] = a.adam_lr * f
        muon.step(a.lr * f, min(0.95, 0.85 + 0.1 * step / 150))
        adam.step()
        for p in model.parameters():
            p.grad = None
        step, tokens, loss_sum, loss_n = step + 1, tokens + x.numel(), loss_sum + loss.item(), loss_n + 1
        if step % a.log == 0:
            dt = time.time() - t_log
            print(f"step {step} phase {name} epoch {data.epoch} loss {loss_sum / loss_n:.4f} lr x{f:.3f} tokens {tokens / 1e6:.2f}M "
                  f"{loss_n * a.batch_tokens / dt:.0f} tok/s {100 * progress:.1f}%", flush=True)
            loss_sum, loss_n, t_log = 0.0, 0, time.time()
        if time.time() - last_save > a.save_minutes * 60 and not a.stop_after:
            save()
            last_save = time.time()
    if not a.stop_after:
        save()
    print(f"done: {step} steps, {tokens / 1e6:.2f}M tokens, {used / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()

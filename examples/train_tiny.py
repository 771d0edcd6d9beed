"""Trains a small GPT with this project's attention and, from the same seed, with torch's, and compares the losses.

python examples/train_tiny.py --plot docs/training.png

Two layers, d_model 128, four query heads and two kv heads of 32, causal, in bf16 by autocast. The text is Python's own
language reference (``pydoc_data.topics`` of the standard library), byte by byte; each step takes one pack of whole
documents and pieces of long ones, which do not see each other. Without a GPU the kernels run simulated.
"""

import argparse
import contextlib
import itertools
import pydoc_data.topics
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import cute_fa

D_MODEL, HEADS, HEADS_KV, LAYERS = 128, 4, 2, 2
VOCABULARY, LONGEST, PACK = 128, 160, 512


def ours(q, k, v, offsets):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=q.device)
    return cute_fa.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, LONGEST, LONGEST, causal=True)


def torchs(q, k, v, offsets):
    """torch's attention of one document after the other."""
    documents = []
    for start, end in itertools.pairwise(offsets):
        one = (t[None, start:end].transpose(1, 2) for t in (q, k, v))
        documents.append(scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(documents)


def torchs_fp32(q, k, v, offsets):
    """The same in fp32: what is left of the difference is bf16's."""
    with torch.autocast(q.device.type, enabled=False):
        return torchs(q.float(), k.float(), v.float(), offsets).to(q.dtype)


ATTENTION = {"cute_fa": ours, "torch": torchs, "torch, attention in fp32": torchs_fp32}


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        head_dim = D_MODEL // HEADS
        self.sizes = (HEADS * head_dim, HEADS_KV * head_dim, HEADS_KV * head_dim)
        self.norm, self.norm_mlp = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.qkv, self.project = nn.Linear(D_MODEL, sum(self.sizes)), nn.Linear(D_MODEL, D_MODEL)
        self.mlp = nn.Sequential(nn.Linear(D_MODEL, 4 * D_MODEL), nn.GELU(), nn.Linear(4 * D_MODEL, D_MODEL))

    def forward(self, x, offsets):
        q, k, v = (t.unflatten(-1, (-1, D_MODEL // HEADS)) for t in self.qkv(self.norm(x)).split(self.sizes, -1))
        x = x + self.project(self.attention(q, k, v, offsets).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class Gpt(nn.Module):
    """Logits (tokens, vocabulary) of packed documents: tokens (tokens), ``offsets`` where each document starts."""

    def __init__(self, attention):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, D_MODEL), nn.Embedding(LONGEST, D_MODEL)
        self.blocks = nn.ModuleList(Block(attention) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, VOCABULARY)

    def forward(self, tokens, offsets):
        position = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(offsets)])
        x = self.token(tokens) + self.position(position.to(tokens.device))
        for block in self.blocks:
            x = block(x, offsets)
        return self.head(self.norm(x))


def packs(seed: int):
    """(tokens (PACK), offsets): pieces of documents in a random order, at most LONGEST tokens each."""
    rng = torch.Generator().manual_seed(seed)
    texts = [text.encode("ascii", "replace") for _, text in sorted(pydoc_data.topics.topics.items())]
    pieces = [text[i : i + LONGEST] for text in texts for i in range(0, len(text), LONGEST)]
    while True:
        tokens, offsets = b"", [0]
        while len(tokens) < PACK:
            piece = pieces[int(torch.randint(len(pieces), (), generator=rng))]
            # a random first part, so that lengths differ
            tokens += piece[: int(torch.randint(2, LONGEST + 1, (), generator=rng))]
            tokens = tokens[:PACK]
            offsets.append(len(tokens))
        yield torch.tensor(list(tokens)), offsets


def train(name: str, steps: int, device: str, seed: int = 0) -> list[float]:
    """The loss of every step, with the attention of that name."""
    torch.manual_seed(seed)
    model = Gpt(ATTENTION[name]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, started = [], time.perf_counter()
    for tokens, offsets in itertools.islice(packs(seed), steps):
        tokens = tokens.to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(tokens, offsets)
        # the last token of a document predicts nothing
        inside = torch.ones(PACK, dtype=torch.bool)
        inside[torch.tensor(offsets[1:]) - 1] = False
        predicting = inside.nonzero()[:, 0].to(device)
        loss = cross_entropy(logits[predicting].float(), tokens[predicting + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(
                f"{name}: step {len(losses)}, loss {losses[-1]:.4f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    return losses


def plot(curves: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(2, 1))
    *others, exact = curves
    for name, style in zip(curves, ("-", "--", ":"), strict=True):
        above.plot(curves[name], style, label=name)
    for name in others:
        below.plot([a - b for a, b in zip(curves[name], curves[exact], strict=True)], label=name)
    above.set_ylabel("loss, nats a byte")
    below.set(xlabel="step", ylabel="difference from\nattention in fp32")
    above.legend()
    below.axhline(0.0, color="black", linewidth=0.5)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the packs")
    parser.add_argument("--arch", default="sm_80", help="simulated where there is no GPU")
    parser.add_argument("--plot", type=Path, help="write a figure of the losses")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    simulated = contextlib.nullcontext() if on_gpu else cute_fa.simulate(options.arch)
    with simulated:
        curves = {name: train(name, options.steps, "cuda" if on_gpu else "cpu", options.seed) for name in ATTENTION}
    for name, losses in curves.items():
        print(f"{name:<25} loss {losses[0]:.4f} at first, {statistics.mean(losses[-10:]):.4f} over the last 10 steps")
    *others, exact = curves
    for name in others:
        differences = [a - b for a, b in zip(curves[name], curves[exact], strict=True)]
        rms = statistics.fmean(d * d for d in differences) ** 0.5
        print(f"{name}, difference from attention in fp32: {rms:.1e} rms, {max(map(abs, differences)):.1e} at most")
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main()

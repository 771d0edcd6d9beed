"""A small server: sequences come and go, their keys and values live in pages, prompts are read in chunks between the
steps of decoding.

python examples/serve.py

There is no model: q, k and v of a token come from a table, one attention layer stands for all, and the next token is
the one whose embedding is most like the layer's output. A sequence that is done is computed again from its tokens
alone, in one piece, and compared with what its steps gave. Without a GPU the kernels run simulated.
"""

import argparse
import contextlib
from dataclasses import dataclass, field

import torch

import cute_fa
from cute_fa import reference

HEADS, HEADS_KV, HEAD_DIM, VOCABULARY = 16, 4, 128, 64
PAGE_SIZE, NUM_PAGES, MAX_TOKENS, MAX_RUNNING = 16, 8, 96, 2


@dataclass
class Sequence:
    """``tokens``: the prompt, then what is made of it, ``length`` in the end; the pages hold the first ``stored``.
    ``queries`` and ``outs``: (tokens, heads, head_dim) of each step."""

    name: str
    tokens: list[int]
    prompt: int
    length: int
    pages: list[int] = field(default_factory=list)
    stored: int = 0
    queries: list[torch.Tensor] = field(default_factory=list)
    outs: list[torch.Tensor] = field(default_factory=list)


class Layer:
    """q, k and v of tokens, rotary tables, and the layer's pages."""

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device)

        self.device = device
        self.q, self.k, self.v = (draw(VOCABULARY, heads, HEAD_DIM) for heads in (HEADS, HEADS_KV, HEADS_KV))
        self.embedding = draw(VOCABULARY, HEADS, HEAD_DIM)
        angle = torch.arange(MAX_TOKENS)[:, None] * 10000.0 ** (-torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)
        self.cache = cute_fa.PagedKvCache.empty(NUM_PAGES, PAGE_SIZE, HEADS_KV, HEAD_DIM, device=device)

    def append(self, sequences: list[Sequence], new: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write the next ``new`` tokens of each sequence into its pages: (rotated q (total, heads, head_dim), page
        table, tokens in the pages)."""
        tokens = [token for s, n in zip(sequences, new, strict=True) for token in s.tokens[s.stored : s.stored + n]]
        q, k, v = (table[torch.tensor(tokens, device=self.device)] for table in (self.q, self.k, self.v))
        rows = [s.pages + [0] * (MAX_TOKENS // PAGE_SIZE - len(s.pages)) for s in sequences]
        page_table = torch.tensor(rows, dtype=torch.int32, device=self.device)
        before = torch.tensor([s.stored for s in sequences], dtype=torch.int32, device=self.device)
        offsets = torch.tensor([0, *new]).cumsum(0).to(torch.int32).to(self.device)
        packed = {"cu_seqlens_q": offsets, "cu_seqlens_k_new": offsets}
        longest = {"max_seqlen_q": max(new), "max_seqlen_k_new": max(new)}
        rotary = {"rotary_cos": self.cos, "rotary_sin": self.sin}
        pages = {"page_table": page_table, "cache_seqlens": before}
        q, seqlens = cute_fa.append_kv(k, v, self.cache.k, self.cache.v, q=q, **pages, **packed, **longest, **rotary)
        return q, page_table, seqlens

    def next_token(self, out: torch.Tensor) -> int:
        return int((self.embedding.float() * out.float()).sum((1, 2)).argmax())

    def error(self, s: Sequence) -> tuple[float, float]:
        """How far what the steps gave is from attention over the whole sequence at once, and what is allowed."""
        tokens = torch.tensor(s.tokens[: s.stored], device=self.device)
        k = rotated(self.k[tokens], self.cos, self.sin)
        compared = reference.check(
            torch.cat(s.outs)[None], None, torch.cat(s.queries)[None], k[None], self.v[tokens][None], causal=True
        )
        return compared.out_error, compared.out_allowed


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim), token t by the t-th row of angles."""
    cos, sin = cos[: len(x), None], sin[: len(x), None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Server:
    """A step is a chunk of one prompt, and a token of every sequence whose prompt has been read."""

    def __init__(self, layer: Layer, chunk: int, waiting: list[Sequence]):
        self.layer, self.chunk, self.waiting = layer, chunk, waiting
        self.running: list[Sequence] = []
        self.free = list(range(NUM_PAGES))

    def step(self) -> list[Sequence]:
        """The sequences that are done with it, their pages free again."""
        self._admit()
        reading = [s for s in self.running if s.stored < s.prompt]
        writing = [s for s in self.running if s.stored >= s.prompt]
        if reading:
            self._prefill(reading[0])
        if writing:
            self._decode(writing)
        done = [s for s in self.running if len(s.tokens) == s.length]
        for s in done:
            self.running.remove(s)
            self.free += s.pages
        return done

    def _admit(self) -> None:
        """Begin with those that wait while there are pages for all their tokens."""
        while self.waiting and len(self.running) < MAX_RUNNING:
            needed = -(-self.waiting[0].length // PAGE_SIZE)
            if needed > len(self.free):
                break
            s = self.waiting.pop(0)
            s.pages, self.free = self.free[:needed], self.free[needed:]
            self.running.append(s)

    def _prefill(self, s: Sequence) -> None:
        n = min(self.chunk, s.prompt - s.stored)
        chunk = cute_fa.ChunkLayout(self.chunk, s.stored, -(-s.prompt // self.chunk), s.stored // self.chunk)
        request = self._request([s], [n])
        out, _ = cute_fa.ChunkedPrefillRequest(request, chunk).run()
        self._keep(s, request.q, out)
        if chunk.is_final:
            s.tokens.append(self.layer.next_token(out[-1]))
        print(f"  {s.name}: chunk {chunk.chunk_index + 1} of {chunk.total_chunks}, {request.kernel_name()}")

    def _decode(self, sequences: list[Sequence]) -> None:
        request = self._request(sequences, [1] * len(sequences))
        out, _ = request.run()
        for i, s in enumerate(sequences):
            self._keep(s, request.q[i : i + 1], out[i : i + 1])
            s.tokens.append(self.layer.next_token(out[i]))
        print(f"  {' and '.join(s.name for s in sequences)}: one token, {request.kernel_name()}")

    def _request(self, sequences: list[Sequence], new: list[int]) -> cute_fa.PagedAttentionRequest:
        q, page_table, seqlens = self.layer.append(sequences, new)
        return cute_fa.PagedAttentionRequest(
            q,
            self.layer.cache,
            page_table,
            seqlens,
            mask=cute_fa.MaskKind.CAUSAL,
            cu_seqlens_q=cute_fa.CumulativeSeqlens.from_lengths(new),
        )

    def _keep(self, s: Sequence, q: torch.Tensor, out: torch.Tensor) -> None:
        s.queries.append(q)
        s.outs.append(out)
        s.stored += len(q)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk", type=int, default=32, help="tokens of a chunk of the prefill")
    parser.add_argument("--arch", default="sm_80", help="simulated where there is no GPU")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    layer = Layer("cuda" if on_gpu else "cpu")
    generator = torch.Generator().manual_seed(1)
    waiting = []
    for name, prompt, new in (("A", 40, 3), ("B", 65, 4), ("C", 20, 2)):
        tokens = torch.randint(VOCABULARY, (prompt,), generator=generator).tolist()
        waiting.append(Sequence(name, tokens, prompt, prompt + new))
    server, wrong, step = Server(layer, options.chunk, waiting), [], 0
    with contextlib.nullcontext() if on_gpu else cute_fa.simulate(options.arch):
        while server.waiting or server.running:
            print(f"step {step}")
            for s in server.step():
                error, allowed = layer.error(s)
                print(f"  {s.name} is done: {s.tokens[s.prompt :]}, error {error:.1e}, allowed {allowed:.1e}")
                wrong += [] if error <= allowed else [s.name]
            step += 1
    if wrong or len(server.free) != NUM_PAGES:
        raise SystemExit(f"wrong: {', '.join(wrong) or 'pages are lost'}")


if __name__ == "__main__":
    main()

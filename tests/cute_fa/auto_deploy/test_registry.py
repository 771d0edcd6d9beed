"""Descriptors: what they hand to a transformation of a graph, and a server's steps made of it."""

import dataclasses

import pytest
import torch

import cute_fa
from cute_fa.integrations.auto_deploy import (
    AttentionDescriptor,
    AttentionInfo,
    AttentionRegistry,
    CacheConfig,
    PositionalEmbeddingConfig,
    SequenceInfo,
)
from cute_fa.semantics import reference
from cute_fa.semantics.errors import ArgumentError, PageSizeError, UnsupportedArgumentError
from tests.testing.caches import Rotary

INFO = AttentionInfo(4, 2, 64, torch.bfloat16, pos_embd_config=PositionalEmbeddingConfig("rope", 500.0))
SEQUENCES = {"flattened": (32, 3), "paged": (32, 3, 8)}
# new tokens of the sequences in each step: two contexts; they go on, and a third one begins; all generate
STEPS = ([13, 5], [1, 1, 9], [1, 1, 1], [1, 0, 1])


def test_names():
    assert AttentionRegistry.has("flattened") and AttentionRegistry.has("paged")
    assert not AttentionRegistry.has("other")
    with pytest.raises(ArgumentError, match="'other': one of flattened, paged"):
        AttentionRegistry.get("other")
    with pytest.raises(ArgumentError, match="'paged': the name is taken by PagedAttention"):
        AttentionRegistry.register("paged")(AttentionDescriptor)


def test_register(monkeypatch):
    monkeypatch.setattr(AttentionRegistry, "_registered", dict(AttentionRegistry._registered))

    @AttentionRegistry.register("other")
    class Other(AttentionRegistry.get("flattened")):
        pass

    assert AttentionRegistry.get("other") is Other


@pytest.mark.parametrize("name", list(SEQUENCES))
def test_caches(name):
    """In the order of the operator's arguments, with the cache's own dtype."""
    descriptor = AttentionRegistry.get(name)
    assert descriptor.is_paged() == (name == "paged")
    info = dataclasses.replace(INFO, cache_config=CacheConfig(torch.float16), v_head_dim=32)
    initializers = descriptor.get_cache_initializers(lambda: info)
    sequences = SequenceInfo(*SEQUENCES[name])
    shape = (12, 8, 2) if name == "paged" else (3, 32, 2)
    made = {key: initialize(sequences) for key, initialize in initializers.items()}
    assert {key: tuple(cache.shape) for key, cache in made.items()} == {
        "k_cache": (*shape, 64),
        "v_cache": (*shape, 32),
    }
    assert {cache.dtype for cache in made.values()} == {torch.float16}
    made = [initialize(sequences) for initialize in descriptor.get_cache_initializers(lambda: INFO).values()]
    assert {cache.dtype for cache in made} == {torch.bfloat16} and made[1].shape[-1] == 64
    operator, of_qkv = descriptor.get_attention_op()
    prepare, of_metadata = descriptor.get_prepare_metadata_op()
    arguments = [argument.name for argument in operator.default._schema.arguments]
    assert arguments[of_qkv + of_metadata :] == [*initializers, "freqs_cis", "scale"]
    assert descriptor.get_constants(INFO) == []  # the scale has a default
    assert len(prepare.default._schema.returns) == of_metadata


def test_page_sizes():
    with pytest.raises(PageSizeError, match="page_size=8 for contiguous caches"):
        AttentionRegistry.get("flattened").get_cache_initializers(lambda: INFO)["k_cache"](SequenceInfo(32, 3, 8))
    with pytest.raises(PageSizeError, match="page_size=20: a power of two from 1 to 1024"):
        AttentionRegistry.get("paged").get_cache_initializers(lambda: INFO)["k_cache"](SequenceInfo(32, 3, 20))


def buffers(info: AttentionInfo) -> dict:
    return AttentionRegistry.get("paged").get_global_buffer_initializers(lambda: info)


def test_rotations():
    """cos and sin of position · theta^(−2i/d); one table for layers that agree on them, and no other."""
    [(name, initialize)] = buffers(INFO).items()
    table = initialize(SequenceInfo(32, 3))
    assert table.shape == (32, 32, 2) and table.dtype == torch.float32
    for position, i in ((0, 0), (1, 0), (31, 5), (17, 31)):
        angle = torch.tensor(position * 500.0 ** (-2 * i / 64), dtype=torch.float64)
        torch.testing.assert_close(table[position, i].double(), torch.stack((angle.cos(), angle.sin())))
    assert buffers(dataclasses.replace(INFO, num_heads=8)).keys() == {name}
    positions = (PositionalEmbeddingConfig(), PositionalEmbeddingConfig("rope", 5000.0))
    others = [dataclasses.replace(INFO, pos_embd_config=config) for config in positions]
    others.append(dataclasses.replace(INFO, head_dim=32))
    names = {name, *(key for other in others for key in buffers(other))}
    assert len(names) == 4 and all(key.isidentifier() for key in names)
    assert next(iter(buffers(others[0]).values()))(SequenceInfo(32, 3)).numel() == 0


def test_bad_rotations():
    with pytest.raises(ArgumentError, match="mode='alibi'"):
        PositionalEmbeddingConfig("alibi")
    with pytest.raises(ArgumentError, match="rope_theta=0"):
        PositionalEmbeddingConfig("rope", 0.0)
    with pytest.raises(UnsupportedArgumentError, match="rope_scale=2"):
        PositionalEmbeddingConfig("rope", rope_scale=2.0)


class Conversation:
    """q, k and v of all tokens of a sequence, and how many of them the server has seen."""

    def __init__(self, seed: int, rotary: Rotary):
        rng = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (torch.randn(32, heads, 64, generator=rng).bfloat16() for heads in (4, 2, 2))
        self.q *= 4  # so that few keys count
        self.rotary, self.seen = rotary, 0

    def take(self, tokens: int) -> list[torch.Tensor]:
        rows = slice(self.seen, self.seen + tokens)
        self.seen += tokens
        return [t[rows].flatten(1) for t in (self.q, self.k, self.v)]

    def check(self, out: torch.Tensor, tokens: int) -> None:
        """Attention of the last tokens to all that were seen."""
        positions = torch.arange(self.seen)
        q, k = (self.rotary(t[: self.seen], positions)[None] for t in (self.q, self.k))
        q = q[:, self.seen - tokens :]
        comparison = reference.check(out.view(1, tokens, 4, 64), None, q, k, self.v[None, : self.seen], causal=True)
        assert comparison.ok, comparison


def at_step(sequences: SequenceInfo, name: str, talks: list[Conversation], new: list[int], free: list[int]) -> None:
    """What a server does before a step; pages come from those that are free."""
    sequences.update_pos([talk.seen for talk in talks], reset=True)
    sequences.nest_sequences([[0] * count for count in new])
    held = sequences.page_assignments if talks[0].seen else []
    held += [[] for _ in range(len(new) - len(held))]
    for talk, count, pages in zip(talks, new, held, strict=False):
        needed = -(-(talk.seen + count) // 8) if name == "paged" else 1
        pages += [free.pop() for _ in range(needed - len(pages))]
    sequences.assign_cache_loc(held)


@pytest.mark.parametrize("name", list(SEQUENCES))
def test_steps_of_a_server(name):
    """Everything by the descriptor: contexts, generated tokens and padding, over pages in no order."""
    descriptor = AttentionRegistry.get(name)
    sequences = SequenceInfo(*SEQUENCES[name])
    caches = [make(sequences) for make in descriptor.get_cache_initializers(lambda: INFO).values()]
    for cache in caches:
        cache.fill_(torch.nan)
    made = [make(sequences) for make in descriptor.get_global_buffer_initializers(lambda: INFO).values()]
    talks = [Conversation(seed, Rotary(*made[0].unbind(-1), interleaved=False)) for seed in range(3)]
    free = torch.randperm(sequences.num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    prepare, attend = descriptor.get_prepare_metadata_op()[0], descriptor.get_attention_op()[0]
    for new in STEPS:
        at_step(sequences, name, talks, new, free)
        taken = [talk.take(count) for talk, count in zip(talks, new, strict=False)]
        qkv = [torch.cat(parts).view(*sequences.input_ids.shape, -1) for parts in zip(*taken, strict=True)]
        with cute_fa.simulate("sm_80"):
            metadata = prepare(*sequences.args, sequences.page_size)
            out = attend(*qkv, *metadata, *caches, *made, *descriptor.get_constants(INFO))
        for talk, count, part in zip(talks, new, sequences.unnest_sequences(out), strict=False):
            talk.check(part, count)

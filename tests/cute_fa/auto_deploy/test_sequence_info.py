"""The description of a batch, and the metadata that operators make of it."""

import pickle

import pytest
import torch
from torch import library
from torch._subclasses import FakeTensorMode

from cute_fa.integrations import auto_deploy
from cute_fa.integrations.auto_deploy import SequenceInfo
from cute_fa.semantics.errors import (
    ArgumentError,
    DTypeError,
    EmptyBatchError,
    EmptyCacheError,
    LengthError,
    PageTableError,
    ShapeError,
    ZeroLengthError,
)


def test_after_reset():
    """A generate-only batch without cache history, as after making it."""
    info = SequenceInfo(max_seq_len=20, max_batch_size=3, page_size=8)
    info.nest_sequences([[1, 2, 3], [4]])
    info.update_pos(5)
    info.assign_cache_loc([[8, 2], [3]])
    info.reset()
    assert info.input_ids.tolist() == [[0], [0], [0]]
    assert info.is_generate and info.num_sequences == 3 and info.sequence_lengths == [1, 1, 1]
    assert info.seq_len.tolist() == [1, 1, 1] and info.input_pos.tolist() == [0, 0, 0]
    assert info.pages_per_seq.tolist() == [1, 1, 1] and info.page_assignments == [[0], [1], [2]]
    assert info.cache_loc.tolist()[:3] == [0, 1, 2]
    assert all(tensor.dtype == torch.int32 for tensor in info.args)


@pytest.mark.parametrize(
    ("limits", "pages", "is_paged"),
    [
        ((20, 3), 3, False),  # one place for each sequence
        ((20, 3, 8), 9, True),  # 3 for each; all tokens together would fit into 8
        ((20, 3, 8, 24), 3, True),
        ((20, 3, 8, 33), 5, True),
        ((20, 3, 8, 1), 3, True),  # one for each sequence at least
        ((20, 3, 64), 3, False),
    ],
)
def test_pages(limits, pages, is_paged):
    info = SequenceInfo(*limits)
    assert (info.num_pages, info.is_paged) == (pages, is_paged)
    assert info.page_size == (limits[2] if len(limits) > 2 else 20)
    assert info.max_num_tokens == (limits[3] if len(limits) > 3 else 60)
    info.num_pages = 11
    assert info.num_pages == info.cache_loc.shape[0] == 11
    info.assign_cache_loc([[10]])
    assert info.page_assignments == [[10]]


def test_nest_and_unnest():
    info = SequenceInfo(max_seq_len=8, max_batch_size=4)
    info.nest_sequences([[5, 6, 7], torch.tensor([8]), [], [9, 10]])
    assert info.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]] and not info.is_generate
    assert info.seq_len.tolist() == [3, 1, 0, 2]
    hidden = torch.arange(12.0).view(1, 6, 2)
    parts = info.unnest_sequences(hidden)
    assert [part.tolist() for part in parts] == [hidden[0, :3].tolist(), [[6.0, 7.0]], [], hidden[0, 4:].tolist()]
    info.nest_sequences(torch.tensor([[5], [6]]))
    assert info.input_ids.tolist() == [[5], [6]] and info.is_generate
    assert info.seq_len.tolist() == [1, 1, 0, 0]
    assert [part.tolist() for part in info.unnest_sequences(torch.tensor([[[1.0]], [[2.0]]]))] == [[[1.0]], [[2.0]]]
    with pytest.raises(ShapeError, match=r"t_nested \(1, 2, 1\)"):
        info.unnest_sequences(torch.zeros(1, 2, 1))


def test_addresses_stay():
    """What a CUDA graph has captured is what the next step fills."""
    info = SequenceInfo(max_seq_len=8, max_batch_size=4, page_size=4)
    before = [tensor.data_ptr() for tensor in info.args]
    info.nest_sequences([[5, 6, 7], [8]])
    info.update_pos([3, 1])
    info.assign_cache_loc([[1, 5], [2]])
    info.reset()
    assert [tensor.data_ptr() for tensor in info.args] == before


def test_positions():
    info = SequenceInfo(max_seq_len=8, max_batch_size=3)
    info.update_pos([2, 3], reset=True)
    assert info.input_pos.tolist() == [2, 3, 0]
    info.update_pos(1)
    assert info.input_pos.tolist() == [3, 4, 1]
    info.update_pos(torch.tensor([1, 0, 2]))
    assert info.input_pos.tolist() == [4, 4, 3]
    info.update_pos(0, reset=True)
    assert info.input_pos.tolist() == [0, 0, 0]


def test_assignments():
    info = SequenceInfo(max_seq_len=24, max_batch_size=3, page_size=8)
    info.nest_sequences([[1, 2], [3]])
    info.assign_cache_loc([[7, 0, 4], [], [2]])
    assert info.cache_loc.tolist() == [7, 0, 4, 2, 0, 0, 0, 0, 0]
    assert info.pages_per_seq.tolist() == [3, 0, 1]
    assert info.page_assignments == [[7, 0, 4], []]  # of the sequences that there are
    info.page_assignments[0].append(5)
    assert info.page_assignments[0] == [7, 0, 4]


def test_sync_and_to():
    info, other = SequenceInfo(8, 3, 4), SequenceInfo(8, 3, 4)
    other.nest_sequences([[1, 2], [3]])
    other.update_pos([4, 2])
    other.assign_cache_loc([[5, 1], [2]])
    info.sync(other)
    for ours, theirs in zip(info.args, other.args, strict=True):
        assert ours.tolist() == theirs.tolist() and ours.data_ptr() != theirs.data_ptr()
    assert info.page_assignments == [[5, 1], [2]] and info.sequence_lengths == [2, 1]
    other.nest_sequences([[1], [1], [1]])
    assert info.sequence_lengths == [2, 1]
    with pytest.raises(ArgumentError, match="num_pages=7"):
        other.num_pages = 7
        info.sync(other)
    info.to("meta")
    assert info.device.type == "meta" and all(tensor.is_meta for tensor in info.args)


def test_dynamic_shapes():
    """Of the token numbers alone; a size that is 1 at most is fixed."""
    ids, *others = SequenceInfo(8, 3, 4, 40).dynamic_shapes
    assert {axis: (dim.__name__, dim.max) for axis, dim in ids.items()} == {0: ("batch_size", 3), 1: ("seq_len", 40)}
    assert others == [{}] * 4
    assert list(SequenceInfo(8, 1).dynamic_shapes[0]) == [1]
    info = SequenceInfo(8, 3, 4)
    assert len(info.dynamic_shapes) == len(info.args)
    assert SequenceInfo().dynamic_shapes[0] == {}
    assert pickle.loads(pickle.dumps(SequenceInfo(8, 3))).num_pages == 3


BAD = {
    "max_seq_len": (ZeroLengthError, "max_seq_len=0", lambda info: SequenceInfo(0)),
    "max_batch_size": (EmptyBatchError, "max_batch_size=0", lambda info: SequenceInfo(8, 0)),
    "no sequence": (EmptyBatchError, "0 sequences", lambda info: info.nest_sequences([])),
    "sequences": (LengthError, "4 sequences.*max_batch_size=3", lambda info: info.nest_sequences([[1]] * 4)),
    "long": (LengthError, r"input_ids\[1\] has 9 tokens", lambda info: info.nest_sequences([[1], [1] * 9])),
    "tokens": (LengthError, "14 tokens: at most max_num_tokens=12", lambda info: info.nest_sequences([[1] * 7] * 2)),
    "kind": (DTypeError, r"input_ids\[0\]", lambda info: info.nest_sequences([torch.zeros(2)])),
    "nested": (ShapeError, r"input_ids\[0\] \(1, 2\)", lambda info: info.nest_sequences(torch.ones(1, 1, 2).int())),
    "positions": (LengthError, "4 sequences", lambda info: info.update_pos([1] * 4)),
    "positions' shape": (ShapeError, "one number", lambda info: info.update_pos([[1]])),
    "page": (PageTableError, "page 3: the cache has 3", lambda info: info.assign_cache_loc([[0], [3]])),
    "negative page": (PageTableError, "page -1", lambda info: info.assign_cache_loc([[-1]])),
    "pages": (LengthError, "4 pages: the cache has 3", lambda info: info.assign_cache_loc([[0, 1], [2, 0]])),
    "owners": (LengthError, "4 sequences", lambda info: info.assign_cache_loc([[]] * 4)),
    "no pages": (EmptyCacheError, "num_pages=0", lambda info: setattr(info, "num_pages", 0)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_changes_nothing(bad):
    error, message, act = BAD[bad]
    info = SequenceInfo(max_seq_len=8, max_batch_size=3, page_size=4, max_num_tokens=12)
    info.nest_sequences([[1, 2], [3]])
    info.assign_cache_loc([[2], [1]])
    before = [tensor.tolist() for tensor in info.args], info.page_assignments, info.sequence_lengths
    with pytest.raises(error, match=message):
        act(info)
    assert ([tensor.tolist() for tensor in info.args], info.page_assignments, info.sequence_lengths) == before


def mixed() -> SequenceInfo:
    """Two sequences of a batch for four; of the others stale positions are left."""
    info = SequenceInfo(max_seq_len=24, max_batch_size=4, page_size=8)
    info.update_pos(9)
    info.nest_sequences([[1, 2, 3], [4]])
    info.update_pos([5, 17], reset=True)
    info.assign_cache_loc([[7], [0, 4, 2]])
    return info


def test_metadata():
    info = mixed()
    seq_len, input_pos, cache_loc, seq_start = auto_deploy.prepare_fused_mha_metadata(*info.args, info.page_size)
    assert seq_len.tolist() == [3, 1, 0, 0]
    assert input_pos.tolist() == [5, 17, 0, 0]
    assert cache_loc.tolist() == [7, 0, 4, 2]
    assert seq_start.tolist() == [0, 3, 4, 4]
    assert {t.dtype for t in (seq_len, input_pos, cache_loc, seq_start)} == {torch.int32}


def test_metadata_of_a_generate_only_batch():
    """As many sequences as there are rows, of which those without a length fill up a captured batch."""
    info = mixed()
    ids = torch.zeros(3, 1, dtype=torch.int32)
    info.nest_sequences([[1], [1]])
    args = (ids, *info.args[1:], info.page_size)
    assert [t.tolist() for t in auto_deploy.prepare_fused_mha_metadata(*args)] == [
        [1, 1, 0],
        [5, 17, 0],
        [7, 0, 4],
        [0, 1, 2],
    ]
    input_pos, rows, seq_len, _, page_table, _ = auto_deploy.prepare_paged_mha_metadata(*args)
    assert (input_pos.tolist(), rows.tolist(), seq_len.tolist()) == ([5, 17, 0], [0, 1, 2], [1, 1, 0])
    assert page_table.shape == (3, 12)


def test_metadata_of_one_token_among_empty_sequences():
    """(1, 1) is a generate-only batch of one sequence, too: the one that has the token."""
    info = mixed()
    info.nest_sequences([[], [4], []])
    info.update_pos([5, 17, 0], reset=True)
    info.assign_cache_loc([[7], [0, 4, 2], [9]])
    assert info.input_ids.tolist() == [[4]]
    fused = auto_deploy.prepare_fused_mha_metadata(*info.args, info.page_size)
    assert [t.tolist() for t in fused] == [[1], [17], [0], [0]]
    input_pos, rows, seq_len, seq_start, page_table, _ = auto_deploy.prepare_paged_mha_metadata(*info.args, 8, 24)
    assert [t.tolist() for t in (input_pos, rows, seq_len, seq_start)] == [[17], [0], [1], [0]]
    assert page_table.tolist() == [[0, 4, 2]]


@pytest.mark.parametrize(("shape", "batch"), [((1, 0), 4), ((0, 1), 0)])
def test_metadata_of_no_tokens(shape, batch):
    ids, seq_len, *others = mixed().args
    args = ids.new_zeros(shape), torch.zeros_like(seq_len), *others, 8
    for tensor in auto_deploy.prepare_fused_mha_metadata(*args):
        assert tensor.shape == (batch,)
    *metadata, page_table, longest = auto_deploy.prepare_paged_mha_metadata(*args, 0)
    assert {tensor.shape for tensor in metadata} == {(batch,)}
    assert page_table.shape == (batch, 1) and longest == 8


@pytest.mark.parametrize(("max_seq_len", "width"), [(None, 12), (24, 3), (17, 3), (16, 2), (200, 12)])
def test_paged_metadata(max_seq_len, width):
    info = mixed()
    arguments = (*info.args, info.page_size, max_seq_len)
    input_pos, rows, seq_len, seq_start, page_table, longest = auto_deploy.prepare_paged_mha_metadata(*arguments)
    assert input_pos.tolist() == [5, 17, 0, 0] and rows.tolist() == [0, 1, 2, 3]
    assert seq_len.tolist() == [3, 1, 0, 0] and seq_start.tolist() == [0, 3, 4, 4]
    assert page_table.dtype == torch.int32 and longest == 8 * width
    expected = torch.full((4, 12), -1)
    expected[0, :1], expected[1, :3] = torch.tensor([7]), torch.tensor([0, 4, 2])
    assert page_table.tolist() == expected[:, :width].tolist()


def test_metadata_operators():
    for name in ("prepare_fused_mha_metadata", "prepare_paged_mha_metadata"):
        library.opcheck(getattr(torch.ops.cute_fa, name).default, (*mixed().args, 8))
        with FakeTensorMode() as mode:
            made = getattr(auto_deploy, name)(*map(mode.from_tensor, mixed().args), 8)
        assert [value.shape for value in made[:4]] == [(4,)] * 4


def test_bad_metadata():
    ids, seq_len, input_pos, cache_loc, pages = mixed().args
    with pytest.raises(ShapeError, match=r"seq_len \(4,\): a length for each of 5 sequences"):
        auto_deploy.prepare_fused_mha_metadata(torch.zeros(5, 1).int(), seq_len, input_pos, cache_loc, pages, 8)
    with pytest.raises(ShapeError, match=r"cache_loc \(3,\): a place for each of 4 sequences"):
        auto_deploy.prepare_fused_mha_metadata(ids, seq_len, input_pos, cache_loc[:3], pages, 8)
    with pytest.raises(EmptyCacheError, match="no pages"):
        auto_deploy.prepare_paged_mha_metadata(ids, seq_len, input_pos, cache_loc[:0], pages, 8)

"""LA Flash's interface: steps of its decoder against dense attention, and what its variables do.

V is the identity, so that O holds the probabilities themselves: a key too many has one, a key too few has none.
"""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

import cute_fa
from cute_fa.api import ready_plans
from cute_fa.engine import worlds
from cute_fa.integrations import la_flash
from cute_fa.integrations.la_flash import Settings, plan_attention, range_attention
from cute_fa.semantics.errors import ArgumentError, RangeError, ShapeError
from cute_fa.semantics.ranges import HostRanges
from cute_fa.semantics.types import SmArch
from tests.testing.simulated import unwritten_is_nan

HEADS, HEADS_KV, HEAD_DIM, SCALE = 4, 2, 64, 0.1


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Sets LA_FLASH_NAME=value for names given, as if the process had begun with them; none are set before."""
    names = ("ATTN", "FASTPATH", "SEGMENT_FASTPATH", "DENSE_BACKEND", "PLAN_STATS")

    def start(**values: str) -> None:
        for name in names:
            monkeypatch.delenv(f"LA_FLASH_{name}", raising=False)
        for name, value in values.items():
            monkeypatch.setenv(f"LA_FLASH_{name}", value)
        la_flash.settings.cache_clear()
        la_flash.reset_plan_stats()

    start()
    yield start
    start()


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dictionary(plan: HostRanges, sequences: tuple[list[int], list[int]] | None = None) -> dict:
    """What LA Flash's scheduler makes of a plan: ranges one each, those of the same queries and type as groups too; and
    offsets where it is packed sequences."""
    rows = zip(plan.q_ranges.tolist(), plan.k_ranges.tolist(), plan.types.tolist(), strict=True)
    rows = [(q, kind, k) for q, k, kind in rows]
    groups = [(q, kind, len(list(of))) for (q, kind), of in groupby(rows, lambda row: row[:2])]
    offsets = [sum(count for _, _, count in groups[:g]) for g in range(len(groups) + 1)]
    made = {
        "q_ranges": int32([q for q, _, _ in rows]),
        "k_ranges": int32([k for _, _, k in rows]),
        "attn_type_map": int32([kind for _, kind, _ in rows]),
        "group_q_ranges": int32([q for q, _, _ in groups]),
        "group_attn_type_map": int32([kind for _, kind, _ in groups]),
        "segment_offsets": int32(offsets),
        "max_q_len": max(q[1] - q[0] for q, _, _ in rows),
        "max_k_len": max(k[1] - k[0] for _, _, k in rows),
        "_la_flash_batched": True,
    }
    if sequences is None:
        return made
    names = ("flash_cu_seqlens_q", "flash_cu_seqlens_k")
    return made | dict(zip(names, map(int32, sequences), strict=True)) | {"flash_causal": True}


# Two sequences: a prompt each; a window with the tokens that were decoded last; windows alone; a token each.
PREFILL = ready_plans.causal_documents([20, 20])
STEPS = {
    "prefill": (PREFILL, dictionary(PREFILL, ([0, 20, 40], [0, 20, 40]))),
    "window and new tokens": (step := ready_plans.hybrid_mtp_decode([20, 18], [2, 3], 6), dictionary(step)),
    "windows": (step := ready_plans.hybrid_mtp_decode([22, 23], [0, 0], 6), dictionary(step)),
    "causal windows": (
        step := ready_plans.hybrid_mtp_decode([22, 21], [1, 0], 6, causal_window=True),
        dictionary(step),
    ),
    "tokens": (step := ready_plans.block_diagonal([1, 1], [30, 31]), dictionary(step)),
    "padding without keys": (
        step := HostRanges([[0, 3], [5, 8]], [[0, 30], [31, 50]], [1, 1], 9, 50),
        dictionary(step),
    ),
}
MTP = STEPS["window and new tokens"]


def tensors(plan: HostRanges, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k = torch.randn(plan.total_q, HEADS, HEAD_DIM), torch.randn(plan.total_k, HEADS_KV, HEAD_DIM)
    assert plan.total_k <= HEAD_DIM
    v = torch.eye(plan.total_k, HEAD_DIM)[:, None].expand(-1, HEADS_KV, -1)
    return q.to(dtype), k.to(dtype), v.to(dtype).contiguous()


def dense(plan: HostRanges, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(total_q, heads, head_dim): probabilities of the keys, 0 behind the last."""
    scores = torch.einsum("ihd,jhd->ihj", q.float(), k.float().repeat_interleave(HEADS // HEADS_KV, 1)) * SCALE
    visible = torch.from_numpy(plan.mask())[:, None]
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1).where(visible, 0.0)
    return torch.nn.functional.pad(probabilities, (0, HEAD_DIM - plan.total_k))


def check(found: torch.Tensor, plan: HostRanges, q: torch.Tensor, k: torch.Tensor) -> None:
    expected = dense(plan, q, k)
    assert (found.dtype, found.shape, found.is_contiguous()) == (q.dtype, q.shape, True)
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-2)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("plan", "step"), STEPS.values(), ids=STEPS)
def test_a_step_of_the_decoder(plan, step, arch):
    q, k, v = tensors(plan)
    with cute_fa.simulate(arch) as simulation, unwritten_is_nan():
        found = plan_attention(q, k, v, dict(step), SCALE)
    assert len(simulation.launches) >= 1
    check(found, plan, q, k)


def arguments(step: dict, *names: str) -> dict:
    return {name: step[name] for name in names}


RANGES = ("q_ranges", "k_ranges", "attn_type_map")
GROUPS = ("segment_offsets", "group_q_ranges", "group_attn_type_map")


def test_the_signature_of_kernel_utils():
    """Ranges one each, by position as the decoder gives them; and groups, whose own ranges then do not count."""
    plan, step = MTP
    q, k, v = tensors(plan, torch.float16)
    ranges = [step[name] for name in RANGES]
    with cute_fa.simulate("sm_80"):
        one_each = range_attention(q, k, v, *ranges, SCALE, disjoint_q_ranges=False)
        grouped = range_attention(q, k, v, None, ranges[1], None, SCALE, **arguments(step, *GROUPS))
    check(one_each, plan, q, k)
    assert torch.equal(one_each, grouped)


def test_offsets_of_the_ranges_themselves():
    """A dictionary without groups: segments of each of q_ranges. Beside ranges of one segment they change nothing."""
    plan, step = MTP
    own = {
        "q_ranges": step["group_q_ranges"],
        "k_ranges": step["k_ranges"],
        "segment_offsets": step["segment_offsets"],
        "attn_type_map": step["group_attn_type_map"],
    }
    q, k, v = tensors(plan)
    with cute_fa.simulate("sm_80"):
        check(plan_attention(q, k, v, own, SCALE), plan, q, k)
        one_each = arguments(step, *RANGES, "segment_offsets")
        check(plan_attention(q, k, v, one_each, SCALE), plan, q, k)


def test_a_dictionary_is_built_once():
    plan, step = MTP
    step = dict(step)
    q, k, v = tensors(plan)
    with cute_fa.simulate("sm_80") as simulation:
        first = plan_attention(q, k, v, step, SCALE)
        launches = len(simulation.launches)
        assert torch.equal(plan_attention(q, k, v, step, SCALE), first)
    assert launches == 2 and len(simulation.launches) == 3  # the walk, and attention
    with cute_fa.simulate("sm_80"), pytest.raises(ShapeError, match=rf"the plan is of {plan.total_q} rows"):
        plan_attention(q[1:], k, v, step, SCALE)


def test_which_path_a_plan_takes(variables):
    """Packed sequences are one launch; their ranges two, the walk's and attention's; PyTorch's none."""
    plan, step = STEPS["prefill"]
    q, k, v = tensors(plan)
    for values, launches in (
        ({}, 1),
        ({"FASTPATH": "off"}, 2),
        ({"SEGMENT_FASTPATH": "off"}, 1),
        ({"FASTPATH": "0", "SEGMENT_FASTPATH": "No"}, 0),
        ({"ATTN": "sdpa"}, 0),
        ({"ATTN": " LA_Flash ", "FASTPATH": "force"}, 1),
    ):
        variables(**values)
        with cute_fa.simulate("sm_80") as simulation:
            check(plan_attention(q, k, v, dict(step), SCALE), plan, q, k)
        assert len(simulation.launches) == launches, values


@pytest.mark.parametrize("name", ["window and new tokens", "padding without keys"])
def test_sdpa_needs_no_gpu(variables, name):
    variables(ATTN="sdpa")
    plan, step = STEPS[name]
    q, k, v = tensors(plan)
    check(plan_attention(q, k, v, dict(step), SCALE), plan, q, k)


def test_sdpa_as_other_backends_have_it(variables, monkeypatch):
    """NaN for queries without keys, and a head's queries one behind the other."""

    def attention(q, k, v, mask, *, scale, enable_gqa):
        assert enable_gqa
        k, v = (tensor.repeat_interleave(HEADS // HEADS_KV, 1) for tensor in (k, v))
        scores = (q.float() @ k.float().mT * scale).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1).to(v.dtype) @ v).contiguous()

    variables(ATTN="sdpa")
    monkeypatch.setattr(la_flash, "scaled_dot_product_attention", attention)
    plan, step = STEPS["padding without keys"]
    q, k, v = tensors(plan)
    check(plan_attention(q, k, v, dict(step), SCALE), plan, q, k)


def test_settings_are_read_once(variables, monkeypatch):
    assert la_flash.settings() == Settings("la_flash", True, True, False)
    monkeypatch.setenv("LA_FLASH_ATTN", "sdpa")
    assert la_flash.settings().attention == "la_flash"
    variables(ATTN="sdpa", FASTPATH="false", SEGMENT_FASTPATH="", DENSE_BACKEND="SDPA", PLAN_STATS="1")
    assert la_flash.settings() == Settings("sdpa", False, True, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ATTN": "magi"}, "LA_FLASH_ATTN='magi': la_flash or sdpa"),
        ({"FASTPATH": "of"}, "LA_FLASH_FASTPATH='of': on is one of auto, 1, .* off one of 0, off"),
        ({"SEGMENT_FASTPATH": "2"}, "LA_FLASH_SEGMENT_FASTPATH='2'"),
        ({"DENSE_BACKEND": "la_flash"}, "LA_FLASH_DENSE_BACKEND='la_flash': sdpa alone"),
        ({"PLAN_STATS": "yes"}, "LA_FLASH_PLAN_STATS='yes': must be 0"),
    ],
)
def test_values_that_there_are_not(variables, values, message):
    variables(**values)
    with pytest.raises(ArgumentError, match=message):
        la_flash.settings()


def test_statistics_of_each_call(variables):
    variables(PLAN_STATS="1")
    plan, step = MTP
    q, k, v = tensors(plan)
    prefill, prompts = STEPS["prefill"]
    with cute_fa.simulate("sm_80"):
        for _ in range(2):
            plan_attention(q, k, v, dict(step), SCALE)
        plan_attention(*tensors(prefill), dict(prompts), SCALE)
    # new tokens: 2 and 3, of 22 and 21 keys; windows of 6, with 21 and 20 keys before the hidden one
    area = (21 + 22) + 6 * (21 + 6) + (19 + 20 + 21) + 6 * (20 + 6)
    tokens = (2 + 6 + 6 + 3 + 6 + 6, 22 + 21 + 6 + 21 + 20 + 6)
    expected = ("ranges", 6, *tokens, 6, 22, 4, 2, area, area / (17 * 55))
    of_prompts = ("sequences", 2, 40, 40, 20, 20, 0, 2, 420, 420 / 1600)
    assert la_flash.plan_stats() == [expected, expected, of_prompts]
    assert la_flash.plan_stats()[0].max_k_len == 22
    la_flash.reset_plan_stats()
    assert la_flash.plan_stats() == []


def test_no_statistics_unless_asked_for():
    plan, step = STEPS["tokens"]
    with cute_fa.simulate("sm_80"):
        plan_attention(*tensors(plan), dict(step), SCALE)
    assert la_flash.plan_stats() == []


def test_available_where_kernels_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not la_flash.is_available()
    with cute_fa.simulate("sm_80"):
        assert la_flash.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capability, available in (((9, 0), True), ((7, 0), False)):
        monkeypatch.setattr(worlds, "_gpu", lambda _, found=capability: worlds.Target(SmArch.of_capability(*found), 1))
        assert la_flash.is_available() == available


@pytest.mark.parametrize("at", [0, 3])
def test_errors_are_runtime_errors(at):
    """As LA Flash's are."""
    plan, step = MTP
    ranges = step["k_ranges"].clone()
    ranges[at] = int32([4, 2])
    with cute_fa.simulate("sm_80"), pytest.raises(RuntimeError, match=rf"k_ranges\[{at}\]=\(4, 2\)") as raised:
        plan_attention(*tensors(plan), dict(step) | {"k_ranges": ranges}, SCALE)
    assert isinstance(raised.value, RangeError)


def test_dictionaries_that_lack_something():
    """No types are full ones; no ranges are an error of theirs."""
    plan = ready_plans.block_diagonal([40, 24], [30, 34])
    q, k, v = tensors(plan)
    given = {name: dictionary(plan)[name] for name in ("q_ranges", "k_ranges")}
    with cute_fa.simulate("sm_80"):
        full = plan_attention(q, k, v, given | {"attn_type_map": int32([0, 0])}, SCALE)
        assert torch.equal(plan_attention(q, k, v, dict(given), SCALE), full)
        for name in given:
            left = {other: ranges for other, ranges in given.items() if other != name}
            with pytest.raises(ArgumentError, match=f"{name} is missing"):
                plan_attention(q, k, v, left | {"segment_offsets": int32([0, 1, 2])}, SCALE)

"""The table: which kernel serves what, in whose words the others decline, and what kernels are called."""

import dataclasses

import pytest

from cute_fa.engine.contract import AttentionKernel
from cute_fa.engine.table import TABLE, DispatchKey
from cute_fa.semantics.append_problem import AppendProblem
from cute_fa.semantics.errors import ArgumentError, Fa3ArchError, Fp8Error, UnsupportedKeyError
from cute_fa.semantics.names import canonical_name
from cute_fa.semantics.options import rows_of
from cute_fa.semantics.problem import AttentionProblem
from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from cute_fa.tools.support import to_markdown
from tests.testing.grid import pairwise

KEY = DispatchKey(SmArch.SM_80, DType.BF16, 128)
# Architectures with a forward of their own, and its family; and those with a backward of their own.
OWN = {SmArch.SM_90A: "fa3", SmArch.SM_100A: "fa4", SmArch.SM_103A: "fa4"}
OWN_BACKWARD = {SmArch.SM_90A: "fa3"}


def test_key_fields_and_their_order():
    assert [field.name for field in dataclasses.fields(DispatchKey)] == [
        "arch", "dtype", "head_dim", "causal", "varlen", "sliding_window", "alibi", "sink", "paged", "gqa_ratio",
        "direction", "head_dim_v", "window_right", "softcap", "learnable_sink", "page_size", "splits",
        "dtype_k", "dtype_v", "out_dtype", "ranges", "tree_mask", "seqlen_k_per_split",
    ]  # fmt: skip


def test_equal_keys_are_spelled_once():
    causal = DispatchKey(SmArch.SM_80, DType.BF16, 128, causal=True)
    assert DispatchKey(SmArch.SM_80, DType.BF16, 128, window_right=0) == causal
    assert DispatchKey(SmArch.SM_80, DType.BF16, 128, causal=True, window_right=0) == causal
    assert DispatchKey(SmArch.SM_80, DType.BF16, 128, causal=True, head_dim_v=128) == causal
    assert hash(DispatchKey(SmArch.SM_80, DType.BF16, 128, window_right=0)) == hash(causal)
    with pytest.raises(ArgumentError, match="causal with window_right=5"):
        DispatchKey(SmArch.SM_80, DType.BF16, 128, causal=True, window_right=5)
    with pytest.raises(ArgumentError, match="paged=True with page_size=None"):
        DispatchKey(SmArch.SM_80, DType.BF16, 128, paged=True)


KEYS = {
    "arch": list(SmArch),
    "dtype": [dtype for dtype in DType if dtype is not DType.INT8],  # of k and v alone
    "head_dim": [8, 64, 100, 128, 256, 264],
    "head_dim_v": [None, 128, 300],
    "causal": [False, True],
    "varlen": [False, True],
    "sliding_window": [None, 100],
    "alibi": [False, True],
    "sink": [0, 4],
    "page_size": [None, 64],
    "gqa_ratio": [1, 8],
    "direction": [Direction.FORWARD, Direction.BACKWARD],
    "softcap": [0.0, 30.0],
    "learnable_sink": [False, True],
    "splits": [1, 2],
}


@pytest.mark.parametrize("seed", range(3))
def test_lookup_follows_supports(seed):
    for options in pairwise(KEYS, seed):
        key = DispatchKey(**options, paged=options["page_size"] is not None)
        problem = key.problem()
        assert DispatchKey.of(problem) == key
        explained = TABLE.explain(key)
        assert explained == TABLE.explain(problem)
        serving = [name for name, reasons in explained.items() if not reasons]
        if not serving:
            with pytest.raises((UnsupportedKeyError, Fp8Error)) as caught:
                TABLE.lookup(key)
            for reasons in explained.values():
                assert all(reason in str(caught.value) for reason in reasons)
            continue
        kernel = TABLE.lookup(key)
        assert issubclass(kernel, AttentionKernel)
        assert kernel.supports(problem) == []
        assert kernel is TABLE.lookup(problem)
        assert kernel.direction is key.direction
        assert serving[0].startswith(kernel.family)


@pytest.mark.parametrize("arch", list(SmArch))
def test_every_arch_has_a_forward_and_a_backward(arch):
    key = dataclasses.replace(KEY, arch=arch)
    own = OWN.get(arch, "fa2")
    assert TABLE.lookup(key).family == own
    assert canonical_name(TABLE.lookup(key), key.problem()) == f"{own}_fwd_{arch.short}_bf16_hd128"
    backward = dataclasses.replace(key, direction=Direction.BACKWARD)
    assert TABLE.lookup(backward).family == OWN_BACKWARD.get(arch, "fa2")
    asked = {SmArch.SM_120A: ["fa4_bwd"], **{arch: [f"{family}_bwd"] for arch, family in OWN.items()}}.get(arch, [])
    wide = ["fa3_bwd_split"] if arch is SmArch.SM_90A else []
    assert list(TABLE.explain(backward)) == [*asked, *wide, "fa2_bwd"]
    if arch in OWN and arch not in OWN_BACKWARD:
        with pytest.raises(UnsupportedKeyError, match=f"{own}_bwd: no {own}_sm[0-9]* backward exists yet"):
            TABLE.lookup(backward, own)


def test_reasons_are_the_kernels_own():
    key = dataclasses.replace(KEY, head_dim=100, head_dim_v=None, splits=3)
    reasons = TABLE.explain(key)
    assert reasons["fa2_fwd"] == TABLE.lookup(KEY).supports(key.problem())
    assert {name: len(why) for name, why in reasons.items()} == {"fa2_fwd": 3, "fa2_split": 2}
    with pytest.raises(UnsupportedKeyError) as caught:
        TABLE.lookup(key)
    assert caught.value.key == key
    assert caught.value.reasons == reasons
    assert "fwd_sm80_bf16_hd100_split3" in str(caught.value)
    assert "head_dim 100" in str(caught.value)


def test_choices_that_fa2_cannot_make_are_refused():
    problem = dataclasses.replace(KEY, gqa_ratio=4).problem()
    packed = dataclasses.replace(problem, pack_gqa=True)
    persistent = dataclasses.replace(problem, persistent=PersistentMode.ON)
    assert TABLE.explain(packed) == {
        "fa2_fwd": ["pack_gqa: this kernel's tiles hold the queries of one head"],
        "fa2_split": [],
    }
    assert TABLE.explain(persistent) == {
        "fa2_fwd": ["persistent: this kernel launches one CTA for each tile"],
        "fa2_split": ["persistent: this kernel launches one CTA for each tile"],
    }
    with pytest.raises(UnsupportedKeyError, match="fa2_fwd: persistent: this kernel"):
        TABLE.lookup(persistent)
    one_head = dataclasses.replace(packed, num_heads_kv=packed.num_heads)
    without = dataclasses.replace(problem, pack_gqa=False, persistent=PersistentMode.OFF)
    for served in (one_head, without):
        assert TABLE.lookup(served).family == "fa2"
    # the key stands for the kernel's own choice
    assert DispatchKey.of(packed) == DispatchKey.of(problem)


def test_fp8():
    for arch in SmArch:
        for dtype in (DType.E4M3, DType.E5M2):
            key = DispatchKey(arch, dtype, 128)
            backward = dataclasses.replace(key, direction=Direction.BACKWARD)
            assert TABLE.lookup(key).family == OWN.get(arch, "fa2")
            few = TABLE.choose(key.problem(), None, 132, 0)[1].__name__
            assert few == ("Fa3Decode" if arch is SmArch.SM_90A else "Fa2Split")
            with pytest.raises(Fp8Error, match=rf"{dtype.value} input on {arch.value}.*fa2_bwd: "):
                TABLE.lookup(backward)
    mixed = DispatchKey(SmArch.SM_90A, DType.E4M3, 128, dtype_v=DType.E5M2, out_dtype=DType.FP16)
    for key in (DispatchKey(SmArch.SM_90A, DType.E5M2, 128), mixed):
        for arch, family in OWN.items():
            there = dataclasses.replace(key, arch=arch)
            assert TABLE.lookup(there).family == family and DispatchKey.of(there.problem()) == there
    assert str(mixed) == "fwd_sm90a_e4m3ve5m2_hd128_outfp16"
    caches = DispatchKey(SmArch.SM_90A, DType.BF16, 128, dtype_k=DType.E4M3, dtype_v=DType.E4M3)
    serving = {arch: TABLE.lookup(dataclasses.replace(caches, arch=arch)).__name__ for arch in SmArch}
    assert serving == dict.fromkeys(SmArch, "Fa2Split") | {SmArch.SM_90A: "Fa3Decode"}
    assert TABLE.lookup(caches, family="fa2").__name__ == "Fa2Split"
    with pytest.raises(Fp8Error, match=r"bf16ke4m3ve4m3 input on sm_80.*head_dim 72 in 8 bits: a multiple of 16"):
        TABLE.lookup(dataclasses.replace(caches, arch=SmArch.SM_80, head_dim=72))
    for problem in (caches.problem(), dataclasses.replace(caches, arch=SmArch.SM_80).problem()):
        blocks = dataclasses.replace(problem, k_descale=True, k_block_descale=True)
        with pytest.raises(Fp8Error, match="descales of blocks of keys"):
            TABLE.lookup(blocks)
    # not the dtype alone: the key is refused as a whole
    with pytest.raises(UnsupportedKeyError, match="head_dim 264"):
        TABLE.lookup(DispatchKey(SmArch.SM_80, DType.E4M3, 264))


@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_86, SmArch.SM_89])
def test_fa3_before_sm_90a(arch):
    with pytest.raises(Fa3ArchError, match=f"FA3 kernels on {arch.value}: they need WGMMA"):
        TABLE.lookup(dataclasses.replace(KEY, arch=arch), family="fa3")


def test_families():
    on_hopper = dataclasses.replace(KEY, arch=SmArch.SM_90A)
    assert TABLE.lookup(on_hopper, family="fa2").family == "fa2"
    assert TABLE.lookup(on_hopper, family="fa3") is TABLE.lookup(on_hopper)
    assert list(TABLE.explain(on_hopper)) == ["fa3_fwd", "fa3_decode", "fa2_fwd", "fa2_split"]
    split = dataclasses.replace(on_hopper, splits=2)
    assert TABLE.lookup(split, family="fa3").__name__ == "Fa3Decode"
    with pytest.raises(UnsupportedKeyError, match="fa4_fwd: tcgen05 exists on sm_100a and sm_103a alone; not sm_90a"):
        TABLE.lookup(on_hopper, family="fa4")
    # an FA3 request on Blackwell is one for FA4's kernels, never for FA2's
    for arch in (SmArch.SM_100A, SmArch.SM_103A):
        on_blackwell = dataclasses.replace(KEY, arch=arch)
        for family in (None, "fa3", "fa4"):
            assert TABLE.lookup(on_blackwell, family).__name__ == "Fa4Forward"
        rule = f"WGMMA exists on sm_90a alone; not {arch.value}"
        assert TABLE.explain(on_blackwell, "fa3") == {"fa4_fwd": [], "fa3_fwd": [rule], "fa3_decode": [rule]}
        assert list(TABLE.explain(on_blackwell)) == ["fa4_fwd", "fa2_fwd", "fa2_split"]
        split = dataclasses.replace(on_blackwell, splits=2)
        assert TABLE.lookup(split).__name__ == "Fa2Split"
        with pytest.raises(UnsupportedKeyError, match="fa4_fwd: num_splits 2") as caught:
            TABLE.lookup(split, family="fa3")
        assert caught.value.reasons["fa3_fwd"] == caught.value.reasons["fa3_decode"] == [rule]


def test_blackwell_without_tcgen05():
    """FA2's kernels, and the table says why not FA4's."""
    key = dataclasses.replace(KEY, arch=SmArch.SM_120A)
    rules = [
        f"{rule}; not sm_120a"
        for rule in ("tcgen05 exists on sm_100a and sm_103a alone", "WGMMA exists on sm_90a alone")
    ]
    assert TABLE.explain(key) == {"fa4_fwd": rules[:1], "fa2_fwd": [], "fa2_split": []}
    assert TABLE.lookup(key).__name__ == "Fa2Forward"
    for family, expected in (
        ("fa3", {"fa4_fwd": rules[:1], **dict.fromkeys(("fa3_fwd", "fa3_decode"), rules[1:])}),
        ("fa4", {"fa4_fwd": rules[:1]}),
    ):
        with pytest.raises(UnsupportedKeyError) as caught:
            TABLE.lookup(key, family)
        assert caught.value.reasons == expected


def test_another_family():
    with pytest.raises(ArgumentError, match="family='fa5': one of fa2, fa3, fa4"):
        TABLE.lookup(KEY, family="fa5")


@pytest.mark.parametrize(
    ("arch", "rows", "other"), [(SmArch.SM_90A, 64, "Fa3Decode"), (SmArch.SM_100A, 128, "Fa2Split")], ids=str
)
def test_more_heads_than_a_tile_has_rows_cannot_be_packed(arch, rows, other):
    """But by a kernel whose tiles hold any rows."""
    problem = dataclasses.replace(KEY, arch=arch, gqa_ratio=2 * rows).problem()
    kernel = TABLE.lookup(problem)
    packed = dataclasses.replace(problem, pack_gqa=True)
    explained = TABLE.explain(packed)
    name = f"{OWN[arch]}_fwd"
    assert explained[name] == kernel.supports(packed)
    assert explained[name] == [f"pack_gqa with gqa_ratio {2 * rows}: a warpgroup holds {rows} query heads"]
    assert TABLE.lookup(packed).__name__ == other
    fitting = dataclasses.replace(KEY, arch=arch, gqa_ratio=rows).problem()
    assert TABLE.lookup(dataclasses.replace(fitting, pack_gqa=True)) is kernel


class Picky(AttentionKernel):
    """Stands for a preferred kernel that serves no softcap."""

    family, direction = "fa3", Direction.FORWARD
    configure = arguments = None

    @classmethod
    def supports(cls, problem):
        return ["softcap: not here", "nor there"] if problem.softcap else []


def test_a_kernel_passed_over_gives_its_reason(monkeypatch):
    monkeypatch.setattr("cute_fa.engine.table._load", lambda target: Picky if "Fa3F" in target else AttentionKernel)
    monkeypatch.setattr(AttentionKernel, "supports", classmethod(lambda cls, problem: []))
    cells = {(row.arch, row.direction, row.feature): row for row in TABLE.rows()}
    assert cells["sm_90a", "fwd", "softcap"][3:] == ("fa3_decode", ("fa3_fwd: softcap: not here, nor there",))
    assert cells["sm_90a", "fwd", "causal"][3:] == ("fa3_fwd", ())
    assert cells["sm_80", "fwd", "softcap"][3:] == ("fa2_fwd", ())
    lines = to_markdown(TABLE.rows()).splitlines()
    [note] = [line for line in lines if line.endswith("fa3_fwd: softcap: not here, nor there")]
    [softcap] = [line for line in lines if line.startswith("| softcap |")]
    assert f"| fa3_decode ({note.split('.')[0]}) |" in softcap
    assert TABLE.lookup(dataclasses.replace(KEY, arch=SmArch.SM_90A)) is Picky
    assert TABLE.lookup(dataclasses.replace(KEY, arch=SmArch.SM_90A, softcap=1.0)) is AttentionKernel


def test_rows():
    rows = list(TABLE.rows())
    assert len(rows) == len(SmArch) * (2 * len(rows_of(AttentionProblem)) + len(rows_of(AppendProblem)))
    cells = {(row.arch, row.direction, row.feature): row for row in rows}
    for row in rows:
        preferred = {**OWN, SmArch.SM_120A: "fa4"}.get(SmArch(row.arch), "fa2")
        if row.direction == "append":
            preferred = "fa2"
        assert bool(row.reasons) != (row.kernel == f"{preferred}_{row.direction}")
    assert cells["sm_80", "fwd", "causal"].kernel == "fa2_fwd"
    assert cells["sm_90a", "fwd", "head_dim 256"].kernel == "fa3_fwd"
    assert cells["sm_80", "fwd", "varlen"].kernel == "fa2_fwd"
    for arch in ("sm_100a", "sm_103a"):
        forwards = {row.feature: row.kernel for row in rows if (row.arch, row.direction) == (arch, "fwd")}
        elsewhere = {feature: kernel for feature, kernel in forwards.items() if kernel != "fa4_fwd"}
        of_split = ("split-KV", "paged KV, a page a token", "paged KV, left padding", "tree of draft tokens")
        of_split += ("bf16, k and v e4m3", "bf16, k and v int8", "bf16, k and v e4m3 with descales of rows")
        of_split += ("batch-invariant",)
        assert elsewhere == dict.fromkeys(of_split, "fa2_split") | {"head_dim 512": None}
        # all that Hopper's forward serves, where a kernel of its own serves the rest
        on_hopper = {feature: cells["sm_90a", "fwd", feature].kernel for feature in forwards}
        decoded = dict.fromkeys(of_split, "fa3_decode")
        assert decoded | {"head_dim 512": None} == {
            feature: kernel for feature, kernel in on_hopper.items() if kernel != "fa3_fwd"
        }
    rule = "tcgen05 exists on sm_100a and sm_103a alone; not sm_120a"
    assert cells["sm_120a", "fwd", "varlen"][3:] == ("fa2_fwd", (f"fa4_fwd: {rule}",))
    assert cells["sm_80", "fwd", "paged KV"][3] == "fa2_split"
    assert "page_size 64" in cells["sm_80", "fwd", "paged KV"].reasons[0]
    split = {arch: cells[arch.value, "fwd", "split-KV"].kernel for arch in SmArch}
    assert split == dict.fromkeys(SmArch, "fa2_split") | {SmArch.SM_90A: "fa3_decode"}
    assert cells["sm_90a", "fwd", "paged KV"].kernel == "fa3_fwd"
    assert cells["sm_90a", "fwd", "fp8 with descales"].kernel == "fa3_fwd"
    assert "fa3_fwd: dtype bf16ke4m3ve4m3" in cells["sm_90a", "fwd", "bf16, k and v e4m3"].reasons[0]
    assert "fa2_fwd: dtype e4m3" in cells["sm_80", "fwd", "fp8 e4m3"].reasons[0]
    assert cells["sm_80", "bwd", "causal"][3:] == ("fa2_bwd", ())
    assert cells["sm_90a", "bwd", "causal"][3:] == ("fa3_bwd", ())
    for feature, reason, served in (
        ("head_dim 256", "registers: 320 a thread", "fa3_bwd_split"),
        ("head_dim 192, head_dim_v 128", "registers: 256 a thread", "fa3_bwd_split"),
        ("range plan", "a range plan: this kernel walks over ranges of blocks", "fa2_bwd"),
    ):
        _, _, _, kernel, reasons = cells["sm_90a", "bwd", feature]
        assert kernel == served and reasons[0].startswith(f"fa3_bwd: {reason}")
    assert cells["sm_100a", "bwd", "causal"][3:] == ("fa2_bwd", ("fa4_bwd: no fa4_sm100 backward exists yet",))
    assert "fa2_bwd: dtype e4m3" in cells["sm_80", "bwd", "fp8 e4m3"].reasons[0]
    assert "head_dim 512" in cells["sm_80", "fwd", "head_dim 512"].reasons[0]
    for feature, reason in (("GQA, query heads packed", "pack_gqa: this kernel"), ("persistent", "persistent: this")):
        assert reason in cells["sm_80", "fwd", feature].reasons[0]
        assert cells["sm_90a", "fwd", feature].kernel == "fa3_fwd"
    for feature in ("GQA, query heads packed", "persistent", "split-KV"):
        assert cells["sm_80", "bwd", feature].kernel == "fa2_bwd"
    for feature in ("paged KV by index", "RoPE", "head_dim 256"):
        assert cells["sm_90a", "append", feature].kernel == "fa2_append"
    for feature in ("fp8 e5m2", "bf16, k and v int8", "bf16, k and v e4m3 with descales of rows"):
        assert all(cells[arch.value, "append", feature][3:] == ("fa2_append", ()) for arch in SmArch)
    rule = "head_dim 8: a multiple of 16 from 16 to 256 is needed"
    narrow = AppendProblem(SmArch.SM_80, DType.E4M3, batch=1, tokens_k=1, num_heads_kv=1, head_dim=8, head_dim_v=16)
    assert TABLE.explain(narrow)["fa2_append"] == [f"{rule} (16-byte copies)"]
    assert ("sm_80", "append", "causal") not in cells
    [causal] = [line for line in to_markdown(rows).splitlines() if line.startswith("| causal |")]
    assert causal.endswith("| – |")


class Named:
    def __init__(self, family):
        self.family = family


@pytest.mark.parametrize(
    ("family", "arch", "options", "name"),
    [
        ("fa2", "sm_80", {}, "fa2_fwd_sm80_bf16_hd128"),
        (
            "fa3",
            "sm_90a",
            {"causal": True, "varlen": True, "sliding_window": 4096, "sink": 4, "gqa_ratio": 8},
            "fa3_fwd_sm90a_bf16_hd128_causal_varlen_sw4096_sink4_gqa8",
        ),
        ("fa2", "sm_86", {"dtype": DType.FP16, "head_dim": 192, "head_dim_v": 128}, "fa2_fwd_sm86_fp16_hd192v128"),
        (
            "fa2",
            "sm_120a",
            {"sliding_window": 7, "window_right": 9, "alibi": True, "sink": 2, "softcap": 50.0, "learnable_sink": True},
            "fa2_fwd_sm120a_bf16_hd128_sw7_wr9_alibi_sink2_softcap50_lsink",
        ),
        ("fa2", "sm_80", {"softcap": 0.5, "window_right": 3}, "fa2_fwd_sm80_bf16_hd128_wr3_softcap0p5"),
        ("fa2", "sm_80", {"softcap": 30}, "fa2_fwd_sm80_bf16_hd128_softcap30"),
        ("fa2", "sm_80", {"sliding_window": -1, "window_right": 3}, "fa2_fwd_sm80_bf16_hd128_sw-1_wr3"),
        ("fa2", "sm_80", {"window_right": -1}, "fa2_fwd_sm80_bf16_hd128_wr-1"),
        ("fa2", "sm_80", {"softcap": 1234567.0}, "fa2_fwd_sm80_bf16_hd128_softcap1234567"),
        ("fa2", "sm_80", {"softcap": 50.00000001}, "fa2_fwd_sm80_bf16_hd128_softcap50p00000001"),
        (
            "fa3",
            "sm_90a",
            {"dtype": DType.E4M3, "varlen": True, "paged": True, "page_size": 16, "splits": 4, "gqa_ratio": 4},
            "fa3_fwd_sm90a_e4m3_hd128_varlen_page16_split4_gqa4",
        ),
        (
            "fa4",
            "sm_100a",
            {"dtype": DType.FP16, "head_dim": 192, "head_dim_v": 128, "causal": True, "gqa_ratio": 8},
            "fa4_fwd_sm100a_fp16_hd192v128_causal_gqa8",
        ),
        ("fa2", "sm_103a", {"direction": Direction.BACKWARD, "causal": True}, "fa2_bwd_sm103a_bf16_hd128_causal"),
    ],
)
def test_canonical_names(family, arch, options, name):
    key = DispatchKey(**{"arch": SmArch(arch), "dtype": DType.BF16, "head_dim": 128, **options})
    assert canonical_name(Named(family), key.problem()) == name


def test_names_of_backwards_say_which_gradients():
    key = DispatchKey(SmArch.SM_80, DType.BF16, 64, causal=True, alibi=True, direction=Direction.BACKWARD)
    problem = dataclasses.replace(key.problem(), lse_gradient=True, slopes_gradient=True, deterministic=True)
    assert canonical_name(Named("fa2"), problem) == "fa2_bwd_sm80_bf16_hd64_causal_alibi_dlse_dalibi_det"


def test_names_tell_keys_apart():
    keys = {DispatchKey(**options, paged=options["page_size"] is not None) for options in pairwise(KEYS, 5)}
    assert len({str(key) for key in keys}) == len(keys) > 20

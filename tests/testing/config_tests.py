"""Tests of configs that the forwards on TMA have in common: what names hold, and what is refused."""

import itertools
from typing import ClassVar

import pytest

from cute_fa.semantics.types import DType, PersistentMode
from tests.testing.cases import small_problem
from tests.testing.tiled_forward import Forward

CHANGES = {
    "right": {"window_right": 0},
    "left": {"window_left": 5},
    "softcap": {"softcap": 1.0},
    "alibi": {"alibi": True},
    "lsink": {"learnable_sink": True},
    "cuq": {"varlen_q": True},
    "cuk": {"varlen_k": True},
    "usedq": {"seqused_q": True},
    "usedk": {"seqused_k": True},
    "hd64v32": {"head_dim_v": 32},
    "fp16": {"dtype": DType.FP16},
    "page16": {"page_size": 16},
    "pack2": {"num_heads": 4, "pack_gqa": True},
    "single": {"persistent": PersistentMode.OFF},
}


class ConfigTests:
    """``prefix``: of compile names; ``too_many``: a change of the problem that asks for more query heads in a tile than
    it has rows, and a word of the reason."""

    forward: ClassVar[Forward]
    prefix: ClassVar[str]
    too_many: ClassVar[tuple[dict, str]]

    def problem(self, **changes):
        return small_problem(self.forward.arch, **{"seqlen_q": 4096, "seqlen_k": 4096, **changes})

    def configure(self, **changes):
        return self.forward.kernel.configure(self.problem(**changes))

    def test_compile_name_holds_flags_and_no_values(self):
        names = {
            self.configure(window_left=left, window_right=0, sink_tokens=sink, softcap=cap).compile_name
            for left, sink, cap in ((128, 4, 30.0), (4096, 1, 50.0))
        }
        assert names == {f"{self.prefix}_bf16_hd64_left_right_sink_softcap"}

    @pytest.mark.parametrize("flag", CHANGES)
    def test_each_feature_has_its_own_code(self, flag):
        plain, changed = self.configure(), self.configure(**CHANGES[flag])
        assert plain != changed
        assert flag in changed.compile_name.split("_") and flag not in plain.compile_name.split("_")

    def test_names_of_different_features_differ(self):
        pairs = [
            pair for pair in itertools.combinations(CHANGES, 2) if pair != ("cuk", "page16")
        ]  # which exclude each other
        names = {self.configure(**CHANGES[a], **CHANGES[b]).compile_name for a, b in pairs}
        assert len(names) == len(pairs)

    @pytest.mark.parametrize("change", [{"sink_tokens": 4}, {"persistent": PersistentMode.ON}, {"pack_gqa": False}])
    def test_what_changes_nothing_is_no_new_kernel(self, change):
        """Sink tokens without a left bound, and the kernel's own choices by name."""
        assert self.configure(**change) == self.configure()

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"head_dim": 264, "head_dim_v": 264}, "head_dim 264"),
            ({"head_dim": 12}, "head_dim 12"),
            ({"head_dim_v": 20}, "head_dim_v 20"),
            ({"dtype_k": DType.E4M3, "dtype_v": DType.E5M2}, "bf16ke4m3ve5m2"),
            ({"num_splits": 2}, "num_splits 2"),
            ({"seqlen_k": 2**30}, "1073741823"),
            ({"softcap": 8193.0}, "softcap 8193"),
            ({"page_size": 64, "cache_leftpad": True}, "cache_leftpad with page_size 64"),
            ({"page_size": 4}, "page_size 4: TMA copies of 8 rows and more"),
            ({"batch": 2**15, "num_heads": 128, "num_heads_kv": 128, "seqlen_q": 2**18}, "tiles of queries"),
        ],
    )
    def test_reasons_name_the_value(self, change, word):
        assert self.forward.kernel.supports(self.problem()) == []
        reasons = self.forward.kernel.supports(self.problem(**change))
        assert any(word in reason for reason in reasons), reasons

    def test_more_heads_than_rows(self):
        change, word = self.too_many
        (reason,) = self.forward.kernel.supports(self.problem(**change))
        assert word in reason

"""A hundred problems of the fuzzer, and that it would find something: drawing, shrinking, workers, interruption."""

import itertools
import re
import shlex
from dataclasses import MISSING

import pytest
from click.testing import CliRunner

import fa2_sm80.forward.entry
from cute_fa.engine import attention as engine
from cute_fa.engine import autograd
from cute_fa.engine import plan as plans
from cute_fa.semantics.errors import ArgumentError
from cute_fa.semantics.options import options_of
from cute_fa.semantics.problem import PAGE_SIZES, AttentionProblem
from cute_fa.semantics.types import DType, SmArch
from cute_fa.tools.inputs import InputSpec
from cute_fa.tools.trial import Machine
from fa2_sm80.append.entry import Fa2Append
from tests.testing import planted
from tests.testing.fuzz import __main__ as command
from tests.testing.fuzz.draw import GROUP, draw
from tests.testing.fuzz.execute import WRONG, Failure, failure_of
from tests.testing.fuzz.problem import CALLS, DIFFERENTIATED, PLANS, CacheSpec, Problem, changed
from tests.testing.fuzz.runner import State, examine, find
from tests.testing.fuzz.shrink import shrink, simplifications

SEED = 1
# what a group of problems is drawn for: a call, and whether its result is differentiated
KINDS = [(call, backward) for call in CALLS for backward in ((False, True) if call in DIFFERENTIATED else (False,))]

# half of the problems are drawn with the race detector
pytestmark = pytest.mark.without_races


def first_group(call: str, backward: bool) -> list[Problem]:
    """The first one of its kind: a hundred problems in all."""
    groups = ([draw(SEED, group * GROUP + number) for number in range(GROUP)] for group in itertools.count())
    return next(problems for problems in groups if (problems[0].call, problems[0].backward) == (call, backward))


@pytest.mark.sampled
@pytest.mark.parametrize(("call", "backward"), KINDS, ids=str)
def test_problems(call, backward):
    problems = first_group(call, backward)
    failures = {problem.to_json(): failure_of(problem) for problem in problems}
    failures = {text: failure for text, failure in failures.items() if failure is not None}
    assert not failures, "\n".join(f"{command.COMMAND} {shlex.quote(text)}: {f}" for text, f in failures.items())


class TestDrawing:
    def test_follows_from_seed_and_index_alone(self):
        forwards = [draw(3, index) for index in range(60)]
        assert [draw(3, index) for index in reversed(range(60))] == forwards[::-1]
        assert len(set(forwards)) == 60
        assert not set(forwards) & {draw(4, index) for index in range(60)}

    def test_problems_of_a_group_share_what_shapes_machine_code(self):
        for group in range(20):
            problems = [draw(5, group * GROUP + number) for number in range(GROUP)]
            for shapes in (
                lambda p: (p.call, p.machine.arch, p.backward, p.deterministic, p.pack_gqa, p.persistent),
                lambda p: (p.spec.dtype, p.spec.head_dim, p.spec.head_dim_v, p.spec.page_size, bool(p.spec.softcap)),
                lambda p: (
                    p.spec.varlen_q,
                    p.spec.varlen_k,
                    p.cache.indexed,
                    p.cache.rotary_dim,
                    bool(p.cache.leftpad),
                ),
            ):
                assert len(set(map(shapes, problems))) == 1

    def test_reaches_everything(self):
        """Every call, architecture and option, all of them valid, and as many with the race detector as without."""
        problems = [draw(0, index) for index in range(3200)]
        specs, caches = [p.spec for p in problems], [p.cache for p in problems]
        assert {p.call for p in problems} == set(CALLS)
        assert {p.machine.arch for p in problems} == set(SmArch)
        assert {p.family for p in problems} == {None, "fa2", "fa3", "fa4"}
        assert {s.dtype for s in specs} == set(DType) - {DType.INT8}  # of k and v alone
        assert {code for cache in caches for code in cache.codes or ()} == {"e4m3", "e5m2", "int8"}
        for name in ("dtype_k", "dtype_v"):
            assert {getattr(s, name) for s in specs} == {None, DType.E4M3, DType.E5M2, DType.INT8}
        assert {s.page_size for s in specs} == {None, *PAGE_SIZES}
        assert {s.layout for s in specs} == {"contiguous", "padded", "transposed", "expanded"}
        assert {0, 1, 2} < {p.num_splits for p in problems}
        for name in (
            "softcap",
            "alibi",
            "alibi_per_batch",
            "learnable_sink",
            "sink_tokens",
            "causal",
            "seqused_q",
            "tree",
        ):
            assert {bool(getattr(spec, name)) for spec in specs} == {False, True}, name
        for name in (
            "offsets_k",
            "joined",
            "summed",
            "into",
            "backward",
            "deterministic",
            "lse_gradient",
            "slopes_gradient",
            "heads_first",
        ):
            assert {getattr(problem, name) for problem in problems} == {False, True}, name
        names = "new packed leftpad indexed rotary_dim rotary_starts one_length codes copied one_descale"
        for name in names.split():
            assert {bool(getattr(cache, name)) for cache in caches} == {False, True}, name
        # Every feature that is declared, with and without it.
        asked = [problem for p in problems for problem in p._problems()]
        for name in options_of(AttentionProblem):
            default = AttentionProblem.__dataclass_fields__[name].default
            values = {getattr(problem, name) == default for problem in asked} | {default is MISSING}
            if name in ("dtype_k", "dtype_v", "out_dtype"):  # None only before the problem is made
                values = {getattr(problem, name) is problem.dtype for problem in asked}
            assert len(values) == 2, name
        planned = [p for p in problems if p.call == "range_attention"]
        assert {p.plan for p in planned} == set(PLANS) and {p.segments for p in planned} == {1, 2, 3}
        assert min(p.spec.ranges for p in planned) == 1 and max(p.spec.ranges for p in planned) > 150
        assert {0, 1, 30} == {p.tail for p in problems}
        assert any(0 in p.lengths_q for p in problems) and any(0 in p.lengths_k for p in problems)
        assert 0.45 < sum(p.machine.race for p in problems) / len(problems) < 0.55
        assert all(p.machine.race == p.machine.late == (p.machine.schedule_seed is not None) for p in problems)
        assert all(problem.objection() is None for problem in problems)

    def test_survives_json(self):
        for index in range(0, 400, 7):
            problem = draw(0, index)
            assert Problem.from_json(problem.to_json()) == problem
        for text in ("", "[]", "{}", '{"call": 1, "nonsense": 2}', "null"):
            with pytest.raises(ArgumentError, match="is no problem"):
                Problem.from_json(text)


SM_80 = Machine(SmArch.SM_80, simulated=True)
WINDOWED = Problem(
    "flash_attn_func", SM_80, InputSpec(2, 70, 90, 4, 2, window=(20, 3), learnable_sink=True), into=True, num_splits=1
)


def test_objections():
    """What is no problem, or one that no kernel serves, says why."""
    for changes, objection in (
        ({"varlen_q": True}, "lengths that vary are fixed"),
        ({"heads": 3}, "heads is a multiple of heads_kv"),
        ({"sink_tokens": 2, "window": (None, 3)}, "sink_tokens without a left edge"),
        ({"call": "flash_attn_varlen_func"}, "this call takes lengths"),
        ({"cache": CacheSpec(indexed=True)}, "this call has no cache"),
        ({"head_dim": 264}, "multiple of 8 from 8 to 256"),
        ({"family": "fa3"}, "FA3 kernels on sm_80"),
        ({"persistent": "on"}, "persistent: this kernel"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
    ):
        assert objection in changed(WINDOWED, **changes).objection()
    assert WINDOWED.objection() is None


class TestPlantedFaults:
    @pytest.fixture(autouse=True)
    def fresh_plans(self, monkeypatch):
        """A plan keeps the arguments of its first call."""
        monkeypatch.setattr(plans, "PLANS", {})

    def test_a_window_too_wide_is_found_and_shrunk(self, monkeypatch):
        """The kernel is given a left bound that is one too large."""
        right = fa2_sm80.forward.entry.common_arguments

        def wide(problem, tensors):
            arguments = right(problem, tensors)
            left = arguments.window.left
            return arguments._replace(window=arguments.window._replace(left=None if left is None else left + 1))

        assert failure_of(WINDOWED) is None
        plans.PLANS.clear()
        monkeypatch.setattr(fa2_sm80.forward.entry, "common_arguments", wide)
        failure = failure_of(WINDOWED)
        assert failure.kind == WRONG and re.search(r"out: error \d\S*, allowed 0\.\d+", failure.message)
        shrunk = shrink(WINDOWED, lambda p: getattr(failure_of(p), "kind", None) == WRONG, most_trials=25)
        assert (shrunk.spec.batch, shrunk.spec.heads, shrunk.spec.heads_kv) == (1, 1, 1)
        assert shrunk.spec.window[0] is not None and shrunk.spec.seqlen_q < 10
        assert failure_of(shrunk).kind == WRONG

    @pytest.mark.sampled
    @pytest.mark.parametrize(("call", "backward"), KINDS, ids=str)
    def test_every_call_is_compared(self, monkeypatch, call, backward):
        """A one too many in what a call writes is noticed: in O, dK or V's new rows."""

        def attention(*arguments):
            out, lse = right_attention(*arguments)
            return out.add_(1.0), lse

        def gradients(*arguments):
            grads = right_gradients(*arguments)
            grads.dk.add_(1.0)
            return grads

        def append(*arguments):
            launch = right_append(*arguments)
            return launch._replace(v=(launch.v.float() + 1.0).to(launch.v.dtype))

        right_attention, right_gradients = engine._run, autograd._run
        right_append = Fa2Append.arguments
        problems = (p for p in first_group(call, backward) if min(*p.lengths_q, *p.lengths_k, *(p.cache.new or (1,))))
        problem = next(problems)
        if backward or call == "Fa2BwdRequest":
            monkeypatch.setattr(autograd, "_run", gradients)
        elif call == "append_kv":
            monkeypatch.setattr(Fa2Append, "arguments", append)
        else:
            monkeypatch.setattr(engine, "_run", attention)
        assert failure_of(problem).kind == WRONG

    def test_an_error_for_what_the_table_serves_is_found(self, monkeypatch):
        def refuse(problem, tensors):
            raise ArgumentError("no")

        monkeypatch.setattr(fa2_sm80.forward.entry, "common_arguments", refuse)
        failure = failure_of(WINDOWED)
        assert failure.kind == "ArgumentError" and failure.message.startswith("no\nin entry.py:")

    def test_shrinking_drops_what_does_not_matter(self):
        problems = [draw(SEED, index) for index in range(0, 1600, GROUP)]
        failing = [p for p in problems if planted.capped_queries_fail(p)]
        assert len({p.call for p in failing}) > 5
        for problem in failing[::5]:
            found = examine(problem, planted.capped_queries_fail)
            spec = found.shrunk.spec
            assert max(found.shrunk.lengths_q) == 6 and found.message == "6 queries"
            assert spec.softcap and spec.batch == spec.heads == 1 and not spec.learnable_sink and not spec.alibi
            assert spec.window == (None, None) and not spec.causal and spec.layout == "contiguous"
            assert not found.shrunk.machine.race and found.shrunk.objection() is None

    def test_simplifications_are_problems(self):
        for index in range(0, 200, 11):
            problem = draw(SEED, index)
            simpler = list(simplifications(problem))
            assert problem not in simpler and all(p.objection() is None for p in simpler)


class TestRuns:
    def test_workers_answer_every_problem_and_outlive_a_death(self):
        indices = [*range(8), *range(80, 83)]  # two processes
        answers = list(find(SEED, indices, 2, planted.fifth_kills))
        found = {index: found for index, found in answers if found is not None}
        assert sorted(index for index, _ in answers) == indices and list(found) == [5]
        assert found[5].failure == Failure("process died", "the process ended with signal 11")
        assert found[5].shrunk == draw(SEED, 5)

    def test_goes_on_after_an_interruption(self, tmp_path, monkeypatch):
        path = tmp_path / "state.jsonl"
        first = State(path, SEED)
        failing = next(i for i in range(100) if planted.capped_queries_fail(draw(SEED, i)))
        found = examine(draw(SEED, failing), planted.capped_queries_fail)
        first.add(failing, found)
        first.add(failing + 1, None)
        path.write_text(path.read_text() + '{"seed": 1, "ind')  # cut short
        second = State(path, SEED)
        assert second.done == {failing: found, failing + 1: None}
        second.add(failing + 2, None)
        assert State(path, SEED).done == {**second.done, failing + 2: None}
        assert State(path, SEED + 1).done == {}
        monkeypatch.setattr("tests.testing.fuzz.runner.source_hash", lambda: "other")
        assert State(path, SEED).done == {}

    def test_command(self, tmp_path, monkeypatch):
        """Prints calls that reproduce what failed, and does not run again what is done."""
        asked = []

        def find_here(seed, indices, jobs):
            for index in sorted(indices):
                asked.append(index)
                yield index, examine(draw(seed, index), planted.capped_queries_fail)

        monkeypatch.setattr(command, "find", find_here)
        options = ["--seed", "12", "--state", str(tmp_path / "state.jsonl")]
        failing = [i for i in range(30) if planted.capped_queries_fail(draw(12, i))]
        assert failing
        outputs = []
        for problems in (20, 30, 30):
            result = CliRunner().invoke(command.main, [*options, "--problems", str(problems)])
            assert result.exit_code == 1
            outputs.append(result.output)
        assert asked == list(range(30))
        assert f"30 problems of seed 12, {len(failing)} failed: {WRONG} {len(failing)}" in outputs[2]
        for index in failing:
            assert f"12:{index} fails: {WRONG}" in outputs[2]
            assert f"python -m tests.testing.fuzz --only 12:{index}\n" in outputs[2]
        shrunk = [shlex.split(line)[-1] for line in outputs[2].splitlines() if "--only '" in line]
        assert len(shrunk) == len(failing)
        assert all(max(Problem.from_json(text).lengths_q) == 6 for text in shrunk)

    def test_one_problem(self):
        small = changed(WINDOWED, batch=1, heads=1, heads_kv=1, seqlen_q=3, seqlen_k=5)
        result = CliRunner().invoke(command.main, ["--only", small.to_json()])
        assert (result.exit_code, result.output) == (0, f"{small.to_json()}\nright\n")
        assert command.problem_named("1:4") == draw(1, 4)
        refused = CliRunner().invoke(command.main, ["--only", changed(small, family="fa3").to_json()])
        assert refused.exit_code == 2 and "not a problem: FA3 kernels on sm_80" in refused.output

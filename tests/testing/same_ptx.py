"""Proof that a change of host code changed no kernel: ``python tests/testing/same_ptx.py A B``, two checkouts' folders.

The same calls of public functions are made in both: the fixed ones below, and the first problem of each of as many
groups of ``tests.testing.fuzz``. Each checkout compiles into a cache folder of its own, which stays, so that an
interrupted run goes on and a checkout that did not change is not compiled again. Then the PTX of all kernels
that the calls asked for is compared as multisets, without comments and with each entry's name, which modules, classes
and argument tuples shape, replaced by its number. The exit code is 0 only if the multisets are equal. With one folder,
that checkout is compiled and nothing is compared.

Launches are idle: nothing runs, and results are ignored. ``flash_attn_with_kvcache`` with new keys is simulated in
earnest, since the attention checks the lengths that the append has written.

Processes in the checkouts run this file too. There it imports what a restructuring leaves in place: ``cute_fa``'s
public names, and the fuzzer.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import platformdirs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    import ptxsim
    from tests.testing.fuzz.problem import Problem

WORKER = "--worker"
SHARE = 20  # calls of one process, which keeps every kernel that it has loaded
SHOWN = 10  # calls that are named, of those whose kernels differ
CANDIDATES = 5  # kernels of A of which the closest one of B is looked for
DIFF_LINES = 40


# ---- the calls -------------------------------------------------------------------------------------------------------


class Fixed(NamedTuple):
    """A call written out here: ``function`` is a key of ``_FIXED``, ``options`` its arguments."""

    function: str
    arch: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.function, self.arch, *(f"{name}={value}" for name, value in self.options.items())])

    def make(self) -> Made:
        import cute_fa

        with cute_fa.simulate(self.arch) as simulation:
            function, given = _FIXED[self.function](simulation, **self.options)
        return Made(str(self), function, str(self), given_names(given), [])


class Drawn(NamedTuple):
    """The first problem of a group of the fuzzer's."""

    seed: int
    group: int

    def make(self) -> Made:
        from tests.testing.fuzz import execute
        from tests.testing.fuzz.draw import GROUP, draw

        index = self.group * GROUP
        problem = draw(self.seed, index)
        if not hasattr(execute, "_simulated"):
            raise AttributeError("tests.testing.fuzz.execute has no _simulated, in the place of which problems end")
        execute._simulated = _simulated_and_done
        try:
            execute.wrong_numbers(problem)
        except _DoneError:
            name = f"{problem.call} {problem.machine.arch.value}, problem {self.seed}:{index} of the fuzzer's"
            return Made(name, problem.call, problem.to_json(), given_names(_given(problem)), [])
        raise AssertionError(f"{problem.to_json()} was not simulated")


class Made(NamedTuple):
    """A call that was made: the public ``function`` with a ``problem``, what it was ``given`` beside plain tensors, and
    which entries of the compile cache were looked up for the first time."""

    name: str
    function: str
    problem: str
    given: list[str]
    kernels: list[str]


class _DoneError(Exception):
    """Ends a problem of the fuzzer's before its results are compared."""


@contextmanager
def _simulated_and_done(problem: Problem) -> Iterator[None]:
    """In the place of the fuzzer's own simulation, whose results are looked at behind it."""
    machine = replace(problem.machine, race=False, late=False, schedule_seed=None)
    in_earnest = problem.call == "flash_attn_with_kvcache" and problem.cache.new is not None
    with machine.simulate() as simulation, nullcontext() if in_earnest else simulation.idle():
        yield
    raise _DoneError


def _given(problem: Problem) -> dict[str, Any]:
    """What counts as given in a problem of the fuzzer's, by the arguments' names."""
    spec, cache = problem.spec, problem.cache
    backward = problem.backward or problem.call == "Fa2BwdRequest"
    return {
        "causal": spec.causal,
        "window_size": any(bound not in (None, -1) for bound in spec.window),
        "sink_tokens": spec.sink_tokens > 0,
        "softcap": spec.softcap > 0.0,
        "alibi_slopes": spec.alibi or spec.alibi_per_batch,
        "learnable_sink": spec.learnable_sink,
        "cu_seqlens_q": spec.varlen_q,
        "cu_seqlens_k": spec.varlen_k,
        "seqused_q": spec.seqused_q,
        "seqused_k": spec.seqused_k,
        "page_table": spec.page_size is not None,
        "cache_batch_idx": cache.indexed,
        "cache_leftpad": cache.leftpad is not None,
        "k": cache.new is not None,
        "cu_seqlens_k_new": cache.new is not None and cache.packed,
        "rotary_cos": cache.rotary_dim > 0,
        "rotary_seqlens": cache.rotary_starts is not None,
        "num_splits": problem.num_splits,
        "backward": backward,
        "deterministic": problem.deterministic,
        "LSE's gradient": backward and problem.lse_gradient,
        "slopes' gradient": problem.slopes_gradient,
    }


def given_names(given: dict[str, Any]) -> list[str]:
    """Names of what differs from its default."""
    splits = {0: ["num_splits=0"], 1: []}.get(given.get("num_splits", 1), ["num_splits>1"])
    return [n for n, value in given.items() if n != "num_splits" and value is not None and value is not False] + splits


# Those of the kernels' static figures, each option alone and each kind of lengths, forward and backward; caches.
ARCHS = ("sm_80", "sm_90a")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": (128, 64)},
    "sink": {"window_size": (128, 0), "sink_tokens": 4},
    "alibi": {"alibi_slopes": (8,)},
    "alibi_per_batch": {"alibi_slopes": (2, 8)},
    "softcap": {"softcap": 30.0},
    "learnable_sink": {"learnable_sink": (8,)},
    "pack_gqa": {"pack_gqa": True},
    "single": {"persistent": "off"},
}
PLACES = ("contiguous", "indexed", "padded", "paged")


def fixed_calls() -> list[Fixed]:
    both, backwards = (False, True), ("atomic", "deterministic")
    options = ("plain", *[name for name in FEATURES if name not in ("plain", "pack_gqa", "single")])
    turned = ("none", "halves", "neighbours")
    return [
        *_grid("attention", head_dim=(64, 128, 256), causal=both, backward=backwards),
        *_grid("attention", head_dim=(128,), causal=(True,), lengths=("packed", "used", "both"), backward=backwards),
        *_grid("attention", head_dim=(64,), lengths=("packed", "used", "both"), backward=("atomic",)),
        *_grid("attention", head_dim=(64, 128), causal=(True,), lengths=("paged",), page_size=(16, 128)),
        *_grid("attention", head_dim=(128,), feature=options[1:], backward=("atomic",)),
        *_grid("attention", head_dim=(64,), feature=options, backward=("deterministic",), lse_gradient=(True,)),
        *_grid("attention", head_dim=(64, 128), feature=("pack_gqa", "single")),
        *_grid("decode", place=PLACES, num_splits=(0, 1, 4)),
        *_grid("decode", place=PLACES, rotary=turned, new=(True,)),
        *_grid("append", place=("contiguous", "indexed", "paged"), rotary=turned, packed=both),
        *_grid("rows", place=("contiguous", "paged", "listed")),
    ]


def _grid(function: str, **levels: tuple) -> list[Fixed]:
    """On each architecture, with each combination of these options."""
    combinations = itertools.product(*levels.values())
    return [Fixed(function, arch, dict(zip(levels, c, strict=True))) for c in combinations for arch in ARCHS]


def _attention(
    simulation: ptxsim.Simulation,
    head_dim: int,
    causal: bool = False,
    feature: str = "plain",
    lengths: str = "dense",
    page_size: int = 0,
    backward: str = "",
    lse_gradient: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Two sequences of 512 rows and 8 heads in bf16, or packed into 512 rows."""
    import torch

    import cute_fa

    options: dict[str, Any] = dict(FEATURES[feature])
    heads_kv = 2 if feature == "pack_gqa" else 8
    rows = (512,) if lengths in ("packed", "both") else (2, 512)
    q, k, v = (torch.zeros(*rows, heads, head_dim, dtype=torch.bfloat16) for heads in (8, heads_kv, heads_kv))
    variables = [q, k, v]
    for name in {"alibi_slopes", "learnable_sink"} & set(options):
        options[name] = torch.full(options[name], 0.5)
        variables.append(options[name])
    if lengths != "dense":
        options |= {"cu_seqlens_q": None, "cu_seqlens_k": None}
    if lengths in ("packed", "both"):
        options |= {"cu_seqlens_q": _int32([0, 200, 512]), "cu_seqlens_k": _int32([0, 300, 512])}
    if lengths in ("used", "both"):
        options |= {"seqused_q": _int32([100, 200]), "seqused_k": _int32([200, 100])}
    if lengths == "paged":
        k, v = (t.reshape(-1, page_size, heads_kv, head_dim) for t in (k, v))
        options |= {"page_table": _int32(range(len(k))).view(2, -1), "seqused_k": _int32([300, 500])}
    options |= {"causal": causal, "deterministic": backward == "deterministic"}
    name = "flash_attn_func" if lengths == "dense" else "flash_attn_varlen_func"
    longest = {} if lengths == "dense" else {"max_seqlen_q": 512, "max_seqlen_k": 512}
    for tensor in variables:
        tensor.requires_grad_(bool(backward))
    with simulation.idle():
        results = getattr(cute_fa, name)(q, k, v, **longest, **options, return_lse=True)[: 1 + lse_gradient]
        if backward:
            torch.autograd.grad(results, variables, [torch.ones_like(result) for result in results])
    slopes = bool(backward) and "alibi_slopes" in options
    return name, {**options, "backward": bool(backward), "LSE's gradient": lse_gradient, "slopes' gradient": slopes}


def _int32(values: Iterable[int]) -> torch.Tensor:
    import torch

    return torch.tensor(list(values), dtype=torch.int32)


def _cache(place: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(keys, values, where they lie) of two sequences with room for 512 rows, 2 heads of 128 in bf16."""
    import torch

    shape = (8, 128, 2, 128) if place in ("paged", "listed") else (2, 512, 2, 128)
    where = {
        "contiguous": {},
        "indexed": {"cache_batch_idx": _int32([1, 0])},
        "padded": {"cache_leftpad": _int32([3, 0])},
        "paged": {"page_table": _int32(range(8)).view(2, 4)},
        "listed": {"page_indices": _int32(range(8)), "page_indptr": _int32([0, 4, 8])},
    }
    return torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16), where[place]


def _rotary(rotary: str) -> dict[str, Any]:
    """Pairs of neighbours count from positions of their own."""
    import torch

    if rotary == "none":
        return {}
    tables = {"rotary_cos": torch.ones(512, 32), "rotary_sin": torch.zeros(512, 32)}
    if rotary == "halves":
        return tables | {"rotary_interleaved": False}
    return tables | {"rotary_interleaved": True, "rotary_seqlens": _int32([5, 7])}


def _decode(
    simulation: ptxsim.Simulation, place: str, num_splits: int = 1, rotary: str = "none", new: bool = False
) -> tuple[str, dict[str, Any]]:
    """One query of 8 heads a sequence."""
    import torch

    import cute_fa

    k_cache, v_cache, options = _cache(place)
    options |= {"cache_seqlens": _int32([100, 300]), "num_splits": num_splits, **_rotary(rotary)}
    if new:
        options |= {name: torch.zeros(2, 1, 2, 128, dtype=torch.bfloat16) for name in ("k", "v")}
    q = torch.zeros(2, 1, 8, 128, dtype=torch.bfloat16)
    with nullcontext() if new else simulation.idle():
        cute_fa.flash_attn_with_kvcache(q, k_cache, v_cache, **options)
    return "flash_attn_with_kvcache", options


def _append(simulation: ptxsim.Simulation, place: str, rotary: str, packed: bool) -> tuple[str, dict[str, Any]]:
    """Two rows a sequence, of which with packed ones the queries too are packed."""
    import torch

    import cute_fa

    k_cache, v_cache, options = _cache(place)
    rows = (4,) if packed else (2, 2)
    options |= {"q": torch.zeros(*rows, 8, 128, dtype=torch.bfloat16), **_rotary(rotary)}
    if packed:
        options |= {name: _int32([0, 1, 4]) for name in ("cu_seqlens_q", "cu_seqlens_k_new")}
    else:
        options |= {name: _int32([1, 2]) for name in ("seqused_q", "seqused_k_new")}
    k, v = (torch.zeros(*rows, 2, 128, dtype=torch.bfloat16) for _ in "kv")
    with simulation.idle():
        cute_fa.append_kv(k, v, k_cache, v_cache, _int32([100, 300]), **options)
    return "append_kv", options


def _rows(simulation: ptxsim.Simulation, place: str) -> tuple[str, dict[str, Any]]:
    import torch

    import cute_fa

    k_cache, v_cache, options = _cache(place)
    k, v = (torch.zeros(3, 2, 128, dtype=torch.bfloat16) for _ in "kv")
    with simulation.idle():
        cute_fa.append_rows(k, v, k_cache, v_cache, _int32([1, 0, 1]), _int32([7, 300, 8]), **options)
    return "append_rows", options


_FIXED: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "attention": _attention,
    "decode": _decode,
    "append": _append,
    "rows": _rows,
}


class Plan(NamedTuple):
    """Which calls are made: ``problems`` of the fuzzer's of a seed, behind the fixed ones if they are wanted."""

    seed: int
    problems: int
    fixed: bool = True

    def calls(self) -> list[Fixed | Drawn]:
        return [*(fixed_calls() if self.fixed else ()), *(Drawn(self.seed, group) for group in range(self.problems))]


# ---- in a checkout ---------------------------------------------------------------------------------------------------


def work(plan: Plan, start: int) -> None:
    """Make some of the calls in the checkout that is the current folder; writes each as a line of JSON."""
    results, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is not a result
    sys.path[0] = os.getcwd()  # instead of this file's folder
    import torch

    import cute_fa
    from tests.testing.fuzz import draw

    for module in (cute_fa, draw):
        if not Path(module.__file__).is_relative_to(Path.cwd()):
            raise ImportError(f"{module.__name__} is {module.__file__}, outside of the checkout")
    torch.set_num_threads(1)
    looked_up = _looked_up(Path(os.environ["CUTE_FA_CACHE_DIR"], "kernels"))
    for call in plan.calls()[start : start + SHARE]:
        looked_up.clear()
        made = call.make()._replace(kernels=list(looked_up))
        print(json.dumps(made), file=results, flush=True)


def _looked_up(folder: Path) -> dict[str, None]:
    """Names of entries of the compile cache, from now on, as this process opens them: whichever module does it."""
    names: dict[str, None] = {}
    entry = re.compile(re.escape(f"{folder}/") + "([0-9a-f]{32})")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            found = entry.fullmatch(os.fspath(arguments[0]))
            if found:
                names[found[1]] = None

    sys.addaudithook(hook)
    return names


# ---- comparing -------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """``call``: the first one that asked for it; ``ptx``: as :func:`normalized` leaves it."""

    call: str
    ptx: str


def normalized(ptx: str) -> str:
    """Without comments, empty lines and source lines, each entry's name replaced by its number in names that are
    derived from it too."""
    lines = (re.sub("//.*", "", line).rstrip() for line in ptx.splitlines())
    text = "\n".join(line for line in lines if line and not re.match(r"\s*\.(file|loc)\b", line))
    names = re.findall(r"\.entry\s+([\w$]+)", text)
    numbers = {name: f"entry{number}" for number, name in enumerate(names)}
    longest_first = sorted(map(re.escape, numbers), key=len, reverse=True)  # one may begin with another
    return re.sub("|".join(longest_first), lambda name: numbers[name[0]], text) if names else text


def missing(kernels: list[Kernel], others: list[Kernel]) -> list[Kernel]:
    """Those that the others lack, as multisets of PTX."""
    left = Counter(kernel.ptx for kernel in others)
    lacking = []
    for kernel in kernels:
        if left[kernel.ptx]:
            left[kernel.ptx] -= 1
        else:
            lacking.append(kernel)
    return lacking


def closest(first: list[Kernel], second: list[Kernel]) -> tuple[Kernel, Kernel]:
    """A kernel of each, with as few lines as possible that the other lacks; of ``first`` only a few are tried."""
    lines = [Counter(kernel.ptx.splitlines()) for kernel in second]

    def distance(pair: tuple[Kernel, int]) -> int:
        ours, theirs = Counter(pair[0].ptx.splitlines()), lines[pair[1]]
        return (ours - theirs).total() + (theirs - ours).total()

    kernel, index = min(itertools.product(first[:CANDIDATES], range(len(second))), key=distance)
    return kernel, second[index]


def report(a: list[Kernel], b: list[Kernel]) -> list[str]:
    """Lines that say what differs; none if the multisets are equal."""
    only_a, only_b = missing(a, b), missing(b, a)
    lines = []
    for side, kernels in (("A", only_a), ("B", only_b)):
        if kernels:
            lines.append(f"{len(kernels)} kernels of {side} alone, first asked for by:")
            lines += [f"  {kernel.call}" for kernel in kernels[:SHOWN]]
            lines += ["  …"] * (len(kernels) > SHOWN)
    if only_a and only_b:
        first, second = closest(only_a, only_b)
        labels = f"A: {first.call}", f"B: {second.call}"
        diff = difflib.unified_diff(first.ptx.splitlines(), second.ptx.splitlines(), *labels, n=2, lineterm="")
        shown = list(itertools.islice(diff, DIFF_LINES + 1))
        lines += ["the closest two:", *shown[:DIFF_LINES], *["…"] * (len(shown) > DIFF_LINES)]
    return lines


# ---- both checkouts --------------------------------------------------------------------------------------------------


def hash_of(words: str, checkout: Path, folders: Iterable[Path]) -> str:
    """Of some words and the Python files in folders of a checkout."""
    digest = hashlib.sha256(f"{words}\n".encode())
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(f"{path.relative_to(checkout)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder(checkout: Path, chosen: Path | None) -> Path:
    """The cache of one state of a checkout's kernels; raises UsageError if the chosen one was filled by another."""
    state = hash_of(str(checkout), checkout, [checkout / "cute_fa", *checkout.glob("fa[0-9]_*")])
    default = Path(platformdirs.user_cache_dir("cute_fa", appauthor=False), "same_ptx", state)
    folder = (chosen or default).expanduser().resolve()
    note = folder / "sources"
    filled = folder.exists() and any(folder.iterdir())
    if filled and not (note.exists() and note.read_text() == state):
        raise click.UsageError(f"{folder} does not hold kernels of {checkout} as it is now: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(state)
    return folder


def make_calls(checkout: Path, folder: Path, plan: Plan, jobs: int) -> list[Made]:
    """Make all calls in a checkout, in ``jobs`` processes at a time; raises ClickException if one fails. What came of
    them is kept beside the kernels."""
    total = len(plan.calls())
    state = hash_of(f"{plan} {Path(__file__).read_text()}", checkout, [checkout / "tests" / "testing"])
    kept = folder / f"calls-{state}.json"
    if kept.exists():
        return [Made(*fields) for fields in json.loads(kept.read_text())]
    environment = os.environ | {"CUTE_FA_CACHE_DIR": str(folder), "CUTE_FA_CACHE": "1", "OMP_NUM_THREADS": "1"}

    def share(start: int) -> list[Made]:
        numbers = (str(int(number)) for number in (*plan, start))
        command = [sys.executable, "-W", "ignore", __file__, WORKER, *numbers]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        made = [Made(*json.loads(line)) for line in done.stdout.splitlines()]
        if done.returncode:
            call = plan.calls()[start + len(made)]
            failed = f"{checkout}: {call} failed, exit code {done.returncode}"
            raise click.ClickException(f"{failed}:\n{done.stderr[-4000:]}")
        return made

    calls: list[Made] = []
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        for made in pool.map(share, range(0, total, SHARE)):
            calls += made
            click.echo(f"{checkout}: {len(calls)} of {total} calls, {time.monotonic() - started:.0f} s", err=True)
    kept.write_text(json.dumps(calls))
    return calls


def read_kernels(calls: list[Made], folder: Path) -> list[Kernel]:
    """Each kernel that the calls asked for, once, in their order."""
    first: dict[str, str] = {}
    for call in calls:
        for entry in call.kernels:
            first.setdefault(entry, call.name)
    return [
        Kernel(call, normalized((folder / "kernels" / entry / "kernel.ptx").read_text()))
        for entry, call in first.items()
    ]


def coverage(calls: list[Made]) -> list[str]:
    """How many calls of each function there are, and of them how many were given what."""
    given: dict[str, Counter] = defaultdict(Counter)
    for call in calls:
        given[call.function].update(call.given)
    counts = Counter(call.function for call in calls)
    return [
        f"{function} {count}: " + ", ".join(f"{name} {number}" for name, number in sorted(given[function].items()))
        for function, count in counts.most_common()
    ]


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True)
_CACHE = click.Path(file_okay=False, path_type=Path)


@click.command(help=__doc__.split("\n")[0])
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER, required=False)
@click.option("--problems", type=click.IntRange(0), default=200, show_default=True, help="How many of the fuzzer's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the fuzzer's problems.")
@click.option("--fixed/--no-fixed", default=True, help="Whether the fixed calls are made too.  [default: fixed]")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option("--cache-a", type=_CACHE, help="Where A's kernels are kept.  [default: in the user's cache folder]")
@click.option("--cache-b", type=_CACHE, help="Where B's kernels are kept.")
def main(
    a: Path,
    b: Path | None,
    problems: int,
    seed: int,
    fixed: bool,
    jobs: int,
    cache_a: Path | None,
    cache_b: Path | None,
) -> None:
    plan = Plan(seed, problems, fixed)
    if not plan.calls():
        raise click.UsageError("no calls: neither fixed ones nor problems")
    kernels, calls = [], []
    for side, checkout, chosen in (("A", a, cache_a), ("B", b, cache_b)):
        if checkout is not None:
            folder = cache_folder(checkout, chosen)
            calls.append(make_calls(checkout, folder, plan, jobs))
            kernels.append(read_kernels(calls[-1], folder))
            if not kernels[-1]:
                raise click.ClickException(f"{side}: no call looked for a kernel in {folder / 'kernels'}")
            click.echo(f"{side}: {len(kernels[-1])} kernels of {len(calls[-1])} calls, in {folder}")
    click.echo("\n".join(coverage(calls[0])))
    if b is None:
        return
    others = sum(ours.problem != theirs.problem for ours, theirs in zip(*calls, strict=True))
    if others:
        click.echo(f"{others} problems of the fuzzer's are drawn otherwise in B: their kernels may differ for that")
    differences = report(*kernels)
    click.echo("\n".join(differences) or "equal")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        *fields, first = map(int, sys.argv[2:])
        work(Plan(*fields), first)
    else:
        main()

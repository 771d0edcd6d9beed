"""The command line: results that can be recomputed from what it saves, exit codes, names, refusals."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cute_fa
from cute_fa import simulate
from cute_fa.api.attention import prepare
from cute_fa.engine.autograd import problem_of_backward
from cute_fa.engine.recording import config_of
from cute_fa.engine.table import TABLE
from cute_fa.engine.worlds import ARITHMETICS
from cute_fa.semantics import reference
from cute_fa.semantics.tensors import problem_of
from cute_fa.semantics.types import Direction, DType, PersistentMode, SmArch
from cute_fa.tools import append_trial, cli, support
from cute_fa.tools.inputs import Inputs, InputSpec, make_inputs
from cute_fa.tools.tour import GPT_OSS, Stop
from cute_fa.tools.trial import Machine, choose_machine, config_fields, problem_of_spec
from perf.__main__ import main as perf_main
from ptxsim.report.cli import main as ptxsim_main

ROOT = Path(__file__).parents[2]
SMALL = ["--seqlen-q", "70", "--heads", "2", "--head-dim", "32", "--arch", "sm_80"]


def invoke(*arguments: str):
    return CliRunner().invoke(cli.main, list(arguments))


def test_saved_tensors_recompute_the_result(tmp_path):
    """O and LSE of a GQA problem with window, sink tokens, softcap, ALiBi and an extra logit, in float64 by hand."""
    file = tmp_path / "run.pt"
    features = "--seqlen-k 90 --heads-kv 1 --causal --window 20 -1 --sink 3 --softcap 5 --alibi --learnable-sink"
    done = invoke("run", *SMALL, *features.split(), "--dtype", "fp16", "--save", str(file), "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["canonical_name"] == "fa2_fwd_sm80_fp16_hd32_causal_sw20_alibi_sink3_softcap5_lsink_gqa2"
    assert summary["ok"]
    assert summary["simulated"]
    saved = torch.load(file)
    q, k, v = (saved[name].double() for name in "qkv")
    scores = torch.einsum("bihd,bjhd->bhij", q, k.expand(-1, -1, 2, -1)) * 32**-0.5
    distance = torch.arange(70)[:, None] + 20 - torch.arange(90)
    scores = 5 * torch.tanh(scores / 5) - saved["alibi_slopes"].double()[:, None, None] * distance.abs()
    visible = (distance >= 0) & ((distance <= 20) | (torch.arange(90) < 3))
    scores = scores.masked_fill(~visible, -torch.inf)
    extra = saved["learnable_sink"].double()[:, None, None].expand(1, 2, 70, 1)
    lse = torch.logsumexp(torch.cat((scores, extra), -1), -1)
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(scores - lse[..., None]), v.expand(-1, -1, 2, -1))
    error = (saved["out"].double() - out).abs().max().item()
    assert error == pytest.approx(summary["out_error"], abs=1e-5)
    assert error < summary["out_allowed"] < 0.01
    assert (saved["lse"] - lse).abs().max() < 1e-3
    assert saved["options"]["seqlen_k"] == 90
    assert saved["options"]["resolved"]["heads_kv"] == 1


def test_saved_gradients_are_those_of_the_formula(tmp_path):
    """Of everything that has one, by torch's autograd through the formula in float64."""
    file = tmp_path / "run.pt"
    features = "--backward --seqlen-k 90 --heads-kv 1 --causal --softcap 5 --alibi --learnable-sink --lse-gradient"
    done = invoke("run", *SMALL, *features.split(), "--seed", "5", "--save", str(file), "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    name = "fa2_bwd_sm80_bf16_hd32_causal_alibi_softcap5_lsink_gqa2_dlse_dalibi"
    assert (summary["ok"], summary["canonical_name"]) == (True, name)
    saved = torch.load(file)
    names = ("q", "k", "v", "alibi_slopes", "learnable_sink")
    q, k, v, slopes, sink = leaves = [saved[name].double().requires_grad_() for name in names]
    scores = 5 * torch.tanh(torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) * 32**-0.5 / 5)
    distance = torch.arange(70)[:, None] + 20 - torch.arange(90)
    scores = (scores - slopes[:, None, None] * distance.abs()).masked_fill(distance < 0, -torch.inf)
    lse = torch.logsumexp(torch.cat((scores, sink[:, None, None].expand(1, 2, 70, 1)), -1), -1)
    out = torch.einsum("bhij,bjd->bihd", torch.exp(scores - lse[..., None]), v[:, :, 0])
    exact = torch.autograd.grad((out, lse), leaves, (saved["dout"].double(), saved["dlse"].double()))
    for name, grad in zip(("dq", "dk", "dv", "dalibi", "dsink"), exact, strict=True):
        error = (saved[name].double() - grad).abs().max().item()
        assert error == pytest.approx(summary["gradients"][name]["error"], abs=1e-4 * grad.abs().max().item())
        assert error < summary["gradients"][name]["allowed"] < 0.1 * grad.abs().max()
    assert not torch.equal(saved["dout"].flatten(), saved["q"].flatten())


def test_a_plain_backward(tmp_path):
    file = tmp_path / "run.pt"
    done = invoke("run", *SMALL, "--backward", "--save", str(file))
    assert done.exit_code == 0, done.output
    for part in ("fa2_bwd_sm80_bf16_hd32 ", "max error of LSE", "max error of dq", "max error of dv"):
        assert part in done.stdout
    assert "dalibi" not in done.stdout
    saved = torch.load(file)
    assert saved["dk"].shape == saved["k"].shape and saved["dout"].shape == saved["out"].shape
    assert (saved["dlse"], saved["dalibi"], saved["dsink"]) == (None, None, None)


def test_arithmetic_of_the_tensor_instructions(tmp_path):
    """Forward and backward are within tolerance whatever tensor instructions keep, and the LSE shows how much it is."""
    saved = {}
    for arithmetic in ARITHMETICS:
        file = tmp_path / f"{arithmetic}.pt"
        done = invoke("run", *SMALL, "--backward", "--arithmetic", arithmetic, "--save", str(file))
        assert done.exit_code == 0, done.output
        saved[arithmetic] = torch.load(file)["lse"]
    off = {name: (saved[name] - saved["float32"]).abs().max() for name in ("hardware", "distinct")}
    assert 0 < off["hardware"] < 2e-6 < 1e-5 < off["distinct"] < 1e-3


@pytest.mark.parametrize("direction", ["--inputs peaked", "--schedule-seed 3"])
def test_varlen(tmp_path, direction):
    file = tmp_path / "run.pt"
    done = invoke("run", *SMALL, "--batch", "3", "--varlen", *direction.split(), "--save", str(file), "--json")
    assert done.exit_code == 0, done.output
    assert "varlen" in json.loads(done.stdout)["canonical_name"]
    saved = torch.load(file)
    assert saved["cu_seqlens_q"].tolist()[:3] == [0, 70, 113]
    assert saved["lse"].shape == (2, 113)
    assert json.loads(done.stdout)["schedule_seed"] == (3 if "schedule" in direction else None)


def test_terminal_output_names_kernel_and_errors():
    done = invoke("run", *SMALL)
    assert done.exit_code == 0, done.output
    config = "config            tile_m=128, tile_n=64, num_warps=4, stages=2 "
    for part in ("fa2_fwd_sm80_bf16_hd32", config, "sm_80 simulated", "max error of LSE", "within tolerance"):
        assert part in done.stdout


HOPPER = ["--arch", "sm_90a", "--seqlen-q", "70", "--heads", "4", "--heads-kv", "1", "--head-dim", "32"]


def test_choices_of_how_reach_the_kernel(monkeypatch):
    """What the config prints is what was launched: persistent CTAs or one a tile, heads packed or not."""
    asked, made = [], []

    @contextmanager
    def remember(arch, **options):
        with simulate(arch, **options) as simulation:
            asked.append(options)
            yield made.append(simulation) or simulation

    monkeypatch.setattr("cute_fa.tools.trial.simulate", remember)
    packed = ["--pack-gqa", "--persistent", "off", "--num-sms", "1", "--late", "--race"]
    apart = ["--no-pack-gqa", "--persistent", "on", "--num-sms", "3", "--schedule-seed", "1"]
    # 70 queries of 4 heads: two tiles of 48 queries packed, a tile a head apart
    for options, pack_gqa, persistent, ctas in ((packed, 4, False, 2), (apart, 1, True, 3)):
        done = invoke("run", *HOPPER, *options, "--json")
        assert done.exit_code == 0, done.output
        summary = json.loads(done.stdout)
        assert summary["config"]["pack_gqa"] == pack_gqa
        assert summary["config"]["persistent"] is persistent
        assert summary["config"]["dtype"] == "bf16"
        assert [launch.grid for launch in made[-1].launches] == [(ctas, 1, 1)]
        assert {name: summary[name] for name in asked[-1]} == asked[-1]
        assert f"pack_gqa={pack_gqa}, persistent={persistent}" in invoke("run", *HOPPER, *options).stdout
    sums = {"fp8_bits": None, "arithmetic": "float32"}
    assert asked[0] == {"late": True, "race": True, "num_sms": 1, "schedule_seed": None} | sums
    assert asked[-1] == {"late": False, "race": False, "num_sms": 3, "schedule_seed": 1} | sums


@pytest.mark.parametrize("lengths", ["", "--varlen"])
def test_saved_pages_recompute_the_result(tmp_path, lengths):
    """Keys gathered from the saved pages by hand, softmax in float64."""
    file = tmp_path / "run.pt"
    request = [*HOPPER, "--seqlen-k", "90", "--batch", "3", "--page-size", "16", *lengths.split(), "--inputs", "peaked"]
    done = invoke("run", *request, "--dtype", "fp16", "--save", str(file), "--json")
    assert done.exit_code == 0, done.output
    name = json.loads(done.stdout)["canonical_name"]
    assert name == "fa3_fwd_sm90a_fp16_hd32_varlen_page16_gqa4"
    saved = torch.load(file)
    assert saved["seqused_k"].tolist()[:2] == [90, 57]
    assert saved["page_table"].shape == (3, 6)
    starts = [0, 0, 0] if saved["cu_seqlens_q"] is None else saved["cu_seqlens_q"].tolist()
    for b, used in enumerate(saved["seqused_k"].tolist()):
        rows = slice(starts[b], starts[b + 1]) if lengths else b
        k, v = (saved[x][saved["page_table"][b].long()].flatten(0, 1)[:used, 0].double() for x in "kv")
        scores = torch.einsum("ihd,jd->hij", saved["q"][rows].double(), k) * 32**-0.5
        lse = saved["lse"][:, rows] if lengths else saved["lse"][b]
        torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), atol=1e-3, rtol=0)
        out = torch.einsum("hij,jd->ihd", torch.softmax(scores, -1), v)
        torch.testing.assert_close(saved["out"][rows].double(), out, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(batch=2, seqlen_q=40, seqlen_k=70, heads=4, causal=True, window=(7, None), sink_tokens=2),
        InputSpec(batch=3, softcap=3.0, softmax_scale=0.3, varlen_q=True, varlen_k=True, alibi=True, dtype=DType.FP16),
        InputSpec(batch=3, seqlen_k=70, page_size=16, varlen_q=True, alibi_per_batch=True, learnable_sink=True),
        InputSpec(batch=3, seqlen_k=70, seqused_q=True, seqused_k=True, head_dim_v=32, window=(None, 3)),
    ],
)
def test_a_spec_has_the_problem_of_its_tensors(spec):
    """So that what a request without tensors is told (compiled, refused) holds for the run."""
    choices = {"pack_gqa": False, "persistent": PersistentMode.OFF}
    inputs = make_inputs(spec)
    call = prepare(inputs.q, inputs.k, inputs.v, **inputs.arguments(), **choices)
    assert problem_of_spec(spec, SmArch.SM_90A, **choices) == problem_of(SmArch.SM_90A, call)
    if spec.page_size is None:
        wanted = {"deterministic": True, "lse_gradient": True, "slopes_gradient": spec.alibi}
        out, lse = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.options())
        out = out.to(inputs.q.dtype)
        given = (out, lse, out, lse, call.changed(deterministic=True), spec.alibi)
        backward = problem_of_spec(spec, SmArch.SM_90A, direction=Direction.BACKWARD, **wanted)
        assert backward == problem_of_backward(SmArch.SM_90A, *given)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "options",
    [
        "--cache-batch-idx",
        "--cache-leftpad --causal --seqused-q",
        "--cache-batch-idx --num-splits 0 --seqlen-k 900",
        "--page-size 16 --cache-leftpad --num-splits 2",
        "--tree --page-size 2 --varlen --num-splits 0",
        "--append --query --rotary-dim 16 --varlen",
        "--append --dtype-k e4m3 --dtype-v e5m2 --query --rotary-dim 16 --page-size 8",
        "--append --dtype e5m2 --dtype-v e4m3 --cache-batch-idx",
    ],
)
def test_what_is_named_is_what_ran_and_what_is_compiled(tmp_path, options):
    given = ["--seqlen-q", "2", "--heads", "2", "--head-dim", "32", "--arch", "sm_80", *options.split(), "--json"]
    with cute_fa.record_keys(tmp_path / "keys"):
        ran = json.loads(invoke("run", *given).stdout)
    (launched,) = map(config_of, (tmp_path / "keys").read_text().splitlines())
    assert ran["ok"] and ran["config"] == config_fields(launched)
    compiled = json.loads(invoke("compile", *given, "--out", str(tmp_path)).stdout)
    names = ("canonical_name", "compile_name", "config")
    assert [compiled[name] for name in names] == [ran[name] for name in names]


def test_a_wrong_result_exits_with_one(monkeypatch):
    right = Inputs.run

    def wrong(self, **extra):
        out, lse = right(self, **extra)
        out[0, -1, -1, -1] += 0.5
        return out, lse

    monkeypatch.setattr(Inputs, "run", wrong)
    done = invoke("run", *SMALL, "--json")
    summary = json.loads(done.stdout)
    assert (done.exit_code, summary["ok"]) == (1, False)
    assert summary["out_error"] > 0.4 > summary["out_allowed"]
    assert "OUTSIDE TOLERANCE" in invoke("run", *SMALL).stdout


def test_a_wrong_gradient_exits_with_one(monkeypatch):
    right = torch.autograd.grad

    def wrong(*arguments, **options):
        dq, dk, dv = right(*arguments, **options)
        dk[0, -1, -1, -1] += 0.5
        return dq, dk, dv

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    done = invoke("run", *SMALL, "--backward", "--json")
    errors = json.loads(done.stdout)["gradients"]
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (1, False)
    assert [name for name, error in errors.items() if error["error"] > error["allowed"]] == ["dk"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("--lse-gradient", "--lse-gradient without --backward"),
        ("--backward --page-size 64", "page_size 64: "),
        ("--deterministic", "--deterministic without --backward"),
        ("--page-size 64 --persistent on", "page"),
        ("--page-size 24", "page_size=24"),
        ("--dtype e4m3 --backward", "no kernel serves it in 8 bits"),
        ("--head-dim 12", "12"),
        ("--batch 0", "batch=0"),
        ("--head-dim-v 0", "head_dim_v=0"),
        ("--seqlen-q -1", "seqlen_q=-1"),
        ("--heads 3 --heads-kv 2", "3 query heads and 2 kv heads"),
        ("--window -5 0", "left=-5"),
        ("--sink -1", "sink_tokens=-1"),
        ("--softcap nan", "softcap=nan"),
        ("--heads-kv 1 --pack-gqa --persistent on", "pack_gqa: this kernel's tiles"),
        ("--persistent on", "persistent: this kernel launches"),
        ("--cache-leftpad --persistent off", "--persistent with --cache-batch-idx or --cache-leftpad"),
    ],
)
def test_refusals(request_, message):
    for command in (["run", "--json"], ["compile", "--out", "never-made", "--json"]):
        done = invoke(*command, "--arch", "sm_80", *request_.split())
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert message in json.loads(done.stdout)["message"]
    assert not Path("never-made").exists()


@pytest.mark.parametrize("caches", ["", "--dtype-k e4m3 --dtype-v e5m2"])
@pytest.mark.parametrize("wrong", ["k_cache", "v_cache", "seqused_k", "q"])
def test_a_wrong_append_exits_with_one(monkeypatch, wrong, caches):
    """Whatever of it is wrong, NaN too; what is right is found to be so."""
    right = append_trial.append_kv
    options = "run --append --seqlen-q 4 --batch 2 --heads 2 --head-dim 32 --query --rotary-dim 16 --json".split()
    options += caches.split()

    def damaged(k, v, k_cache, v_cache, *others, **given):
        q, seqused_k = right(k, v, k_cache, v_cache, *others, **given)
        written = {"k_cache": k_cache, "v_cache": v_cache, "seqused_k": seqused_k, "q": q}[wrong]
        written.flatten()[-1] = 99 if wrong == "seqused_k" else torch.nan
        return q, seqused_k

    assert json.loads(invoke(*options).stdout)["ok"]
    monkeypatch.setattr(append_trial, "append_kv", damaged)
    done = invoke(*options)
    errors = json.loads(done.stdout, parse_constant=pytest.fail)["errors"]
    assert done.exit_code == 1
    assert [name for name, error in errors.items() if error["error"] is None or error["error"] > error["allowed"]] == [
        wrong
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--causal", "--causal: an append does not have it"),
        ("--window 3 -1", "--window: an append does not have it"),
        ("--softcap 3", "--softcap: an append does not have it"),
        ("--backward", "--append with --backward"),
        ("--seqused-q", "--seqused-q: an append without --query has none"),
        ("--query", "--query without --rotary-dim"),
        ("--seqlen-q -1", "tokens_k=-1"),
        ("--heads -2 --heads-kv 2 --query --rotary-dim 16", "num_heads=-2"),
        ("--rotary-dim -16", "rotary_dim=-16"),
        ("--rotary-dim 16 --rotary-dtype half", "rotary_dtype='half'"),
        ("--rotary-seqlens", "rotary_seqlens without rotary_dim"),
        ("--page-size 24", "page_size=24"),
        ("--dtype-k e4m3", "caches in e4m3 and bf16: both in fp8 or int8"),
        ("--dtype e4m3 --query --rotary-dim 16", "rotary_dim with rows in e4m3"),
        ("--dtype e4m3 --head-dim 24", "head_dim 24: a multiple of 16"),
    ],
)
def test_refusals_of_an_append(options, message):
    for command in (["run", "--json"], ["compile", "--out", "never-made", "--json"]):
        done = invoke(*command, "--append", "--seqlen-q", "4", *options.split())
        assert done.exit_code == 2, done.output
        assert message in json.loads(done.stdout)["message"]
    assert not Path("never-made").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seqlen-k 3", "seqlen-k=3"),
        ("--seqlen-k 0", "seqlen-k=0"),
        ("--inputs peaked", "--inputs peaked with --append"),
        ("--save x", "--save with --append"),
    ],
)
def test_refusals_of_a_run_of_an_append(options, message):
    done = invoke("run", "--append", "--seqlen-q", "4", *options.split(), "--json")
    assert (done.exit_code, message in json.loads(done.stdout)["message"]) == (2, True), done.output


def test_save_into_no_folder_is_refused_before_any_work(tmp_path):
    done = invoke("run", *SMALL, "--save", str(tmp_path / "missing" / "file"))
    assert done.exit_code == 2
    assert "is no folder" in done.stderr


def test_what_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "missing" / "file")
    saved = invoke("run", *SMALL, "--save", str(tmp_path / "dangling"))
    compiled = invoke("compile", *SMALL, "--out", str(tmp_path / "file" / "folder"))
    for done, path in ((saved, "dangling"), (compiled, "folder")):
        assert done.exit_code == 2, done.output
        assert f"cannot write {tmp_path}" in done.stderr and path in done.stderr


def test_a_machine_without_sms_is_refused():
    done = invoke("run", *SMALL, "--num-sms", "0")
    assert done.exit_code == 2
    assert "--num-sms" in done.stderr


def test_a_seed_beyond_what_generators_take_is_refused():
    done = invoke("run", *SMALL, "--seed", str(2**64))
    assert done.exit_code == 2
    assert "--seed" in done.stderr and "range" in done.stderr
    assert invoke("run", *SMALL, "--seed", str(2**64 - 1)).exit_code == 0


def test_compile_writes_ptx_and_cubin(tmp_path):
    done = invoke("compile", "--arch", "sm_90a", "--head-dim", "32", "--causal", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    names = json.loads(done.stdout)
    assert names["canonical_name"] == "fa3_fwd_sm90a_bf16_hd32_causal"
    assert Path(names["ptx"]).stem == Path(names["cubin"]).stem == names["compile_name"]
    assert ".target sm_90a" in Path(names["ptx"]).read_text()
    assert Path(names["cubin"]).read_bytes()[:4] == b"\x7fELF"
    assert names["config"]["window_right"] is True
    assert names["config"]["persistent"] is True
    # Values of windows and caps are arguments, so they are in no compile name.
    for window in ("7", "9"):
        again = invoke(
            "compile", "--arch", "sm_90a", "--head-dim", "32", "--window", window, "0", "--out", str(tmp_path)
        )
        assert f"_sw{window}" in again.output
        assert re.search(r"config +warpgroups=\d.* window_left=True, window_right=True\n", again.output)
    assert len(list(tmp_path.glob("*.ptx"))) == 2


def test_compile_writes_what_makes_walks_too(tmp_path):
    done = invoke("compile", "--arch", "sm_80", "--head-dim", "64", "--ranges", "3", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    names = json.loads(done.stdout)
    (walk,) = names["walks"]
    rows, columns = (names["config"][name] for name in ("tile_m", "tile_n"))
    assert walk["compile_name"] == f"ranges_sm80_rows{rows}_columns{columns}"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in (names["compile_name"], walk["compile_name"]) for kind in ("ptx", "cubin")
    }
    assert Path(walk["cubin"]).read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("option", ["--race", "--late", "--num-sms", "--schedule-seed", "--seed", "--inputs"])
def test_what_only_a_run_has_is_no_option_of_a_compile(tmp_path, option):
    done = invoke("compile", "--out", str(tmp_path), option, "4")
    assert (done.exit_code, "No such option" in done.output and option in done.output) == (2, True)


@pytest.mark.parametrize(("command", "name"), [(cli.main, "cute_fa"), (perf_main, "perf"), (ptxsim_main, "ptxsim")])
def test_versions_and_help(command, name):
    assert CliRunner().invoke(command, ["--version"]).stdout == f"{name}, version {cute_fa.__version__}\n"
    short, long = (CliRunner().invoke(command, [option]).stdout for option in ("-h", "--help"))
    assert short == long and "Commands:" in short


PERF = "compare features flavours gpu-check gpu-pack host microbench plot predict sass static sweep".split()


def test_perf_lists_its_commands():
    """Though they come from two modules that are imported when they are asked for."""
    listed = CliRunner().invoke(perf_main, ["--help"]).stdout.split("Commands:\n")[1]
    assert [line.split()[0] for line in listed.splitlines()] == PERF


@pytest.mark.parametrize("command", PERF)
def test_perf_says_what_a_command_takes(command):
    short, long = (CliRunner().invoke(perf_main, [command, option]) for option in ("-h", "--help"))
    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert f"{command} [OPTIONS]" in short.stdout.splitlines()[0]


def test_table_gives_a_kernel_or_a_reason():
    rows = json.loads(invoke("table", "--json").stdout)
    assert {row["arch"] for row in rows} == {arch.value for arch in SmArch}
    assert all(row["kernel"] or row["reasons"] for row in rows)
    known = {(row["arch"], row["direction"], row["feature"]): row for row in rows}
    assert known["sm_90a", "fwd", "causal"]["kernel"] == "fa3_fwd"
    assert known["sm_80", "bwd", "causal"]["kernel"] == "fa2_bwd"
    assert known["sm_90a", "bwd", "causal"]["kernel"] == "fa3_bwd"


def test_the_documentation_has_the_present_table():
    markdown = support.to_markdown(TABLE.rows())
    assert invoke("table", "--markdown").stdout.strip() == markdown
    assert markdown in ROOT.joinpath("docs", "support.md").read_text()


def test_the_readme_is_short_and_what_the_pages_link_to_exists():
    assert ROOT.joinpath("README.md").read_text().count("\n") <= 150
    for page in [ROOT / "README.md", *ROOT.joinpath("docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
    index = ROOT.joinpath("docs", "README.md").read_text()
    assert all(f"]({page.name})" in index for page in ROOT.joinpath("docs").glob("*.md") if page.name != "README.md")


def test_every_note_of_the_table_is_used():
    markdown = support.to_markdown(TABLE.rows())
    notes = [line for line in markdown.splitlines() if line[:1].isdigit()]
    used = {number for cell in re.findall(r"(?:no|fa._[a-z_]+) \(([^)]*)\)", markdown) for number in cell.split(", ")}
    assert used == {str(number) for number in range(1, len(notes) + 1)}
    header = markdown.splitlines()[0]
    directions = len(Direction) - 1  # but for that of range plans, which is no column
    assert all(header.count(f"{arch.value}") == directions for arch in SmArch)


@pytest.mark.parametrize("wrong", [False, True])
def test_without_options_the_tour_decides_the_exit_code(monkeypatch, wrong):
    stop = Stop(GPT_OSS, Machine(SmArch.SM_80, simulated=True), 80)
    monkeypatch.setattr("cute_fa.tools.tour.itinerary", lambda: [stop])
    if wrong:
        right = Inputs.run
        monkeypatch.setattr(Inputs, "run", lambda self, **extra: [x + 0.5 for x in right(self, **extra)])
    done = invoke("run", "--json")
    (layer,) = json.loads(done.stdout)["layers"]
    assert (done.exit_code, layer["ok"]) == ((1, False) if wrong else (0, True))
    assert layer["canonical_name"] == "fa2_fwd_sm80_bf16_hd64_causal_sw15_lsink_gqa8"
    assert layer["mask"] == "causal, window 128 → 16 at this length, learnable sink"
    shown = invoke("run").stdout
    assert "gpt-oss-20b, 64/8 heads" in shown
    assert ("WRONG" in shown) is wrong


def test_a_gpu_is_used_unless_another_machine_is_asked_for(monkeypatch):
    monkeypatch.setattr("cute_fa.tools.trial.gpu_arch", lambda: SmArch.SM_90A)
    assert choose_machine(None) == Machine(SmArch.SM_90A, simulated=False)
    assert choose_machine(SmArch.SM_90A).device == "cuda"
    assert choose_machine(SmArch.SM_80) == Machine(SmArch.SM_80, simulated=True)
    for options in ({"schedule_seed": 5}, {"schedule_seed": 0}, {"late": True}, {"race": True}, {"num_sms": 4},
                    {"arithmetic": "hardware"}):  # fmt: skip
        assert choose_machine(None, **options) == Machine(SmArch.SM_90A, simulated=True, **options)
    monkeypatch.setattr("cute_fa.tools.trial.gpu_arch", lambda: None)
    assert choose_machine(None) == Machine(SmArch.SM_80, simulated=True)


def test_a_gpu_that_no_kernel_is_built_for_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_machine(None) == Machine(SmArch.SM_80, simulated=True)
    assert choose_machine(SmArch.SM_90A) == Machine(SmArch.SM_90A, simulated=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert choose_machine(None) == Machine(SmArch.SM_86, simulated=False)


def test_readme_example_gives_small_errors(capsys):
    readme = ROOT.joinpath("README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert example.count("\n") <= 14
    exec(compile(example, "README.md", "exec"), {})
    errors = [float(value) for value in re.findall(r"tensor\(([^)]*)\)", capsys.readouterr().out)]
    assert len(errors) == 2
    assert errors[0] < 0.02
    assert errors[1] < 1e-3


@pytest.mark.gpu
def test_on_a_gpu_one_problem_and_the_tour_run_there():
    one = invoke("run", "--causal", "--json")
    assert one.exit_code == 0, one.output
    assert json.loads(one.stdout)["simulated"] is False
    tour = invoke("run", "--json")
    assert tour.exit_code == 0, tour.output
    assert not any(layer["simulated"] for layer in json.loads(tour.stdout)["layers"])

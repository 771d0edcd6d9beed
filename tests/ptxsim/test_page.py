"""The examples of errors in docs/ptxsim.md: each raises what stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ptxsim

PAGE = (Path(__file__).parents[2] / "docs" / "ptxsim.md").read_text("utf-8")
EXAMPLES = re.findall(r"^### (\w+)\n(?:(?!^#).)*?^```ptx\n(.*?)^```\n\n```\n(.*?)^```$", PAGE, re.M | re.S)
OPTIONS = {"WgmmaError": {"threads": 128}, "TensorFenceError": {"target": "sm_100a"}}
# of the host's side: they need more than a kernel
HOST = {"CompilerMissing", "RuntimeAlreadyLoaded", "SimError"}


def test_every_error_has_an_example():
    errors = {
        name for name in ptxsim.__all__ if isinstance(x := getattr(ptxsim, name), type) and issubclass(x, Exception)
    }
    assert {name for name, _, _ in EXAMPLES} == errors - HOST


@pytest.mark.parametrize(("name", "body", "message"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_example(name, body, message):
    (setup,) = [x for x in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "def check(" in x]
    page = {}
    exec(setup, page)
    with pytest.raises(getattr(ptxsim, name)) as caught:
        page["check"](body, **OPTIONS.get(name, {}))
    assert type(caught.value).__name__ == name
    told, shown = (" ".join(text.split()) for text in (f"{name}: {caught.value}", message))
    pattern = ".*?".join(re.escape(part) for part in re.split(" ?… ?", shown))  # … stands for anything
    assert re.match(pattern, told), told

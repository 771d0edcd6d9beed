"""Runs jobs of ``peer_runner`` in a process of their own, once for all tests and all workers that ask for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import filelock

ROOT = Path(__file__).parents[2]


def run_once(tmp_path_factory, name, arch, jobs):
    """Results of the jobs, one dict each; kept under ``name`` for the test session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what the workers share
    kept = folder / f"{name}-{arch}.json"
    with filelock.FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_text(json.dumps(_run(arch, jobs)))
    return json.loads(kept.read_text())


def _run(arch, jobs):
    environment = {
        **os.environ,
        "FLASH_ATTENTION_NUM_SMS": "4",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
        "QUACK_CACHE_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.testing.peer_runner", arch]
    done = subprocess.run(command, input=json.dumps(jobs), cwd=ROOT, env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if len(results) < len(jobs):
        results += [{"raised": done.stderr[-4000:]}] * (len(jobs) - len(results))
    return results

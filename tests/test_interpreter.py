"""The Triton source on this machine: test_triton.py in a process of its own, because Triton decides
when it is imported whether its functions are compiled or interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_claim_about_the_triton_path_holds_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed: nothing to interpret")
    versions = [[int(x) for x in module.__version__.split(".")[:2]] for module in (triton, numpy)]
    if versions[0] <= [3, 6] and versions[1] >= [2, 4]:
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} cannot loop up to an argument under "
            f"numpy {numpy.__version__}"
        )
    options = "-q -m gpu -p no:cacheprovider tests/test_triton.py"
    command = [sys.executable, "-m", "pytest", *options.split()]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    print(summary)
    assert "passed" in summary and "skipped" not in summary and "failed" not in summary, summary

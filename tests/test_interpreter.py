"""The Triton source on this machine: test_triton.py in a process of its own, because Triton decides
when it is imported whether its functions are compiled or interpreted."""

import numpy
import pytest


def test_every_claim_about_the_triton_path_holds_in_the_interpreter(interpreted):
    triton = pytest.importorskip("triton", reason="Triton is not installed: nothing to interpret")
    versions = [[int(x) for x in module.__version__.split(".")[:2]] for module in (triton, numpy)]
    if versions[0] <= [3, 6] and versions[1] >= [2, 4]:
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} cannot loop up to an argument under "
            f"numpy {numpy.__version__}"
        )
    code, output = interpreted()
    assert code == 0, output[-8000:]
    summary = output.strip().splitlines()[-1]
    print(summary)
    assert "passed" in summary and "skipped" not in summary and "failed" not in summary, summary

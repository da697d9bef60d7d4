"""The compiled CPU kernels of every level of the processor, not only of the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = (
    "decode_step",
    "linear_distill_loss",
    "linear_logprob",
    "linear_policy_loss",
    "mamba2",
    "mamba2_native",
    "moe_experts",
    "rms_norm",
)


@pytest.mark.parametrize("level", ["base", "v3"])
def test_other_levels_pass_the_tests_of_the_best(level: str) -> None:
    """The other files test v4 where there is one, and v3 where that is the best."""
    if level == "v3" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("v3 is the best level of this processor")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", "native", "-m", "not slow"),
            *(str(HERE / f"test_{name}.py") for name in FILES),
        ],
        env=os.environ | {"NEMOCASCADE_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if "has no such level" in done.stdout:
        pytest.skip(f"this processor has no level {level}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_a_level_that_is_not_there_is_an_error() -> None:
    code = (
        "import torch\n"
        "from nemocascade_kernels import step_norm\n"
        "step_norm(torch.ones(1, 4), torch.ones(4), 1e-5, backend='native')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NEMOCASCADE_CPU_LEVEL": "v9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "NEMOCASCADE_CPU_LEVEL is v9" in done.stderr
    assert "name base, v3 or v4" in done.stderr

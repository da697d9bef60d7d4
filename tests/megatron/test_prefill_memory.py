"""Activation memory of chunked prefill does not grow with the prompt.

Each prompt is prefilled in a process of its own, which reports the growth of its peak memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def read_prompt(length: int, piece: int) -> None:
    """Print the bytes by which memory rose beyond weights and the slot's own states."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.rollout import draw_tokens, make_model, make_runner

    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, ParallelConfig, tiny

    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    shape = tiny()
    model = make_runner(world, make_model(world, shape), slots=1, context=length)
    model.refresh()
    text = draw_tokens(shape.vocab_size, length, seed=1)
    # First, at the size of a piece but small: libraries take their own memory at the first call.
    model.prefill([text[:64]], [[0]])
    model.prefill([text[:64]], [[0]], [64])
    for layer in model._pipeline.layers:
        for name in ("keys", "values"):
            if hasattr(layer, name):
                getattr(layer, name).fill_(0)  # pages that are written are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    size = piece or length
    for held in range(0, length, size):
        model.prefill([text[held : held + size]], [[0]], [held])
    print("rose by", _status("VmHWM") - before, flush=True)
    world.close()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [x for x in lines if x.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def rise(length: int, piece: int) -> int:
    code = f"import test_prefill_memory as m; m.read_prompt({length}, {piece})"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests/megatron'}"
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [line] = [x for x in done.stdout.splitlines() if x.startswith("rose by")]
    return int(line.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_of_a_prompt_of_32k_tokens() -> None:
    """Beside the whole read, and beside a prompt of a quarter of the length."""
    whole, pieces, quarter = (
        # A peak varies from run to run, by up to half: the least counts.
        min(rise(length, piece) for _ in range(3))
        for length, piece in ((32768, 0), (32768, 2048), (8192, 2048))
    )
    print(
        f"whole {whole / MIB:.0f} MiB, in pieces of 2,048 {pieces / MIB:.0f} MiB, "
        f"8,192 tokens in such pieces {quarter / MIB:.0f} MiB"
    )
    assert pieces < whole / 6
    assert pieces < 1.3 * quarter + 8 * MIB

"""Transformer Engine's linear layers in FP8, as Megatron builds them, on a stand-in of the package.

The stand-in is imported by a process of its own: this file, run as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {
    "0.mixer.in_proj", "0.mixer.out_proj", "1.mixer.linear_qkv", "1.mixer.linear_proj",
    "2.mixer.shared_experts.linear_fc1", "2.mixer.shared_experts.linear_fc2",
    "3.mixer.linear_fc1", "3.mixer.linear_fc2",
}  # fmt: skip


def measure() -> dict[str, Any]:
    """The model with these linears beside the plain one: names, state, losses, gradients."""
    from dataclasses import replace

    import torch
    from gpu_dry.stand_ins import BUFFERS, Linear

    from nemocascade.megatron.config import Accelerators, make_config
    from nemocascade.megatron.microbatch import Microbatch
    from nemocascade.megatron.model import build_model
    from nemocascade.megatron.user_buffers import user_buffers
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import (
        EngineConfig,
        MoeTrainingConfig,
        ParallelConfig,
        UserError,
        tiny,
    )
    from nemocascade.types import Document, pack_documents

    engine, parallel = EngineConfig(linears="fp8"), ParallelConfig()
    world = start_world(parallel, engine)
    shape = replace(tiny(), pattern="M*E-", mamba_heads=16, mamba_head_dim=16)
    batch = pack_documents([Document(torch.arange(40), torch.ones(40, dtype=torch.bool), "x")], 48)
    found: dict[str, Any] = {}
    for name, fp8, recompute, overlap in (
        ("plain", False, False, False),
        ("te", True, False, False),
        ("again", True, True, False),
        ("overlap", False, False, True),
    ):
        settings = replace(engine, recompute=recompute)
        config = make_config(shape, parallel, settings, MoeTrainingConfig(), seed=1,
                             fp8_linears=fp8, overlap_tensor_parallel=overlap)  # fmt: skip
        (model,) = build_model(world, config, Accelerators(te_linears=fp8))
        packed = Microbatch.from_batch(batch, world.device)
        Linear.recipes.clear()
        hidden = model(packed)
        hidden.float().square().sum().backward()
        trained = list(Linear.recipes)
        Linear.recipes.clear()
        with torch.no_grad():
            model.eval()(packed)
        state = model.sharded_state_dict()
        found[name] = {
            "linears": [n for n, module in model.decoder.layers.named_modules()
                        if isinstance(module, Linear)],
            "buffers": {n: module.user_buffers for n, module in
                        model.decoder.layers.named_modules() if isinstance(module, Linear)},
            "trained": [str(recipe) for recipe in trained],
            "evaluated": [str(recipe) for recipe in Linear.recipes],
            "state": sorted(key for key, value in state.items() if hasattr(value, "data")),
            "hidden": hidden.flatten().tolist(),
            "gradients": {n: p.grad.flatten()[:50].tolist() for n, p in model.named_parameters()
                          if p.grad is not None},
        }  # fmt: skip
    with user_buffers(world, shape.hidden_size, 48):
        found["made"] = BUFFERS.copy()
    found["left"] = BUFFERS.copy()
    try:
        config = make_config(replace(shape, mlp_width=40), parallel, engine, MoeTrainingConfig(),
                             seed=1, fp8_linears=True)  # fmt: skip
        build_model(world, config, Accelerators(te_linears=True))
    except UserError as error:
        found["rejected"] = str(error)
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    paths = [ROOT, ROOT / "kernels", ROOT / "tests"]
    paths.append(ROOT / "tests" / "gpu_dry" / "packages" / "transformer_engine")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_linear_is_transformer_engines(measured: dict[str, Any]) -> None:
    assert set(measured["te"]["linears"]) == EXPECTED
    assert measured["plain"]["linears"] == []


def test_fp8_runs_in_training_alone(measured: dict[str, Any]) -> None:
    """Also where a layer is recomputed in backward, outside of the model's own forward."""
    recipe = "Float8BlockScaling(fp8_format='e4m3')"
    count = len(EXPECTED)
    assert measured["te"]["trained"] == [recipe] * count
    assert measured["again"]["trained"] == [recipe] * 2 * count
    assert measured["te"]["evaluated"] == ["None"] * count


def test_weights_and_checkpoints_are_those_of_plain_linears(measured: dict[str, Any]) -> None:
    """The stand-in multiplies without rounding, so results differ only by another initial value."""
    for name in ("te", "again", "overlap"):
        for what in ("state", "hidden", "gradients"):
            assert measured[name][what] == measured["plain"][what], (name, what)
    assert any(key.endswith("in_proj.weight") for key in measured["te"]["state"])


def test_user_buffers_are_passed_on(measured: dict[str, Any]) -> None:
    """Each linear names its buffer, as Megatron's own layers do. Products are not in FP8."""
    names = {
        "linear_qkv": "qkv", "linear_proj": "proj", "in_proj": "fc1", "linear_fc1": "fc1",
        "out_proj": "fc2", "linear_fc2": "fc2",
    }  # fmt: skip
    found = measured["overlap"]["buffers"]
    assert set(found) == EXPECTED
    for linear, settings in found.items():
        assert settings["ub_name"] == names[linear.rpartition(".")[2]]
        assert settings["ub_overlap_ag"] is True
    assert measured["overlap"]["trained"] == ["None"] * len(EXPECTED)
    assert not any("ub_overlap_ag" in settings for settings in measured["te"]["buffers"].values())


def test_evaluation_does_not_use_buffers(measured: dict[str, Any]) -> None:
    """Its rows are of any number, so it does not call Transformer Engine."""
    assert measured["overlap"]["evaluated"] == []


def test_buffers_hold_the_rows_of_a_micro_batch(measured: dict[str, Any]) -> None:
    expected = {"shape": [48, 128], "tp_size": 1, "bootstrap_backend": "nccl"}
    assert measured["made"] == [{**expected, "quantization_modes": ["none"]}]
    assert measured["left"] == []


def test_sizes_that_fp8_products_cannot_take_are_rejected(measured: dict[str, Any]) -> None:
    assert "layers.3.mixer.linear_fc1.weight has 128 inputs and 40 outputs" in measured["rejected"]
    assert "--engine.linears bf16" in measured["rejected"]


if __name__ == "__main__":
    print(json.dumps(measure()))

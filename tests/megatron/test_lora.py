"""Adapters against models whose weights are W + s B A: losses, gradients, files, exports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.integrations import installed
from helpers.rollout import QWEN3
from safetensors.torch import load_file
from torch import Tensor

from nemocascade.cli import main
from nemocascade.megatron.adapter import merged_parts, train_adapters_only
from nemocascade.megatron.adapter_artifact import load_adapter, read_adapter, write_adapter
from nemocascade.megatron.artifact import (
    Provenance,
    load_artifact_weights,
    read_artifact,
    write_artifact,
)
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.megatron.checkpoint.state import model_parts
from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.convert import ConversionError, export_peft, merge_adapter
from nemocascade.megatron.layers.lora import Adapted, Adapter
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    CheckpointConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    tiny,
)
from nemocascade.runtime.world import World
from nemocascade.train.checkpointing import Checkpoints
from nemocascade.train.objectives import nll_objective
from nemocascade.train.trainer import Trainer
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Document, PackedBatch, pack_documents

ENGINE = EngineConfig(precision="fp32")
HYBRID = replace(tiny(), pattern="M*E-", vocab_size=96, hidden_size=64, mlp_width=96)
GATED = replace(HYBRID, pattern="*E*-", **QWEN3)
DENSE = replace(GATED, pattern="*-*-", tie_embeddings=True)
EVERY = LoraConfig(
    rank=4,
    alpha=6.0,
    targets=(
        "linear_qkv",
        "linear_proj",
        "in_proj",
        "out_proj",
        "mlp",
        "shared_experts",
        "experts",
    ),
)
PARTS = {"MLP": ("mlp",), "all": ()}
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), ENGINE)
    yield world
    world.close()


def fitting(shape: ModelConfig) -> LoraConfig:
    """Every target that a model of this shape has."""
    kept = {"*": ("linear_qkv", "linear_proj"), "M": ("in_proj", "out_proj"), "-": ("mlp",)}
    kept["E"] = ("experts", *(["shared_experts"] if shape.shared_expert_width else []))
    targets = tuple(t for symbol, found in kept.items() if symbol in shape.pattern for t in found)
    lora = replace(EVERY, targets=targets)
    assert lora.problems(ENGINE, shape) == []
    return lora


def model_of(
    world: World, shape: ModelConfig, lora: LoraConfig | None = None, *, initialise: bool = True
) -> CascadeModel:
    """A model whose adapters, if it has any, are already trained: B is random."""
    moe = MoeTrainingConfig(freeze_router=True, bias_update_rate=0.0)
    config = make_config(
        shape, world.parallel, ENGINE, moe, seed=1, lora=lora, initialise=initialise
    )
    [model] = build_model(world, config, Accelerators())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) * 0.05)
    model.train()
    return model


def adapters(model: torch.nn.Module) -> list[Adapter]:
    return [a for m in model.modules() if isinstance(m, Adapted) for a in m.adapters()]


def batch_of(shape: ModelConfig) -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    documents = [
        Document(
            torch.randint(shape.vocab_size, (n,), generator=generator, dtype=torch.int32),
            torch.arange(n) > 2,
            "x",
        )
        for n in (17, 30, 9)
    ]
    return pack_documents(documents, 60)


def loss_of(model: CascadeModel, shape: ModelConfig) -> Tensor:
    batch = batch_of(shape)
    out = model(Microbatch.from_batch(batch, torch.device("cpu")), nll_objective(batch))
    loss: Tensor = out.loss
    return loss


def write_merged(model: CascadeModel, plain: CascadeModel, world: World) -> None:
    """Fill a model without adapters with the merged weights of another."""
    target = {part.key: part for part in model_parts([plain], world)}
    with torch.no_grad():
        for part in merged_parts([model], world):
            place = target[part.key]
            place.view(place.box).copy_(part.view(part.box))


@pytest.mark.parametrize("shape", [HYBRID, GATED], ids=["hybrid", "gated"])
def test_loss_and_gradients_are_those_of_full_weights(shape: ModelConfig, world: World) -> None:
    """dA = s B^T dW and dB = s dW A^T, where dW is the gradient of W + s B A."""
    lora = fitting(shape)
    model, plain = model_of(world, shape, lora), model_of(world, shape)
    write_merged(model, plain, world)
    train_adapters_only([model])
    loss, expected = loss_of(model, shape), loss_of(plain, shape)
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    loss.backward()
    expected.backward()
    weights = dict(plain.named_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    found = adapters(model)
    assert len(found) == sum({"*": 2, "M": 2, "-": 2}.get(s, 0) for s in shape.pattern) + sum(
        2 + 2 * bool(shape.shared_expert_width) for s in shape.pattern if s == "E"
    )
    for adapter in found:
        full = weights[names[id(adapter.weight)]].grad
        assert full is not None
        pairs = (
            (adapter.a.grad, adapter.scale * adapter.b.transpose(-1, -2) @ full),
            (adapter.b.grad, adapter.scale * full @ adapter.a.transpose(-1, -2)),
        )
        for mine, wanted in pairs:
            assert mine is not None
            assert wanted.norm() > 0
            assert (mine - wanted).norm() <= TOLERANCE * wanted.norm(), names[id(adapter.weight)]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_new_adapter_changes_no_bit(world: World) -> None:
    base = loss_of(model_of(world, HYBRID), HYBRID)
    model = model_of(world, HYBRID, fitting(HYBRID))
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.b.zero_()
    assert torch.equal(loss_of(model, HYBRID), base)
    gated = [model_of(world, GATED, lora) for lora in (None, fitting(GATED))]
    with torch.no_grad():
        for adapter in adapters(gated[1]):
            adapter.b.zero_()
    # The gated activation of the separate operators rounds unlike that of the fused kernel.
    assert loss_of(gated[1], GATED).item() == pytest.approx(loss_of(gated[0], GATED).item(), 1e-6)


def trainer_of(
    world: World, run_dir: Path, lora: LoraConfig, shape: ModelConfig = HYBRID, **engine: Any
) -> Trainer:
    return Trainer(
        world,
        shape,
        engine=replace(ENGINE, **engine),
        moe=MoeTrainingConfig(),
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant", warmup_steps=0),
        accelerators=Accelerators(),
        seed=1,
        run_dir=run_dir,
        lora=lora,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_factors_have_gradients_and_optimizer_state(
    world: World, tmp_path: Path, precision: str
) -> None:
    trainer = trainer_of(world, tmp_path, fitting(HYBRID), precision=precision)
    model = trainer.modules[0]
    before = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    losses = [trainer.train_step([batch_of(HYBRID)]).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    factors = {name for name in before if "lora_" in name}
    after = model.state_dict()
    changed = {name for name, value in before.items() if not same(value, after[name])}
    assert changed == factors
    count = sum(before[name].numel() for name in factors)
    [chunk] = trainer.chunks
    buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
    # Parameters start at multiples of 64 elements.
    assert count <= sum(b.grad_data.numel() for b in buffers) <= count + 64 * len(factors) + 128
    copies = 3 if precision == "bf16" else 2
    assert sum(t.numel() for t in trainer.optimizer.state_tensors()) == copies * count


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right)


MADE = Provenance("sft", 3, {"lora": {"rank": 4}}, {}, {"x": 1.0}, "base", "0" * 64, 128)


@pytest.fixture(scope="module", params=["hybrid", "dense"])
def stored(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CascadeModel]:
    """A folder with `base`, `adapter` and the stage's `artifact`, and the model."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    shape = {"hybrid": HYBRID, "dense": DENSE}[request.param]
    model = model_of(world, shape, fitting(shape))
    base = write_artifact(
        folder / "base", world, [model_of(world, shape)], replace(MADE, parent_digest=None)
    )
    made = replace(MADE, parent=str(base.folder), parent_digest=base.digest)
    write_artifact(folder / "artifact", world, [model], made)
    write_adapter(folder / "adapter", world, [model], made)
    return folder, model


def tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def test_the_artifact_is_merged(stored: tuple[Path, CascadeModel], world: World) -> None:
    """A plain model of the artifact computes what the model with the adapter does."""
    folder, model = stored
    shape = model.config.shape
    plain = model_of(world, shape)
    load_artifact_weights(read_artifact(folder / "artifact"), world, [plain])
    assert loss_of(plain, shape).item() == pytest.approx(loss_of(model, shape).item(), rel=1e-6)
    base = tensors(folder / "base")
    assert not any("lora" in name for name in tensors(folder / "artifact"))
    assert any(not same(t, base[n]) for n, t in tensors(folder / "artifact").items())


def test_merge_makes_the_artifact_that_the_stage_wrote(
    stored: tuple[Path, CascadeModel], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, _ = stored
    call = ["nemocascade", "merge", str(folder / "adapter"), str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", call)
    main()
    assert "weights merged" in capsys.readouterr().out
    merged, wanted = read_artifact(tmp_path / "merged"), read_artifact(folder / "artifact")
    for name in ("model", "precision", "stage", "step", "recipe", "parent_digest"):
        assert getattr(merged, name) == getattr(wanted, name)
    expected = tensors(folder / "artifact")
    found = tensors(tmp_path / "merged")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_loading_a_base_resets_the_adapter_and_an_adapter_fills_it(
    stored: tuple[Path, CascadeModel], world: World
) -> None:
    folder, model = stored
    shape = model.config.shape
    base, adapter = read_artifact(folder / "base"), read_adapter(folder / "adapter")
    other = model_of(world, shape, model.config.lora)
    load_artifact_weights(base, world, [other])
    assert all(not a.b.any() for a in adapters(other))
    load_adapter(adapter, base, world, [other])
    assert torch.equal(loss_of(other, shape), loss_of(model, shape))


def test_a_new_adapter_has_initial_values_where_its_base_is_loaded(
    stored: tuple[Path, CascadeModel], world: World
) -> None:
    folder, model = stored
    shape, lora = model.config.shape, model.config.lora
    full, other = (model_of(world, shape, lora, initialise=drawn) for drawn in (True, False))
    factors = {id(factor) for a in adapters(other) for factor in (a.a, a.b)}
    with torch.no_grad():
        for parameter in other.parameters():
            if id(parameter) not in factors:
                parameter.fill_(float("nan"))
    for built in (full, other):
        load_artifact_weights(read_artifact(folder / "base"), world, [built])
    expected = full.state_dict()
    for name, value in other.state_dict().items():
        assert value is expected[name] is None or torch.equal(value, expected[name]), name


def test_a_run_continues_the_adapter_that_it_names(
    stored: tuple[Path, CascadeModel], world: World, tmp_path: Path
) -> None:
    folder, model = stored
    shape = model.config.shape
    lora = replace(model.config.lora, adapter=str(folder / "adapter"))
    trainer = trainer_of(world, tmp_path, lora, shape)
    source: Any = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), world)
    checkpoints.start(trainer, source, resume=True, init_from=str(folder / "base"))
    [continued] = trainer.modules
    assert torch.equal(loss_of(continued, shape), loss_of(model, shape))


def test_a_swap_gives_the_whole_artifact_and_the_policy_back(
    stored: tuple[Path, CascadeModel], world: World
) -> None:
    """References and teachers run in the policy's model, without its adapter."""
    folder, model = stored
    shape = model.config.shape
    teacher = model_of(world, shape)
    load_artifact_weights(read_artifact(folder / "artifact"), world, [teacher])
    own, wanted = loss_of(model, shape), loss_of(teacher, shape).item()
    swap = WeightSwap(world, [model])
    swap.load("teacher", read_artifact(folder / "artifact"))
    with swap.using("teacher"):
        assert loss_of(model, shape).item() == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(loss_of(model, shape), own)


def test_another_base_is_rejected(
    stored: tuple[Path, CascadeModel], world: World, tmp_path: Path
) -> None:
    folder, model = stored
    adapter = read_adapter(folder / "adapter")
    foreign = folder / "artifact"
    digest, own = read_artifact(foreign).digest[:12], read_artifact(folder / "base").digest[:12]
    rule = f"its base is the artifact {own} .*, and {foreign} is {digest}.*name the artifact"
    with pytest.raises(ConversionError, match=rule):
        merge_adapter(folder / "adapter", tmp_path / "merged", foreign)
    with pytest.raises(CheckpointError, match=rule):
        load_adapter(adapter, read_artifact(foreign), world, [model])
    with pytest.raises(CheckpointError, match="nemocascade merge ADAPTER ARTIFACT"):
        read_artifact(folder / "adapter")
    narrow = model_of(world, model.config.shape, replace(model.config.lora, rank=2))
    with pytest.raises(CheckpointError, match=r"lora.rank is 2 in this run and 4 in the adapter"):
        load_adapter(adapter, read_artifact(folder / "base"), world, [narrow])
    assert not (tmp_path / "merged").exists()


def test_a_damaged_adapter_is_rejected(stored: tuple[Path, CascadeModel], tmp_path: Path) -> None:
    import shutil

    folder, _ = stored
    copy = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = next(copy.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="was altered"):
        merge_adapter(copy, tmp_path / "merged", folder / "base")


def test_factors_of_peft_give_the_merged_linears(
    stored: tuple[Path, CascadeModel], tmp_path: Path
) -> None:
    """PEFT's documented formula, W + alpha / r B A, on the Hugging Face folder of the base."""
    from nemocascade.megatron.convert import export_huggingface

    folder, _ = stored
    export_peft(folder / "adapter", tmp_path / "peft", base_model="org/base")
    for name in ("base", "artifact"):
        export_huggingface(folder / name, tmp_path / name)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6, "LORA")
    assert config["base_model_name_or_path"] == "org/base"
    base, merged = tensors(tmp_path / "base"), tensors(tmp_path / "artifact")
    factors = tensors(tmp_path / "peft")
    adapted = set()
    for name in factors:
        if not name.endswith(".lora_A.weight"):
            continue
        linear = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
        found = base[f"{linear}.weight"] + config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(found, merged[f"{linear}.weight"], rtol=1e-5, atol=1e-6)
        adapted.add(f"{linear}.weight")
        assert any(linear.endswith(target) for target in config["target_modules"])
    changed = {n for n, t in merged.items() if not same(t, base[n])}
    assert adapted == changed


@pytest.mark.integration
def test_peft_loads_the_export(
    stored: tuple[Path, CascadeModel], world: World, tmp_path: Path
) -> None:
    folder, model = stored
    if model.config.shape != DENSE:
        pytest.skip("the hybrid's experts are not linears in transformers")
    peft = installed("peft")
    import transformers

    from nemocascade.megatron.convert import export_huggingface

    export_peft(folder / "adapter", tmp_path / "peft")
    for name in ("base", "artifact"):
        export_huggingface(folder / name, tmp_path / name)
    ids = torch.arange(40)[None]
    load = transformers.AutoModelForCausalLM.from_pretrained
    wanted = load(tmp_path / "artifact", dtype=torch.float32)(ids).logits
    start = load(tmp_path / "base", dtype=torch.float32)
    assert (start(ids).logits - wanted).abs().max() > 1e-3
    found = peft.PeftModel.from_pretrained(start, tmp_path / "peft")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_merged_experts_have_no_place_in_peft(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemocascade.megatron.convert import conversion
    from nemocascade.megatron.convert.names import Style

    shape = replace(GATED, pattern="*E*E")
    model = model_of(world, shape, replace(EVERY, targets=("experts",)))
    write_adapter(tmp_path / "adapter", world, [model], MADE)
    export_peft(tmp_path / "adapter", tmp_path / "one each")
    assert any("experts.0.gate_proj" in name for name in tensors(tmp_path / "one each"))
    style = Style(prefix="model.", merged_experts=True)
    monkeypatch.setattr(conversion, "default_style", lambda *_: style)
    with pytest.raises(ConversionError, match="all experts of a layer in one tensor"):
        export_peft(tmp_path / "adapter", tmp_path / "peft")

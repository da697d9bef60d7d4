"""Hugging Face folders to artifacts and back: bit-identical tensors, equal logits, all checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.against_transformers import (
    NEMOTRON_H,
    QWEN3,
    QWEN3_DENSE,
    QWEN3_MOE,
    TOLERANCE,
    error,
    packed_batch,
    read_packed,
    read_with_transformers,
)
from helpers.transformers_weights import (
    WeightMap,
    from_nemotron_h,
    from_qwen3,
    from_qwen3_moe,
    nemotron_h,
    qwen3,
    qwen3_moe,
    randomise,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nemocascade.megatron.artifact import (
    Provenance,
    artifact_model,
    load_artifact_weights,
    read_artifact,
    write_artifact,
)
from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.convert import (
    ConversionError,
    export_huggingface,
    import_huggingface,
)
from nemocascade.megatron.convert.config import config_of_model
from nemocascade.megatron.convert.names import Family, Style, name_map
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    ModelConfig,
    MoeTrainingConfig,
    ParallelConfig,
)
from nemocascade.runtime.world import World

pytest.importorskip("transformers")

NEMOTRON: Family = "NemotronHForCausalLM"
QWEN: Family = "Qwen3MoeForCausalLM"
DENSE: Family = "Qwen3ForCausalLM"
MODELS: dict[Family, tuple[Callable[[ModelConfig], nn.Module], WeightMap]] = {
    NEMOTRON: (nemotron_h, from_nemotron_h),
    QWEN: (qwen3_moe, from_qwen3_moe),
    DENSE: (qwen3, from_qwen3),
}
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_heads": 4, "head_dim": 8, "expert_width": 16}
SHAPES: dict[str, tuple[Family, ModelConfig]] = {
    **{f"nemotron, {name}": (NEMOTRON, shape) for name, shape in NEMOTRON_H.items()},
    **{f"qwen3, {name}": (QWEN, shape) for name, shape in QWEN3_MOE.items()},
    **{f"dense qwen3, {name}": (DENSE, shape) for name, shape in QWEN3_DENSE.items()},
    "nemotron, short steps": (NEMOTRON, replace(NEMOTRON_H["tiny"], mamba_dt_min=0.02)),
    "qwen3, untied, one kv head": (QWEN, replace(QWEN3, num_kv_heads=1, num_experts=5)),
}
COMPANIONS = {
    "tokenizer.json": b'{"model": {"type": "BPE"}}',
    "tokenizer_config.json": b'{"eos_token": "</s>"}\n',
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"eos_token_id": [2, 11]}',
    "special_tokens_map.json": b"{}",
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def their_model(family: Family, shape: ModelConfig, seed: int = 3) -> nn.Module:
    build, _ = MODELS[family]
    model = build(shape).eval()
    randomise(model, seed)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """A folder as transformers writes it, with files that it would not write itself."""
    if model.lm_head.weight is model.get_input_embeddings().weight and not model._tied_weights_keys:
        # transformers writes no head that it does not know to be tied, and NemotronH's it does not.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder, **options)
    for name, data in COMPANIONS.items():
        (folder / name).write_bytes(data)
    (folder / "modeling_own.py").write_text("raise RuntimeError('remote code was run')\n")
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def settings_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_bytes())
    return {k: v for k, v in config.items() if k not in ("transformers_version", "dtype")}


def assert_same_folder(left: Path, right: Path) -> None:
    """Bit for bit the same tensors and small files, the same settings."""
    a, b = tensors_of(left), tensors_of(right)
    assert sorted(a) == sorted(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value.view(torch.uint8), b[name].view(torch.uint8)), name
    for name, data in COMPANIONS.items():
        assert (right / name).read_bytes() == data
    assert settings_of(left) == settings_of(right)


def load_ours(folder: Path, world: World) -> CascadeModel:
    artifact = read_artifact(folder)
    engine = EngineConfig(precision="fp32")
    moe = MoeTrainingConfig(load_balance="none")
    config = make_config(artifact_model(artifact), world.parallel, engine, moe, seed=0)
    [model] = build_model(world, config, Accelerators())
    load_artifact_weights(artifact, world, [model])
    return model


@pytest.mark.parametrize("case", SHAPES)
def test_logits_and_round_trip(case: str, world: World, tmp_path: Path) -> None:
    """A folder that transformers wrote gives its logits, and comes back as it was."""
    family, shape = SHAPES[case]
    theirs = their_model(family, shape)
    source = save(theirs, tmp_path / "hf", max_shard_size="300KB")
    report = import_huggingface(source, tmp_path / "artifact")
    assert report.rounded == ()
    assert report.left_behind == ("modeling_own.py",)
    assert artifact_model(read_artifact(tmp_path / "artifact")) == shape
    ours = load_ours(tmp_path / "artifact", world)
    batch = packed_batch(shape, seed=5)
    _, to_ours = MODELS[family]
    expected = read_with_transformers(theirs, shape, batch, to_ours)
    found = read_packed(ours, batch, world)
    assert error(found.logits, expected.logits) <= TOLERANCE
    export_huggingface(tmp_path / "artifact", tmp_path / "back", shard_bytes=200_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_folder(source, tmp_path / "back")


@pytest.mark.parametrize("case", ["nemotron, tiny", "qwen3, tied", "dense qwen3, tied"])
def test_transformers_reads_what_we_write(case: str, world: World, tmp_path: Path) -> None:
    """From an artifact that no folder ever was, in a new folder."""
    import transformers

    family, shape = SHAPES[case]
    engine = EngineConfig(precision="fp32")
    config = make_config(shape, world.parallel, engine, MoeTrainingConfig(), seed=1)
    [model] = build_model(world, config, Accelerators())
    write_artifact(tmp_path / "artifact", world, [model], Provenance("sft", 1, {}, {}, {}))
    export_huggingface(tmp_path / "artifact", tmp_path / "hf")
    theirs = getattr(transformers, family).from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs.eval()
    batch = packed_batch(shape, seed=6)
    _, to_ours = MODELS[family]
    expected = read_with_transformers(theirs, shape, batch, to_ours)
    assert error(read_packed(model, batch, world).logits, expected.logits) <= TOLERANCE


@pytest.mark.parametrize(
    "case", ["nemotron, tiny", "qwen3, dense SwiGLU layers", "dense qwen3, tied"]
)
@pytest.mark.parametrize("through", ["auto", "fp32"])
def test_bf16_comes_back_bit_for_bit(case: str, through: str, tmp_path: Path) -> None:
    family, shape = SHAPES[case]
    theirs = their_model(family, shape).to(torch.bfloat16)
    source = save(theirs, tmp_path / "hf")
    report = import_huggingface(source, tmp_path / "artifact", precision=through)  # type: ignore[arg-type]
    assert report.precision == ("bf16" if through == "auto" else "fp32")
    assert read_artifact(tmp_path / "artifact").precision == report.precision
    export_huggingface(tmp_path / "artifact", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")


def test_published_names_and_tensors_for_each_expert(tmp_path: Path) -> None:
    """The other spelling of the same folder: "backbone.", one tensor an expert or one a layer."""
    _, shape = SHAPES["nemotron, one group, one kv head, k of an odd E"]
    source = save(their_model(NEMOTRON, shape), tmp_path / "hf")
    import_huggingface(source, tmp_path / "artifact")
    weights = tensors_of(source)
    separate = any(".experts.0." in name for name in weights)
    other = tmp_path / "other"
    other.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    style = Style(prefix="backbone.", merged_experts=separate)
    names = name_map(NEMOTRON, shape, style)
    renamed: dict[str, Tensor] = {}
    for name in names.theirs:
        plain = name.replace("backbone.", "model.", 1)
        spelled = name if name in weights else plain
        if spelled in weights:
            renamed[name] = weights[spelled]
            continue
        stem = spelled if any(n.startswith(spelled + ".") for n in weights) else name
        if separate:
            head, _, tail = stem.rpartition(".")
            head = head if f"{head}.0.{tail}.weight" in weights else f"backbone{head[5:]}"
            renamed[name] = torch.stack(
                [weights[f"{head}.{e}.{tail}.weight"] for e in range(shape.num_experts)]
            )
    save_file(renamed, other / "model.safetensors")
    import_huggingface(other, tmp_path / "second")
    first, second = (read_artifact(tmp_path / n) for n in ("artifact", "second"))
    assert first.model == second.model
    a, b = (tensors_of(x.folder) for x in (first, second))
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    export_huggingface(tmp_path / "second", tmp_path / "back")
    assert_same_folder(other, tmp_path / "back")


def drop(weights: dict[str, Tensor]) -> None:
    del weights[next(n for n in sorted(weights) if n.endswith("A_log"))]


def add(weights: dict[str, Tensor]) -> None:
    weights["mtp.layers.0.norm.weight"] = torch.zeros(3)


def misshape(weights: dict[str, Tensor]) -> None:
    name = next(n for n in sorted(weights) if n.endswith("norm_f.weight"))
    weights[name] = torch.zeros(7)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    _, shape = SHAPES["nemotron, tiny"]
    source = save(their_model(NEMOTRON, shape), tmp_path / "hf")
    weights = tensors_of(source)
    for fault in (drop, add, misshape):
        fault(weights)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        import_huggingface(source, tmp_path / "artifact")
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "A_log is missing" in text
    assert "mtp.layers.0.norm.weight [3] is unknown" in text
    assert "norm_f.weight has shape [7], the model needs [128]" in text
    assert not (tmp_path / "artifact").exists()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def test_all_unknown_settings_are_named_at_once(tmp_path: Path) -> None:
    _, shape = SHAPES["nemotron, tiny"]
    source = save(their_model(NEMOTRON, shape), tmp_path / "hf")
    change_config(source, attention_bias=True, mlp_hidden_act="gelu", moe_latent_size=64)
    with pytest.raises(ConversionError) as caught:
        import_huggingface(source, tmp_path / "artifact")
    assert len(caught.value.problems) == 3
    change_config(source, architectures=["LlamaForCausalLM"])
    with pytest.raises(ConversionError, match="LlamaForCausalLM"):
        import_huggingface(source, tmp_path / "artifact")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": 5}, r"architectures\(5\) .* of another type"),
        ({"architectures": [["x"]]}, "architectures"),
        ({"layers_block_type": [5, {}]}, "layers_block_type"),
        ({"layers_block_type": None, "hybrid_override_pattern": 5}, "hybrid_override_pattern"),
        ({"time_step_limit": [0]}, "time_step_limit"),
        ({"time_step_limit": [[], "x"]}, "time_step_limit"),
        ({"time_step_limit": [{}, {}]}, "time_step_limit"),
        ({"hidden_size": "128"}, "hidden_size"),
        ({"hidden_size": 10**30}, "must fit in 64 bits"),
        ({"norm_topk_prob": "yes"}, "router_normalize cannot be 'yes'"),
        ({"layer_norm_epsilon": [1]}, "norm_eps cannot be"),
        ({"n_routed_experts": 2**40}, "at most 131072 together"),
        ({"num_attention_heads": 2**40, "num_key_value_heads": 2**40}, "at most 131072 together"),
        ({"architectures": [QWEN], "num_hidden_layers": 2**40}, r"num_hidden_layers\(1099"),
        ({"architectures": [QWEN], "rope_scaling": 5}, "rope_scaling"),
        ({"architectures": [QWEN], "mlp_only_layers": ["a"]}, "mlp_only_layers"),
        ({"architectures": [QWEN], "decoder_sparse_step": "a"}, "decoder_sparse_step"),
    ],
    ids=str,
)
def test_settings_of_another_type_or_size_are_rejected(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family, shape = SHAPES["nemotron, tiny"]
    (tmp_path / "config.json").write_text(json.dumps(config_of_model(shape, family)))
    change_config(tmp_path, **changes)
    with pytest.raises(ConversionError, match=message):
        import_huggingface(tmp_path, tmp_path / "artifact")


@pytest.mark.parametrize("content", ["[" * 3000, '{"weight_map": 5}', '{"weight_map": {"a": [1]}}'])
def test_a_broken_index_of_weights_is_rejected(content: str, tmp_path: Path) -> None:
    family, shape = SHAPES["nemotron, tiny"]
    (tmp_path / "config.json").write_text(json.dumps(config_of_model(shape, family)))
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConversionError, match=r"model.safetensors.index.json"):
        import_huggingface(tmp_path, tmp_path / "artifact")


def test_weights_that_overlap_are_rejected(tmp_path: Path) -> None:
    _, shape = SHAPES["nemotron, tiny"]
    source = save(their_model(NEMOTRON, shape), tmp_path / "hf")
    file = source / "model.safetensors"
    data = file.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    one, other = [n for n in header if n.endswith("mixer.dt_bias")][:2]
    header[other]["data_offsets"] = header[one]["data_offsets"]
    made = json.dumps(header).encode()
    file.write_bytes(len(made).to_bytes(8, "little") + made + data[size:])
    with pytest.raises(ConversionError, match=r"model.safetensors: tensor .* cannot be read"):
        import_huggingface(source, tmp_path / "artifact")


def test_rounding_must_be_asked_for(tmp_path: Path) -> None:
    _, shape = SHAPES["nemotron, tiny"]
    source = save(their_model(NEMOTRON, shape).to(torch.bfloat16), tmp_path / "hf")
    weights = tensors_of(source)
    name = next(n for n in weights if n.endswith("norm_f.weight"))
    weights[name] = weights[name].float()
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConversionError, match=r"norm_f\.weight is F32"):
        import_huggingface(source, tmp_path / "artifact")
    report = import_huggingface(source, tmp_path / "artifact", precision="bf16")
    assert report.rounded == (name,)


def test_a_head_that_is_not_tied_is_rejected(tmp_path: Path) -> None:
    _, shape = SHAPES["nemotron, attention first, dense MLP, tied"]
    source = save(their_model(NEMOTRON, shape), tmp_path / "hf")
    weights = tensors_of(source)
    embedding = next(n for n in weights if n.endswith("embeddings.weight"))
    weights["lm_head.weight"] = weights[embedding] + 1
    for path in source.glob("model*"):
        path.unlink()
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs"):
        import_huggingface(source, tmp_path / "artifact")


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A safetensors file with a changed header; `change` may return another one."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    found = change(header)
    text = found if isinstance(found, bytes) else json.dumps(found or header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def spoil(header: dict[str, Any], **changes: Any) -> None:
    header["lm_head.weight"].update(changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4], "has .* bytes, its header says"),
        (lambda data: b"\xff" * 8 + data[8:], "longer than the file"),
        (lambda data: with_header(data, lambda h: [h]), "its header is not a JSON object"),
        (lambda data: with_header(data, lambda h: b"[" * 3000), "cannot be read"),
        (lambda data: with_header(data, lambda h: h.update(a=5)), "describes no tensor as 'a'"),
        (lambda data: with_header(data, lambda h: spoil(h, shape="ab")), "describes no tensor"),
        (lambda data: with_header(data, lambda h: spoil(h, shape=[-1, 2])), "describes no tensor"),
        (lambda data: with_header(data, lambda h: spoil(h, shape=[1.5])), "describes no tensor"),
        (lambda data: with_header(data, lambda h: spoil(h, shape=[10**30])), "describes no tensor"),
        (lambda data: with_header(data, lambda h: spoil(h, dtype=[1])), "describes no tensor"),
        (lambda data: with_header(data, lambda h: spoil(h, data_offsets=[0])), "no tensor"),
        (lambda data: with_header(data, lambda h: spoil(h, dtype="U8")), "describes no tensor"),
    ],
)
def test_damaged_files_are_rejected(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    _, shape = SHAPES["nemotron, all experts"]
    source = save(their_model(NEMOTRON, shape), tmp_path / "hf")
    path = source / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConversionError, match=message):
        import_huggingface(source, tmp_path / "artifact")

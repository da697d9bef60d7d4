"""Folders of weights and of runs: Hugging Face models, artifacts, reports, settings."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fuzz.harness import Target
from fuzz.mutations import Choices, json_bytes, mutated, spoiled
from safetensors.torch import save

from nemocascade.cascade.comparison import compare
from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.lineage import report_text
from nemocascade.cascade.records import read_record
from nemocascade.cascade.report.read import read_run
from nemocascade.megatron.artifact import artifact_model, read_artifact, verify_artifact
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.megatron.checkpoint.folder import digest_of, read_index_json, read_manifest
from nemocascade.megatron.checkpoint.index import index_from_json
from nemocascade.megatron.checkpoint.streaming import FolderStream
from nemocascade.megatron.convert import ConversionError, export_huggingface, import_huggingface
from nemocascade.megatron.convert.config import config_of_model
from nemocascade.megatron.convert.names import Family, Style, name_map
from nemocascade.recipe import ModelConfig, UserError
from nemocascade.recipe.changes import as_json
from nemocascade.recipe.commands import DiffSettings
from nemocascade.recipe.sft import SftRecipe
from nemocascade.stages.scoring import read_scores

Files = dict[str, bytes]

ALONE: Any = SimpleNamespace(
    rank=0, size=1, device=torch.device("cpu"), all_gather_object=lambda value: [value]
)
"""A world without process groups."""

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "vocab_size": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "mamba_heads": 2,
    "mamba_head_dim": 4,
    "mamba_state": 4,
    "mamba_groups": 1,
    "num_experts": 2,
    "experts_per_token": 1,
    "expert_width": 4,
    "mlp_width": 8,
}
SHAPES: tuple[tuple[Family, ModelConfig], ...] = (
    (
        "NemotronHForCausalLM",
        ModelConfig(pattern="M*E-", shared_expert_width=4, tie_embeddings=True, **SIZES),
    ),
    (
        "Qwen3MoeForCausalLM",
        ModelConfig(
            pattern="*E*-",
            activation="swiglu",
            rope=True,
            qk_norm=True,
            router_score="softmax",
            router_bias=False,
            router_scale=1.0,
            shared_expert_width=0,
            **SIZES,
        ),
    ),
)
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"


@functools.cache
def _huggingface_seeds() -> tuple[Files, ...]:
    """Folders of both families; the second one has two shards."""
    found = []
    for number, (family, shape) in enumerate(SHAPES):
        style = Style(prefix="model.", stored_head=shape.tie_embeddings)
        tensors = {
            name: torch.zeros(size, dtype=torch.bfloat16)
            for name, size in name_map(family, shape, style).theirs.items()
        }
        files = {"config.json": json.dumps(config_of_model(shape, family)).encode()}
        names = sorted(tensors)
        parts = (
            {WEIGHTS: names}
            if not number
            else {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        )
        for file, part in parts.items():
            files[file] = save({name: tensors[name] for name in part}, {"format": "pt"})
        if number:
            placed = {name: file for file, part in parts.items() for name in part}
            files[SHARDS] = json.dumps({"metadata": {}, "weight_map": placed}).encode()
        found.append(files)
    return tuple(found)


def _header_changed(choices: Choices, data: bytes) -> bytes:
    """A safetensors file with a changed header; its length is right in most cases."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json_bytes(mutated(choices, [header]))
    length = choices.of((len(text), len(text), len(text), 0, 2**63, 2**64 - 1, len(text) + 5))
    return length.to_bytes(8, "little") + text + data[8 + size :]


def _json_changed(choices: Choices, data: bytes) -> bytes:
    return spoiled(choices, json_bytes(mutated(choices, [json.loads(data)])))


def _changed(choices: Choices, files: Mapping[str, bytes]) -> Files:
    """The folder with one or two of its files changed."""
    made = dict(files)
    for _ in range(1 + choices.below(2)):
        name = choices.of(sorted(files))
        if name.endswith(".safetensors"):
            made[name] = _header_changed(choices, files[name])
        elif name.endswith((".json", ".jsonl")):
            made[name] = _json_changed(choices, files[name])
        if choices.chance(30):
            del made[name]
        elif choices.chance(30):
            made[name] = spoiled(choices, made[name])
    return made


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _huggingface(choices: Choices) -> Files:
    return _changed(choices, choices.of(_huggingface_seeds()))


def _import(files: Files, folder: Path) -> None:
    _write(files, folder / "source")
    import_huggingface(folder / "source", folder / "artifact")
    verify_artifact(folder / "artifact")


@functools.cache
def _artifact_seeds() -> tuple[Files, ...]:
    found = []
    for files in _huggingface_seeds():
        with tempfile.TemporaryDirectory() as folder:
            _write(files, Path(folder, "source"))
            import_huggingface(Path(folder, "source"), Path(folder, "artifact"))
            found.append({p.name: p.read_bytes() for p in Path(folder, "artifact").iterdir()})
    return tuple(found)


def _artifact(choices: Choices) -> Files:
    """A changed artifact. In most cases its hashes and its digest are made right again."""
    files = _changed(choices, choices.of(_artifact_seeds()))
    if choices.chance(4):
        return files
    try:
        manifest = json.loads(files["manifest.json"])
        for name, record in manifest["files"].items():
            if name in files and record:
                record["sha256"] = hashlib.sha256(files[name]).hexdigest()
                record["bytes"] = len(files[name])
        manifest.pop("digest", None)
        manifest["digest"] = digest_of(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return files
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def _open(files: Files, folder: Path) -> None:
    _write(files, folder / "artifact")
    compare(DiffSettings(str(folder / "artifact"), str(folder / "artifact")))
    artifact = read_artifact(folder / "artifact")
    artifact_model(artifact)
    assert artifact.tokenizer_path is None or artifact.tokenizer_path.is_file()
    manifest = read_manifest(artifact.folder, "artifact")
    index = index_from_json(read_index_json(artifact.folder, manifest), manifest["files"])
    stream = FolderStream(artifact.folder, ALONE, manifest["files"], index)
    if problems := stream.open() or stream.fill([], [[]]):
        raise CheckpointError(artifact.folder, problems)
    export_huggingface(folder / "artifact", folder / "exported")


SCORES = {
    "version": 1,
    "digest": "ab",
    "settings": "cd",
    "seconds": 1.5,
    "scores": {"math": {"score": 0.5, "tasks": 4, "errors": 0}},
    "samples": {
        "math": [{"prompt": [{"role": "user", "content": "1+1"}], "response": "2", "reward": 1.0}]
    },
}
RECORD = {
    "version": 1,
    "key": "k",
    "inputs": {"recipe": {}},
    "status": "done",
    "artifact_digest": "ab",
    "seconds": 2.0,
    "tokens": 100,
    "teachers": {"math": {"stage": "sft", "artifact": "a", "score": 0.5, "pinned": False}},
}
CASCADE = {
    "version": 1,
    "stages": [
        {
            "name": "sft",
            "kind": "sft",
            "start": "",
            "side": False,
            "status": "done",
            "run_dir": "stages/sft",
            "artifact_digest": "ab",
            "seconds": 2.0,
            "tokens": 100,
            "key": "k",
        }
    ],
    "teachers": RECORD["teachers"],
    "alarms": [
        {
            "domain": "math",
            "stage": "sft",
            "from_stage": "sft",
            "before": 0.5,
            "after": 0.25,
            "drop": 25.0,
        }
    ],
    "settings": {"run_dir": "a", "stages": [{"name": "sft", "recipe": {"steps": 2}}]},
    "versions": {"python": "3"},
}
METRICS = b'{"step": 1, "loss": 2.5, "tokens": 10}\n{"step": 2, "loss": NaN, "tokens": 20}\n'
RUN: Files = {
    "cascade.json": json.dumps(CASCADE).encode(),
    "stages/sft/scores.json": json.dumps(SCORES).encode(),
    "stages/sft/stage.json": json.dumps(RECORD).encode(),
    "stages/sft/recipe.json": json.dumps(as_json(SftRecipe())).encode(),
}
LINES: Files = {
    "stages/sft/metrics.jsonl": METRICS,
    "stages/sft/rollouts/step_00000001.jsonl": json.dumps(
        {"domain": "math", "reward": 1.0, **SCORES["samples"]["math"][0]}  # type: ignore[index]
    ).encode(),
}


def _run(choices: Choices) -> Files:
    files = _changed(choices, RUN)
    for name, data in LINES.items():
        rows = [mutated(choices, [json.loads(line)]) for line in data.splitlines()]
        files[name] = spoiled(choices, b"\n".join(map(json_bytes, rows)))
    return files


def _report(files: Files, folder: Path) -> None:
    """Read a run folder in every way that there is; each may reject it."""
    _write(files, folder)
    stage = folder / "stages" / "sft"
    for read in (
        lambda: read_run(folder),
        lambda: report_text(folder),
        lambda: read_record(stage),
        lambda: read_scores(stage / "scores.json"),
        lambda: compare(DiffSettings(str(folder), str(stage))),
        lambda: compare(DiffSettings(str(stage / "recipe.json"), str(folder))),
    ):
        try:
            read()
        except UserError:
            continue


TARGETS = (
    Target("Hugging Face folder", _huggingface, _import, (ConversionError,), share=8),
    Target("artifact", _artifact, _open, (CheckpointError, ConversionError, UserError), share=8),
    Target("run folder", _run, _report, (ReportError,), share=6),
)

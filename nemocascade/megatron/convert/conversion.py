"""Import of Hugging Face folders as artifacts, and export of artifacts as such folders.

No process group and no model is created, and no code of the folder runs. Names, shapes and dtypes
are compared first; then the tensors are streamed from file to file in chunks.
An imported artifact keeps its folder's other settings in `huggingface.json`, so that the exported
folder is bit-identical.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemocascade.megatron.artifact import (
    KIND,
    ORIGIN,
    TOKENIZER_COMPANIONS,
    artifact_model,
    read_artifact,
)
from nemocascade.megatron.checkpoint.boxes import whole
from nemocascade.megatron.checkpoint.errors import CheckpointError
from nemocascade.megatron.checkpoint.folder import (
    flush,
    fresh_folder,
    hash_problems,
    read_index_json,
    read_manifest,
    write_durably,
)
from nemocascade.megatron.checkpoint.index import DTYPES, Index, index_from_json
from nemocascade.megatron.checkpoint.state import MODEL
from nemocascade.megatron.checkpoint.storage import Outgoing, Reader, write_boxes
from nemocascade.megatron.checkpoint.weights import describe_shape
from nemocascade.megatron.checkpoint.writing import finish_folder
from nemocascade.megatron.convert.config import (
    config_of_model,
    families_of_model,
    model_of_config,
)
from nemocascade.megatron.convert.config_fields import FAMILIES, ConfigError, family_of
from nemocascade.megatron.convert.folder import (
    CONFIG,
    SHARD_BYTES,
    TOKENIZERS,
    WEIGHTS,
    ConversionError,
    json_bytes,
    main_dtype,
    read_index,
    read_json,
    split_shards,
    write_weights,
)
from nemocascade.megatron.convert.names import Family, NameMap, Style, default_style, name_map
from nemocascade.megatron.convert.stream import differences, equal_tensors, outgoing
from nemocascade.recipe import ModelConfig, ParallelConfig
from nemocascade.runtime.stored_records import record_of
from nemocascade.types import CONVERTED_FILE_BYTES, Artifact

Precision = Literal["auto", "fp32", "bf16"]
STAGE = "convert"
# Float32 at any model precision: the scan's decays and the routers' choice need it.
_ALWAYS_FLOAT32 = (".A_log", ".dt_bias", ".D", ".router.expert_bias")
_DTYPE_OF = {"fp32": "F32", "bf16": "BF16"}
_PRECISION_OF = {dtype: name for name, dtype in _DTYPE_OF.items()}
_CONFIG_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Settings of config.json that describe the file, not the model.
_VOLATILE = ("auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Serving:
    """Files of an exported folder, by name, and settings of its config.json, which the tokenizer
    and the training determine."""

    files: Mapping[str, bytes]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion. tensors, num_bytes: written. rounded: tensors that lost bits.
    left_behind: files of the source that were not copied."""

    folder: Path
    family: Family
    precision: str
    tensors: int
    num_bytes: int
    rounded: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class OriginDtypes:
    """Dtypes of a folder: that of most bytes, and those of the other tensors by name."""

    main: str
    others: dict[str, str]


@dataclass(frozen=True)
class Origin:
    """The content of `huggingface.json`. config: the folder's config.json."""

    config: dict[str, Any]
    style: Style
    dtypes: OriginDtypes


def import_huggingface(source: Path, target: Path, *, precision: Precision = "auto") -> Conversion:
    """Write the artifact `target` from the Hugging Face folder `source`.

    precision: dtype of the artifact's weights; "auto" is that of most of the folder's bytes, and
    rounding the others is an error.

    Raises ConversionError listing every setting our model does not have, every tensor that is
    missing, unknown or of another shape, and every one that "auto" would round.
    """
    config = read_json(source / CONFIG)
    try:
        family, shape = family_of(config), model_of_config(config)
    except ConfigError as error:
        raise ConversionError(source, error.problems) from None
    index = read_index(source)
    style = _style_of(family, index, shape)
    names = name_map(family, shape, style)
    problems = differences(index, names.theirs)
    if problems:
        raise ConversionError(source, problems)
    chosen = _precision_of_folder(source, index, precision)
    dtypes = {
        name: "F32" if name.endswith(_ALWAYS_FLOAT32) else _DTYPE_OF[chosen] for name in names.ours
    }
    rounded = sorted(
        {m.theirs for m in names.moves if _loses(index[m.theirs].dtype, dtypes[m.ours])}
    )
    if rounded and precision == "auto":
        asked = f"to round them to {chosen}, say --precision {chosen}"
        raise ConversionError(
            source, [f"{n} is {index[n].dtype}, most others are not: {asked}" for n in rounded]
        )
    tokenizer, documents = _documents(source, config, index, style)
    fields = {
        **describe_shape(shape, chosen, ParallelConfig(), 1),
        "stage": STAGE,
        "step": 0,
        "recipe": {},
        "data": {"source": source.name, "family": family},
        "scores": {},
        "parent": None,
        "parent_digest": None,
        "tokenizer": tokenizer,
        "template": None,
        "context_length": int(config.get("max_position_embeddings") or 0),
    }
    with Reader(source, index, error=ConversionError) as reader:
        _check_copies(source, names, reader)
        tensors = outgoing(names, reader, dtypes, to_ours=True)
        written = store_artifact(target, tensors, documents, fields)
    carried = {*documents, CONFIG, *(p.file for e in index.values() for p in e.shards)}
    left = {p.name for p in source.iterdir() if not p.name.startswith(".")} - carried
    left.discard(f"{WEIGHTS}.index.json")
    return Conversion(
        target, family, chosen, len(tensors), written, tuple(rounded), tuple(sorted(left))
    )


def _check_copies(source: Path, names: NameMap, reader: Reader) -> None:
    """Raise ConversionError if a stored copy of a tied tensor differs from the tensor."""
    for copy in names.copies:
        embedding = next(m.ours for m in names.moves if m.theirs == copy)
        first = next(m.theirs for m in names.moves if m.ours == embedding)
        if not equal_tensors(reader, copy, first):
            problem = f"{copy} differs from {first}, but config.json says they are tied"
            raise ConversionError(source, [problem])


def export_huggingface(
    source: Path,
    target: Path,
    *,
    precision: Precision = "auto",
    family: Family | Literal["auto"] = "auto",
    shard_bytes: int = SHARD_BYTES,
    serving: Serving | None = None,
) -> Conversion:
    """Write the Hugging Face folder `target` from the artifact `source`, of any layout.

    precision: dtype of the folder's weights; "auto" rounds nothing: an imported artifact gets its
    folder's dtypes back, others keep their own. family: "auto" is the one the artifact was
    imported from, or the first of `FAMILIES` that can express the model. shard_bytes: size of a
    weights file. serving: files and settings of the tokenizer. The folder of an artifact that was
    imported and not trained gets only the missing ones.

    Raises ConversionError if `target` exists, if the family cannot express the model, or listing
    every tensor that is missing, unknown or of another shape; CheckpointError if the artifact is
    damaged.
    """
    artifact, index = open_artifact(source)
    shape = artifact_model(artifact)
    origin = _read_origin(source)
    chosen_family, names = names_to_write(source, shape, family)
    problems = differences(index, names.ours, MODEL)
    if target.exists():
        problems.append(f"{target} exists already: name a folder that does not")
    if problems:
        raise ConversionError(source, problems)
    chosen = artifact.precision if precision == "auto" else precision
    stored = {name.removeprefix(MODEL): entry for name, entry in index.items()}
    dtypes = _their_dtypes(names, stored, artifact, origin, precision)
    rounded = sorted(
        {m.theirs for m in names.moves if _loses(stored[m.ours].dtype, dtypes[m.theirs])}
    )
    files = _tokenizer_files(source)
    files.pop(ORIGIN, None)
    trained = artifact.stage != STAGE
    settings = _config(shape, chosen_family, origin, dtypes, trained)
    given = Serving({}, {}) if serving is None else serving
    files = {**files, **given.files} if trained else {**given.files, **files}
    settings = {**settings, **given.settings} if trained else {**given.settings, **settings}
    files[CONFIG] = json_bytes(settings)
    temporary = fresh_folder(target)
    with Reader(source, index) as reader:
        tensors = outgoing(names, reader, dtypes, to_ours=False, source_prefix=MODEL)
        write_weights(temporary, tensors, shard_bytes)
    for name, data in files.items():
        write_durably(temporary / name, data)
    flush(temporary)
    temporary.rename(target)
    flush(target.parent)
    size = sum(t.num_bytes for t in tensors)
    return Conversion(target, chosen_family, chosen, len(tensors), size, tuple(rounded))


def names_to_write(
    source: Path, shape: ModelConfig, family: Family | Literal["auto"]
) -> tuple[Family, NameMap]:
    """The family and the names of a folder to be written. source: an artifact or an adapter, which
    may have the settings of an imported folder. family: as in `export_huggingface`.

    Raises ConversionError if the family cannot express the model.
    """
    origin = _read_origin(source)
    chosen = _family(source, shape, origin, family)
    return chosen, name_map(chosen, shape, _style_of_origin(chosen, shape, origin))


def _read_origin(source: Path) -> Origin | None:
    """Settings of the folder that an artifact was imported from; None for other artifacts.

    Raises ConversionError if they are damaged.
    """
    if not (source / ORIGIN).is_file():
        return None
    try:
        origin = record_of(Origin, read_json(source / ORIGIN))
        model_of_config(origin.config)
        if unknown := {origin.dtypes.main, *origin.dtypes.others.values()} - DTYPES.keys():
            raise ValueError(f"{min(unknown)[:80]!r} is not a dtype")
    except ValueError as error:
        raise ConversionError(source, [f"{ORIGIN} is damaged: {error}"]) from None
    return origin


def _style_of(family: Family, index: Index, shape: ModelConfig) -> Style:
    prefixes = ("backbone.", "model.") if family == "NemotronHForCausalLM" else ("model.",)
    prefix = next((p for p in prefixes if any(n.startswith(p) for n in index)), prefixes[0])
    return Style(
        prefix=prefix,
        merged_experts=any(
            n.endswith((".experts.up_proj", ".experts.gate_up_proj")) for n in index
        ),
        stored_head=shape.tie_embeddings and "lm_head.weight" in index,
    )


def _style_of_origin(family: Family, shape: ModelConfig, origin: Origin | None) -> Style:
    if origin and family_of(origin.config) == family:
        return origin.style
    return default_style(family, shape)


def _precision_of_folder(source: Path, index: Index, precision: Precision) -> str:
    if precision != "auto":
        return precision
    dtype = main_dtype(index)
    if dtype not in _PRECISION_OF:
        raise ConversionError(source, [f"its weights are {dtype}: say --precision bf16 or fp32"])
    return _PRECISION_OF[dtype]


def _their_dtypes(
    names: NameMap,
    stored: Index,
    artifact: Artifact,
    origin: Origin | None,
    precision: Precision,
) -> dict[str, str]:
    if precision != "auto":
        fixed = {name for name in names.theirs if name.endswith(".e_score_correction_bias")}
        return {n: "F32" if n in fixed else _DTYPE_OF[precision] for n in names.theirs}
    if artifact.stage == STAGE and origin:
        other, main = origin.dtypes.others, origin.dtypes.main
        return {n: other.get(n, main) for n in names.theirs}
    made_of = {move.theirs: move.ours for move in names.moves}
    return {name: stored[made_of[name]].dtype for name in names.theirs}


def _loses(source: str, target: str) -> bool:
    return source != target and not DTYPES[target].itemsize > DTYPES[source].itemsize


def _documents(
    source: Path, config: dict[str, Any], index: Index, style: Style
) -> tuple[str | None, dict[str, bytes]]:
    """The tokenizer's name in the artifact, and the small files: tokenizer, its companions, and
    the folder's other settings."""
    tokenizer = next((source / name for name in TOKENIZERS if (source / name).is_file()), None)
    files = _tokenizer_files(source)
    main = main_dtype(index)
    others = {n: e.dtype for n, e in sorted(index.items()) if e.dtype != main}
    files[ORIGIN] = json_bytes(asdict(Origin(config, style, OriginDtypes(main, others))))
    return None if tokenizer is None else tokenizer.name, files


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    names = (*TOKENIZERS, *TOKENIZER_COMPANIONS)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def store_artifact(
    target: Path, tensors: list[Outgoing], documents: dict[str, bytes], fields: dict[str, Any]
) -> int:
    """Write the folder as a run of one rank would, in files of CONVERTED_FILE_BYTES; returns
    its bytes."""
    temporary = fresh_folder(target)
    # The widest types first, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize)
    written = []
    for number, shard in enumerate(split_shards(ordered, CONVERTED_FILE_BYTES)):
        name = f"rank_{number:05d}.safetensors"
        named = [replace(t, name=MODEL + t.name) for t in shard]
        places = [(t.shape, whole(t.shape)) for t in shard]
        written.append(write_boxes(temporary, name, named, places))
    _, problems = finish_folder(temporary, target, KIND, written, documents, fields)
    if problems:
        raise ConversionError(target, problems)
    return sum(w.size for w in written)


def open_artifact(source: Path) -> tuple[Artifact, Index]:
    """Open the artifact and its index after checking every file's hash."""
    artifact = read_artifact(source)
    manifest = read_manifest(source, KIND)
    weights = [name for name in manifest["files"] if name.endswith(".safetensors")]
    if problems := hash_problems(source, manifest, weights):
        raise CheckpointError(source, problems)
    return artifact, index_from_json(read_index_json(source, manifest), manifest["files"])


def _family(source: Path, shape: ModelConfig, origin: Origin | None, asked: str) -> Family:
    try:
        able = families_of_model(shape)
        if asked != "auto":
            if asked not in FAMILIES:
                raise ConfigError([f"family({asked}) is unknown: use {', '.join(FAMILIES)}"])
            config_of_model(shape, asked)
            return asked
    except ConfigError as error:
        raise ConversionError(source, error.problems) from None
    known = family_of(origin.config) if origin else able[0]
    return known if known in able else able[0]


def _config(
    shape: ModelConfig,
    family: Family,
    origin: Origin | None,
    dtypes: Mapping[str, str],
    trained: bool,
) -> dict[str, Any]:
    """The folder's own config.json if it describes the same model, otherwise a new one."""
    made = config_of_model(shape, family)
    found = list(dtypes.values())
    main = _PRECISION_OF.get(max(sorted(set(found)), key=found.count), "fp32")
    made["dtype"] = _CONFIG_DTYPES[main]
    if not origin or family_of(origin.config) != family:
        return made
    theirs = {k: v for k, v in origin.config.items() if k not in _VOLATILE}
    if model_of_config(theirs) == shape and not trained:
        return {**theirs, "dtype": made["dtype"]}
    # The model's settings, as it was trained, override the folder's.
    return {**theirs, **made}

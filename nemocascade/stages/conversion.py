"""Commands that write the weights of one folder to another: `convert` and `merge`."""

from __future__ import annotations

from pathlib import Path

from nemocascade.data.serving import serving_of
from nemocascade.megatron.adapter_artifact import is_adapter
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint.folder import MANIFEST
from nemocascade.megatron.convert import (
    Conversion,
    Serving,
    export_huggingface,
    export_peft,
    import_huggingface,
    merge_adapter,
)
from nemocascade.recipe.commands import ConvertSettings, MergeSettings


def run_convert(settings: ConvertSettings) -> None:
    """Convert as the settings say, and print what was written."""
    report = _convert(settings)
    print(
        f"{report.folder}: {report.family}, {report.precision}, {report.tensors} tensors, "
        f"{report.num_bytes / 2**30:.2f} GiB"
    )
    for what, names in (("rounded", report.rounded), ("not carried over", report.left_behind)):
        if names:
            print(f"{what}: {len(names)}: {', '.join(names)}")


def _convert(settings: ConvertSettings) -> Conversion:
    source, target = Path(settings.source), Path(settings.target)
    if is_adapter(source):
        return export_peft(source, target, family=settings.family, base_model=settings.base_model)
    if not (source / MANIFEST).is_file():
        return import_huggingface(source, target, precision=settings.precision)
    return export_huggingface(
        source,
        target,
        precision=settings.precision,
        family=settings.family,
        shard_bytes=int(settings.shard_gib * 2**30),
        serving=Serving(*serving_of(read_artifact(source))),
    )


def run_merge(settings: MergeSettings) -> None:
    """Merge an adapter into its base, and print what was written."""
    base = Path(settings.base) if settings.base else None
    size, merged = merge_adapter(Path(settings.adapter), Path(settings.target), base)
    print(f"{settings.target}: {merged} weights merged, {size / 2**30:.2f} GiB")

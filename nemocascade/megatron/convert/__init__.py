"""Conversion between Hugging Face model folders and artifacts, without running their code;
adapters merged, and in PEFT's format."""

from nemocascade.megatron.convert.config_fields import ConfigError
from nemocascade.megatron.convert.conversion import (
    Conversion,
    Serving,
    export_huggingface,
    import_huggingface,
)
from nemocascade.megatron.convert.folder import ConversionError
from nemocascade.megatron.convert.live import LiveTensors, TensorSpec
from nemocascade.megatron.convert.merge import merge_adapter
from nemocascade.megatron.convert.peft import export_peft

__all__ = [
    "ConfigError",
    "Conversion",
    "ConversionError",
    "LiveTensors",
    "Serving",
    "TensorSpec",
    "export_huggingface",
    "export_peft",
    "import_huggingface",
    "merge_adapter",
]

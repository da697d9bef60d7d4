"""Conversion between Hugging Face model folders and artifacts, without running their code."""

from nemocascade.megatron.convert.config_fields import ConfigError
from nemocascade.megatron.convert.conversion import (
    Conversion,
    Serving,
    export_huggingface,
    import_huggingface,
)
from nemocascade.megatron.convert.folder import ConversionError
from nemocascade.megatron.convert.live import LiveTensors, TensorSpec

__all__ = [
    "ConfigError",
    "Conversion",
    "ConversionError",
    "LiveTensors",
    "Serving",
    "TensorSpec",
    "export_huggingface",
    "import_huggingface",
]

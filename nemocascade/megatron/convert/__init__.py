"""Conversion between Hugging Face model folders and artifacts, without running their code."""

from nemocascade.megatron.convert.config import ConfigError
from nemocascade.megatron.convert.conversion import (
    Conversion,
    export_huggingface,
    import_huggingface,
)
from nemocascade.megatron.convert.folder import ConversionError

__all__ = [
    "ConfigError",
    "Conversion",
    "ConversionError",
    "export_huggingface",
    "import_huggingface",
]

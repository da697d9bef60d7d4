"""Checkpoints: sharded, atomic, hashed, without pickle, readable on any parallel layout."""

from nemocascade.megatron.checkpoint.background import Writer
from nemocascade.megatron.checkpoint.checkpoints import (
    checkpoint_name,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    read_extra,
    save_checkpoint,
)
from nemocascade.megatron.checkpoint.errors import CheckpointError
from nemocascade.megatron.checkpoint.folder import clean_leftovers, remove

__all__ = [
    "CheckpointError",
    "Writer",
    "checkpoint_name",
    "clean_leftovers",
    "complete_checkpoints",
    "latest_checkpoint",
    "load_checkpoint",
    "read_extra",
    "remove",
    "save_checkpoint",
]

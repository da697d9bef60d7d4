"""The only door to Megatron-Core: world, model and its layers, optimizer, checkpoints."""

from nemocascade.megatron.upstream import import_megatron

import_megatron()

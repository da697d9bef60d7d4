"""The only package that imports Megatron-Core: world, model, layers, optimizer, checkpoints."""

from nemocascade.megatron.upstream import import_megatron

import_megatron()

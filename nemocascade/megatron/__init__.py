"""The only package that imports Megatron-Core: world, model, layers, optimizer, checkpoints."""

from nemocascade.megatron.upstream import quieten_import

quieten_import()

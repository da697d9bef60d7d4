"""Recipes: typed, documented settings of a stage. A default stands on its field only."""

from nemocascade.recipe.data import DataConfig, TokenizerConfig
from nemocascade.recipe.model import PRESETS, ModelConfig, nemotron3_nano_30b, tiny
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.rl import (
    DomainConfig,
    GrpoConfig,
    GrpoRecipe,
    RlEvalConfig,
    RolloutConfig,
)
from nemocascade.recipe.sft import DemonstrationConfig, SftRecipe
from nemocascade.recipe.train import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    LogConfig,
    MoeTrainingConfig,
    OptimizerConfig,
)

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "DataConfig",
    "DemonstrationConfig",
    "DomainConfig",
    "EngineConfig",
    "EvalConfig",
    "GrpoConfig",
    "GrpoRecipe",
    "LogConfig",
    "ModelConfig",
    "MoeTrainingConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RlEvalConfig",
    "RolloutConfig",
    "SftRecipe",
    "TokenizerConfig",
    "nemotron3_nano_30b",
    "tiny",
]

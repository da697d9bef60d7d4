"""Recipes: typed, documented settings of a stage. Every default is defined once, on its field."""

from nemocascade.recipe.cascade import (
    AlarmConfig,
    CascadeRecipe,
    StageConfig,
    StageRecipe,
    TeacherChoice,
)
from nemocascade.recipe.data import DataConfig, TokenizerConfig
from nemocascade.recipe.domains import DomainConfig
from nemocascade.recipe.envs import (
    AgentConfig,
    AgentlessConfig,
    CodeConfig,
    EnvConfig,
    PythonToolConfig,
    SandboxConfig,
    ToolCallingConfig,
)
from nemocascade.recipe.errors import PicklableError, RecipeError, UserError
from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.recipe.loading import Recipe, load_any_recipe, load_recipe
from nemocascade.recipe.lora import LoraConfig
from nemocascade.recipe.model import (
    PRESETS,
    ModelConfig,
    nemotron3_nano_30b,
    qwen3_0_6b,
    qwen3_30b_a3b,
    small,
    tiny,
    tiny_policy,
)
from nemocascade.recipe.mopd import MopdConfig, MopdRecipe, TeacherConfig
from nemocascade.recipe.parallel import ParallelConfig, RolloutParallelConfig
from nemocascade.recipe.presets import (
    nemotron3_nano_30b_stage,
    one_gpu_stage,
    qwen3_30b_a3b_stage,
    tiny_stage,
)
from nemocascade.recipe.rl import (
    GrpoRecipe,
    PolicyRecipe,
    RlEvalConfig,
    RolloutConfig,
)
from nemocascade.recipe.scores import ScoreConfig, ScoredDomain
from nemocascade.recipe.server import RolloutServerConfig
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
    "AgentConfig",
    "AgentlessConfig",
    "AlarmConfig",
    "CascadeRecipe",
    "CheckpointConfig",
    "CodeConfig",
    "DataConfig",
    "DemonstrationConfig",
    "DomainConfig",
    "EngineConfig",
    "EnvConfig",
    "EvalConfig",
    "GrpoConfig",
    "GrpoRecipe",
    "JudgeConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "MoeTrainingConfig",
    "MopdConfig",
    "MopdRecipe",
    "OptimizerConfig",
    "ParallelConfig",
    "PicklableError",
    "PolicyRecipe",
    "PythonToolConfig",
    "Recipe",
    "RecipeError",
    "RlEvalConfig",
    "RolloutConfig",
    "RolloutParallelConfig",
    "RolloutServerConfig",
    "SandboxConfig",
    "ScoreConfig",
    "ScoredDomain",
    "SftRecipe",
    "StageConfig",
    "StageRecipe",
    "TeacherChoice",
    "TeacherConfig",
    "TokenizerConfig",
    "ToolCallingConfig",
    "UserError",
    "load_any_recipe",
    "load_recipe",
    "nemotron3_nano_30b",
    "nemotron3_nano_30b_stage",
    "one_gpu_stage",
    "qwen3_0_6b",
    "qwen3_30b_a3b",
    "qwen3_30b_a3b_stage",
    "small",
    "tiny",
    "tiny_policy",
    "tiny_stage",
]

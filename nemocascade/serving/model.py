"""A model that is open for requests: its engine, tokenizer and chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemocascade.data.reply import Reply
from nemocascade.data.tokenizer import Tokenizer, load_artifact_tokenizer
from nemocascade.megatron.artifact import artifact_model, read_artifact
from nemocascade.megatron.convert import import_huggingface
from nemocascade.megatron.generation.kv_cache import Load
from nemocascade.recipe import RecipeError, RolloutConfig
from nemocascade.rollout.engine import Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.stopping import StopAsked, Stopped
from nemocascade.runtime.world import World
from nemocascade.serving.settings import ModelSettings
from nemocascade.stages.setup import open_frozen, watched_world
from nemocascade.types import Artifact

MANIFEST = "manifest.json"
LONGEST = 32_768
"""Largest default context in tokens; a larger one is asked for by name, since it takes memory."""


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model with its engine. name: for clients. digest: of its artifact. context: largest number
    of tokens of a prompt with its answer."""

    name: str
    digest: str
    world: World
    engine: LiveEngine
    tokenizer: Tokenizer
    settings: ModelSettings
    context: int

    @property
    def load(self) -> Load:
        """Load of requests that are not known yet."""
        return Load(self.context, self.context - 1, self.settings.slots)

    @property
    def sampling(self) -> Sampling:
        """Sampling by the settings, up to the end of a turn."""
        s = self.settings
        return Sampling(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            max_tokens=s.max_tokens,
            stop_tokens=self.tokenizer.stop_tokens,
            seed=s.seed,
        )

    def max_new_tokens(self, prompt: Sequence[int], wanted: int) -> int:
        """Largest number of tokens of the answer to a prompt, at most `wanted`.

        Raises ValueError if the prompt leaves no token to generate.
        """
        if len(prompt) >= self.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and the context {self.context}: shorten it, "
                "or start with a larger --context"
            )
        return min(wanted, self.context - len(prompt))

    def reply(self, ids: Sequence[int], *, thinking: bool) -> Reply:
        """The assistant turn in the tokens of an answer."""
        return self.tokenizer.template.parse(self.tokenizer.decode(ids), thinking=thinking)


@contextmanager
def open_model(settings: ModelSettings) -> Iterator[OpenModel]:
    """Open the model of the settings; every rank calls it.

    Raises RecipeError for settings that cannot run, CheckpointError or ConversionError if the model
    cannot be read.
    """
    size = world_size_of_environment()
    artifact = read_artifact(_artifact_of(settings, size))
    if artifact.tokenizer_path is None:
        raise RecipeError([f"{artifact.folder} holds no tokenizer: name another model"])
    shape = artifact_model(artifact)
    parallel = settings.parallel
    replicas = max(1, parallel.data_parallel(size))
    problems = parallel.problems(
        shape, size, capacity=None, sequences_per_step=replicas * parallel.pp
    )
    if problems:
        raise RecipeError(problems)
    context = settings.context or min(LONGEST, artifact.context_length or LONGEST)
    with watched_world(Path(settings.work_dir), parallel, settings.engine) as (world, detected):
        tokenizer = load_artifact_tokenizer(artifact)
        engine = open_frozen(
            artifact,
            world,
            detected,
            tokenizer,
            settings.engine,
            RolloutConfig(slots=settings.slots, kv_gib=settings.kv_gib, max_prompt_tokens=context),
            tool_calls=1,
        )
        world.stop.clear()
        try:
            yield OpenModel(
                _name_of(settings, artifact),
                artifact.digest,
                world,
                engine,
                tokenizer,
                settings,
                context,
            )
        except StopAsked:
            LOGGER.info("stopped on request")
            raise Stopped(0, interrupted=world.stop.finish()) from None


def _artifact_of(settings: ModelSettings, ranks: int) -> Path:
    """The artifact of the settings. A Hugging Face folder is imported, unless it has been."""
    folder = Path(settings.model)
    config = folder / "config.json"
    if (folder / MANIFEST).is_file() or not config.is_file():
        return folder
    # A changed folder is imported again.
    text = "\n".join(f"{f.name} {f.stat().st_size}" for f in sorted(folder.glob("*.safetensors")))
    identity = f"{folder.resolve()}\n{text}\n".encode() + config.read_bytes()
    target = Path(settings.work_dir) / f"imported-{hashlib.sha256(identity).hexdigest()[:12]}"
    if not (target / MANIFEST).is_file():
        if ranks > 1:
            raise RecipeError(
                [
                    f"{folder} is a Hugging Face folder, and {ranks} ranks would each import it: "
                    f"run nemocascade convert {folder} ARTIFACT first"
                ]
            )
        LOGGER.info("importing %s to %s", folder, target)
        import_huggingface(folder, target)
    return target


def _name_of(settings: ModelSettings, artifact: Artifact) -> str:
    """The name of the folder, or for RUN/artifact that of the run."""
    folder = Path(settings.model).resolve()
    return folder.parent.name if folder.name == "artifact" else folder.name or artifact.digest[:12]

"""Held-out scores of an artifact: mean reward of greedy answers, by domain, on any layout."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from nemocascade.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from nemocascade.envs.registry import DOMAINS, close_environments, make_environments
from nemocascade.megatron.artifact import artifact_model, load_artifact_weights, read_artifact
from nemocascade.megatron.checkpoint.folder import digest_of
from nemocascade.megatron.config import make_config
from nemocascade.megatron.model import build_model
from nemocascade.megatron.warm_up import warm_up
from nemocascade.recipe import (
    DomainConfig,
    MoeTrainingConfig,
    RecipeError,
    RolloutConfig,
    ScoreConfig,
    ScoredDomain,
)
from nemocascade.recipe.judge import HOW as JUDGE_HOW
from nemocascade.recipe.rules import Natural
from nemocascade.rl.collector import Collector, Group
from nemocascade.rl.tasks import Task, encode_prompts, read_tasks
from nemocascade.rl.verification import verifier_threads
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.world import World, world_size_of_environment
from nemocascade.stages.judge import check_judge, judge_on_ranks, probe_judge
from nemocascade.stages.setup import watched_world
from nemocascade.types import Environment

VERSION = 1
# Fields that affect how scores are computed, but not their values.
_HOW = ("parallel", "slots")


@dataclass(frozen=True)
class DomainScore:
    """Score of one domain. score: mean reward, None if every verifier failed. tasks: number of
    answered tasks. errors: number of failed verdicts, which are excluded from the mean."""

    score: float | None
    tasks: int
    errors: int


@dataclass(frozen=True)
class Scores:
    """An artifact's scores by domain, with some answers as text."""

    digest: str
    settings: str
    scores: dict[str, DomainScore]
    samples: dict[str, list[dict[str, Any]]]
    seconds: float

    def of(self, domain: str) -> float | None:
        """The score of a domain; None if there is none."""
        found = self.scores.get(domain)
        return None if found is None else found.score

    def as_json(self) -> dict[str, Any]:
        """The content of scores.json."""
        return {"version": VERSION, **asdict(self)}


@dataclass(frozen=True)
class ScoreSettings:
    """Mean reward of an artifact's greedy answers to held-out tasks, by domain."""

    artifact: str = ""
    """Artifact folder."""

    domains: tuple[str, ...] = DOMAINS
    """Names of the domains."""

    difficulty: Natural = 0
    """Difficulty of generated tasks; 0 is the easiest."""

    work_dir: str = "runs/score"
    """Folder for the log."""

    scores: ScoreConfig = field(default_factory=ScoreConfig)


def run_scoring(settings: ScoreSettings) -> Scores:
    """Score the artifact of the settings. Raises as `score_artifact`."""
    domains = tuple(ScoredDomain(d, difficulty=settings.difficulty) for d in settings.domains)
    config = replace(settings.scores, domains=settings.scores.domains or domains)
    return score_artifact(Path(settings.artifact), config, Path(settings.work_dir))


def settings_key(config: ScoreConfig, files: Mapping[str, str]) -> str:
    """Key of the settings that affect scores. files: fingerprints of held-out files."""
    said = {name: value for name, value in asdict(config).items() if name not in _HOW}
    said["engine"] = said["engine"]["precision"]
    for name in JUDGE_HOW:
        said["envs"]["judge"].pop(name)
    return digest_of({"version": VERSION, "settings": json.loads(json.dumps(said)), "files": files})


def read_versioned(path: Path, version: int) -> dict[str, Any] | None:
    """The fields of a versioned JSON file; None if it is missing or of another version."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and found.pop("version", None) == version else None


def read_scores(path: Path) -> Scores | None:
    """The content of a scores.json; None if it is missing or of another version."""
    found = read_versioned(path, VERSION)
    if found is None:
        return None
    scores = {name: DomainScore(**value) for name, value in found.pop("scores").items()}
    return Scores(scores=scores, **found)


def score_artifact(
    folder: Path, config: ScoreConfig, work_dir: Path, *, settings: str = ""
) -> Scores:
    """Answer every domain's held-out tasks greedily and score the answers; every rank calls it.

    settings: stored with the scores, see `settings_key`.

    Raises CheckpointError if the artifact cannot be read, RecipeError for invalid settings, and
    DataError for a domain without held-out tasks.
    """
    started = time.perf_counter()
    artifact = read_artifact(folder)
    problems = scoring_problems(config)
    if artifact.tokenizer_path is None:
        problems.append(f"{folder} holds no tokenizer: score another artifact")
    if problems:
        raise RecipeError(problems)
    check_judge(config.envs.judge, artifact)
    model = artifact_model(artifact)
    if problems := config.problems(world_size_of_environment(), model):
        raise RecipeError(problems)
    with watched_world(work_dir, config.parallel, config.engine) as (world, detected):
        probe_judge(config.envs.judge, world)
        tokenizer = load_tokenizer(str(artifact.tokenizer_path))
        check_vocabulary(tokenizer, model.vocab_size)
        settled = make_config(model, world.parallel, config.engine, MoeTrainingConfig(), seed=0)
        rows = max(config.max_prompt_tokens, RolloutConfig.prefill_tokens)
        usable = warm_up(detected.accelerators, model, config.engine, world, rows)
        chunks = build_model(world, settled, usable)
        load_artifact_weights(artifact, world, chunks)
        engine = LiveEngine(
            world,
            chunks,
            slots=config.slots,
            prefill_chunk=RolloutConfig.prefill_chunk,
            decode=tokenizer.decode,
            vocabulary=tokenizer.vocab_size,
        )
        judge = judge_on_ranks(
            config.envs.judge, artifact, world, chunks, engine, tokenizer, seed=config.seed
        )
        environments = make_environments(config.envs, judge=judge)
        try:
            chosen: dict[str, Environment] = {
                d.domain: environments[d.domain] for d in config.domains
            }
            groups = _answer(world, engine, tokenizer, chosen, config)
        finally:
            close_environments(environments)
    found = Scores(
        digest=artifact.digest,
        settings=settings,
        scores={name: _score_of(answered) for name, answered in groups.items()},
        samples={name: _samples(answered[: config.samples]) for name, answered in groups.items()},
        seconds=time.perf_counter() - started,
    )
    _report(found)
    return found


def scoring_problems(config: ScoreConfig) -> list[str]:
    """Every rule that the settings break, as far as can be checked without a model."""
    problems = config.problems(world_size_of_environment())
    problems += [
        f"scores.domains names {d.domain!r}, known are {', '.join(DOMAINS)}"
        for d in config.domains
        if d.domain not in DOMAINS
    ]
    if not config.domains:
        problems.append("scores.domains is empty: name at least one domain")
    return problems


def _answer(
    world: World,
    engine: LiveEngine,
    tokenizer: Tokenizer,
    environments: Mapping[str, Environment],
    config: ScoreConfig,
) -> dict[str, list[Group]]:
    """Answer every domain's tasks; domains with the same limit are generated together."""
    rollout = RolloutConfig(
        rollouts_per_prompt=1,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        max_turns=config.max_turns,
        thinking=config.thinking,
        slots=config.slots,
    )
    collector = Collector(
        world,
        engine,
        tokenizer,
        environments,
        rollout,
        seed=config.seed,
        threads=verifier_threads(config.envs.judge),
    )
    found: dict[str, list[Group]] = {d.domain: [] for d in config.domains}

    def limit(domain: ScoredDomain) -> int:
        return domain.max_response_tokens or config.max_response_tokens

    for most, domains in groupby(sorted(config.domains, key=limit), key=limit):
        tasks: list[Task] = []
        for domain in domains:
            prompts = read_tasks(
                _as_domain(domain),
                environments,
                seed=config.seed,
                heldout=True,
                count=domain.tasks or config.tasks,
                domains=tuple(map(_as_domain, config.domains)),
            )
            encoded = encode_prompts(prompts, tokenizer, rollout)
            if not encoded:
                raise DataError(
                    f"{domain.domain}: no held-out task has a prompt of at most "
                    f"scores.max_prompt_tokens({rollout.max_prompt_tokens}): raise it"
                )
            first = len(tasks)
            tasks += [Task(prompt, ids, first + i) for i, (prompt, ids) in enumerate(encoded)]
        greedy = replace(collector.sampling(), temperature=0.0, max_tokens=most)
        for group in collector.roll_out(tasks, 1, greedy):
            found[group.task.prompt.domain].append(group)
    return found


def _as_domain(domain: ScoredDomain) -> DomainConfig:
    return DomainConfig(
        domain.domain, difficulty=domain.difficulty, heldout_path=domain.heldout_path
    )


def _score_of(groups: Sequence[Group]) -> DomainScore:
    rewards = [g.rollouts[0].verdict.reward for g in groups]
    valid = [r for r in rewards if r is not None]
    mean = sum(valid) / len(valid) if valid else None
    return DomainScore(mean, len(rewards), len(rewards) - len(valid))


def _samples(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in g.task.prompt.messages],
            "response": g.rollouts[0].text,
            "reward": g.rollouts[0].verdict.reward,
            "error": g.rollouts[0].verdict.error,
        }
        for g in groups
    ]


def _report(found: Scores) -> None:
    """Log the scores and the number of failed verdicts."""
    shown = ", ".join(
        f"{name} {'-' if s.score is None else format(s.score, '.3f')}"
        for name, s in found.scores.items()
    )
    LOGGER.info("held out: %s (%.1f s)", shown, found.seconds)
    for name, score in found.scores.items():
        if score.errors:
            LOGGER.warning(
                "held out: %d of %d verdicts of %s failed and are not counted",
                score.errors,
                score.tasks,
                name,
            )

"""Held-out scores of an artifact: mean reward of its answers, by domain, on any layout."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemocascade.data.tokenizer import Tokenizer, load_artifact_tokenizer
from nemocascade.envs.base import Domain
from nemocascade.envs.registry import (
    close_environments,
    domain_problems,
    known_domains,
    make_environments,
)
from nemocascade.megatron.accelerators import Detection
from nemocascade.megatron.artifact import artifact_model, read_artifact
from nemocascade.megatron.checkpoint.folder import digest_of
from nemocascade.recipe import (
    DomainConfig,
    RecipeError,
    RolloutConfig,
    ScoreConfig,
    ScoredDomain,
)
from nemocascade.recipe.judge import HOW as JUDGE_HOW
from nemocascade.rl.collector import Collector, Group
from nemocascade.rl.exchange import send_transcripts
from nemocascade.rl.journal import Journals
from nemocascade.rl.prompts import encode_prompts
from nemocascade.rl.tasks import GroupRequest, Task, read_tasks
from nemocascade.rl.verification import rank_envs, verifier_threads
from nemocascade.rollout.engine import Engine, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import LOGGER, Console, end_status, printable
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.stopping import StopAsked, Stopped
from nemocascade.runtime.stored_records import record_of
from nemocascade.runtime.world import World
from nemocascade.stages.domain_score import DomainScore, domain_score
from nemocascade.stages.judge import check_judge, open_frozen_with_judge, probe_judge
from nemocascade.stages.setup import watched_world
from nemocascade.train.progress import Activity
from nemocascade.types import Artifact, Environment

VERSION = 2
MOST_SAMPLES = 1 << 32
"""Distance of the domains' request ids."""
# Fields that affect how scores are computed, but not their values.
_HOW = ("parallel", "slots", "kv_gib")
_LONGEST_REASON = 300
_NAMED = 1 << 20
"""Places of named sets of tasks."""


@dataclass(frozen=True)
class Scores:
    """An artifact's scores by domain, with some answers as text on the main rank."""

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


def settings_key(config: ScoreConfig, files: Mapping[str, str]) -> str:
    """Key of the settings that affect scores. files: fingerprints of held-out files."""
    said = {name: value for name, value in asdict(config).items() if name not in _HOW}
    said["engine"] = said["engine"]["precision"]
    for name in JUDGE_HOW:
        said["envs"]["judge"].pop(name)
    for name in ("workers", "ray"):
        said["envs"]["sandbox"].pop(name)
    return digest_of({"version": VERSION, "settings": json.loads(json.dumps(said)), "files": files})


def read_versioned(path: Path, version: int) -> dict[str, Any] | None:
    """The fields of a versioned JSON file; None if it is missing, damaged or of another version."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.pop("version", None) == version else None


def read_scores(path: Path) -> Scores | None:
    """The content of a scores.json; None if it is missing, damaged or of another version."""
    found = read_versioned(path, VERSION)
    try:
        return None if found is None else record_of(Scores, found)
    except ValueError:
        return None


def score_artifact(
    folder: Path,
    config: ScoreConfig,
    work_dir: Path,
    *,
    settings: str = "",
    console: Console | None = None,
) -> Scores:
    """Answer every domain's held-out tasks and score the answers; every rank calls it.

    settings: stored with the scores, see `settings_key`. console: of the cascade.

    Raises CheckpointError if the artifact cannot be read, RecipeError for invalid settings,
    DataError for a domain without held-out tasks, and Stopped if WORK_DIR/stop asks for it.
    """
    started = time.perf_counter()
    artifact = _checked_artifact(folder, config)
    with watched_world(work_dir, config.layout, config.engine) as (world, detected):
        world.stop.interrupt.arm()
        if world.is_main:
            world.watch.on_change = Activity(console or Console(), "held-out scores").show
        engine, tokenizer, environments = _open(artifact, config, world, detected)
        try:
            chosen: dict[str, Environment] = {
                d.domain: environments[d.domain] for d in config.domains
            }
            bound_to = {"artifact": artifact.digest, "settings": settings_key(config, {})}
            journals = Journals(work_dir, world, lambda: bound_to)
            # Another job may score another artifact in the same folder.
            name = f"scores-{digest_of(bound_to)[:12]}"
            groups = _answer(world, engine, tokenizer, chosen, config, journals, name)
            samples = {
                name: _samples(world, answered[: config.stored_answers])
                for name, answered in groups.items()
            }
            journals.clear(name)
        except StopAsked:
            LOGGER.info("stopped on request: the same command resumes from the finished answers")
            raise Stopped(0, interrupted=world.stop.finish()) from None
        finally:
            world.stop.interrupt.disarm()
            close_environments(environments)
            end_status()
    found = Scores(
        digest=artifact.digest,
        settings=settings,
        scores={
            name: domain_score([[r.verdict.reward for r in g.rollouts] for g in answered])
            for name, answered in groups.items()
        },
        samples=samples,
        seconds=time.perf_counter() - started,
    )
    report_scores(found)
    return found


def _checked_artifact(folder: Path, config: ScoreConfig) -> Artifact:
    """The artifact of `folder`, once all settings fit it. Raises as `score_artifact`."""
    artifact = read_artifact(folder)
    problems = scoring_problems(config)
    if artifact.tokenizer_path is None:
        problems.append(f"{folder} holds no tokenizer: score another artifact")
    if problems:
        raise RecipeError(problems)
    check_judge(config.envs.judge, artifact)
    if problems := config.problems(world_size_of_environment(), artifact_model(artifact)):
        raise RecipeError(problems)
    return artifact


def _open(
    artifact: Artifact, config: ScoreConfig, world: World, detected: Detection
) -> tuple[LiveEngine, Tokenizer, dict[str, Domain]]:
    """The engine that answers, and the environments that verify; every rank calls it."""
    probe_judge(config.envs.judge, world)
    tokenizer = load_artifact_tokenizer(artifact)
    rollout = RolloutConfig(
        slots=config.slots, kv_gib=config.kv_gib, max_prompt_tokens=config.max_prompt_tokens
    )
    engine, judge = open_frozen_with_judge(
        artifact,
        world,
        detected,
        tokenizer,
        config.engine,
        rollout,
        config.envs,
        seed=config.seed,
    )
    environments = make_environments(rank_envs(config.envs, world, engine), judge=judge)
    return engine, tokenizer, environments


def scoring_problems(config: ScoreConfig) -> list[str]:
    """Every rule that the settings break, as far as can be checked without a model."""
    problems = config.problems(world_size_of_environment())
    names = [d.domain for d in config.domains]
    problems += domain_problems("scores.domains", names, config.envs.modules)
    if not config.domains:
        problems.append("scores.domains is empty: name at least one domain")
    return problems


def _answer(
    world: World,
    engine: Engine,
    tokenizer: Tokenizer,
    environments: Mapping[str, Environment],
    config: ScoreConfig,
    journals: Journals,
    name: str,
) -> dict[str, list[Group]]:
    """Answer the tasks of all domains in one pass, each by its own sampling. Answers that the
    journal `name` has are not generated again."""
    rollout = RolloutConfig(
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        max_turns=config.max_turns,
        slots=config.slots,
    )
    collector = Collector(
        world,
        engine,
        tokenizer,
        environments,
        rollout,
        seed=config.seed,
        threads=verifier_threads(rank_envs(config.envs, world, engine)),
        journals=journals,
    )
    wanted = _heldout_groups(world, tokenizer, environments, config, rollout, collector.sampling())
    found: dict[str, list[Group]] = {d.label: [] for d in config.domains}
    with collector.journalled(name):
        groups = collector.roll_out_each([request for _, request in wanted], compared=False)
        for (label, _), group in zip(wanted, groups, strict=True):
            found[label].append(group)
    return found


def _heldout_groups(
    world: World,
    tokenizer: Tokenizer,
    environments: Mapping[str, Environment],
    config: ScoreConfig,
    rollout: RolloutConfig,
    default: Sampling,
) -> list[tuple[str, GroupRequest]]:
    """Requests for the answers to every held-out task, each with the label of its set of tasks.

    default: the sampling, where a set of tasks has none of its own. Raises DataError for a set
    without tasks.
    """
    known = known_domains(config.envs.modules)
    wanted: list[tuple[str, GroupRequest]] = []
    for domain in config.domains:
        how = config.sampling_of(domain)
        prompts = read_tasks(
            _as_domain(domain),
            environments,
            seed=config.seed,
            heldout=True,
            count=domain.tasks or config.tasks,
            domains=tuple(map(_as_domain, config.domains)),
        )
        answered = replace(rollout, thinking=how.thinking)
        encoded = encode_prompts(prompts, tokenizer, answered, world)
        if not len(encoded):
            raise DataError(
                f"{domain.label}: no held-out task has a prompt of at most "
                f"scores.max_prompt_tokens({rollout.max_prompt_tokens}): raise it"
            )
        sampling = replace(
            default,
            temperature=how.temperature,
            top_p=how.top_p,
            max_tokens=how.max_tokens,
        )
        # The ids decide the samples, so they do not depend on what else is scored.
        first = _place(domain, known) * MOST_SAMPLES
        for number, (prompt, ids) in enumerate(encoded):
            task = Task(prompt, ids, number, how.thinking)
            samples = range(first + number * how.samples, first + (number + 1) * how.samples)
            wanted.append((domain.label, GroupRequest(task, samples, sampling)))
    return wanted


def _place(domain: ScoredDomain, known: Sequence[str]) -> int:
    """Number of a set of tasks among all that there may be; it follows from its name alone."""
    if not domain.name:
        return known.index(domain.domain)
    return len(known) + zlib.crc32(domain.name.encode()) % _NAMED


def _as_domain(domain: ScoredDomain) -> DomainConfig:
    return DomainConfig(
        domain.domain,
        difficulty=domain.difficulty,
        heldout_path=domain.heldout_path,
        max_bad_rows=domain.max_bad_rows,
    )


def _samples(world: World, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The first answer to each task as JSON values, on the main rank; [] on the others."""
    texts = send_transcripts(world, [g.rollouts[0] for g in groups], [[0]] * len(groups))
    return [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in g.task.prompt.messages],
            "response": text.text,
            "reward": text.verdict.reward,
            "error": text.verdict.error,
        }
        for g, text in zip(groups, texts.values(), strict=False)
    ]


def report_scores(found: Scores) -> None:
    """Log the scores and the number of failed verdicts."""
    shown = ", ".join(f"{name} {s}" for name, s in found.scores.items())
    LOGGER.info("held out: %s (%.1f s)", shown, found.seconds)
    for name, score in found.scores.items():
        if score.errors:
            reasons = (s["error"] for s in found.samples.get(name, ()) if s["error"])
            reason = next(reasons, "")[:_LONGEST_REASON]
            LOGGER.warning(
                "held out: %d of %d verdicts of %s failed and are not counted%s",
                score.errors,
                score.tasks * score.samples,
                name,
                f", such as {printable(reason)}" if reason else "",
            )

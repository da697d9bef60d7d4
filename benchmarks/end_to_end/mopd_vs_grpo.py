"""MOPD compared with GRPO for a student that has lost a domain, with equal prompts and rollouts.

    python benchmarks/end_to_end/mopd_vs_grpo.py --seeds 5 --out benchmarks/results/<record>.json
    python benchmarks/end_to_end/mopd_vs_grpo.py --base runs/tiny/domains_sft/artifact ...
    python benchmarks/end_to_end/mopd_vs_grpo.py --divergence reverse_kl forward_kl ...
    python benchmarks/end_to_end/mopd_vs_grpo.py --quick           # checks that the code runs

A small version of the paper's comparison (Nemotron-Cascade 2, arXiv 2603.19220, section on MOPD).
The base is the tiny model after SFT on all domains. Then, for each seed:

1. teacher: GRPO on the domain, from the base;
2. student: the teacher after SFT on another domain only, which makes it lose the first;
3. race: MOPD with the teacher, and GRPO on rewards, both from the student, with the same prompts in
   the same order, the same number of rollouts per step and the same sampling seed. Each
   `--divergence` adds a way: MOPD with that exact divergence, at the learning rate of MOPD.

Held-out answers are greedy and use the same tasks for all. The teacher's level is its own score on
them, less `--margin`. GRPO's dynamic filtering is off, since it draws more prompts.

Learning rates are those of recipes/tiny. With several `--mopd-lrs` or `--grpo-lrs`, each is tried
on a seed outside the races, and the best mean held-out score decides. Both ways are thus tuned
alike. A seed is rejected if its teacher is not `--gap` above its student, since there is nothing to
recover. The record counts rejected seeds.

Runs are stored in `--work`, and existing ones are reused. Several processes may run some seeds each
(`--first`, with `--base` and one learning rate per way) in the same folder; a last one over all
seeds writes the record, with seconds from a shared machine. A PNG plot is written beside the
record.

Exit code: 0 fine, whatever wins; 1 no seed could be raced; 2 the options do not go together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from nemocascade_kernels import DIVERGENCES  # noqa: E402

from benchmarks.end_to_end.races import Race, plot, summary  # noqa: E402
from benchmarks.run import new_record, write_record  # noqa: E402
from nemocascade.recipe import (  # noqa: E402
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    GrpoRecipe,
    LogConfig,
    MopdRecipe,
    OptimizerConfig,
    RlEvalConfig,
    RolloutConfig,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageRecipe,
    TeacherConfig,
    TokenizerConfig,
    load_recipe,
)
from nemocascade.stages.launch import run_stage  # noqa: E402
from nemocascade.stages.scoring import score_artifact  # noqa: E402

WAYS = ("MOPD", "GRPO")
EXACT = "MOPD, {}"
"""Name of MOPD with an exact divergence."""
TUNING_SEED = 1000
LOG = LogConfig(every=1, tensorboard=False)
DATA = DataConfig(capacity=2048, sequences_per_step=2, balance_group=1)
"""Tokens of an SFT step, which the settings below count with."""


@dataclass(frozen=True)
class Setting:
    """Settings of all races: steps of each stage; an evaluation every `eval_every` steps."""

    domain: str = "instruction_following"
    other: str = "multiple_choice"
    base_steps: int = 150
    teacher_steps: int = 30
    regress_steps: int = 15
    regress_lr: float = 1e-3
    race_steps: int = 30
    eval_every: int = 2
    eval_tasks: int = 256
    prompts: int = 16
    rollouts: int = 8
    tasks: int = 800
    gap: float = 0.10
    margin: float = 0.0


def tiny_recipe[R: StageRecipe](name: str, kind: type[R]) -> R:
    """The recipe of recipes/tiny/<name>.py."""
    return load_recipe(ROOT / "recipes" / "tiny" / f"{name}.py", kind)


class Bench:
    """Makes the artifacts of a seed and races from them; existing runs are reused."""

    def __init__(self, setting: Setting, work: Path, base: Path | None) -> None:
        self.setting, self.work = setting, work
        self.rl = tiny_recipe("if_rl", GrpoRecipe)
        self.mopd = tiny_recipe("mopd", MopdRecipe)
        self.base = base or self.made(
            "base",
            replace(
                tiny_recipe("domains_sft", SftRecipe), steps=setting.base_steps, data=DATA, log=LOG
            ),
        )

    def made(self, name: str, recipe: StageRecipe) -> Path:
        """Artifact of a recipe, run in `work`/name unless it exists there."""
        folder = self.work / name
        recipe = replace(recipe, run_dir=str(folder))
        artifact = folder / "artifact"
        if (artifact / "manifest.json").is_file():
            written = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
            if written != json.loads(json.dumps(asdict(recipe))):
                raise SystemExit(f"{folder} was made with other settings: name another --work")
            return artifact
        return run_stage(recipe)

    @property
    def rollout(self) -> RolloutConfig:
        """Rollouts of the race, the same for both ways."""
        return replace(
            self.mopd.rollout,
            prompts_per_step=self.setting.prompts,
            rollouts_per_prompt=self.setting.rollouts,
            dynamic_filtering=False,
        )

    @property
    def domains(self) -> tuple[DomainConfig, ...]:
        return (DomainConfig(domain=self.setting.domain, tasks=self.setting.tasks),)

    def teacher(self, seed: int) -> Path:
        """Train the teacher: GRPO on the domain, with the recipe's own filtering."""
        rollout = replace(self.rollout, dynamic_filtering=True, max_draws=2)
        recipe = replace(
            self.rl,
            seed=seed,
            steps=self.setting.teacher_steps,
            init_from=str(self.base),
            domains=self.domains,
            rollout=rollout,
            eval=RlEvalConfig(prompts=0),
            log=LOG,
        )
        return self.made(f"seed_{seed}/teacher", recipe)

    def student(self, seed: int, teacher: Path) -> Path:
        """Train the student: the teacher after SFT on the other domain only."""
        setting, sft = self.setting, tiny_recipe("domains_sft", SftRecipe)
        assert isinstance(sft, SftRecipe)
        other = DomainConfig(domain=setting.other, tasks=setting.tasks)
        recipe = replace(
            sft,
            seed=seed,
            steps=setting.regress_steps,
            data=DATA,
            init_from=str(teacher),
            demonstrations=DemonstrationConfig(domains=(other,)),
            tokenizer=TokenizerConfig(path=str(teacher / "tokenizer.model")),
            optimizer=OptimizerConfig(
                lr=setting.regress_lr,
                min_lr=setting.regress_lr,
                schedule="constant",
                warmup_steps=0,
            ),
            log=LOG,
        )
        return self.made(f"seed_{seed}/student", recipe)

    def score(self, seed: int, artifact: Path) -> float:
        """Held-out score, on the same tasks as the races' evaluations."""
        rollout = self.rollout
        config = ScoreConfig(
            domains=(ScoredDomain(self.setting.domain),),
            tasks=self.setting.eval_tasks,
            seed=seed,
            max_prompt_tokens=rollout.max_prompt_tokens,
            max_response_tokens=rollout.max_response_tokens,
            thinking=rollout.thinking,
            slots=rollout.slots,
            envs=self.rl.envs,
            engine=self.rl.engine,
        )
        found = score_artifact(artifact, config, self.work / "scoring" / f"seed_{seed}").scores[
            self.setting.domain
        ]
        assert found.score is not None, found
        return found.score

    def race(self, seed: int, way: str, lr: float, start: Path, teacher: Path) -> Race:
        """Run one way from the student and collect its scores."""
        recipe = self._race_recipe(seed, way, lr, start, teacher)
        name = way.lower().replace(", ", "_")
        artifact = self.made(f"seed_{seed}/{name}_lr_{lr:g}", recipe)
        lines = (artifact.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps, scores, tokens, seconds = [0], [self.score(seed, start)], [0.0], [0.0]
        spent, took = 0.0, 0.0
        for row in map(json.loads, lines):
            spent += row["response_tokens"] * row["groups_drawn"] * self.setting.rollouts
            # A step without a training signal records the time of its rollouts only.
            took += row.get("step_time_s", row["rollout_time_s"])
            if (score := row.get(f"heldout/{self.setting.domain}")) is not None:
                steps.append(row["step"])
                scores.append(score)
                tokens.append(spent)
                seconds.append(took)
        return Race(steps, scores, tokens, seconds, self.score(seed, teacher))

    def _race_recipe(
        self, seed: int, way: str, lr: float, start: Path, teacher: Path
    ) -> GrpoRecipe | MopdRecipe:
        shared: dict[str, Any] = {
            "seed": seed,
            "steps": self.setting.race_steps,
            "init_from": str(start),
            "domains": self.domains,
            "rollout": self.rollout,
            "envs": self.rl.envs,
            "eval": RlEvalConfig(every=self.setting.eval_every, prompts=self.setting.eval_tasks),
            "log": LOG,
        }
        if way == "GRPO":
            return replace(self.rl, optimizer=with_lr(self.rl.optimizer, lr), **shared)
        exact = {EXACT.format(kind): kind for kind in DIVERGENCES}
        return replace(
            self.mopd,
            mopd=replace(self.mopd.mopd, divergence=exact.get(way, "sampled")),
            teachers=(TeacherConfig(self.setting.domain, str(teacher)),),
            optimizer=with_lr(self.mopd.optimizer, lr),
            **shared,
        )


def with_lr(optimizer: OptimizerConfig, lr: float) -> OptimizerConfig:
    """The same schedule with another peak learning rate."""
    scale = lr / optimizer.lr
    return replace(
        optimizer,
        lr=lr,
        min_lr=optimizer.min_lr * scale,
        warmup_start_lr=optimizer.warmup_start_lr * scale,
    )


def tuned(bench: Bench, lrs: dict[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, Any]]:
    """The chosen learning rate of each way, and the trials behind it."""
    chosen, tried = {way: found[0] for way, found in lrs.items()}, {}
    if all(len(found) == 1 for found in lrs.values()):
        return chosen, {}
    teacher = bench.teacher(TUNING_SEED)
    student = bench.student(TUNING_SEED, teacher)
    for way, candidates in lrs.items():
        means = {}
        for lr in candidates:
            race = bench.race(TUNING_SEED, way, lr, student, teacher)
            means[lr] = sum(race.scores) / len(race.scores)
        chosen[way] = max(means, key=lambda lr: means[lr])
        tried[way] = [{"lr": lr, "mean_score": mean} for lr, mean in means.items()]
    return chosen, tried


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="races: this many seeds")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--work", type=Path, default=Path("runs/mopd_vs_grpo"))
    parser.add_argument("--base", type=Path, help="artifact of the SFT on all domains")
    parser.add_argument("--out", type=Path, help="write the record to this file, and a plot")
    parser.add_argument("--mopd-lrs", type=float, nargs="+", help="default: the recipe's")
    parser.add_argument("--grpo-lrs", type=float, nargs="+", help="default: the recipe's")
    parser.add_argument(
        "--divergence",
        choices=DIVERGENCES,
        nargs="+",
        default=[],
        help="further ways: MOPD with each of these divergences",
    )
    parser.add_argument("--quick", action="store_true", help="few steps, to try the code")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """The defaults, reduced for --quick, with the command line's values."""
    setting = Setting()
    if options.quick:
        setting = replace(
            setting, base_steps=4, teacher_steps=2, regress_steps=2, race_steps=2, eval_every=1,
            eval_tasks=8, prompts=2, rollouts=2, tasks=16, gap=-1.0,
        )  # fmt: skip
    named = {n: v for n in asdict(setting) if (v := getattr(options, n)) is not None}
    return replace(setting, **named)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    several = max(len(options.mopd_lrs or ()), len(options.grpo_lrs or ())) > 1
    if options.first != 1 and (options.base is None or several):
        print("--first needs --base, and one learning rate a way: all seeds share what they make")
        return 2
    setting = setting_of(options)
    bench = Bench(setting, options.work.resolve(), options.base and options.base.resolve())
    lrs = {
        "MOPD": options.mopd_lrs or [bench.mopd.optimizer.lr],
        "GRPO": options.grpo_lrs or [bench.rl.optimizer.lr],
    }
    chosen, tried = tuned(bench, lrs)
    ways = [*WAYS]
    for divergence in options.divergence:
        ways.append(EXACT.format(divergence))
        chosen[ways[-1]] = chosen["MOPD"]
    races: dict[str, list[Race]] = {way: [] for way in ways}
    raced, rejected = [], []
    for seed in range(options.first, options.first + options.seeds):
        teacher = bench.teacher(seed)
        student = bench.student(seed, teacher)
        level, start = bench.score(seed, teacher), bench.score(seed, student)
        print(f"seed {seed}: teacher {level:.3f}, student {start:.3f}", flush=True)
        if level - start < setting.gap:
            rejected.append({"seed": seed, "teacher": level, "student": start})
            continue
        raced.append(seed)
        for way in ways:
            race = bench.race(seed, way, chosen[way], student, teacher)
            races[way].append(race)
            print(f"  {way}: {' '.join(f'{s:.3f}' for s in race.scores)}", flush=True)
    if not races[WAYS[0]]:
        print(f"no seed lost {setting.gap} of {setting.domain}: raise --regress-steps")
        return 1
    record = new_record(
        "end_to_end",
        settings=asdict(setting) | {"lr": chosen, "tuning": tried, "base": str(options.base)},
        seeds=raced,
        refused_seeds=rejected,
        summary=summary(races, setting.margin),
        races={way: [asdict(race) for race in found] for way, found in races.items()},
    )
    print(json.dumps(record["summary"], indent=1))
    if options.out is not None:
        write_record(options.out, record)
        title = f"Winning back {setting.domain}: {len(races['MOPD'])} seeds, 95 % intervals"
        plot(options.out.with_suffix(".png"), races, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A GRPO stage on every parallel layout, and resumed: rollouts, rewards and updates agree.

Its curriculum adapts to the rewards. Pass rates of rows are sampled from the same artifact. The
quick tests omit settings that other layouts have too; slow ones take these.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.start_policy import start_policy

REPLAY = ", replay"
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "DP2": {},
    "EP2": {"ep": 2},
    "PP2": {"pp": 2},
    f"EP2{REPLAY}": {"ep": 2},
    "EP2, rollouts TP2": {"ep": 2},
    "CP2": {"cp": 2},
    f"CP2 EP2{REPLAY}": {"cp": 2, "ep": 2},
}
ROLLOUTS = {"EP2, rollouts TP2": {"tp": 2, "ep": 1}}
"""Layouts of generation; training's memory is offloaded meanwhile."""
LORA = ("EP2, rollouts TP2", "EP2")
"""Layouts that also train adapters."""
ADAPTED = ("linear_qkv", "linear_proj", "in_proj", "out_proj", "shared_experts", "experts")
STEPS = 2
COMPARED = ("loss", "grad_norm", "entropy", "logprob")
EXACT = (
    *("reward", "response_tokens", "groups", "groups_drawn", "trained_tokens"),
    *("curriculum/instruction_following", "curriculum_pass_rate/instruction_following"),
)
RATED = {"TP2": {"tp": 2}, "CP2": {"cp": 2}, "DP2": {}}
QUICK = ("TP2", "DP2", "PP2", "EP2, rollouts TP2", f"CP2 EP2{REPLAY}")
QUICK_LORA, QUICK_RATED = LORA[:1], tuple(RATED)[:2]

Lines = list[dict[str, Any]]


def grpo(
    artifact: str,
    folder: str,
    parallel: dict[str, Any],
    steps: int = STEPS,
    *,
    replay: bool = False,
    rollouts: dict[str, int] | None = None,
    lora: bool = False,
) -> Lines:
    """metrics.jsonl of a stage. Answers are junk, and some junk keeps to "no commas"."""
    from nemocascade.recipe import (
        CheckpointConfig,
        DomainConfig,
        EngineConfig,
        GrpoConfig,
        GrpoRecipe,
        LogConfig,
        LoraConfig,
        OptimizerConfig,
        ParallelConfig,
        RlEvalConfig,
        RolloutConfig,
        RolloutParallelConfig,
    )
    from nemocascade.recipe.envs import EnvConfig
    from nemocascade.stages.grpo import run_grpo

    run_grpo(
        GrpoRecipe(
            steps=steps,
            run_dir=folder,
            init_from=artifact,
            domains=(
                DomainConfig(
                    domain="instruction_following",
                    tasks=64,
                    difficulty=1,
                    curriculum="adaptive",
                    target_pass_rate=0.1,
                ),
            ),
            rollout=RolloutConfig(
                prompts_per_step=6,
                rollouts_per_prompt=4,
                max_prompt_tokens=96,
                max_response_tokens=12,
                thinking=False,
                slots=8,
                max_draws=3,
                replay_routing=replay,
                parallel=RolloutParallelConfig(**(rollouts or {})),
                offload=rollouts is not None,
            ),
            grpo=GrpoConfig(capacity=256, kl_coef=0.1),
            envs=EnvConfig(if_language_check="letters", check_workers=1),
            optimizer=OptimizerConfig(
                lr=3e-2 if lora else 1e-3, min_lr=0.0, warmup_steps=0, schedule="constant"
            ),
            lora=LoraConfig(rank=4, alpha=32.0, targets=ADAPTED) if lora else LoraConfig(),
            parallel=ParallelConfig(**parallel),
            engine=EngineConfig(precision="fp32", preflight=False),
            checkpoint=CheckpointConfig(every=0 if parallel else 1),
            eval=RlEvalConfig(prompts=4),
            log=LogConfig(tensorboard=False),
        )
    )
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def pass_rates(artifact: str, folder: str, parallel: dict[str, Any]) -> Lines:
    """Rows with their pass rates. Some junk keeps to "no commas", none has the word of the last."""
    from nemocascade.recipe import EngineConfig, ParallelConfig, RolloutConfig
    from nemocascade.recipe.envs import EnvConfig
    from nemocascade.recipe.pass_rates import PassRateSettings
    from nemocascade.stages.pass_rates import run_pass_rates

    rows = Path(folder).parent / "rows.jsonl"
    lines = [
        {
            "prompt": f"say {word}",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for word in ("one", "two", "three", "four", "five", "six")
    ]
    lines.append(
        {
            "prompt": "say seven",
            "instruction_id_list": ["keywords:existence"],
            "kwargs": [{"keywords": ["serendipity"]}],
        }
    )
    if not rows.exists():
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = Path(f"{folder}.jsonl")
    found = run_pass_rates(
        PassRateSettings(
            rows=str(rows),
            output=str(output),
            artifact=artifact,
            samples=3,
            rollout=RolloutConfig(
                prompts_per_step=5, max_response_tokens=24, thinking=False, slots=4
            ),
            envs=EnvConfig(check_workers=1),
            parallel=ParallelConfig(**parallel),
            engine=EngineConfig(precision="fp32"),
        )
    )
    assert found["rows"] == len(lines)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def alone(folder: str) -> dict[str, Any]:
    """One process: a run, and the same run stopped after its first step."""
    artifact = start_policy(f"{folder}/sft")
    whole = grpo(artifact, f"{folder}/whole", {})
    grpo(artifact, f"{folder}/parts", {}, steps=1)
    parts = grpo(artifact, f"{folder}/parts", {})
    rated = pass_rates(artifact, f"{folder}/rated", {})
    found = {"artifact": artifact, "whole": whole, "parts": parts, "rated": rated}
    found["LoRA whole"] = grpo(artifact, f"{folder}/LoRA whole", {}, lora=True)
    return found


def adapter_in_parts(artifact: str, folder: str) -> Lines:
    """One process: the run with an adapter, stopped after its first step."""
    grpo(artifact, f"{folder}/LoRA parts", {}, steps=1, lora=True)
    return grpo(artifact, f"{folder}/LoRA parts", {}, lora=True)


def together(
    artifact: str, folder: str, layouts: list[str], lora: list[str], rated: list[str]
) -> dict[str, Lines]:
    """Two ranks, layout by layout."""
    found = {
        name: grpo(
            artifact,
            f"{folder}/{name}",
            LAYOUTS[name],
            replay=name.endswith(REPLAY),
            rollouts=ROLLOUTS.get(name),
        )
        for name in layouts
    }
    for name in lora:
        found[f"LoRA {name}"] = grpo(
            artifact,
            f"{folder}/LoRA {name}",
            LAYOUTS[name],
            rollouts=ROLLOUTS.get(name),
            lora=True,
        )
    for name in rated:
        found[f"rated {name}"] = pass_rates(artifact, f"{folder}/rated_{name}", RATED[name])
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("grpo"))
    (found,) = run_ranks(alone, 1, {"folder": folder}, timeout_s=300)
    arguments = {"artifact": found["artifact"], "folder": folder}
    arguments |= {"layouts": QUICK, "lora": QUICK_LORA, "rated": QUICK_RATED}
    return {**found, **run_ranks(together, 2, arguments, timeout_s=500)[0], "folder": folder}


@pytest.fixture(scope="module")
def others(runs: dict[str, Any]) -> dict[str, Any]:
    """Runs that the quick tests omit."""
    arguments = {"artifact": runs["artifact"], "folder": runs["folder"]}
    (parts,) = run_ranks(adapter_in_parts, 1, arguments, timeout_s=300)
    for name, every, quick in (
        ("layouts", LAYOUTS, QUICK),
        ("lora", LORA, QUICK_LORA),
        ("rated", RATED, QUICK_RATED),
    ):
        arguments[name] = [key for key in every if key not in quick]
    found = run_ranks(together, 2, arguments, timeout_s=500)[0]
    return {**runs, **found, "LoRA parts": parts}


def cases(every: Iterable[str], quick: Collection[str]) -> pytest.MarkDecorator:
    """A test of each name in `found`; those outside of `quick` are slow."""
    return pytest.mark.parametrize(
        ("name", "found"),
        [
            pytest.param(name, "runs" if name in quick else "others", marks=marks)
            for name in every
            for marks in [[] if name in quick else [pytest.mark.slow]]
        ],
        indirect=["found"],
    )


@pytest.fixture
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The runs of the fixture that the parameter names."""
    of: dict[str, Any] = request.getfixturevalue(request.param)
    return of


def test_it_trains_on_groups_that_differ(runs: dict[str, Any]) -> None:
    for line in runs["whole"]:
        assert line["groups"] >= 1
        assert line["grad_norm"] > 0
        assert 0 < line["reward"] < 1
        assert line["mismatch_mean"] <= 1e-4
        assert line["mismatch_max"] <= 1e-2
        assert line["kl"] >= 0
    assert runs["whole"][0]["kl"] == pytest.approx(0, abs=1e-6), "the start is its own reference"
    assert "heldout/instruction_following" in runs["whole"][-1]


@cases(LAYOUTS, QUICK)
def test_layout_equals_one_process(name: str, found: dict[str, Any]) -> None:
    """The same rollouts and rewards, and the same update within rounding."""
    assert len(found[name]) == STEPS
    for ours, theirs in zip(found[name], found["whole"], strict=True):
        assert ("mismatch_mean_free" in ours) == name.endswith(REPLAY)
        assert ours.get("mismatch_mean_free", 0.0) <= 1e-4
        for key in EXACT:
            assert ours[key] == theirs[key], (key, ours["step"])
        for key in COMPARED:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), (key, ours["step"])


def test_rollouts_are_of_the_merged_adapter(runs: dict[str, Any]) -> None:
    """After the first step the adapter is not zero, and rollouts without it would differ."""
    first, second = runs["LoRA whole"]
    for line in (first, second):
        assert line["mismatch_mean"] <= 1e-4
        assert line["mismatch_max"] <= 1e-2
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-3, "the policy is where it started"


@cases(LORA, QUICK_LORA)
def test_adapters_train_alike_on_every_layout(name: str, found: dict[str, Any]) -> None:
    for ours, theirs in zip(found[f"LoRA {name}"], found["LoRA whole"], strict=True):
        for key in EXACT:
            assert ours[key] == theirs[key], (key, ours["step"])
        for key in COMPARED:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), (key, ours["step"])


@cases(RATED, QUICK_RATED)
def test_pass_rates_do_not_depend_on_the_layout(name: str, found: dict[str, Any]) -> None:
    assert found[f"rated {name}"] == found["rated"]
    assert {line["pass_rate_samples"] for line in found["rated"]} == {3}
    assert len({line["pass_rate"] for line in found["rated"]}) > 1


def test_the_curriculum_follows_the_rewards(runs: dict[str, Any]) -> None:
    targets = [line["curriculum/instruction_following"] for line in runs["whole"]]
    assert 0 < targets[0] < targets[1]


@cases(["", "LoRA "], [""])
def test_a_stopped_run_goes_on_bit_for_bit(name: str, found: dict[str, Any]) -> None:
    """Rollouts included: the artifact's weights, and the adapter's, are the same files."""
    timing = {
        "tflops_per_rank",
        "mfu",
        "groups_ahead",
        # What is cancelled, and when a slot is filled, depends on timing.
        *("decode_steps", "decode_rows", "preemptions", "offloads", "prefill_tokens", "verdicts"),
    }
    timing.add("peak_memory_gib")
    for ours, theirs in zip(found[f"{name}parts"], found[f"{name}whole"], strict=True):
        shown = [k for k in theirs if k not in timing and not k.startswith("heldout")]
        shown = [k for k in shown if not k.endswith("_s")]
        assert {k: ours[k] for k in shown} == {k: theirs[k] for k in shown}
    for kind in ("artifact", "adapter") if name else ("artifact",):
        hashes = []
        for run in ("whole", "parts"):
            path = Path(found["folder"]) / f"{name}{run}" / kind / "manifest.json"
            files = json.loads(path.read_text())["files"]
            hashes.append({k: v for k, v in files.items() if k.endswith(".safetensors")})
        assert hashes[0]
        assert hashes[0] == hashes[1]


def test_rollouts_are_kept_as_text(runs: dict[str, Any]) -> None:
    text = (Path(runs["folder"]) / "whole/rollouts/step_00000001.jsonl").read_text()
    sample = json.loads(text.splitlines()[0])
    assert sample["prompt"][0]["role"] == "user"
    assert sample["response"]
    assert len(sample["rewards_of_group"]) == 4

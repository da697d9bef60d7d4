"""Generates a plausible run folder of a cascade, for tests and for viewing the report.

python tests/helpers/cascade_run.py runs/made_up    # the folder and its report
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

MULTI = ("multiple_choice", "tool_calling", "structured_output")
DOMAINS = ("math", "instruction_following", *MULTI, "preference", "long_context", "code", "swe")
# name, kind, start, side, domains, steps, seconds
STAGES: tuple[tuple[str, str, str, bool, tuple[str, ...], int, float], ...] = (
    ("sft", "sft", "", False, DOMAINS, 150, 214.0),
    ("if_rl", "grpo", "sft", False, ("instruction_following",), 30, 71.0),
    ("multi_domain_rl", "grpo", "if_rl", False, MULTI, 30, 118.4),
    ("rlhf_teacher", "grpo", "sft", True, ("preference",), 12, 64.0),
    ("mopd", "mopd", "multi_domain_rl", False, ("math", *DOMAINS[1:6]), 40, 142.0),
    ("rlhf", "grpo", "mopd", False, ("preference",), 10, 52.0),
    ("long_context_rl", "grpo", "rlhf", False, ("long_context",), 15, 75.0),
    ("code_rl", "grpo", "long_context_rl", False, ("code",), 20, 61.0),
    ("swe_agentic_rl", "grpo", "code_rl", False, ("swe",), 20, 88.0),
)
# What a stage adds to a domain's score, in points; every other domain loses a little.
GAINS = {
    "if_rl": {"instruction_following": 27, "preference": -9, "math": -3},
    "multi_domain_rl": {"multiple_choice": 22, "tool_calling": 19, "structured_output": 15},
    "rlhf_teacher": {"preference": 24, "instruction_following": 2},
    "mopd": {"math": 5, "preference": 25, "instruction_following": 1},
    "rlhf": {"preference": 5},
    "long_context_rl": {"long_context": 26},
    "code_rl": {"code": 24},
    "swe_agentic_rl": {"swe": 21},
}
START = (46, 41, 38, 44, 52, 48, 33, 37, 29)
ALARM = 0.06


def digest(name: str) -> str:
    """Digest of an artifact."""
    return hashlib.sha256(name.encode()).hexdigest()


def make_run(run: Path, *, stages: int = len(STAGES), seed: int = 0) -> Path:
    """Write a run whose first `stages` stages are done and whose next one runs."""
    scores: dict[str, dict[str, float]] = {}
    entries, alarms = [], []
    for number, (name, kind, start, side, domains, steps, seconds) in enumerate(STAGES):
        dice = random.Random(f"{seed}/{name}")
        status = "done" if number < stages else "running" if number == stages else "pending"
        tokens = steps * 8_192
        entry: dict[str, Any] = {"name": name, "kind": kind, "start": start, "side": side}
        entry |= {"status": status, "run_dir": f"stages/{name}", "key": digest(f"key {name}")}
        done = {"artifact_digest": digest(name), "seconds": seconds, "tokens": tokens}
        entries.append(entry | (done if status == "done" else {}))
        if status == "pending":
            continue
        folder = run / "stages" / name
        folder.mkdir(parents=True)
        written = steps if status == "done" else steps // 3
        _write(folder / "recipe.json", _recipe(name, kind, start, domains, steps))
        _metrics(folder, kind, domains, steps, written, seconds / steps, dice)
        if kind != "sft":
            _rollouts(folder, domains, written, dice)
        if status == "done":
            scores[name] = _scores(name, scores.get(start), dice)
            alarms += _alarms(name, start, scores)
            _write(folder / "scores.json", _scored(name, scores[name], dice))
            inputs: dict[str, Any] = {"start": digest(start) if start else ""}
            if kind == "mopd":
                taught = _teachers(scores)
                inputs["teachers"] = {d: digest(t["stage"]) for d, t in taught.items()}
            record: dict[str, Any] = {"version": 1, "key": digest(f"key {name}"), "status": "done"}
            record |= {"inputs": inputs, "artifact_digest": digest(name), "seconds": seconds}
            record |= {"tokens": tokens, "teachers": _teachers(scores) if kind == "mopd" else {}}
            _write(folder / "stage.json", record)
            (folder / "artifact").mkdir()
            _write(folder / "artifact" / "manifest.json", {"digest": digest(name), "step": steps})
    settings = {"stop_on_alarm": False, "alarm_drop": ALARM, "heldout_tasks": 256}
    found = {"version": 1, "stages": entries, "teachers": _teachers(scores), "alarms": alarms}
    versions = {"nemocascade": "0.1.0", "torch": "2.13.0+cu130", "megatron-core": "0.19.2"}
    _write(run / "cascade.json", found | {"settings": settings, "versions": versions})
    return run


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _recipe(
    name: str, kind: str, start: str, domains: tuple[str, ...], steps: int
) -> dict[str, Any]:
    listed = [{"domain": d, "share": 1.0, "tasks": 800, "difficulty": 0} for d in domains]
    shared = {
        "steps": steps,
        "seed": 1,
        "run_dir": f"runs/x/stages/{name}",
        "init_from": f"runs/x/stages/{start}/artifact" if start else "",
        "optimizer": {"lr": 3e-3 if kind == "sft" else 5e-4, "beta2": 0.95, "weight_decay": 0.0},
        "parallel": {"tp": 1 + (name == "code_rl"), "pp": 1, "ep": 1, "cp": 1},
    }
    if kind == "sft":
        return shared | {"demonstrations": {"domains": listed}, "data": {"capacity": 2048}}
    rollout: dict[str, Any] = {
        "prompts_per_step": 16,
        "rollouts_per_prompt": 8 if kind == "grpo" else 4,
    }
    rollout |= {"max_response_tokens": 48, "temperature": 1.0, "top_p": 1.0, "thinking": False}
    own = {"grpo": {"kl_coef": 0.03 if "rlhf" in name else 0.0, "capacity": 2048}}
    if kind == "mopd":
        own = {"mopd": {"ratio_low": 0.5, "ratio_high": 2.0, "capacity": 2048}}
    return shared | {"stage": name, "domains": listed, "rollout": rollout} | own


def _metrics(
    folder: Path,
    kind: str,
    domains: tuple[str, ...],
    steps: int,
    written: int,
    step_time_s: float,
    dice: random.Random,
) -> None:
    lines = []
    for step in range(written):
        done = step / steps
        wave = dice.gauss(0, 1)
        row: dict[str, Any] = {"step": step + 1, "grad_norm": 0.4 + 2 * math.exp(-4 * done)}
        row |= {"lr": 5e-4, "tokens": 8192, "trained_tokens": 3000, "mfu": None}
        row |= {"tokens_per_s": 8192 / step_time_s, "step_time_s": step_time_s}
        row |= {"moe_max_load": 1.3 + 0.05 * wave, "moe_max_load_by_layer": [1.2, 1.4]}
        if kind == "sft":
            row["loss"] = 1.2 + 6 * math.exp(-5 * done) + 0.05 * wave
            if (step + 1) % 50 == 0:
                row["heldout_loss"] = 1.3 + 6 * math.exp(-5 * done)
        else:
            reward = 0.42 + 0.38 * (1 - math.exp(-3 * done)) + 0.03 * wave
            row |= {"reward": reward, "response_tokens": 21 + 9 * done + wave, "turns": 1.0}
            row |= {"response_tokens_max": 48.0, "entropy": 0.9 * math.exp(-done) + 0.02 * wave}
            row |= _times(step_time_s, scored=kind == "mopd") | {"repetition": 0.02 + 0.01 * done}
            row |= {"truncated": 0.08 * (1 - done), "mismatch_mean": 2e-7, "mismatch_max": 3e-6}
            row |= {"groups_all_right": 0.1 + 0.3 * done, "groups_all_wrong": 0.2 * (1 - done)}
            row |= {"verifier_errors": int(dice.random() < 0.1), "advantage": 0.01 * wave}
            if len(domains) > 1:
                for index, domain in enumerate(domains):
                    row[f"reward/{domain}"] = reward - 0.05 * index + 0.02 * dice.gauss(0, 1)
            if step + 1 == steps:
                row |= {f"heldout/{domain}": reward for domain in domains}
        if kind == "mopd":
            gap = 0.35 * math.exp(-3 * done)
            row |= {"advantage": -gap, "advantage_abs": 1.6 * gap, "ratio": 1 + 0.001 * wave}
            row |= {"gated_low": 0.003 * gap, "gated_high": 0.001 * gap}
            for index, domain in enumerate(domains):
                row[f"reverse_kl/{domain}"] = gap * (1 + 0.15 * index)
                row[f"importance/{domain}"] = 1 + 0.001 * dice.gauss(0, 1)
                row[f"gated/{domain}"] = 0.004 * gap
        elif folder.name == "code_rl":
            row |= {"curriculum/code": done, "curriculum_pass_rate/code": 0.5 + 0.1 * done}
        elif folder.name.startswith("rlhf"):
            row["kl"] = 0.02 * done + 0.001 * abs(wave)
        lines.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def _times(step_time_s: float, *, scored: bool) -> dict[str, float]:
    """Times of the phases of a step: 60 % rollouts, of which a tenth waits for tools."""
    found = {"rollout_time_s": 0.6 * step_time_s, "generation_time_s": 0.5 * step_time_s}
    found |= {"idle_time_s": 0.05 * step_time_s, "verify_wait_s": 0.1 * step_time_s}
    teacher = 0.1 * step_time_s if scored else 0.0
    return found | {"teacher_time_s": teacher, "train_time_s": 0.35 * step_time_s - teacher}


def _rollouts(folder: Path, domains: tuple[str, ...], steps: int, dice: random.Random) -> None:
    (folder / "rollouts").mkdir()
    for step in range(1, steps + 1):
        rows = [
            _task(domains[n % len(domains)], dice.randrange(90), dice.random() < step / steps)
            | {"step": step, "domain": domains[n % len(domains)], "task": f"{step}-{n}"}
            | {"rewards_of_group": [0.0, 1.0, 1.0, 0.0], "details": {}}
            for n in range(4)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rollouts" / f"step_{step:08d}.jsonl").write_text(text, encoding="utf-8")


def _task(domain: str, number: int, right: bool) -> dict[str, Any]:
    prompt = [
        {"role": "system", "content": f"You answer tasks of the kind: {domain}."},
        {"role": "user", "content": f"What is {number} + {2 * number + 7}? Answer with a number."},
    ]
    answer = 3 * number + 7 + (0 if right else 10)
    response = f"{number} plus {2 * number + 7} makes {answer}.\nSo the answer is {answer}."
    return {"prompt": prompt, "response": response, "reward": float(right), "error": None}


def _scores(name: str, before: dict[str, float] | None, dice: random.Random) -> dict[str, float]:
    if before is None:
        return {d: s / 100 for d, s in zip(DOMAINS, START, strict=True)}
    gains = GAINS[name]
    return {
        domain: min(0.98, max(0.0, value + gains.get(domain, dice.uniform(-2.5, 0.8)) / 100))
        for domain, value in before.items()
    }


def _alarms(name: str, start: str, scores: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    if not start:
        return []
    found = []
    for domain, after in scores[name].items():
        drop = scores[start][domain] - after
        if drop > ALARM:
            entry = {"domain": domain, "stage": name, "from_stage": start, "drop": drop}
            found.append(entry | {"before": scores[start][domain], "after": after})
    return found


def _teachers(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    if "mopd" not in scores:
        return {}
    found = {}
    for domain in ("math", *DOMAINS[1:6]):
        candidates = [name for name in scores if name in ("sft", *list(GAINS)[:3])]
        stage = max(candidates, key=lambda name: scores[name][domain])
        found[domain] = {
            "stage": stage,
            "score": scores[stage][domain],
            "pinned": False,
            "artifact": "",
        }
    found["math"] |= {"stage": "sft", "score": scores["sft"]["math"], "pinned": True}
    return found


def _scored(name: str, scores: dict[str, float], dice: random.Random) -> dict[str, Any]:
    return {
        "version": 2,
        "settings": "",
        "digest": digest(name),
        "scores": {
            d: {"score": s, "tasks": 256, "errors": 2 if d == "code" else 0}
            for d, s in scores.items()
        },
        "samples": {
            d: [_task(d, n, dice.random() < s) for n in (3, 14, 15, 92)] for d, s in scores.items()
        },
        "seconds": 6.5,
    }


if __name__ == "__main__":
    from nemocascade.cascade.report import write_report

    print(
        write_report(
            make_run(Path(sys.argv[1]), stages=int(sys.argv[2]) if sys.argv[2:] else len(STAGES))
        )
    )

"""A GRPO stage of several domains: their own limits, shares and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.ranks import run_ranks

LIMITS = {"instruction_following": 5, "math": 12}


def mixed(root: str) -> list[dict[str, Any]]:
    """metrics.jsonl of two steps on two domains."""
    from helpers.cascade_jobs import rl
    from helpers.start_policy import start_policy

    from nemocascade.recipe import DomainConfig
    from nemocascade.stages.grpo import run_grpo

    domains = tuple(
        DomainConfig(domain, tasks=64, max_response_tokens=limit if limit < 12 else 0)
        for domain, limit in LIMITS.items()
    )
    folder = f"{root}/rl"
    run_grpo(
        rl(
            "mixed",
            domains=domains,
            run_dir=folder,
            init_from=start_policy(f"{root}/sft", tuple(LIMITS)),
        )
    )
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]


def test_each_domain_has_its_limit_and_its_metrics(tmp_path: Path) -> None:
    [lines] = run_ranks(mixed, 1, {"root": str(tmp_path)}, timeout_s=300)
    assert len(lines) == 2
    for line in lines:
        for domain, limit in LIMITS.items():
            assert 0 < line[f"response_tokens/{domain}"] <= limit
            assert line[f"groups/{domain}"] == line[f"groups_drawn/{domain}"] == 2
            assert 0 <= line[f"truncated/{domain}"] <= 1
            assert line[f"verify_time_s/{domain}"] > 0
        total = sum(line[f"verify_time_s/{domain}"] for domain in LIMITS)
        assert abs(total - line["verify_time_s"]) < 1e-6
        # The start policy writes junk until it is cut off.
        assert line["response_tokens_max"] > LIMITS["instruction_following"]

"""Rows of public benchmarks, as published, from the file to the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from helpers.data import GSM8K_TEST, needs_gsm8k

from nemocascade.envs.base import Domain
from nemocascade.envs.benchmark_rows import BENCHMARKS, LETTERS, check_rows
from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.recipe import (
    DemonstrationConfig,
    DomainConfig,
    EnvConfig,
    RecipeError,
    SandboxConfig,
    ScoreConfig,
    SftRecipe,
)
from nemocascade.rl import demonstrations
from nemocascade.rl.demonstrations import demonstration_rows
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.world import World
from nemocascade.stages.score import config_of
from nemocascade.stages.settings import ScoreSettings
from nemocascade.types import Message, Prompt

HUMANEVAL: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\n\ndef total(xs: List[int]) -> int:\n"
    '    """ Sum of xs.\n    >>> total([1, 2])\n    3\n    """\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n"
    "    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
SUM = "def total(xs: list[Unknown]) -> int:\n    return sum(xs)"
FUTURE = {
    "first": f"from __future__ import annotations\n{SUM}",
    "after a docstring": f'"""Sums.\n"""\n# A.\nfrom __future__ import (\n annotations,\n)\n{SUM}',
    "two": f"from __future__ import annotations\nfrom __future__ import division\n{SUM}",
    "beside a statement": f"from __future__ import annotations; import math\n{SUM}",
    "in a text": f'from __future__ import annotations\nx = """\nfrom __future__ import x"""\n{SUM}',
    "too late": f"{SUM}\nfrom __future__ import annotations",
}
IFEVAL: dict[str, Any] = {
    "key": 1000,
    "prompt": "Say hello without a comma.",
    "instruction_id_list": ["punctuation:no_comma"],
    "kwargs": [{}],
}
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": (
        {
            "question": "Ann has 1,000 nuts and buys 48/2. How many has she?",
            "answer": "She buys 48/2 = <<48/2=24>>24 nuts.\nShe has 1,024.\n#### 1,024",
        },
        r"So it is \boxed{1024}.",
        r"\boxed{24}",
    ),
    "math": (
        {
            "problem": "What is $1/2 + 1/4$?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": r"It is $\boxed{\frac{3}{4}}$.",
        },
        r"\boxed{0.75}",
        r"\boxed{1}",
    ),
    "mmlu_pro": (
        {
            "question_id": 7,
            "question": "Which is a bird?",
            "options": ["a cat", "a cow", "an owl", "a dog", "a hat", "a car"],
            "answer": "C",
            "answer_index": 2,
            "cot_content": "",
            "category": "biology",
            "src": "made",
        },
        r"It is \boxed{C}.",
        r"\boxed{A}",
    ),
    "humaneval": (
        HUMANEVAL,
        "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```",
        "```python\nimport sys\ndef total(xs):\n    sys.exit(0)\n```",
    ),
    "ifeval": (IFEVAL, "Hello there.", "Hello, you."),
    "ifbench": ({**IFEVAL, "key": "1"}, "Hello there.", "Hello, you."),
}


@pytest.fixture(scope="module")
def environments() -> Iterator[dict[str, Domain]]:
    made = make_environments(
        EnvConfig(if_language_check="letters", sandbox=SandboxConfig(workers=1))
    )
    yield made
    close_environments(made)


def file_of(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_and_wrong_answers(
    environments: dict[str, Domain],
    name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    row, right, wrong = ROWS[name]
    path = file_of(tmp_path / "rows.jsonl", row)
    check_rows(name, str(path))
    domain = environments[BENCHMARKS[name].domain]
    [prompt] = domain.read(path)
    assert "does not know" not in caplog.text
    for text, reward in ((right, 1.0), (wrong, 0.0)):
        verdict = domain.score(prompt, [Message("assistant", text)])
        assert verdict.reward == reward, verdict


def test_the_prompts_ask_for_what_the_verifier_reads(
    environments: dict[str, Domain], tmp_path: Path
) -> None:
    for name in ("gsm8k", "math", "mmlu_pro"):
        row, _, _ = ROWS[name]
        path = file_of(tmp_path / f"{name}.jsonl", row)
        [prompt] = environments[BENCHMARKS[name].domain].read(path)
        text = prompt.messages[0].content
        assert r"\boxed{}" in text
        assert text.startswith(row.get("question") or row["problem"])
        assert all(f"{LETTERS[i]}. {o}" in text for i, o in enumerate(row.get("options", [])))


@pytest.mark.parametrize("answer", FUTURE)
def test_future_imports_of_an_answer_come_first(
    environments: dict[str, Domain], answer: str, tmp_path: Path
) -> None:
    """HumanEval's parts are one program, and Python accepts these imports at its start only."""
    path = file_of(tmp_path / "rows.jsonl", HUMANEVAL)
    [prompt] = environments["code"].read(path)
    verdict = environments["code"].score(
        prompt, [Message("assistant", f"```python\n{FUTURE[answer]}\n```")]
    )
    assert verdict.reward == float(answer != "too late"), verdict


def test_future_imports_where_parts_are_compiled_alone(environments: dict[str, Domain]) -> None:
    source = "from __future__ import annotations\n\ndef f(x: Unknown):\n    return x + 1"
    text = {"calls": source, "standard input": f"{source}\n\nprint(f(int(input())))"}
    tests: dict[str, dict[str, Any]] = {
        "calls": {"function": "f", "inputs": [[1]], "outputs": [2]},
        "standard input": {"function": "", "inputs": ["1"], "outputs": ["2"]},
    }
    for form, answer in tests.items():
        prompt = Prompt(form, "code", (), answer)
        verdict = environments["code"].score(prompt, [Message("assistant", text[form])])
        assert verdict.reward == 1.0, (form, verdict)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("math", {"solution": "It is 3/4."}, r"solution holds no \\boxed"),
        ("mmlu_pro", {"answer_index": 1}, r"answer_index\(1\) is not that of answer\(C\)"),
        ("mmlu_pro", {"answer": "Z", "answer_index": None}, "'Z' is not one of the options"),
        ("mmlu_pro", {"options": "a, b"}, "options must be a list"),
        ("humaneval", {"test": "assert True"}, "test defines no function check"),
        ("humaneval", {"entry_point": "1; x"}, "entry_point.* is not the name of a function"),
        ("gsm8k", {"answer": "####"}, "answer does not end with a line '#### number'"),
        ("gsm8k", {"question": 5}, "question must be a text"),
    ],
)
def test_a_broken_row_is_named(
    environments: dict[str, Domain], name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path / "rows.jsonl", ROWS[name][0] | changes)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{reason}"):
        list(environments[BENCHMARKS[name].domain].read(path))


def test_what_a_row_lacks_is_named(tmp_path: Path) -> None:
    path = file_of(tmp_path / "rows.jsonl", ROWS["gsm8k"][0], {"question": "x"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2 has no answer") as caught:
        config_of(ScoreSettings(benchmarks=(f"gsm8k={path}",)))
    assert "whose rows have question, answer" in str(caught.value)
    path = file_of(tmp_path / "rows.jsonl", {"question": "x", "answer": "4"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1 has no #### before the number"):
        config_of(ScoreSettings(benchmarks=(f"gsm8k={path}",)))
    for given in ("gsm9k=x", "gsm8k", "gsm8k="):
        with pytest.raises(RecipeError, match="NAME=PATH with NAME one of gsm8k, math"):
            config_of(ScoreSettings(benchmarks=(given,)))


def test_benchmarks_of_one_domain_have_scores_of_their_own(tmp_path: Path) -> None:
    paths = {n: file_of(tmp_path / f"{n}.jsonl", ROWS[n][0]) for n in ("gsm8k", "math")}
    given = tuple(f"{name}={path}" for name, path in paths.items())
    config = config_of(ScoreSettings(benchmarks=given, limit=3))
    assert [(d.label, d.domain, d.tasks) for d in config.domains] == [
        ("gsm8k", "math", 3),
        ("math", "math", 3),
    ]
    assert config.problems(1) == []
    several = config_of(ScoreSettings(benchmarks=given, domains=("code",)))
    assert [d.label for d in several.domains] == ["code", "gsm8k", "math"]
    assert [d.label for d in config_of(ScoreSettings()).domains][:2] != ["gsm8k", "math"]
    twice = replace(ScoreConfig(), domains=(*config.domains, *config.domains))
    assert any("names gsm8k twice" in problem for problem in twice.problems(1))


def test_rows_of_a_domain_are_scored(tmp_path: Path) -> None:
    paths = [file_of(tmp_path / f"{n}.jsonl", ROWS["gsm8k"][0]) for n in ("a", "b")]
    given = (f"math={paths[0]}", f"sorting={paths[0]}", f"math={paths[1]}")
    config = config_of(ScoreSettings(rows=given, limit=3))
    assert [(d.label, d.domain, d.heldout_path, d.tasks) for d in config.domains] == [
        ("math", "math", tuple(map(str, paths)), 3),
        ("sorting", "sorting", (str(paths[0]),), 3),
    ]
    assert config.problems(1) == []
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        config_of(ScoreSettings(rows=("math=missing.jsonl",)))
    for wrong in ("rows.jsonl", "=rows.jsonl", "math="):
        with pytest.raises(RecipeError, match=rf"rows\({wrong}\) must be DOMAIN=PATH"):
            config_of(ScoreSettings(rows=(wrong,)))


def test_worked_solutions_are_rows_of_sft(environments: dict[str, Domain], tmp_path: Path) -> None:
    """SFT sees the prompts of RL, and answers that its verifier accepts."""
    rows = [ROWS["gsm8k"][0], ROWS["math"][0]]
    path = file_of(tmp_path / "rows.jsonl", *rows)
    domain = DomainConfig("math", path=(str(path),), tasks=0, heldout_path=(str(path),))
    recipe = SftRecipe(demonstrations=DemonstrationConfig(domains=(domain,), thinking=0.0))
    found = list(demonstration_rows(recipe, heldout=False))
    prompts = {p.messages[0].content: p for p in environments["math"].read(path)}
    assert len(found) == 2
    for row in found:
        user, assistant = row["messages"]
        answer = [Message("assistant", assistant["content"])]
        assert environments["math"].score(prompts[user["content"]], answer).reward == 1.0
        assert "<<" not in assistant["content"]
    [one] = demonstration_rows(
        replace(recipe, demonstrations=replace(recipe.demonstrations, heldout=1)), heldout=True
    )
    assert one in found
    bare = file_of(tmp_path / "bare.jsonl", {"prompt": "1 + 1?", "expected_answer": "2"})
    domain = replace(domain, path=(str(bare),))
    with pytest.raises(DataError, match=r"bare\.jsonl:1 has no demonstration"):
        list(
            demonstration_rows(
                replace(recipe, demonstrations=DemonstrationConfig(domains=(domain,))),
                heldout=False,
            )
        )


def test_sft_without_heldout_tasks_has_no_file_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An empty file would end the stage; rows of the training set are split off instead."""
    monkeypatch.setattr(demonstrations, "main_first", lambda world, write, read: write())
    path = str(file_of(tmp_path / "rows.jsonl", ROWS["gsm8k"][0]))
    folder = tmp_path / "demonstrations"
    for domain, count, files in (
        (DomainConfig("math", path=(path,), tasks=0), 32, ()),
        (DomainConfig("math", path=(path,), tasks=0, heldout_path=(path,)), 0, ()),
        (DomainConfig("math", path=(path,), tasks=0, heldout_path=(path,)), 32, ("heldout.jsonl",)),
    ):
        made = DemonstrationConfig(domains=(domain,), heldout=count)
        recipe = SftRecipe(run_dir=str(tmp_path), demonstrations=made)
        data = demonstrations.with_demonstrations(recipe, cast(World, None)).data
        assert data.path == (str(folder / "train.jsonl"),)
        assert data.heldout_path == tuple(str(folder / name) for name in files)
        assert (folder / "heldout.jsonl").exists() == bool(files)


@needs_gsm8k
def test_every_solution_of_gsm8k_is_right(environments: dict[str, Domain]) -> None:
    prompts = list(environments["math"].read(GSM8K_TEST))
    assert len(prompts) == 1319
    scores = [environments["math"].score(p, p.demonstration).reward for p in prompts]
    assert scores == [1.0] * len(prompts)

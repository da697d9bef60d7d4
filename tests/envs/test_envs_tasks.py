"""Properties of every domain: the split, demonstrations, rows, error verdicts."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers.data import own_template, text_of
from helpers.graded import WrittenJudge

from nemocascade.data.formats import parse_row
from nemocascade.envs.base import Domain, demonstration, final_text, is_heldout, last_boxed
from nemocascade.envs.preference import Preference
from nemocascade.envs.registry import DOMAINS, close_environments, make_environments
from nemocascade.recipe import DemonstrationConfig, DomainConfig, SftRecipe
from nemocascade.recipe.data import DataConfig
from nemocascade.recipe.envs import EnvConfig, SandboxConfig
from nemocascade.rl.demonstrations import demonstration_rows, sft_row
from nemocascade.rl.trial import try_verifiers
from nemocascade.runtime.ray_cluster import ClusterError
from nemocascade.runtime.row_errors import BadRows, DataError
from nemocascade.runtime.stopping import AGAIN
from nemocascade.sandbox.child import ChildPool
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.types import Message, Prompt, SandboxUnavailable, ToolCall, Verdict

LEVELS = range(5)
PROGRAMS = ("code", "swe_agentless", "swe_agentic")
# Demonstrations of preference are of mixed quality on purpose; test_preference.py looks at them.
# Domains whose verdicts come from a child process or the sandbox.
CHILDREN = ("structured_output", "math", *PROGRAMS)
VERIFIED = tuple(name for name in DOMAINS if name != "preference")


@pytest.fixture(scope="module")
def environments() -> Iterator[dict[str, Domain]]:
    config = EnvConfig(if_language_check="letters", sandbox=SandboxConfig(workers=1, time_s=5.0))
    made = make_environments(config)
    yield made
    close_environments(made)


# Some domains have few of the easiest tasks: full counts of these, and of harder ones if slow.
COUNTS = [
    pytest.param(0, 1024),
    *(pytest.param(level, 128) for level in LEVELS[1:]),
    *(pytest.param(level, 1024, marks=pytest.mark.slow) for level in LEVELS[1:]),
]


@pytest.mark.parametrize(("level", "count"), COUNTS)
@pytest.mark.parametrize("name", DOMAINS)
def test_enough_tasks_that_never_stand_on_both_sides(
    environments: dict[str, Domain], name: str, level: int, count: int
) -> None:
    domain = environments[name]
    heldout = list(domain.prompts(seed=3, count=count // 4, difficulty=level, heldout=True))
    training = list(domain.prompts(seed=4, count=count, difficulty=level))
    ids = [p.id for p in heldout + training]
    assert len(set(ids)) == count // 4 + count
    keys = [{domain.split_key(p) for p in prompts} for prompts in (heldout, training)]
    assert all(map(is_heldout, keys[0]))
    assert not any(map(is_heldout, keys[1]))
    assert not keys[0] & keys[1]
    assert all(p.domain == name for p in heldout)


@pytest.mark.parametrize("name", DOMAINS)
def test_tasks_are_a_function_of_the_seed(environments: dict[str, Domain], name: str) -> None:
    domain = environments[name]
    first = list(domain.prompts(seed=3, count=20, difficulty=2))
    assert first == list(domain.prompts(seed=3, count=20, difficulty=2))
    assert first != list(domain.prompts(seed=4, count=20, difficulty=2))


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", VERIFIED)
def test_demonstrations_are_right_and_other_answers_wrong(
    environments: dict[str, Domain], name: str, level: int, thinking: bool
) -> None:
    domain = environments[name]
    prompts = list(domain.prompts(seed=1, count=3 if name in PROGRAMS else 25, difficulty=level))
    try:
        for prompt in prompts:
            turns = demonstration(prompt, thinking=thinking)
            assert domain.score(prompt, turns).reward == 1.0, turns
            assert any(m.reasoning for m in turns) == thinking
            assert domain.score(prompt, []).reward == 0.0
            unfinished = [Message("assistant", f"<think>\n{turns[0].content}")]
            assert domain.score(prompt, unfinished).reward == 0.0
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", VERIFIED)
def test_careless_solutions_lose_the_reward(
    environments: dict[str, Domain], name: str, level: int
) -> None:
    """All of them, but of instructions that a text may follow by chance."""
    domain = environments[name]
    prompts = list(domain.prompts(seed=1, count=3 if name in PROGRAMS else 25, difficulty=level))
    try:
        verdicts = [
            domain.score(p, demonstration(p, thinking=False, careless=True)) for p in prompts
        ]
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    mean = sum(v.reward or 0.0 for v in verdicts) / len(verdicts)
    assert all(v.error is None for v in verdicts)
    assert mean <= (0.6 if name == "instruction_following" else 0.0)


def test_rows_for_sft_are_careless_as_often_as_asked() -> None:
    domains = (DomainConfig(domain="multiple_choice", tasks=400),)
    found = {}
    for share in (0.0, 0.6, 1.0):
        made = DemonstrationConfig(domains=domains, thinking=0.0, careless=share)
        rows = list(demonstration_rows(SftRecipe(demonstrations=made), heldout=False))
        assert len(rows) == 400
        found[share] = sum("boxed" not in row["messages"][-1]["content"] for row in rows) / 400
    assert found[0.0] == 0.0
    assert found[0.6] == pytest.approx(0.6, abs=0.1)
    assert found[1.0] == 1.0


def test_solutions_of_multiple_choice_name_an_option_that_the_prompt_shows(
    environments: dict[str, Domain],
) -> None:
    """A letter would be right too; the solution shows the word, which a tiny model can find."""
    domain = environments["multiple_choice"]
    for prompt in domain.prompts(seed=1, count=50):
        options, letter = prompt.answer["options"], prompt.answer["letter"]
        stated = last_boxed(prompt.demonstration[0].content)
        assert stated == options[letter]
        assert f"{letter} {stated}" in prompt.messages[0].content.splitlines()
        for text, reward in ((f"\\boxed{{{letter}}}", 1.0), (f"it is {stated}", 0.0)):
            assert domain.score(prompt, [Message("assistant", text)]).reward == reward


def test_the_easiest_sums_are_few(environments: dict[str, Domain]) -> None:
    """A tiny model sees each often enough to learn it; the split is by their wording."""
    prompts = list(environments["math"].prompts(seed=1, count=1300))
    sums = {p.demonstration[0].reasoning for p in prompts}
    assert len(sums) == 49 + 28
    assert {p.answer["expected"] for p in prompts} == set(map(str, range(13)))


def test_a_task_without_a_habit_is_solved_with_care(environments: dict[str, Domain]) -> None:
    (prompt,) = environments["preference"].prompts(seed=1, count=1)
    assert demonstration(prompt, thinking=True, careless=True) == list(prompt.demonstration)


@pytest.mark.parametrize("name", DOMAINS)
def test_easy_tasks_fit_a_small_context(environments: dict[str, Domain], name: str) -> None:
    """Characters bound tokens: pieces of a trained tokenizer are longer than one. A quarter of the
    agent's tasks are bugs of real repositories, whose issues are longer."""
    most, answer = (320, 800) if name == "swe_agentic" else (200, 300)
    for prompt in environments[name].prompts(seed=1, count=50):
        assert sum(len(m.content) for m in prompt.messages) < most
        assert sum(len(m.content) + len(m.reasoning) for m in prompt.demonstration) < answer


def test_running_out_of_tasks_is_an_error(environments: dict[str, Domain]) -> None:
    with pytest.raises(ValueError, match=r"math has about \d+ training tasks of difficulty 0"):
        list(environments["math"].prompts(seed=1, count=100_000))


def test_a_task_of_another_domain_is_rejected(environments: dict[str, Domain]) -> None:
    (prompt,) = environments["math"].prompts(seed=1, count=1)
    with pytest.raises(ValueError, match="multiple_choice cannot score a task of math"):
        environments["multiple_choice"].score(prompt, [])


def test_a_verifier_that_raises_reports_an_error(
    environments: dict[str, Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = environments["math"]
    (prompt,) = domain.prompts(seed=1, count=1)

    def fail(*arguments: Any) -> Verdict:
        raise ZeroDivisionError("a fault of the verifier")

    monkeypatch.setattr(domain, "check", fail)
    verdict = domain.score(prompt, demonstration(prompt, thinking=True))
    assert verdict.reward is None
    assert verdict.error == "ZeroDivisionError: a fault of the verifier"


def test_a_verdict_is_a_reward_or_an_error() -> None:
    assert Verdict(0.0).error is None
    for reward, error in ((None, None), (1.0, "both"), (math.nan, None), (math.inf, None)):
        with pytest.raises(ValueError, match=r"reward"):
            Verdict(reward, error)


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ([], ""),
        ([Message("assistant", " yes ", "why")], "yes"),
        ([Message("assistant", "why</think>yes")], "yes"),
        ([Message("assistant", "<think>a</think>b</think>\nyes")], "yes"),
        ([Message("assistant", "<think>never ends")], ""),
        ([Message("assistant", "first"), Message("tool", "answer")], ""),
        (
            [Message("assistant", "first"), Message("tool", "x"), Message("assistant", "last")],
            "last",
        ),
    ],
)
def test_the_final_message(response: list[Message], text: str) -> None:
    assert final_text(response) == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "2"),
        (r"\boxed{1} and $\boxed{\frac{2}{3}$ is it", r"\frac{2}{3}"),
        (r"\boxed{1} and \[\boxed{2\] is it", "2"),
        (r"\boxed{1} and $\boxed{\$2$ is it", r"\$2"),
        ("\\boxed{1} and \\boxed{2\nis it", "2"),
        (r"\boxed{1} and \boxed{", ""),
        (r"\boxed{1} and \boxed{}", ""),
        (r"\boxed{1} and \boxed {2}", "2"),
        (r"\boxed{1} and \boxed{\{2\}", r"\{2\}"),
        ("\\boxed{1\n2}", "1\n2"),
        (r"\boxed{1} and \fbox{2}", "2"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{\boxed{1}}", "1"),
        (r"\boxed{ }", ""),
        ("no box", None),
    ],
)
def test_the_last_box(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


ROWS: dict[str, dict[str, Any]] = {
    "instruction_following": {
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{"keywords": None, "num_words": None}, {"keywords": ["cat"]}],
        "prompt": "Write.",
    },
    "multiple_choice": {"options": [{"A": "x"}, {"B": "y"}], "expected_answer": "B"},
    "tool_calling": {
        "ground_truth": [{"name": "add_task", "arguments": '{"title": "x"}'}],
        "category": "tasks",
    },
    "structured_output": {"schema_str": '{"type": "object"}', "schema_type": "json"},
    "math": {"expected_answer": "4"},
    "code": {"verifier_metadata": {"unit_tests": {"inputs": ["1\n"], "outputs": ["2\n"]}}},
    "preference": {},
    "long_context": {"ground_truth": "The lake.", "metadata": {"documents": 6}},
    "swe_agentless": {
        "problem_statement": "f adds.",
        "files": {"f.py": "def f(x):\n    return x + 2\n"},
        "golden_files": ["f.py"],
        "tests": {
            "files": {"test_f.py": "from f import f\n\n\ndef test_f():\n    assert f(3) == 6\n"},
            "FAIL_TO_PASS": ["test_f.py::test_f"],
        },
    },
    "swe_agentic": {
        "problem_statement": "f adds.",
        "repository": "repository",
        "tests": {
            "files": {"test_f.py": "from f import f\n\n\ndef test_f():\n    assert f(3) == 6\n"},
            "FAIL_TO_PASS": ["test_f.py::test_f"],
        },
    },
}
RIGHT = {
    "instruction_following": [Message("assistant", "a cat")],
    "multiple_choice": [Message("assistant", r"\boxed{B}")],
    "structured_output": [Message("assistant", "{}")],
    "long_context": [Message("assistant", "It is there.\nAnswer: lake")],
    "math": [Message("assistant", r"\boxed{4}")],
}


def row_of(name: str) -> dict[str, Any]:
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Do it."}]
    return {
        "responses_create_params": {"input": turns, "tools": []},
        "agent_ref": {"type": "responses_api_agents", "name": "simple_agent"},
        "dataset": "released",
        **ROWS[name],
    }


@pytest.mark.parametrize("name", DOMAINS)
def test_released_rows(environments: dict[str, Domain], tmp_path: Path, name: str) -> None:
    """A file may mix domains that all read it: no row has two, and none is left over."""
    path = tmp_path / "rows.jsonl.gz"
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "f.py").write_text("def f(x):\n    return x + 2\n")
    with gzip.open(path, "wt") as file:
        for other in DOMAINS:
            file.write(json.dumps(row_of(other)) + "\n\n")
    others = [environment for other, environment in environments.items() if other != name]
    domain = Preference(WrittenJudge()) if name == "preference" else environments[name]
    (prompt,) = domain.read(path, others=others)
    assert prompt.messages == (Message("system", "Be brief."), Message("user", "Do it."))
    assert prompt.source == f"{path}:{2 * DOMAINS.index(name) + 1}"
    assert len(prompt.id) == 32
    with pytest.raises(ValueError, match="no demonstration"):
        demonstration(prompt, thinking=False)
    if name in RIGHT:
        assert environments[name].score(prompt, RIGHT[name]).reward == 1.0


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "multiple_choice",
            {"expected_answer": "C"},
            r"'C' is not one of the options \['A', 'B'\]",
        ),
        ("multiple_choice", {"responses_create_params": {"input": []}}, "both empty"),
        ("instruction_following", {"kwargs": [{}]}, "2 instructions have 1 sets"),
        ("math", {"expected_answer": '["7f3a", "91bc"]'}, "a list of texts"),
        ("structured_output", {"schema_str": "{"}, "schema_str: not JSON"),
        ("structured_output", {"schema_str": '{"a": 1, "a": 2}'}, "the key 'a' occurs twice"),
        ("structured_output", {"schema_type": "ini"}, "'ini' must be one of json, yaml"),
        ("structured_output", {"schema_str": '{"type": "obj"}'}, "no validator accepts .*'obj'"),
        ("structured_output", {"schema_str": '{"$ref": "#/$defs/a"}'}, "'#/.defs/a' leads nowhere"),
        ("structured_output", {"schema_str": '{"$ref": "http://x/y"}'}, "'http://x/y' leads nowh"),
        ("instruction_following", {"instruction_id_list": ["a:b", "c:d"]}, "instruction 'a:b'"),
        ("instruction_following", {"kwargs": [{"num_words": 3}, {}]}, "num_words"),
        ("multiple_choice", {"answer_regex": "("}, "missing \\)"),
        ("math", {"expected_answer": None}, "expected_answer must be .*, it is missing or null"),
        ("math", {"expected_answer": " "}, "expected_answer is empty"),
        ("math", {"options": [{"A": "4"}]}, r"it is not a row of math: fields \['agent_ref'"),
        ("math", {"responses_create_params": {}, "prompt": [{"content": "x"}]}, "role None"),
        ("math", {"responses_create_params": {"input": [{"role": "user"}]}}, "turn 0 .* is empty"),
        ("math", {"responses_create_params": {"input": {"role": "user"}}}, "turns, it is dict"),
        ("math", {"responses_create_params": {"input": [3]}}, "turn 0 .* must be an object"),
        ("math", {"responses_create_params": 3}, "AttributeError"),
        ("code", {"verifier_metadata": 3}, "verifier_metadata must be an object, it is int"),
        ("code", {"unit_tests": {}}, r"\['unit_tests'\] have one value in the row and another"),
        ("math", {"pass_rate": 10**400}, "'pass_rate' is 1000"),
        ("tool_calling", {"office": {"mail": None}}, "'mail' must be a list of objects"),
        ("code", {"verifier_metadata": {"unit_tests": '{"inputs": [NaN]}'}}, "the value NaN"),
        (
            "code",
            {"verifier_metadata": {"unit_tests": {"inputs": [1], "outputs": ["1"]}}},
            "inputs and outputs are texts; one is int",
        ),
        (
            "tool_calling",
            {"ground_truth": [{"name": "crm_add", "arguments": "{}"}]},
            r"no tools \['crm_add'\]",
        ),
        (
            "tool_calling",
            {"ground_truth": [{"name": "delete_task", "arguments": {"title": "x"}}]},
            "no entry in tasks",
        ),
        ("code", {"verifier_metadata": {"unit_tests": {"inputs": [], "outputs": []}}}, "0 inputs"),
    ],
)
def test_a_broken_row_is_named(
    environments: dict[str, Domain], tmp_path: Path, name: str, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row_of(name))}\n{json.dumps({**row_of(name), **change})}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        list(environments[name].read(path))
    bad = BadRows(1)
    assert len(list(environments[name].read(path, bad.skip))) == 1
    assert bad.count == 1


@pytest.mark.parametrize("rate", [10**400, -(10**400), 1.5, "2", float("1e308")])
def test_a_pass_rate_is_a_share(
    environments: dict[str, Domain], tmp_path: Path, rate: float | str
) -> None:
    row = {"prompt": "1 + 1?", "expected_answer": "2", "pass_rate": rate}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'pass_rate' is .*, a share of tries is"):
        list(environments["math"].read(tmp_path / "rows.jsonl"))


def test_a_file_without_a_row_of_the_domain(
    environments: dict[str, Domain], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row_of("math")))
    with pytest.raises(DataError, match="none of its 1 rows is of code"):
        list(environments["code"].read(path, others=[environments["math"]]))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: it is not a row of code: fields \["):
        list(environments["code"].read(path))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not JSON"):
        list(environments["math"].read(path))
    # Rows that are skipped up to a limit are the reason, too.
    path.write_text(json.dumps({**row_of("math"), "expected_answer": []}) + "\n[]")
    why = r"none of its 2 rows is of math: .*first bad one is .*rows\.jsonl:1: expected_answer must"
    with pytest.raises(DataError, match=why):
        list(environments["math"].read(path, BadRows(2).skip))


@pytest.mark.parametrize("name", DOMAINS)
def test_demonstrations_become_sft_rows(environments: dict[str, Domain], name: str) -> None:
    prompt: Prompt
    for prompt in islice(environments[name].prompts(seed=1, count=5, difficulty=3), 5):
        for thinking in (True, False):
            row = json.loads(json.dumps(sft_row(prompt, thinking=thinking)))
            conversation = parse_row(row, "messages", DataConfig())
            assert conversation.messages[: len(prompt.messages)] == prompt.messages
            assert conversation.tools == prompt.tools
            text = text_of(own_template().render(conversation, thinking=True))
            assert ("<think>\n" in text) == thinking


def test_sft_rows_mix_domains_and_hold_out(environments: dict[str, Domain]) -> None:
    domains = tuple(DomainConfig(n, tasks=k) for n, k in (("math", 30), ("tool_calling", 20)))
    made = DemonstrationConfig(domains=domains, thinking=0.5, careless=0.0)
    recipe = SftRecipe(demonstrations=made, seed=7)
    rows = list(demonstration_rows(recipe, heldout=False))
    assert len(rows) == 50
    thinking = sum("reasoning_content" in json.dumps(row) for row in rows)
    assert 10 < thinking < 40
    assert list(demonstration_rows(recipe, heldout=False)) == rows
    heldout = {
        p.messages[-1].content
        for p in environments["math"].prompts(seed=7, count=256, heldout=True)
    }
    assert not heldout & {row["messages"][0]["content"] for row in rows}


def test_a_verifier_that_fails_is_found_by_a_dummy_answer(
    environments: dict[str, Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each form of tasks: code that is called, and code that reads its input."""
    prompts = [
        prompt
        for name, domain in environments.items()
        for level in (0, 3)
        for prompt in domain.prompts(seed=1, count=12, difficulty=level)
    ]
    try_verifiers(prompts, environments)
    seen: list[str] = []

    def fail(prompt: Prompt, response: Sequence[Message]) -> Verdict:
        seen.append(prompt.answer["function"])
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(environments["code"], "check", fail)
    with pytest.raises(DataError, match=r"code \(code:1:1\): ZeroDivisionError: a fault"):
        try_verifiers(prompts, environments)
    assert [bool(name) for name in seen] == [True, False]


def test_a_cluster_without_nodes_is_no_fault_of_the_verifier(
    environments: dict[str, Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job ends for good after a DataError, and starts again after a ClusterError."""

    def fail(*_: object) -> Verdict:
        raise ClusterError("no node answers in time")

    monkeypatch.setattr(environments["code"], "score", fail)
    prompt = next(iter(environments["code"].prompts(seed=1, count=1)))
    with pytest.raises(ClusterError, match="no node answers") as caught:
        try_verifiers([prompt], environments)
    assert caught.value.exit_code == AGAIN


def test_a_dummy_answer_runs_the_verifier_in_full(
    environments: dict[str, Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs run, and checks in children are made; a judge is not asked."""
    prompts = {n: next(iter(d.prompts(seed=1, count=1))) for n, d in environments.items()}
    try_verifiers(prompts.values(), environments)

    def fail(*_: object) -> None:
        raise OSError("no process")

    monkeypatch.setattr(SandboxPool, "run", fail)
    monkeypatch.setattr(ChildPool, "call", fail)
    for name, prompt in prompts.items():
        if name not in CHILDREN:
            try_verifiers([prompt], environments)
            continue
        with pytest.raises(DataError, match=f"{name} .*no process"):
            try_verifiers([prompt], environments)


def test_rows_of_unusual_forms_are_tried(environments: dict[str, Domain]) -> None:
    pattern: dict[str, Any] = {"letter": "A", "options": {"A": "x"}, "patterns": [r"(\w)"]}
    pattern |= {"mode": "lenient_boxed"}
    boxed = {**pattern, "patterns": []}
    prompts = [Prompt(str(i), "multiple_choice", (), a) for i, a in enumerate((pattern, boxed))]
    assert [list(environments["multiple_choice"].forms(p)) for p in prompts] == [
        ["pattern"],
        ["lenient_boxed"],
    ]


def test_earlier_calls_of_a_prompt_are_kept(
    environments: dict[str, Domain], tmp_path: Path
) -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Do it."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    rows = [{"prompt": turns, "expected_answer": "4"}, {"prompt": turns, "expected_answer": 4}]
    rows[1] = json.loads(json.dumps(rows[1]).replace("1}", "3}"))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    first, second = environments["math"].read(path)
    assert first.messages == (
        Message("user", "Do it."),
        Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}),)),
        Message("tool", "2"),
    )
    assert first.id != second.id


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"check_workers\(0\).*sandbox.processes\(0\)"):
        make_environments(EnvConfig(check_workers=0, sandbox=SandboxConfig(processes=0)))

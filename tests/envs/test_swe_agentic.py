"""Agents that repair repositories: tasks, tools, confinement, verdicts, rows."""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.data import sentencepiece_tokenizer
from helpers.swe import agentic_domain, task, turn

from nemocascade.data.chat_template import Conversation, encode
from nemocascade.envs import swe_agentic
from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.envs.swe_made import make_task
from nemocascade.recipe import DomainConfig
from nemocascade.recipe.envs import AgentConfig, SandboxConfig
from nemocascade.rl.tasks import read_tasks
from nemocascade.swe.repository import run_tests
from nemocascade.swe.rows import snapshot_of
from nemocascade.swe.shipped import repositories, vary
from nemocascade.swe.workspace import TOOLS, ToolError, Workspace, cut
from nemocascade.types import Environment, Message, Prompt, ToolCall

domain = pytest.fixture(scope="module")(agentic_domain)


def edits_of(prompt: Prompt) -> list[ToolCall]:
    return [c for m in prompt.demonstration for c in m.tool_calls if c.name == "edit"]


# Tasks


@pytest.mark.parametrize("difficulty", range(4))
def test_demonstrations_pass_and_what_is_not_repaired_does_not(
    domain: SweAgentic, difficulty: int
) -> None:
    for prompt in domain.prompts(seed=difficulty, count=3, difficulty=difficulty):
        assert domain.score(prompt, prompt.demonstration).reward == 1.0
        idle = [turn(("list", {}), ("submit", {}))]
        assert domain.score(prompt, idle).details["reason"] == "nothing was changed"
        (edit,) = edits_of(prompt)
        other = edit.arguments["new"] + " + 1 - 2"
        spoiled = turn(("edit", {**edit.arguments, "new": other}))
        assert domain.score(prompt, [spoiled]).reward == 0.0


def test_the_easiest_tasks_are_short_and_many() -> None:
    """Most are a file of two lines, a tenth a bug of a repository that ships with the project."""
    tokens: dict[int, list[int]] = {2: [], 3: []}
    count, tokenizer = 2000, sentencepiece_tokenizer()
    for prompt in SweAgentic().prompts(seed=3, count=count):
        turns = len([m for m in prompt.demonstration if m.role == "assistant"])
        short = len(prompt.answer["files"]) == 1
        assert turns == (2 if short else 3)
        whole = Conversation((*prompt.messages, *prompt.demonstration), prompt.tools)
        if len(tokens[turns]) < 20:
            ids, _ = encode(tokenizer.template.render(whole, thinking=True), tokenizer)
            tokens[turns].append(len(ids))
        count -= short
    # More than a tenth: short tasks repeat, and each is given once.
    assert 200 < count < 420
    # This tokenizer knows no word of the tasks: one that was trained on them needs half.
    assert max(tokens[2]) <= 600
    assert max(tokens[3]) <= 1600


def test_demonstrations_hold_what_the_tools_answer(domain: SweAgentic) -> None:
    for difficulty in range(4):
        prompt = task(difficulty)
        session = domain.session(prompt)
        turns = list(prompt.demonstration)
        while turns:
            said = turns.pop(0)
            assert said.reasoning
            answers = session.step(said.tool_calls)
            if session.done:
                break
            assert answers == turns[: len(answers)]
            turns = turns[len(answers) :]
        assert session.done
        assert not turns
        assert bool(prompt.tools) == (difficulty >= 2)


BUGS = [(name, i) for name, chosen in repositories().items() for i in range(len(chosen["bugs"]))]


def test_enough_repositories_ship() -> None:
    assert len(repositories()) >= 6
    for chosen in repositories().values():
        assert len(chosen["files"]) >= 5
        assert len(chosen["bugs"]) >= 4
    # Different prompts on both sides of the split.
    domain = SweAgentic()
    for heldout, count in ((False, 400), (True, 100)):
        found = {p.id for p in domain.prompts(seed=1, count=count, difficulty=3, heldout=heldout)}
        assert len(found) == count


@pytest.mark.parametrize(("name", "number"), BUGS)
def test_a_bug_that_ships_fails_the_tests_that_it_names_and_no_others(
    domain: SweAgentic, name: str, number: int
) -> None:
    chosen = repositories()[name]
    rng = random.Random(f"{name}/{number}")
    words = {word: rng.choice(others) for word, others in chosen["choices"].items()}
    _, answer, steps = vary(chosen, chosen["bugs"][number], words, name_file=False)
    files = snapshot_of(answer)
    tests = {path: text.encode() for path, text in answer["tests"].items()}
    wanted = (*answer["fail_to_pass"], *answer["pass_to_pass"])
    found = run_tests(domain.sandbox, {**files, **tests}, wanted).outcomes
    assert {t for t, outcome in found.items() if outcome != "passed"} == set(answer["fail_to_pass"])
    prompt = Prompt("x", "swe_agentic", (), answer)
    calls = [call for made, _ in steps for call in made]
    assert domain.score(prompt, [Message("assistant", "", tool_calls=tuple(calls))]).reward == 1.0


# Tools


FILES = {
    "a.py": b"x = 1\ny = 2\nz = x + y\n",
    "lib/b.py": b"def f():\n    return 1\n",
    "lib/c.bin": b"\xff\xfe\x00",
    "long.txt": b"".join(b"line %d\n" % i for i in range(1, 1001)),
}


def workspace(**limits: int) -> Workspace:
    return Workspace(FILES, AgentConfig(**limits))


def test_looking_around() -> None:
    w = workspace(search_matches=2)
    assert w.list_files() == "a.py\nlib/b.py\nlib/c.bin\nlong.txt"
    assert w.list_files("lib") == w.list_files("./lib/") == "lib/b.py\nlib/c.bin"
    assert w.read("a.py") == "x = 1\ny = 2\nz = x + y"
    assert w.read("long.txt", "999") == "line 999\nline 1000"
    assert w.read("long.txt", "2", "3") == "line 2\nline 3"
    assert w.search("return", "lib") == "lib/b.py:2:     return 1"
    assert (
        w.search("line 99")
        == "long.txt:99: line 99\nlong.txt:990: line 990\n[9 more lines hold it]"
    )
    assert w.search("nothing") == "no line holds 'nothing'"


@pytest.mark.parametrize("lines", [("2", "3"), ("2", "4"), ("1", "2")])
def test_lines_that_were_read_can_be_replaced_whatever_ends_them(lines: tuple[str, str]) -> None:
    w = Workspace({"a.txt": b"one\r\ntwo\x0cand\r\nthree\r\nfour"}, AgentConfig())
    assert w.edit("a.txt", w.read("a.txt", *lines), "new") == "edited a.txt"


def test_edits() -> None:
    w = workspace()
    assert w.edit("a.py", "y = 2", "y = 3\nw = 4") == "edited a.py"
    assert w.read("a.py") == "x = 1\ny = 3\nw = 4\nz = x + y"
    assert w.edit("lib/new.py", "", "k = 1") == "made lib/new.py"
    assert dict(w.changes) == {
        "a.py": b"x = 1\ny = 3\nw = 4\nz = x + y\n",
        "lib/new.py": b"k = 1\n",
    }
    w.edit("a.py", "y = 3\nw = 4", "y = 2")
    assert list(w.changes) == ["lib/new.py"]
    assert FILES["a.py"] == b"x = 1\ny = 2\nz = x + y\n"
    assert workspace().files == FILES


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("read", {"path": "../../etc/passwd"}, "not a path inside"),
        ("read", {"path": "/etc/passwd"}, "not a path inside"),
        ("read", {"path": "lib/../../x"}, "not a path inside"),
        ("list", {"path": ".."}, "not a path inside"),
        ("search", {"text": "root", "path": "/etc"}, "not a path inside"),
        ("edit", {"path": "../x", "old": "", "new": "x"}, "not a path inside"),
        ("edit", {"path": "/tmp/x", "old": "", "new": "x"}, "not a path inside"),
        ("edit", {"path": "", "old": "", "new": "x"}, "not a path inside"),
        ("edit", {"path": "\ud800", "old": "", "new": "x"}, "half a surrogate pair"),
        ("edit", {"path": "x" * 256, "old": "", "new": "x"}, "is too long"),
        ("read", {"path": "b.py"}, "no file b.py"),
        ("read", {"path": "lib"}, "no file lib"),
        ("read", {"path": "lib/c.bin"}, "not text"),
        ("read", {"path": "a.py", "start": "many"}, "not a line number"),
        ("read", {"path": "a.py", "start": "3", "end": "2"}, "lines 3 to 2 of 3"),
        ("edit", {"path": "a.py", "old": "q", "new": ""}, "0 times"),
        ("edit", {"path": "a.py", "old": "x", "new": ""}, "2 times"),
        ("edit", {"path": "a.py", "old": "", "new": ""}, "a.py exists"),
        ("edit", {"path": "lib", "old": "", "new": ""}, "is a folder"),
        ("edit", {"path": "a.py/b", "old": "", "new": "x"}, "a.py is a file"),
        ("edit", {"path": "a.py", "old": "y = 2"}, "missing ones ['new']"),
        ("edit", {"path": "a.py", "old": "y", "new": "", "all": "1"}, "arguments ['all']"),
        ("search", {"text": ""}, "an empty text"),
        ("fly", {}, "no tool 'fly', the tools are list, read"),
        ("call", {}, "no tool 'call'"),
        ("run_tests", {"tests": "../x.py"}, "not a path inside"),
    ],
)
def test_a_call_that_cannot_be_executed_is_answered_with_what_is_wrong(
    domain: SweAgentic, name: str, arguments: dict[str, str], reason: str
) -> None:
    prompt = Prompt("x", "swe_agentic", (), ANSWER)
    session = domain.session(prompt)
    (answer,) = session.step([ToolCall(name, arguments)])
    assert answer.content.startswith("error: ")
    assert reason in answer.content
    assert not session.workspace.changes  # type: ignore[attr-defined]


ANSWER = {
    "files": {p: data.decode() for p, data in FILES.items() if p != "lib/c.bin"},
    "tests": {"test_a.py": "import unittest\n"},
    "fail_to_pass": ["test_a.A.test_b"],
    "pass_to_pass": [],
    "framework": "unittest",
    "sealed": True,
}


@pytest.fixture(autouse=True)
def binary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that JSON cannot hold is in the answer's repository."""

    def found(answer: dict[str, object]) -> dict[str, bytes]:
        return FILES if answer is ANSWER else dict(snapshot_of(answer))

    monkeypatch.setattr(swe_agentic, "snapshot_of", found)


def test_edits_are_bounded() -> None:
    w = workspace(changed_files=2, file_kib=1)
    with pytest.raises(ToolError, match="larger than 1 KiB"):
        w.edit("big", "", "x" * 2000)
    w.edit("one", "", "x")
    w.edit("two", "", "x")
    with pytest.raises(ToolError, match="2 files were changed"):
        w.edit("three", "", "x")
    w.edit("one", "x", "y")


def test_answers_are_cut_and_say_by_how_much() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcdef", 2) == "ab\n[4 of 6 characters omitted]"
    assert cut("abcdef", 2, end=True) == "[4 of 6 characters omitted]\nef"
    session = SweAgentic(limits=AgentConfig(result_chars=50)).session(
        Prompt("x", "swe_agentic", (), ANSWER)
    )
    for call in (
        ToolCall("read", {"path": "long.txt"}),
        ToolCall("search", {"text": "line"}),
        ToolCall("read", {"path": "x" * 1000}),
    ):
        (answer,) = session.step([call])
        assert len(answer.content) < 120
        assert "characters omitted]" in answer.content


def test_an_agent_sees_what_its_tests_say(domain: SweAgentic) -> None:
    source = (
        "import unittest\nfrom lib.b import f\n\nclass A(unittest.TestCase):\n"
        "    def test_f(self):\n        self.assertEqual(f(), 2)\n"
    )
    session = domain.session(Prompt("x", "swe_agentic", (), ANSWER))
    answers = session.step(
        [
            ToolCall("edit", {"path": "test_b.py", "old": "", "new": source}),
            ToolCall("run_tests", {}),
            ToolCall("edit", {"path": "lib/b.py", "old": "return 1", "new": "return 2"}),
            ToolCall("run_tests", {"tests": "test_b.A.test_f"}),
        ]
    )
    assert "AssertionError: 1 != 2" in answers[1].content
    assert answers[1].content.endswith("0 of 1 passed")
    assert answers[3].content == "1 of 1 passed"


# Episodes that behave badly


def leftovers() -> tuple[set[int], set[str], int]:
    """Resources of this process: children, temporary files, threads."""
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    return children, set(os.listdir(tempfile.gettempdir())), threading.active_count()


ROUGH = [
    ("edit", {"path": "a.py", "old": "x = 1", "new": "import os\nos.remove('a.py')\nwhile 1: 0"}),
    ("edit", {"path": "test_x.py", "old": "", "new": "import os\nos.fork()\nwhile True: pass"}),
    ("edit", {"path": "../../tmp/out", "old": "", "new": "x"}),
    ("run_tests", {}),
    ("run_tests", {"tests": "a.py"}),
]


def test_an_episode_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks files, forks, loops, and never submits; its session is closed half way."""
    # Tests that run at the same time have temporary files of their own.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    others = leftovers()[0]
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    domain = SweAgentic(SandboxConfig(time_s=1.0, workers=1))
    assert domain.sandbox
    before = leftovers()
    prompt = Prompt("x", "swe_agentic", (), ANSWER)
    session = domain.session(prompt)
    target = {"path": str(outside), "old": "untouched", "new": "gone"}
    answers = session.step([ToolCall(n, a) for n, a in (*ROUGH, ("edit", target))])
    assert [m.content.startswith("error: ") for m in answers].count(True) == 2
    assert "the run ended early: time" in answers[3].content
    session.close()
    assert not session.workspace.files  # type: ignore[attr-defined]
    response = [turn(*ROUGH)] * 40
    assert domain.score(prompt, response).reward == 0.0
    assert outside.read_text() == "untouched"
    children, files, threads = leftovers()
    assert (children, threads) == (before[0], before[2])
    assert files <= before[1]
    domain.close()
    assert leftovers()[0] <= others


def test_calls_and_test_runs_of_an_episode_are_bounded(domain: SweAgentic) -> None:
    limited = SweAgentic(limits=AgentConfig(calls=5, test_runs=1))
    limited._sandbox = domain.sandbox
    session = limited.session(Prompt("x", "swe_agentic", (), ANSWER))
    answers = session.step([ToolCall("run_tests", {})] * 2 + [ToolCall("list", {})] * 6)
    assert [m.content.startswith("error: ") for m in answers] == [False, True] + [False] * 3 + (
        [True] * 3
    )
    assert "more than 5 calls" in answers[5].content
    assert session.done


def test_the_time_of_all_test_runs_is_bounded(domain: SweAgentic) -> None:
    limited = SweAgentic(limits=AgentConfig(tests_time_s=0.5))
    limited._sandbox = domain.sandbox
    session = limited.session(Prompt("x", "swe_agentic", (), ANSWER))
    slow = {"path": "test_s.py", "old": "", "new": "import time\ntime.sleep(0.6)"}
    run = ToolCall("run_tests", {})
    answers = session.step([run, ToolCall("edit", slow), run, run, ToolCall("list", {})])
    assert [m.content.startswith("error: ") for m in answers] == [False, False, False, True, False]
    assert "0.5 s are allowed for all runs together" in answers[3].content


def test_what_tools_answer_can_be_encoded(domain: SweAgentic) -> None:
    """Tokenizers reject half a surrogate pair."""
    session = domain.session(Prompt("x", "swe_agentic", (), ANSWER))
    source = "raise ValueError('\\ud800 is half a pair')\n"
    answers = session.step(
        [
            ToolCall("edit", {"path": "test_c.py", "old": "", "new": source}),
            ToolCall("run_tests", {}),
            ToolCall("search", {"text": "\ud800"}),
            ToolCall("read", {"path": "\udcff"}),
            ToolCall("fly\ud800", {}),
        ]
    )
    for answer in answers:
        answer.content.encode()
    assert "ValueError: \\ud800 is half a pair" in answers[1].content


def test_a_submitted_repository_changes_no_more(domain: SweAgentic) -> None:
    prompt = task()
    (edit,) = edits_of(prompt)
    back = {"path": edit.arguments["path"], "old": edit.arguments["new"]}
    undo = ("edit", {**back, "new": edit.arguments["old"]})
    late = [turn(("edit", dict(edit.arguments)), ("submit", {})), turn(undo)]
    assert domain.score(prompt, late).reward == 1.0
    early = [turn(("submit", {})), turn(("edit", dict(edit.arguments)))]
    assert domain.score(prompt, early).reward == 0.0


def test_the_verdict_depends_on_the_response_alone(domain: SweAgentic) -> None:
    prompt = task(3)
    session = domain.session(prompt)
    session.step([ToolCall("edit", {"path": "README.md", "old": "", "new": "x"})])
    first = domain.score(prompt, prompt.demonstration)
    assert first == domain.score(prompt, prompt.demonstration)
    # Answers of the tools are not read, only the calls are.
    calls_only = [m for m in prompt.demonstration if m.role == "assistant"]
    assert domain.score(prompt, calls_only) == first


# Rows


def write_task(folder: Path, answer: Mapping[str, Any], **row: object) -> None:
    for name, files in (("repository", answer["files"]), ("tests", answer["tests"])):
        for path, text in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_text(text)
    (folder / "row.json").write_text(json.dumps(row))


def test_rows_of_a_folder_and_of_a_file(domain: SweAgentic, tmp_path: Path) -> None:
    made = task(2)
    names = {
        "FAIL_TO_PASS": json.dumps(made.answer["fail_to_pass"]),
        "PASS_TO_PASS": made.answer["pass_to_pass"],
    }
    write_task(tmp_path / "one", made.answer, problem_statement="It is broken.", **names)
    (prompt,) = domain.read(tmp_path)
    assert "<issue>\nIt is broken.\n</issue>" in prompt.messages[-1].content
    assert [t.name for t in prompt.tools] == list(TOOLS)
    assert json.loads(json.dumps(prompt.answer)) == prompt.answer
    assert domain.score(prompt, made.demonstration).reward == 1.0
    row = {
        "issue": "It is broken.",
        "repository": "one/repository",
        "tests": {"files": made.answer["tests"], "sealed": True},
        "pass_rate": 0.25,
        **names,
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (again,) = domain.read(tmp_path / "rows.jsonl")
    assert again.answer["sealed"]
    assert again.pass_rate == 0.25
    assert domain.score(again, made.demonstration).reward == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repository": "none"}, "there is no folder"),
        ({"repository": None}, "'repository' must name"),
        ({"problem_statement": " "}, "is empty"),
        ({"FAIL_TO_PASS": []}, "names no test"),
        ({"FAIL_TO_PASS": "[1]"}, "must be a list of test ids"),
        ({"tests": {}}, "'tests.files' must be"),
        ({"tests": {"files": {"../x": ""}}}, "not a path inside"),
        ({"tests": {"files": "none"}}, "there is no folder"),
        ({"tests": {"files": {"t.py": ""}, "framework": "nose"}}, "'nose'"),
        ({"pass_rate": 3}, "'pass_rate' is 3"),
        ({"repository": "../secret"}, "'../secret' is not inside of"),
        ({"repository": "/etc"}, "'/etc' is not inside of"),
        ({"repository": "out"}, "'out' is not inside of"),
        ({"repository": "."}, "'.' is not inside of"),
        ({"repository": "x" * 300}, "is not a path"),
        ({"repository": "a\0b"}, "is not a path"),
        ({"tests": {"files": "r/../../secret"}}, "'tests.files': 'r/../../secret' is not inside"),
        ({"tests": {"files": "out/inner"}}, "'tests.files': 'out/inner' is not inside"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    secret = tmp_path / "secret" / "inner"
    secret.mkdir(parents=True)
    (secret / "key.py").write_text("KEY = 1")
    tmp_path = tmp_path / "rows"
    (tmp_path / "r").mkdir(parents=True)
    (tmp_path / "r" / "a.py").touch()
    (tmp_path / "out").symlink_to(secret.parent)
    row = {
        "problem_statement": "x",
        "repository": "r",
        "FAIL_TO_PASS": ["t.T.test"],
        "tests": {"files": {"t.py": ""}},
        **change,
    }
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2") as caught:
        list(SweAgentic().read(tmp_path / "rows.jsonl"))
    assert message in str(caught.value)


def test_a_folder_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*/row\.json"):
        list(SweAgentic().read(tmp_path))


def test_tasks_are_dropped_by_their_pass_rate(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "a.py").touch()
    rates = [1.0, 0.0, 0.5, None]
    rows = [
        {
            "problem_statement": f"issue {i}",
            "repository": "r",
            "FAIL_TO_PASS": ["t.T.test"],
            "tests": {"files": {"t.py": ""}},
            "pass_rate": rates[i % 4],
        }
        for i in range(800)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DomainConfig("swe_agentic", path=(str(path),), drop_solved=1.0, drop_unsolved=0.9)

    def kept(config: DomainConfig) -> list[Prompt]:
        domains: dict[str, Environment] = {"swe_agentic": SweAgentic()}
        return read_tasks(config, domains, seed=1, heldout=False, count=0)

    found = [p.pass_rate for p in kept(settings)]
    assert [found.count(rate) for rate in (1.0, 0.5, None)] == [0, 200, 200]
    assert 5 <= found.count(0.0) <= 40
    assert kept(settings) == kept(settings)
    assert len(kept(DomainConfig("swe_agentic", path=(str(path),)))) == 800


def test_short_tasks_are_made_as_they_say() -> None:
    for seed in range(200):
        made = make_task(random.Random(seed), seed % 2)
        assert set(made.tools) >= {"read", "edit", "submit"}
        shipped = len(made.answer["files"]) > 2
        assert shipped or len(made.answer["files"]) == 1 + seed % 2
        assert not (shipped and seed % 2)

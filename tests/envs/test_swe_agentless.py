"""Repairs by search/replace edits: tests decide, and no edit can replace them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bm25s
import pytest
from helpers.graded import WrittenJudge

from nemocascade.envs.long_context import LongContext
from nemocascade.envs.swe_agentless import SweAgentless
from nemocascade.envs.swe_bugs import make_bug
from nemocascade.judges.rule import RuleJudge
from nemocascade.recipe.envs import AgentlessConfig, SandboxConfig
from nemocascade.sandbox import launch
from nemocascade.swe import rows
from nemocascade.swe.edits import Edit, apply_edits, edit_text
from nemocascade.swe.repository import judge
from nemocascade.swe.snapshots import read_snapshot
from nemocascade.swe.tasks import with_texts
from nemocascade.types import Answer, Message, Prompt, SandboxUnavailable, Verdict

TESTS = """\
import unittest

from cart import total


class TestCart(unittest.TestCase):
    def test_sum(self):
        self.assertEqual(total([1, 2]), 3)

    def test_none(self):
        with self.assertRaises(TypeError):
            total(None)
"""
FILES = {
    "cart.py": "def total(xs):\n    return sum(xs) + 1\n",
    "tests/test_cart.py": TESTS,
    "notes.txt": "The total of a cart.",
    "other.py": "x = 1\n",
}
ROW: dict[str, Any] = {
    "problem_statement": "The total of a cart is wrong.",
    "repository": FILES,
    "golden_files": ["cart.py"],
    "tests": {
        "files": {"tests/test_cart.py": TESTS},
        "FAIL_TO_PASS": '["tests/test_cart.py::TestCart::test_sum"]',
        "PASS_TO_PASS": ["tests.test_cart.TestCart.test_none"],
        "sealed": True,
    },
}
PATCH = "--- a/cart.py\n+++ b/cart.py\n@@ -2 +2 @@\n-    return sum(xs) + 1\n+    return sum(xs)\n"
RIGHT = Edit("cart.py", ("    return sum(xs) + 1",), ("    return sum(xs)",))


@pytest.fixture(scope="module")
def domain() -> Iterator[SweAgentless]:
    made = SweAgentless(SandboxConfig(workers=1, time_s=4.0))
    try:
        assert made.sandbox.size == 1
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def read(folder: Path, domain: SweAgentless, *rows: dict[str, Any]) -> list[Prompt]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(domain.read(path))


def said(*edits: Edit | str) -> list[Message]:
    return [
        Message("assistant", "\n".join(e if isinstance(e, str) else edit_text(e) for e in edits))
    ]


def test_a_prompt_holds_the_issue_and_files_but_no_answer(
    domain: SweAgentless, tmp_path: Path
) -> None:
    (prompt,) = read(tmp_path, domain, ROW)
    text = prompt.messages[0].content
    for shown in ("The total of a cart is wrong.", "### cart.py", "### notes.txt", "SEARCH"):
        assert shown in text
    assert "### other.py" not in text
    # The hidden tests say what a repair must do, and so may other tests.
    assert "test_cart.py" not in text
    assert "assertEqual" not in text
    beside = {"checks/cart.py": "import cart\n", "testing/helpers.py": "the cart total is 3\n"}
    row = {**ROW, "repository": {**FILES, **beside}}
    row["tests"] = {**ROW["tests"], "files": {**ROW["tests"]["files"], "checks/cart.py": "cart"}}
    (prompt,) = read(tmp_path, domain, row)
    assert "### notes.txt" in prompt.messages[0].content
    assert "checks" not in prompt.messages[0].content
    assert "testing" not in prompt.messages[0].content


def test_a_text_that_an_issue_was_written_from_is_not_shown(
    domain: SweAgentless, tmp_path: Path
) -> None:
    (prompt,) = read(tmp_path, domain, {**ROW, "prompt": "The solution is sum(xs)."})
    assert "The solution" not in prompt.messages[0].content
    turns = [{"role": "user", "content": "Repair it."}]
    (prompt,) = read(tmp_path, domain, {**ROW, "prompt": turns})
    assert prompt.messages == (Message("user", "Repair it."),)


def test_a_prompt_has_room_for_so_many_characters(tmp_path: Path) -> None:
    lines = [f"line_{i} = {i}" for i in range(2000)]
    lines[999] = "total = sum(cart) + 1"
    files = {"big.py": "\n".join(lines) + "\n", "cart.py": "total = cart\n"}
    patch = "--- a/big.py\n+++ b/big.py\n@@ -1000 +1000 @@\n-total = sum(cart) + 1\n+total = 0\n"
    row = {**ROW, "repository": files, "golden_files": None, "patch": patch, "tests": None}
    judge = WrittenJudge()
    (whole,) = read(tmp_path, SweAgentless(judge=judge), row)
    assert files["big.py"] in whole.messages[0].content
    limits = AgentlessConfig(prompt_chars=4000)
    (cut,) = read(tmp_path, SweAgentless(judge=judge, limits=limits), row)
    text = cut.messages[0].content
    assert 3900 < len(text) <= 4000
    assert "\ntotal = sum(cart) + 1\n" in text
    assert "### cart.py" not in text
    first, last = (int(n) for n in re.findall(r"\[lines (\d+)-(\d+) of 2000\]", text)[0])
    assert 1000 - first == last - 1000 > 10
    none = AgentlessConfig(retrieved=0)
    (prompt,) = read(tmp_path, SweAgentless(judge=judge, limits=none), row)
    assert "### cart.py" not in prompt.messages[0].content
    assert "### cart.py" in whole.messages[0].content


def write_task(folder: Path, name: str, **change: Any) -> None:
    """A task folder of ROW."""
    task = folder / name
    files = {f"repository/{path}": text for path, text in FILES.items()}
    for path, text in {**files, "tests/tests/test_cart.py": TESTS}.items():
        (task / path).parent.mkdir(parents=True, exist_ok=True)
        (task / path).write_text(text)
    row = {key: ROW[key] for key in ("problem_statement", "golden_files")}
    row["FAIL_TO_PASS"] = ["tests.test_cart.TestCart.test_sum"]
    (task / "row.json").write_text(json.dumps({**row, **change}))


def test_rows_that_share_a_folder_read_it_once(
    domain: SweAgentless, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path, "a")
    for name in ("b", "c"):
        write_task(tmp_path, name, repository="a/repository")
    reads: list[str] = []
    indexed: list[int] = []
    read_folder, index = read_snapshot, bm25s.BM25.index

    def counted(folder: str) -> dict[str, bytes]:
        reads.append(folder)
        return read_folder(folder)

    def count_index(self: Any, *args: Any, **kwargs: Any) -> Any:
        indexed.append(1)
        return index(self, *args, **kwargs)

    monkeypatch.setattr(rows, "read_snapshot", counted)
    monkeypatch.setattr(bm25s.BM25, "index", count_index)
    prompts = list(domain.read(tmp_path))
    assert [p.source for p in prompts] == ["a/row.json", "b/row.json", "c/row.json"]
    assert [domain.score(p, said(RIGHT)).reward for p in prompts] == [1.0, 1.0, 1.0]
    snapshot = str(tmp_path / "a" / "repository")
    assert reads.count(snapshot) == 1
    assert len(indexed) == 1


@pytest.mark.parametrize("judge", [None, RuleJudge()])
def test_rows_from_files_need_a_judge_that_knows_language(
    tmp_path: Path, judge: RuleJudge | None
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROW, "tests": None, "patch": PATCH}) + "\n")
    with pytest.raises(ValueError, match=r"set envs\.judge\.kind to server or artifact"):
        list(SweAgentless(judge=judge).read(path))
    question = {"context": "A story.", "question": "Why?", "answer": "They had no more money left."}
    path.write_text(json.dumps(question) + "\n")
    with pytest.raises(ValueError, match=r"set envs\.judge\.kind to server or artifact"):
        list(LongContext(judge).read(path))


def test_golden_files_are_there_unless_the_patch_makes_them(tmp_path: Path) -> None:
    domain = SweAgentless(judge=WrittenJudge())
    row = {**ROW, "tests": None, "golden_files": None}
    made = "--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+x = 1\n"
    (prompt,) = read(tmp_path, domain, {**row, "patch": PATCH + made})
    assert "### cart.py" in prompt.messages[0].content
    lost = PATCH.replace("cart.py", "lost.py")
    with pytest.raises(ValueError, match=r"the golden file 'lost\.py' is not in the repository"):
        read(tmp_path, domain, {**row, "patch": lost})
    with pytest.raises(ValueError, match=r"are all hidden tests"):
        read(tmp_path, domain, {**ROW, "golden_files": ["tests/test_cart.py"]})


@pytest.mark.parametrize(
    ("edits", "reward"),
    [
        ([RIGHT], 1.0),
        (["I think that this is it:", RIGHT, "Done."], 1.0),
        ([Edit("cart.py", ("    return sum(xs) + 1",), ("    return 3",))], 0.0),
        ([Edit("cart.py", ("    return sum(xs) + 1",), ("    return sum(xs",))], 0.0),
        ([Edit("cart.py", ("    return sum(xs) + 1",), ("    while True: pass",))], 0.0),
        (["no edit"], 0.0),
        ([Edit("cart.py", ("    return sum(xs)",), ("    return 3",))], 0.0),
        ([Edit("cart.py", ("    return sum(xs) + 1",), ("    return sum(xs or ())",))], 0.0),
        ([Edit("missing.py", ("x",), ("y",))], 0.0),
        ([RIGHT, Edit("missing.py", ("x",), ("y",))], 0.0),
    ],
)
def test_tests_decide(
    domain: SweAgentless, tmp_path: Path, edits: list[Edit | str], reward: float
) -> None:
    (prompt,) = read(tmp_path, domain, ROW)
    verdict = domain.score(prompt, said(*edits))
    assert verdict.error is None
    assert verdict.reward == reward


def broken(line: str) -> Edit:
    """A wrong repair that tries something else."""
    return Edit("cart.py", ("    return sum(xs) + 1",), (f"    return {line}",))


FAKES: dict[str, list[Edit]] = {
    "the test file is rewritten": [
        Edit(
            "tests/test_cart.py", ("        self.assertEqual(total([1, 2]), 3)",), ("        pass",)
        ),
    ],
    "the module that the tests import is another": [Edit("tests/cart.py", (), ("total = sum",))],
    "unittest is another": [
        Edit("unittest.py", (), ("class TestCase:", "    pass", "def main():", "    pass"))
    ],
    "assertions are replaced": [
        Edit(
            "cart.py",
            ("def total(xs):",),
            (
                "import unittest",
                "unittest.TestCase.assertEqual = lambda *a: None",
                "def total(xs):",
            ),
        )
    ],
    "the process ends well": [
        Edit("cart.py", ("def total(xs):",), ("import os", "os._exit(0)", "def total(xs):"))
    ],
    "a result is equal to everything": [
        Edit(
            "cart.py",
            ("    return sum(xs) + 1",),
            ("    return type('A', (int,), {'__eq__': lambda *a: True})(1)",),
        )
    ],
    "the tests are rewritten while they are loaded": [
        Edit(
            "cart.py",
            ("def total(xs):",),
            ("open('tests/test_cart.py', 'w').write('')", "def total(xs):"),
        )
    ],
    "a setting skips the tests": [
        Edit("conftest.py", (), ("collect_ignore = ['tests']",)),
        Edit("tests/__init__.py", (), ("import cart", "cart.total = sum")),
    ],
}


@pytest.mark.parametrize("name", FAKES)
def test_a_pass_cannot_be_faked(domain: SweAgentless, tmp_path: Path, name: str) -> None:
    (prompt,) = read(tmp_path, domain, ROW)
    verdict = domain.score(prompt, said(*FAKES[name]))
    assert verdict.error is None
    assert verdict.reward == 0.0
    assert domain.score(prompt, said(RIGHT)).reward == 1.0


@pytest.mark.parametrize("path", ["../cart.py", "/tmp/cart.py", "a/../../b.py", ".git/hooks/x"])
def test_edits_cannot_leave_the_repository(domain: SweAgentless, tmp_path: Path, path: str) -> None:
    (prompt,) = read(tmp_path, domain, ROW)
    verdict = domain.score(prompt, said(RIGHT, Edit(path, (), ("x",))))
    assert verdict.reward == 0.0
    assert "not a path inside of the repository" in verdict.details["reason"]


def test_a_folder_is_read_without_following_links(domain: SweAgentless, tmp_path: Path) -> None:
    outside = tmp_path / "secret.py"
    outside.write_text("total = 'outside'\n")
    root = tmp_path / "repo"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "total.py").symlink_to(outside)
    (root / "linked").symlink_to(tmp_path)
    (root / ".git").mkdir()
    (root / ".git" / "total.txt").write_text("total cart")
    (prompt,) = read(tmp_path, domain, {**ROW, "repository": "repo"})
    text = prompt.messages[0].content
    assert "### notes.txt" in text
    assert "outside" not in text
    assert ".git" not in text
    assert domain.score(prompt, said(RIGHT)).reward == 1.0
    through = Edit("total.py", ("total = 'outside'",), ("total = 1",))
    assert domain.score(prompt, said(through)).reward == 0.0
    assert outside.read_text() == "total = 'outside'\n"
    assert (root / "cart.py").read_text() == FILES["cart.py"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"problem_statement": " "}, "is empty"),
        ({"repository": {}}, "nothing to edit"),
        ({"repository": {"../cart.py": "x"}}, "not a path inside of the repository"),
        ({"repository": {"cart.py": 3}}, "cart.py: the content is int, not text"),
        ({"repository": "nowhere"}, "there is no folder .*nowhere"),
        ({"golden_files": ["card.py"]}, "the golden file 'card.py' is not in the repository"),
        ({"golden_files": []}, "'golden_files' and 'patch' are both missing"),
        ({"golden_files": [], "patch": "fix"}, "not a unified diff"),
        ({"tests": {}}, "needs a judge: set envs.judge"),
        ({"tests": {"files": {"t.py": "x"}}}, "names no test"),
        ({"tests": {**ROW["tests"], "files": {}}}, "tests that an edit could change"),
        ({"tests": {**ROW["tests"], "framework": "nose"}}, r"framework\('nose'\) must be"),
        ({"tests": {**ROW["tests"], "FAIL_TO_PASS": "["}}, "not JSON"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{fault}"):
        read(tmp_path, SweAgentless(), ROW, {**ROW, **change})


def test_names_of_tests_may_stand_in_several_places(tmp_path: Path) -> None:
    tests = {"files": ROW["tests"]["files"]}
    names = ROW["tests"]["FAIL_TO_PASS"]
    beside = {**ROW, "tests": tests, "FAIL_TO_PASS": names}
    lower = {**ROW, "tests": {**tests, "fail_to_pass": names}}
    empty = {**beside, "tests": {**tests, "FAIL_TO_PASS": None}}
    low_row = {**ROW, "tests": tests, "fail_to_pass": names}
    inside = {**ROW, "tests": {**tests, "FAIL_TO_PASS": names}, "FAIL_TO_PASS": ["other.T.test"]}
    rows = (beside, lower, empty, low_row, inside)
    first, *others = (p.answer["tests"] for p in read(tmp_path, SweAgentless(), *rows))
    assert all(other == first for other in others)
    assert len(others) == 4
    assert first.fail_to_pass == ("tests/test_cart.py::TestCart::test_sum",)


def test_without_tests_the_judge_grades_edits_that_apply(tmp_path: Path) -> None:
    written = WrittenJudge(Answer('{"score": 0.9}'), Answer(None, "down"))
    domain = SweAgentless(judge=written)
    row = {**ROW, "tests": None, "golden_files": None, "patch": PATCH}
    (prompt,) = read(tmp_path, domain, row)
    groups = [(prompt, [said(RIGHT), said("no edit"), said(broken("3"))])]
    (found,) = domain.score_groups(groups)
    assert [v.reward for v in found] == [0.9, 0.0, None]
    assert found[2].error == "the judge failed: down"
    (questions,) = written.calls
    assert len(questions) == 2
    asked = questions[0].messages[-1].content
    for shown in (ROW["problem_statement"], PATCH.strip(), "return sum(xs)\n>>>>>>> REPLACE"):
        assert shown in asked
    with pytest.raises(ValueError, match="the judge needs 'patch'"):
        read(tmp_path, domain, {**ROW, "tests": None})


@pytest.mark.parametrize("difficulty", range(4))
def test_made_bugs_fail_their_tests_until_they_are_repaired(
    domain: SweAgentless, difficulty: int
) -> None:
    rng = random.Random(f"bugs/{difficulty}")
    for _ in range(3):
        bug = make_bug(rng, difficulty)
        before = with_texts({}, bug.files)
        assert judge(domain.sandbox, before, before, bug.tests).reward == 0.0
        after = with_texts({}, apply_edits(bug.files, [bug.edit]))
        verdict = judge(domain.sandbox, before, after, bug.tests)
        assert verdict == Verdict(1.0, details=verdict.details)
        assert len(bug.tests.fail_to_pass) == max(1, difficulty)
        assert not any("test" in path for path in bug.files)


def test_a_host_without_isolation_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = SweAgentless()
    (prompt,) = read(tmp_path, made, ROW)
    monkeypatch.setattr(launch, "missing", lambda isolation: "forbidden by this test")
    with pytest.raises(SandboxUnavailable):
        made.score(prompt, said(RIGHT))
    with pytest.raises(SandboxUnavailable):
        made.score_groups([(prompt, [said(RIGHT)])])

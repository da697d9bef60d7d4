"""Rows of repair tasks: valid forms, and errors raised before any training."""

from __future__ import annotations

import base64
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.swe import agentic_domain, turn

from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.swe.rows import hidden_of
from nemocascade.swe.rows import test_settings_of as settings_of
from nemocascade.swe.snapshots import read_snapshot
from nemocascade.types import Prompt

TESTS = """import unittest
from shop import total

class ShopTest(unittest.TestCase):
    def test_total(self):
        with open("tests/data/prices.bin", "rb") as file:
            self.assertEqual(total(file.read()), 2036)
"""
BINARY = b"\xff\xfe\x00" * 4
ROW: dict[str, Any] = {
    "problem_statement": "Totals are one too high.",
    "repository": "shop",
    "FAIL_TO_PASS": ["tests.test_shop.ShopTest.test_total"],
    "tests": {"files": "hidden"},
}
REPAIR = turn(("edit", {"path": "shop.py", "old": "xs) + 1", "new": "xs)"}))


domain = pytest.fixture(scope="module")(agentic_domain)


def read(folder: Path, **change: Any) -> Prompt:
    files = {
        "shop/shop.py": b"def total(xs):\n    return sum(xs) + 1\n",
        "shop/tests/__init__.py": b"",
        "shop/tests/test_old.py": b"import unittest\n",
        "hidden/tests/test_shop.py": TESTS.encode(),
        "hidden/tests/data/prices.bin": BINARY,
    }
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "rows.jsonl").write_text(json.dumps({**ROW, **change}) + "\n")
    (prompt,) = SweAgentic().read(folder / "rows.jsonl")
    return prompt


def test_binary_files_of_tests_are_kept(domain: SweAgentic, tmp_path: Path) -> None:
    prompt = read(tmp_path)
    again = json.loads(json.dumps(prompt.answer))
    assert again == prompt.answer
    assert hidden_of(again).files["tests/data/prices.bin"] == BINARY
    assert hidden_of(again).files["tests/test_shop.py"] == TESTS.encode()
    files = {
        "tests/test_shop.py": TESTS,
        "tests/data/prices.bin": {"base64": base64.b64encode(BINARY).decode()},
    }
    inline = read(tmp_path, tests={"files": files})
    for same in (prompt, inline):
        assert domain.score(same, [REPAIR]).reward == 1.0


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "'x' is NoneType: give a text"),
        ({"base64": "?"}, "'x' cannot be read"),
        ({"text": "x"}, "'x' is dict"),
    ],
)
def test_a_file_of_tests_that_cannot_be_read_is_named(
    tmp_path: Path, content: object, fault: str
) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1.*tests\.files: {fault}"):
        read(tmp_path, tests={"files": {"tests/test_shop.py": TESTS, "x": content}})


def test_a_snapshot_that_could_not_be_read_later_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    (tmp_path / "empty" / ".git" / "config").touch()
    with pytest.raises(ValueError, match=r"rows\.jsonl:1.*empty holds no file"):
        read(tmp_path, repository="empty")
    (tmp_path / "large").mkdir()
    with open(tmp_path / "large" / "sparse.bin", "wb") as file:
        file.truncate(257 << 20)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1.*large holds more than 256 MiB"):
        read(tmp_path, repository="large")


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").touch()

    def reject(path: Path) -> bytes:
        raise PermissionError(f"not for you: {path}")

    monkeypatch.setattr(Path, "read_bytes", reject)
    with pytest.raises(ValueError, match=r"a\.py cannot be read: not for you"):
        read_snapshot(tmp_path)


def test_links_that_are_skipped_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.py").touch()
    os.symlink("a.py", tmp_path / "b.py")
    os.symlink(".", tmp_path / "folder")
    with caplog.at_level(logging.WARNING, logger="nemocascade"):
        assert read_snapshot(tmp_path) == {"a.py": b""}
    assert "2 links are skipped" in caplog.text


def test_a_test_that_is_nowhere_is_rejected(tmp_path: Path) -> None:
    for name in ("tests.test_gone.T.test_a", "tests/test_gone.py::test_a"):
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1.*file of {name} is in neither"):
            read(tmp_path, FAIL_TO_PASS=[name])
    found = read(tmp_path, PASS_TO_PASS=["tests.test_old.OldTest.test_a"])
    assert found.answer["pass_to_pass"] == ["tests.test_old.OldTest.test_a"]


def test_the_text_that_an_issue_was_written_from_is_not_shown(tmp_path: Path) -> None:
    leak = "Write an issue for this patch: +    return sum(xs)"
    (shown,) = read(tmp_path, prompt=leak).messages
    assert "Totals are one too high." in shown.content
    assert leak not in shown.content
    with pytest.raises(ValueError, match="is empty"):
        read(tmp_path, prompt=leak, problem_statement="")
    turns = [{"role": "user", "content": "Repair it."}]
    assert read(tmp_path, prompt=turns).messages[0].content == "Repair it."
    released = read(tmp_path, prompt=leak, responses_create_params={"input": turns})
    assert released.messages[0].content == "Repair it."


@pytest.mark.parametrize(
    ("ids", "given", "framework"),
    [
        (["tests/test_a.py::test_sum"], None, "pytest"),
        (["tests/test_a.py::Case::test_sum"], "unittest", "unittest"),
        (["tests.test_a.Case.test_sum"], None, "unittest"),
        (["tests/test_a.py::Case::test_sum", "tests.test_a.Case.test_b"], None, "unittest"),
    ],
)
def test_ids_say_which_framework_runs_them(
    ids: list[str], given: str | None, framework: str
) -> None:
    tests = {"FAIL_TO_PASS": ids[:1], "PASS_TO_PASS": ids[1:], "framework": given}
    assert settings_of({}, tests)["framework"] == framework


def test_pytest_cannot_run_dotted_ids() -> None:
    with pytest.raises(
        ValueError, match=r"'tests\.test_a\.T\.test_b' is not a test's name in pytest"
    ):
        settings_of({}, {"FAIL_TO_PASS": ["tests.test_a.T.test_b"], "framework": "pytest"})

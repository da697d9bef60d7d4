"""Declared fields of rows: nothing else is read, and what is unknown is named."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nemocascade.envs.base import Domain
from nemocascade.envs.long_context import MIN_DOCUMENTS
from nemocascade.envs.registry import DOMAINS, close_environments, make_environments
from nemocascade.envs.row_forms import EVERY_ROW, DeclaredRow, RowFields, RowForm
from nemocascade.runtime.row_errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TESTS = {"tests/test_a.py": "def test_a():\n    assert True\n"}
REPAIR: dict[str, Any] = {
    "problem_statement": "It fails.",
    "repository": "repo",
    "tests": {"files": TESTS},
    "FAIL_TO_PASS": ["tests/test_a.py::test_a"],
}
CALLED = {
    "schema": {"type": "object", "properties": {"x": {"type": "string"}}},
    "response_mode": "tool_call",
    "tool_name": "save",
    "tool_payload_key": "data",
    "responses_create_params": {
        "input": "p",
        "tools": [{"type": "function", "name": "save", "parameters": {"type": "object"}}],
    },
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "instruction_following": [
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": None}]}
    ],
    "multiple_choice": [
        {"options": [{"A": "x"}, {"B": "y"}], "expected_answer": "A"},
        {
            "options": [{"A": "x"}],
            "expected_answer": "A",
            "template_metadata": {"output_regex": "(A)", "template_id": 3},
        },
        {"question": "q", "options": ["x", "y"], "answer": "A", "answer_index": 0},
    ],
    "tool_calling": [{"ground_truth": []}],
    "structured_output": [{"schema_str": "{}", "schema_type": "json"}, {"schema": {}}, CALLED],
    "math": [
        {"expected_answer": 3},
        {"question": "q", "answer": "#### 3"},
        {"problem": "q", "solution": r"\boxed{3}"},
    ],
    "code": [
        {"verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": ["2"]}}},
        {"test": "def check(f): pass", "entry_point": "f"},
    ],
    "preference": [{}],
    "long_context": [
        {"prompt": None, "question": "q", "documents": ["a"] * MIN_DOCUMENTS, "answer": "a"},
        {"prompt": None, "question": "q", "context": "a", "answer": "a"},
        {"prompt": "q", "ground_truth": "a", "metadata": {"grading": "exact", "level": 3}},
    ],
    "swe_agentless": [
        REPAIR | {"golden_files": ["app.py"]},
        {"issue": "i", "files": {"app.py": "x"}, "golden_files": ["app.py"]},
    ],
    "swe_agentic": [REPAIR, REPAIR | {"problem_statement": None, "issue": "i"}],
}
"""Rows of every domain that together have its code ask for each field."""


@pytest.fixture(scope="module")
def domains() -> Iterator[dict[str, Domain]]:
    environments = make_environments()
    yield environments
    close_environments(environments)


def test_every_environment_declares_its_rows(domains: dict[str, Domain]) -> None:
    bare = [name for name, domain in domains.items() if not domain.row_forms]
    assert not bare, f"no row_forms, so any field is read and none is named: {bare}"
    assert set(ROWS) == set(domains) == set(DOMAINS)


def test_the_page_is_generated_from_the_declarations() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "row_forms.py"))["page"]()
    written = (ROOT / "docs" / "your_data.md").read_text()
    assert page == written, "run: python tools/row_forms.py > docs/your_data.md"


@pytest.mark.parametrize("name", DOMAINS)
def test_what_is_declared_is_read_and_nothing_else(
    domains: dict[str, Domain], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "app.py").write_text("x = 1\n")
    asked: set[str] = set()
    check = DeclaredRow._check

    def record(row: DeclaredRow, field: object) -> None:
        asked.add(str(field))
        check(row, field)

    monkeypatch.setattr(DeclaredRow, "_check", record)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", **row} for row in ROWS[name]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults: list[str] = []
    # Rows that need a judge are rejected, but only after their fields were read.
    with suppress(DataError):
        list(domains[name].read(path, bad=lambda where, why: faults.append(why)))
    assert all("judge" in why for why in faults), faults
    declared = {field for form in domains[name].row_forms for field in form.read}
    unread = {field.split(".")[-1] for field in declared} - asked
    # Tests of repair tasks are read from a copy of the row, which records nothing.
    source = "".join(
        (ROOT / "nemocascade" / "swe" / f).read_text() for f in ("rows.py", "tasks.py")
    )
    assert not unread or name.startswith("swe_"), unread
    assert all(f'"{field}"' in source for field in unread), unread


FORMS = (
    RowForm(
        "made",
        read={"answer": "the answer", "tests.files": "tests"},
        ignored={"note": "nothing", "extra.*": "nothing"},
        rejected={"checker": "it cannot be run"},
    ),
)
ROW = {"prompt": "p", "answer": 1, "tests": {"files": 1}, "note": 1, "id": 3}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({}, ""),
        ({"extra": {"a": 1}, "checker": None, "other": ""}, ""),
        ({"verifier_metadata": {"answer": 1, "note": 2}}, ""),
        ({"metadata": {"a": 1}, "responses_create_params": {"input": [], "top_p": 1}}, ""),
        ({"other": 0}, "'other' in 2 rows"),
        ({"tests": {"files": 1, "limit": 3}}, "'tests.limit' in 2 rows"),
        ({"verifier_metadata": {"limit": 3}}, "'verifier_metadata.limit' in 2 rows"),
        ({"responses_create_params": {"logit_bias": "x"}}, "'responses_create_params.logit"),
    ],
)
def test_an_unknown_field_is_named_once_with_its_count(
    caplog: pytest.LogCaptureFixture, more: dict[str, Any], named: str
) -> None:
    fields = RowFields("made", FORMS)
    for _ in range(2):
        fields.declared({**ROW, **more})
    fields.report(Path("rows.jsonl"))
    messages = [record.message for record in caplog.records]
    assert len(messages) == bool(named)
    assert all(named in message and "rows.jsonl" in message for message in messages)


@pytest.mark.parametrize("more", [{"checker": "x"}, {"verifier_metadata": {"checker": "x"}}])
def test_a_field_that_decides_in_an_unknown_way_is_rejected(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'checker' is not supported: it cannot be run"):
        RowFields("made", FORMS).declared({**ROW, **more})


def test_an_undeclared_field_cannot_be_read() -> None:
    row = RowFields("made", FORMS).declared(ROW)
    assert row["answer"] == row.get("answer") == 1
    assert "note" not in dict(row)
    for ask in (lambda: row["note"], lambda: row.get("new"), lambda: "id" in row):
        with pytest.raises(LookupError, match=r"made reads '.*', which its row_forms do"):
            ask()
    with pytest.raises(LookupError, match="made reads 'limit'"):
        row["tests"].get("limit")


def test_without_a_declaration_every_field_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    fields = RowFields("made", ())
    assert fields.declared(ROW) is ROW
    fields.report(Path("rows.jsonl"))
    assert not caplog.records


def test_no_field_is_declared_twice_with_different_uses(domains: dict[str, Domain]) -> None:
    for domain in domains.values():
        forms = (EVERY_ROW, *domain.row_forms)
        read = {name for form in forms for name in form.read}
        others = {name for form in forms for name in (*form.ignored, *form.rejected)}
        assert not read & others

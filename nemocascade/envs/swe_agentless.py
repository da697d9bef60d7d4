"""Software repair without an agent: an issue and files go in, search/replace edits come out."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemocascade.envs.base import Row, final_text
from nemocascade.envs.graded import GradedDomain
from nemocascade.envs.judges.prompts import grade_question
from nemocascade.envs.sandbox.pool import Sandbox
from nemocascade.envs.swe.bugs import make_bug
from nemocascade.envs.swe.edits import FORM, EditError, apply_edits, edit_text, parse_edits
from nemocascade.envs.swe.repository import HiddenTests, judge, read_snapshot
from nemocascade.envs.swe.retrieval import retrieve
from nemocascade.envs.swe.rows import hidden_of, issue_of, test_settings_of
from nemocascade.envs.swe.texts import patched_files, row_files, texts_of, with_texts
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.types import Judge, Message, Prompt, Question, Verdict

RETRIEVED = 5
"""Files beside the golden ones that a prompt shows (Nemotron-Cascade 2, arXiv 2603.19220)."""

_ASK = (
    "Repair the repository as the issue asks. Below are the issue and some of the repository's "
    "files.\n\n<issue>\n{issue}\n</issue>\n\n{files}\n\nAnswer with edits of this form, one for "
    "each place. The searched lines must be whole lines of the file and stand in it exactly "
    "once; without searched lines, an edit makes a new file.\n\n" + FORM
)
_CRITERIA = (
    "The response holds search/replace edits that were applied without a fault. Grade above 0.5 "
    "only a repair that solves the issue and breaks nothing. The reference is a patch that does; "
    "other right ways are as good."
)


class SweAgentless(GradedDomain):
    """1 if the repaired repository passes its tests, else 0; without tests, a judge's grade.

    Edits that cannot be read or applied score 0. The tests' own files are never the model's: see
    `swe.repository`. The sandbox starts with the first repair that is tested.
    """

    domain = "swe_agentless"

    def __init__(self, config: SandboxConfig | None = None, judge: Judge | None = None) -> None:
        super().__init__(judge)
        self._config = config or SandboxConfig()
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None

    @property
    def sandbox(self) -> Sandbox:
        """The pool that runs the tests."""
        with self._lock:
            if self._sandbox is None:
                self._sandbox = Sandbox(self._config)
            return self._sandbox

    def claims(self, row: Row) -> bool:
        """Rows that say which files are to be repaired; `swe_agentic` may read them too."""
        golden = "golden_files" in row or "patch" in row
        return ("problem_statement" in row or "issue" in row) and golden

    def prepare(self, row: Row, folder: Path) -> Row:
        """The row with its `files` read, and with a `prompt` where it has none.

        The repository is `files` (path to text), or `repository`: such an object, or the name of a
        folder beside the JSONL file. `golden_files`, or the files of `patch`, are those to repair.
        """
        where = row.get("repository", row.get("files"))
        if isinstance(where, str):
            root = (folder / where).resolve()
            row = {**row, "folder": str(root)}
            files = texts_of(read_snapshot(root))
        else:
            files = row_files(where or {})
            row = {**row, "files": files}
        if not files:
            raise ValueError("'repository' and 'files' name no text file: there is nothing to edit")
        patched = patched_files(row["patch"]) if row.get("patch") else []
        golden = list(row.get("golden_files") or patched)
        if not golden:
            raise ValueError("'golden_files' and 'patch' are both missing: which files are wrong?")
        # A patch may make files that are not there yet.
        if missing := sorted(set(golden) - set(files) - set(patched)):
            raise ValueError(f"the golden file {missing[0]!r} is not in the repository")
        if row.get("responses_create_params") or row.get("prompt"):
            return row
        issue = issue_of(row)
        shown = shown_files(issue, files, golden)
        return {**row, "prompt": _ASK.format(issue=issue, files=_listing(shown))}

    def parse(self, row: Row) -> Mapping[str, Any]:
        """`tests`: see `_tests`; or `patch`, the reference for the judge."""
        tests, patch = row.get("tests"), str(row.get("patch") or "")
        if not tests and self.judge is None:
            raise ValueError("without 'tests' a repair needs a judge: set envs.judge")
        if not tests and not patch:
            raise ValueError("without 'tests' the judge needs 'patch', a repair that is right")
        return {
            "issue": issue_of(row),
            "patch": patch,
            "tests": _tests(row) if tests else None,
            # A folder is read again when it is needed: many rows may speak of one.
            **({"folder": row["folder"]} if "folder" in row else {"files": row["files"]}),
        }

    def score(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """The verdict. Raises SandboxUnavailable where tests cannot be isolated at all.

        No later verdict could be better, so that is no error of this one.
        """
        self._start([prompt])
        return super().score(prompt, response)

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        """As `score`, with one call of the judge."""
        self._start([prompt for prompt, _ in groups])
        return super().score_groups(groups)

    def examine(self, prompt: Prompt, response: Sequence[Message]) -> Verdict | Question:
        text, answer = final_text(response), prompt.answer
        if "folder" in answer:
            snapshot = read_snapshot(answer["folder"])
        else:
            snapshot = with_texts({}, answer["files"])
        try:
            edits = parse_edits(text)
            repaired = apply_edits(texts_of(snapshot), edits)
        except EditError as error:
            return Verdict(0.0, details={"reason": str(error)})
        tests: HiddenTests | None = answer["tests"]
        if tests is None:
            asked = [Message("user", answer["issue"])]
            shown = "\n".join(map(edit_text, edits))
            return grade_question(asked, shown, reference=answer["patch"], criteria=_CRITERIA)
        return judge(self.sandbox, snapshot, with_texts(snapshot, repaired), tests)

    def close(self) -> None:
        """End the sandbox's workers."""
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()
                self._sandbox = None

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """See `swe.bugs.make_bug`."""
        bug = make_bug(rng, difficulty)
        # The module's name, which is no path of a file.
        elsewhere = replace(bug.edit, path=bug.edit.path.removesuffix(".py"))
        if difficulty <= 0:
            ask = f"{bug.issue}\n{_brief(bug.files)}"
        else:
            shown = shown_files(bug.issue, bug.files, [bug.edit.path])
            ask = _ASK.format(issue=bug.issue, files=_listing(shown))
        return Prompt(
            id="",
            domain=self.domain,
            messages=(Message("user", ask),),
            answer={"issue": bug.issue, "patch": "", "tests": bug.tests, "files": bug.files},
            demonstration=(Message("assistant", edit_text(bug.edit), bug.reasoning),),
            careless=(Message("assistant", edit_text(elsewhere), bug.reasoning),),
        )

    def _start(self, prompts: Sequence[Prompt]) -> None:
        if any(prompt.answer.get("tests") is not None for prompt in prompts):
            assert self.sandbox


def shown_files(issue: str, files: Mapping[str, str], golden: Sequence[str]) -> dict[str, str]:
    """The golden files and the `RETRIEVED` others that match the issue best, by path.

    The order says nothing of which is which.
    """
    others = {path: text for path, text in files.items() if path not in golden}
    chosen = {*(path for path in golden if path in files), *retrieve(issue, others, RETRIEVED)}
    return {path: files[path] for path in sorted(chosen)}


def _listing(files: Mapping[str, str]) -> str:
    return "\n\n".join(f"### {path}\n```\n{text}\n```" for path, text in files.items())


def _brief(files: Mapping[str, str]) -> str:
    return "\n".join(f"### {path}\n{text.rstrip()}" for path, text in files.items())


def _tests(row: Row) -> HiddenTests:
    """`tests.files` (path to text), `FAIL_TO_PASS`, and more of `swe.rows.test_settings_of`."""
    tests = row["tests"]
    files = row_files(tests.get("files") or {})
    if not files:
        raise ValueError("'tests.files' is empty: tests that an edit could change decide nothing")
    return hidden_of({"tests": files, **test_settings_of(row, tests)})

"""Software repair without an agent: issue and files in, search/replace edits out."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemocascade.envs.base import digest, final_text
from nemocascade.envs.graded import GradedDomain
from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.sandboxed import RepairDomain
from nemocascade.envs.swe_bugs import make_bug
from nemocascade.judges.prompts import grade_question
from nemocascade.judges.rule import knows_language
from nemocascade.recipe.envs import AgentlessConfig, SandboxConfig
from nemocascade.swe.edits import FORM, Edit, EditError, apply_edits, edit_text, parse_edits
from nemocascade.swe.prompt_files import SEPARATOR, FileIndex, folder_index, shown_files
from nemocascade.swe.repository import HiddenTests, judge
from nemocascade.swe.rows import issue_of, snapshot_of
from nemocascade.swe.tasks import (
    RepairTask,
    made_files,
    patched_files,
    task_of,
    texts_at,
    with_texts,
)
from nemocascade.types import Judge, Message, Prompt, Question, Row, Verdict

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


class SweAgentless(RepairDomain, GradedDomain):
    """1 if the repaired repository passes its tests, else 0; without tests, a judge's grade.

    Edits that cannot be parsed or applied score 0. Edits of the test files are ignored: see
    `swe.repository`.
    """

    domain = "swe_agentless"
    row_forms = (
        *RepairDomain.row_forms,
        RowForm(
            "files to repair",
            read={
                "repository": "also the files themselves: texts by path, or a list of objects",
                "files": "the same as `repository`",
                "golden_files": "paths of the files to repair, shown first",
                "patch": "a right repair; names the files to repair, and is a judge's reference",
            },
        ),
    )

    def __init__(
        self,
        config: SandboxConfig | None = None,
        judge: Judge | None = None,
        limits: AgentlessConfig | None = None,
    ) -> None:
        super().__init__(config)
        self.judge = judge
        self._limits = limits or AgentlessConfig()

    def runs_programs(self, prompt: Prompt) -> bool:
        """Return True if tests decide, not the judge."""
        return prompt.answer.get("tests") is not None

    def claims(self, row: Row) -> bool:
        """Claim rows that name the files to repair; `swe_agentic` may claim them too."""
        golden = any(name in row for name in ("golden_files", "patch", "docker_image"))
        return ("problem_statement" in row or "issue" in row) and golden

    def prepare(self, row: Row, folder: Path) -> Row:
        """Return the row with its `answer`, and with a prompt from its issue if it has no turns.

        The files to repair are `golden_files`, or those of `patch`; see `swe.tasks` for the rest. A
        string `prompt` is not shown: in R2E-Gym it is the input from which a model wrote the issue,
        and contains the solution.
        """
        task = task_of(row, folder)
        golden = _golden(row, task)
        if task.tests is None:
            self._check_judge(task.patch)
        answer = {
            "issue": issue_of(row),
            "patch": task.patch,
            "tests": task.tests,
            # A folder is read again when needed: many rows may share one.
            **task.where,
        }
        row = {**row, "answer": answer}
        turns = row.get("prompt")
        if (row.get("responses_create_params") or {}).get("input"):
            return row
        if turns and not isinstance(turns, str):
            return row
        where = task.where.get("repository")
        hidden = () if task.tests is None else task.tests.files
        prompt = self._prompt_text(
            answer["issue"],
            task.texts,
            golden,
            patch=task.patch,
            hidden=hidden,
            index=None if where is None else folder_index(where),
        )
        return {**row, "prompt": prompt}

    def parse(self, row: Row) -> Mapping[str, Any]:
        return dict(row["answer"])

    def _check_judge(self, patch: str) -> None:
        if not knows_language(self.judge):
            raise ValueError(
                "without 'tests' a repair needs a judge: set envs.judge.kind to server or artifact "
                "(a rule cannot tell right repairs from wrong ones), or give the row 'tests'"
            )
        if not patch:
            raise ValueError("without 'tests' the judge needs 'patch', a repair that is right")

    def _prompt_text(
        self,
        issue: str,
        files: Mapping[str, str],
        golden: Sequence[str],
        *,
        patch: str = "",
        hidden: Collection[str] = (),
        index: FileIndex | None = None,
    ) -> str:
        """Build the prompt, see `swe.prompt_files`."""
        shown = shown_files(
            issue,
            files,
            golden,
            max_chars=self._limits.prompt_chars - len(_ASK) - len(issue),
            retrieved=self._limits.retrieved,
            patch=patch,
            hidden=hidden,
            index=index,
        )
        return _ASK.format(issue=issue, files=SEPARATOR.join(shown.values()))

    def examine(self, prompt: Prompt, response: Sequence[Message]) -> Verdict | Question:
        text, answer = final_text(response), prompt.answer
        texts = texts_at(answer)
        try:
            edits = parse_edits(text)
            repaired = apply_edits(texts, edits)
        except EditError as error:
            return Verdict(0.0, details={"reason": str(error)})
        tests: HiddenTests | None = answer["tests"]
        if tests is None:
            asked = [Message("user", answer["issue"])]
            shown = "\n".join(map(edit_text, edits))
            return grade_question(asked, shown, reference=answer["patch"], criteria=_CRITERIA)
        snapshot = snapshot_of(answer)
        changed = {path: new for path, new in repaired.items() if texts.get(path) != new}
        return judge(self.sandbox, snapshot, with_texts(snapshot, changed), tests)

    def forms(self, prompt: Prompt) -> Collection[str]:
        tests: HiddenTests | None = prompt.answer["tests"]
        return ("judge" if tests is None else tests.framework,)

    def dummy(self, prompt: Prompt) -> Sequence[Message] | None:
        if prompt.answer["tests"] is None:
            return None
        return (Message("assistant", edit_text(Edit("dummy_answer.txt", (), ("dummy",)))),)

    def split_key(self, prompt: Prompt) -> str:
        """Hash the issue and its repair: other files in a prompt do not make another task."""
        return digest(f"{prompt.answer['issue']}\n{prompt.demonstration[0].content}")

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task, see `swe_bugs.make_bug`."""
        bug = make_bug(rng, difficulty)
        # A careless edit names the module, which is not a file path.
        elsewhere = replace(bug.edit, path=bug.edit.path.removesuffix(".py"))
        if difficulty <= 0:
            ask = f"{bug.issue}\n{_brief(bug.files)}"
        else:
            ask = self._prompt_text(bug.issue, bug.files, [bug.edit.path])
        answer = {"issue": bug.issue, "patch": "", "tests": bug.tests, "files": bug.files}
        return self._made(
            ask, answer, edit_text(bug.edit), bug.reasoning, careless=edit_text(elsewhere)
        )


def _golden(row: Row, task: RepairTask) -> list[str]:
    """Return the files to repair, except hidden tests, which no edit can change.

    Raises ValueError if the row names none, or one that does not exist before the repair.
    """
    patched = patched_files(task.patch) if task.patch else []
    named = list(row.get("golden_files") or patched)
    if not named:
        raise ValueError("'golden_files' and 'patch' are both missing: which files are wrong?")
    golden = [path for path in named if task.tests is None or path not in task.tests.files]
    if not golden:
        raise ValueError(f"the golden files {named} are all hidden tests: name those to repair")
    made = made_files(task.patch) if task.patch else set()
    if missing := sorted(set(golden) - set(task.texts) - made):
        raise ValueError(f"the golden file {missing[0]!r} is not in the repository, or is not text")
    return golden


def _brief(files: Mapping[str, str]) -> str:
    return "\n".join(f"### {path}\n{text.rstrip()}" for path, text in files.items())

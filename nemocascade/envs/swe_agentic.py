"""Software repair by an agent that edits a private copy of a repository until its tests pass."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.sandboxed import RepairDomain
from nemocascade.envs.swe_made import make_task
from nemocascade.recipe.envs import AgentConfig, SandboxConfig
from nemocascade.runtime.turns import encodable
from nemocascade.swe.repository import Framework, judge, run_tests
from nemocascade.swe.rows import answer_of, hidden_of, issue_of, snapshot_of
from nemocascade.swe.shipped import Steps
from nemocascade.swe.workspace import TOOLS, ToolError, Workspace, arguments_of, cut
from nemocascade.types import (
    Message,
    Prompt,
    Row,
    Sandbox,
    SandboxError,
    ToolCall,
    ToolSession,
    Verdict,
)

ASK = (
    "Repair the repository so that this issue is solved. Find the code that is wrong, change it "
    "with the tools, run the tests, and submit.\n\n<issue>\n{issue}\n</issue>"
)


class RepositorySession:
    """Tools of one episode. The copy is in memory only, and `close` frees it.

    sandbox: called when tests are to be run; None when a response is replayed, which needs only
    the edits.
    """

    def __init__(
        self,
        answer: Mapping[str, Any],
        limits: AgentConfig,
        sandbox: Callable[[], Sandbox] | None,
    ) -> None:
        self.workspace = Workspace(snapshot_of(answer), limits)
        self._framework: Framework = answer["framework"]
        self._limits, self._sandbox = limits, sandbox
        self.calls = self.edits = self.test_runs = 0
        self._tested_s = 0.0
        self.submitted = False

    @property
    def done(self) -> bool:
        """True once the agent has submitted or exceeded its number of calls."""
        return self.submitted or self.calls > self._limits.calls

    def step(self, calls: Sequence[ToolCall]) -> list[Message]:
        """Execute `calls` in order; calls after the end of the episode are skipped."""
        return [Message("tool", self._answer(call)) for call in calls]

    def close(self) -> None:
        """Free the copy of the repository."""
        self.workspace = Workspace({}, self._limits)
        self._sandbox = None

    def _answer(self, call: ToolCall) -> str:
        if self.done:
            return "error: the work has ended"
        self.calls += 1
        if self.done:
            return f"error: more than {self._limits.calls} calls: the work ends here"
        limit = self._limits.result_chars
        try:
            # The end of a test report is the most informative.
            return cut(encodable(self._execute(call)), limit, end=call.name == "run_tests")
        except ToolError as error:
            return cut(encodable(f"error: {error}"), limit)

    def _execute(self, call: ToolCall) -> str:
        arguments = arguments_of(call.name, call.arguments)
        if call.name == "submit":
            self.submitted = True
            return "submitted"
        if call.name == "run_tests":
            return self._run_tests(arguments.get("tests", ""))
        answer = self.workspace.call(call.name, arguments)
        self.edits += call.name == "edit"
        return answer

    def _run_tests(self, tests: str) -> str:
        if self._sandbox is None:
            return ""
        limits = self._limits
        if self.test_runs >= limits.test_runs:
            raise ToolError(f"the tests have run {self.test_runs} times: no more runs are allowed")
        if self._tested_s >= limits.tests_time_s:
            raise ToolError(
                f"the tests have run for {self._tested_s:.1f} s, {limits.tests_time_s:g} s are "
                "allowed for all runs together: no more runs are allowed"
            )
        self.test_runs += 1
        wanted = [line.strip() for line in tests.splitlines() if line.strip()]
        files = self.workspace.files
        start = time.monotonic()
        try:
            return run_tests(self._sandbox(), files, wanted, framework=self._framework).text
        except (SandboxError, ValueError) as error:
            raise ToolError(f"the tests could not be run: {error}") from error
        finally:
            self._tested_s += time.monotonic() - start


class SweAgentic(RepairDomain):
    """1 if all hidden tests pass on the repository after the agent's edits, else 0.

    The verdict depends on the response alone: its edits are replayed on a fresh copy, and the
    hidden tests run there. An episode that ran out of turns or context counts like a submitted
    one. Tool answers are truncated at `AgentConfig.result_chars`; one that does not fit into the
    remaining context ends the episode.
    """

    domain = "swe_agentic"
    row_forms = (
        *RepairDomain.row_forms,
        RowForm(
            "fields of `swe_agentless`",
            read={},
            ignored=dict.fromkeys(("patch", "golden_files"), "the agent finds the repair itself"),
        ),
    )

    def __init__(
        self, config: SandboxConfig | None = None, limits: AgentConfig | None = None
    ) -> None:
        super().__init__(config)
        self._limits = limits or AgentConfig()

    def claims(self, row: Row) -> bool:
        """Claim rows with a repository in a folder; `swe_agentless` may claim them too."""
        inline = "files" in row or isinstance(row.get("repository"), Mapping)
        return ("problem_statement" in row or "issue" in row) and not inline

    def prepare(self, row: Row, folder: Path) -> Row:
        """Return the row with its `answer`, a prompt from its issue, and the tools.

        A string `prompt` is not shown: in R2E-Gym it is the input from which a model wrote the
        issue, and contains the solution.
        """
        params = row.get("responses_create_params") or {}
        prompt = row.get("prompt")
        if not params.get("input") and (not prompt or isinstance(prompt, str)):
            prompt = ASK.format(issue=issue_of(row))
        tools = [
            {"name": t.name, "description": t.description, "parameters": t.parameters}
            for t in TOOLS.values()
        ]
        return {
            **row,
            "prompt": prompt,
            "responses_create_params": {**params, "tools": tools},
            "answer": answer_of(row, folder),
        }

    def parse(self, row: Row) -> Mapping[str, Any]:
        return dict(row["answer"])

    def session(self, prompt: Prompt) -> ToolSession:
        """Return a fresh copy of the repository for one episode."""
        return RepositorySession(prompt.answer, self._limits, lambda: self.sandbox)

    def forms(self, prompt: Prompt) -> Collection[str]:
        return (prompt.answer["framework"],)

    def dummy(self, prompt: Prompt) -> Sequence[Message]:
        edit = ToolCall("edit", {"path": "dummy_answer.txt", "old": "", "new": "dummy"})
        return (Message("assistant", "", tool_calls=(edit,)),)

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        session = RepositorySession(prompt.answer, self._limits, None)
        session.step([call for message in response for call in message.tool_calls])
        changes = session.workspace.changes
        made = {
            "calls": session.calls,
            "edits": session.edits,
            "submitted": session.submitted,
            "changed": sorted(changes),
        }
        if not changes:
            return Verdict(0.0, details={**made, "reason": "nothing was changed"})
        snapshot = snapshot_of(prompt.answer)
        verdict = judge(self.sandbox, snapshot, session.workspace.files, hidden_of(prompt.answer))
        return Verdict(verdict.reward, verdict.error, {**made, **verdict.details})

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task by difficulty.

        0: one short file, or in a tenth of the tasks a bug in a shipped repository to be found by
        search. 1: two short files, one to be found. 2: a whole repository whose issue names the
        file. 3: an issue that does not. Below 2, a system turn lists the tools in a short form, for
        small contexts.
        """
        task = make_task(rng, difficulty)
        declared = difficulty >= 2
        brief = Message("system", "\n".join(_brief(TOOLS[name]) for name in task.tools))
        ask = Message("user", ASK.format(issue=task.issue) if declared else task.issue)
        return Prompt(
            id="",
            domain=self.domain,
            messages=(ask,) if declared else (brief, ask),
            tools=tuple(TOOLS.values()) if declared else (),
            answer=task.answer,
            demonstration=self._turns(task.answer, task.steps),
            careless=self._turns(task.answer, _too_early(task.steps)),
        )

    def _turns(self, answer: Mapping[str, Any], steps: Steps) -> tuple[Message, ...]:
        """Play the episode of `steps` and return its turns, including the tools' answers."""
        session = RepositorySession(answer, self._limits, None)
        turns: list[Message] = []
        for calls, reasoning in steps:
            results = session.step(calls)
            turns.append(Message("assistant", "", reasoning, tuple(calls)))
            # The call that ends the episode has no answer.
            turns += [] if session.done else results
        return tuple(turns)


def _too_early(steps: Steps) -> Steps:
    """Return the steps up to the first edit, before which the agent submits."""
    first = next(n for n, (calls, _) in enumerate(steps) if any(c.name == "edit" for c in calls))
    calls, reasoning = steps[first]
    edits = (call for call in calls if call.name != "submit")
    return (*steps[:first], ((ToolCall("submit", {}), *edits), reasoning))


def _brief(tool: Any) -> str:
    return f"{tool.name}({', '.join(tool.parameters['required'])})"

"""Base classes of all domains: training/held-out split, rows from files, final message."""

from __future__ import annotations

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from nemocascade.envs.prompt_rows import flattened, pass_rate_of, turns_of
from nemocascade.envs.row_forms import RowFields, RowForm
from nemocascade.recipe.envs import EnvConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError, RowError, reject_row
from nemocascade.runtime.row_files import find_files, read_rows, report_skipped
from nemocascade.runtime.turns import encodable, kind_of
from nemocascade.sandbox.child import ChildError, ChildHostError, ChildPool
from nemocascade.types import (
    Environment,
    Judge,
    Message,
    Prompt,
    Row,
    SandboxError,
    ToolSession,
    Verdict,
)

HELDOUT_SHARE = 4
"""One task in this many is held out, decided by the hash of its text."""
_NOT_OF_A_ROW = (SandboxError, MemoryError)
"""Errors of the host; any other error where a row is parsed is the row's."""
TRIES = 2000
"""A difficulty is exhausted after this many consecutive tasks that were seen before."""
_MARKED: set[type] = set()
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_CUT = re.compile(r"\n|(?<!\\)\$|\\[\])]")
"""End of a box that is never closed: that of its line or of its formula."""


def tool_results(
    session: ToolSession,
    turn: Message,
    faults: Sequence[str],
    answered: Callable[[], object] = lambda: None,
) -> list[Message]:
    """The tools' turns after an assistant turn: results of its calls, then errors for `faults`.

    faults: why calls of the turn could not be parsed. answered: called after every call. What no
    tokenizer accepts is escaped.
    """
    results: list[Message] = []
    for call in turn.tool_calls:
        results += session.step([call])
        answered()
    results += [Message("tool", f"error: {fault}") for fault in faults]
    return [replace(m, content=encodable(m.content)) for m in results]


class Domain(ABC):
    """Base class of environments, with the parts that all domains share."""

    domain: str
    by_group = False
    row_forms: tuple[RowForm, ...] = ()
    """Forms of released rows, beside `row_forms.EVERY_ROW`. Other fields cannot be read."""
    answered_tools: Collection[str] | None = None
    """Names of the tools that a released row may declare; None allows any."""

    @classmethod
    def from_settings(cls, config: EnvConfig, judge: Judge, children: ChildPool) -> Self:
        """Make an environment that a user's module defines; by default without arguments.

        config: all settings of verifiers. judge: the run's judge. children: processes for checks
        that may not terminate, as `CheckedDomain` runs them.
        """
        return cls()

    @property
    def collective(self) -> bool:
        """Return False: by default, a verifier does not work on all ranks at once."""
        return False

    @property
    def activity(self) -> int:
        """Progress counter of the judge; 0 for domains without one."""
        return 0

    @abstractmethod
    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a random task with its demonstration; `difficulty` 0 is the easiest."""

    @abstractmethod
    def claims(self, row: Row) -> bool:
        """Return True if a released row belongs to this domain."""

    @abstractmethod
    def parse(self, row: Row) -> Mapping[str, Any]:
        """Return a released row's `answer`.

        Raises ValueError, LookupError or TypeError if it is broken, or if no verifier of this
        installation knows what it asks for.
        """

    def prepare(self, row: Row, folder: Path) -> Row:
        """Return a claimed row with a `prompt`, built from its other fields if it has none.

        folder: folder of the file; names in the row are relative to it.
        """
        return row

    def solution(self, row: Row) -> Sequence[Message]:
        """Return the turns of a prepared row's worked solution, for SFT; none by default."""
        return ()

    @abstractmethod
    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """Return the verdict. An exception becomes an error verdict."""

    def prompts(
        self, *, seed: int, count: int, difficulty: int = 0, heldout: bool = False
    ) -> Iterator[Prompt]:
        """Yield `count` distinct tasks, the same for the same arguments.

        The split depends on the problem of a task alone, so no task is in both splits, whatever
        the seeds. Raises DataError if there are fewer than `count`.
        """
        rng = random.Random(f"{self.domain}/{seed}/{difficulty}/{heldout}")
        seen: set[str] = set()
        tries = 0
        while len(seen) < count:
            prompt = self.make(rng, difficulty)
            task = task_id(prompt)
            tries += 1
            if tries > TRIES:
                side = "held-out" if heldout else "training"
                setting = "eval.prompts or scores.tasks" if heldout else "the domain's tasks"
                raise DataError(
                    f"{self.domain} has about {len(seen)} {side} tasks of difficulty "
                    f"{difficulty}, {count} were asked for: lower {setting}, or raise the "
                    "difficulty"
                )
            if task in seen or is_heldout(self.split_key(prompt)) != heldout:
                continue
            tries = 0
            seen.add(task)
            yield replace(prompt, id=task, source=f"{self.domain}:{seed}:{len(seen)}")

    def _made(
        self, ask: str, answer: Mapping[str, Any], reply: str, reasoning: str, careless: str = ""
    ) -> Prompt:
        """Build a one-turn task that `reply` solves. careless: the reply of `Prompt.careless`."""
        return Prompt(
            id="",
            domain=self.domain,
            messages=(Message("user", ask),),
            answer=answer,
            demonstration=(Message("assistant", reply, reasoning),),
            careless=(Message("assistant", careless, reasoning),) if careless else (),
        )

    def split_key(self, prompt: Prompt) -> str:
        """Hash, in hex, of the problem that a generated task poses; it decides the split.

        Prompts that word the same problem differently share it.
        """
        return task_id(prompt)

    def read(
        self,
        path: str | Path,
        bad: Callable[[str, str], object] = reject_row,
        others: Collection[Environment] = (),
    ) -> Iterator[Prompt]:
        """Yield this domain's tasks from released rows: a data file, or a folder of them.

        bad: called with `file:row` and the reason for a row that cannot be read; by default it
        raises DataError. others: further domains that read the path. Their rows are counted and
        logged. A row that no domain claims is bad.

        Raises DataError for a damaged file, and if no row belongs to this domain.
        """
        theirs = found = rows = 0
        first_bad = ""
        fields = RowFields(self.domain, self.row_forms)
        for where, folder, row in self._rows(Path(path)):
            rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                if not isinstance(row, Mapping):
                    raise RowError(f"a row must be an object, it is {kind_of(row)}")
                row = flattened(row)
                if not self.claims(row):
                    if not any(other.claims(row) for other in others):
                        raise RowError(f"it is not a row of {self.domain}: fields {sorted(row)}")
                    theirs += 1
                    continue
                prepared = self.prepare(fields.declared(row), folder)
                prompt = self._prompt(fields.prepared(prepared), where)
            except _NOT_OF_A_ROW:
                raise
            except Exception as error:  # a row comes from a download: any error is its own
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                first_bad = first_bad or f"; the first bad one is {where}: {kind}{error}"
                bad(where, f"{kind}{error}")
                continue
            found += 1
            yield prompt
        fields.report(Path(path))
        if not found:
            raise DataError(
                f"{path}: none of its {rows} rows is of {self.domain}: name other files{first_bad}"
            )
        if theirs:
            LOGGER.info("%s: %d rows of other domains than %s", path, theirs, self.domain)

    def _rows(self, path: Path) -> Iterator[tuple[str, Path, Any]]:
        """Yield (`file:row`, folder that names in the row are relative to, row or its error)."""
        report_skipped(path)
        for file in find_files(path):
            for where, row in read_rows(file):
                yield where, Path(file).parent, row

    def _prompt(self, row: Row, where: str) -> Prompt:
        messages, tools = turns_of(row)
        if self.answered_tools is not None:
            unanswered = [tool.name for tool in tools if tool.name not in self.answered_tools]
            if unanswered:
                raise RowError(
                    f"the row declares {', '.join(unanswered)}, and nothing answers calls of it: "
                    f"add {self.domain} to envs.python_tool.domains for the Python tool, or leave "
                    "other tools out of the row"
                )
        prompt = Prompt(
            id="",
            domain=self.domain,
            messages=messages,
            answer=dict(self.parse(row)),
            tools=tools,
            source=where,
            pass_rate=pass_rate_of(row),
            demonstration=tuple(self.solution(row)),
        )
        return replace(prompt, id=task_id(prompt))

    def forms(self, prompt: Prompt) -> Collection[str]:
        """Return the ways in which the verifier treats this task, by name."""
        return ("",)

    def dummy(self, prompt: Prompt) -> Sequence[Message] | None:
        """Return an answer that makes the verifier run in full, to try it before training.

        None if a judge decides: its server gets a first question of its own.
        """
        return (Message("assistant", "A dummy answer."),)

    def session(self, prompt: Prompt) -> ToolSession | None:
        """Return None: by default, a domain has no tools."""
        return None

    def score(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """Return the verdict on `response`.

        A check that the answer itself makes fail gives 0; any other failure gives an error.
        """
        if prompt.domain != self.domain:
            raise ValueError(f"{self.domain} cannot score a task of {prompt.domain}")
        try:
            found: Any = self.check(prompt, response)
            if not isinstance(found, Verdict):
                raise TypeError(
                    f"check of {self.domain} returned {found!r}, which is not a Verdict: return "
                    "Verdict(reward)"
                )
            return found
        except Exception as error:  # any failure of a verifier becomes a verdict
            return failed(error)

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        """Score each response independently, unless the domain compares them."""
        return [[self.score(prompt, r) for r in responses] for prompt, responses in groups]

    def begin_group(
        self, prompt: Prompt, written: Mapping[int, Sequence[Message]], new: int
    ) -> None:
        """Start scoring a partial group; a no-op unless the domain compares responses."""
        return

    def close(self) -> None:
        """Release resources; a no-op by default."""
        return


def environment[T: type[Domain]](kind: T) -> T:
    """Mark a class as a domain that `envs.modules` offers to recipes by its name `domain`."""
    _MARKED.add(kind)
    return kind


def is_environment(kind: type) -> bool:
    """Return True for a class that is marked with `environment`."""
    return kind in _MARKED


class AnswerFault(Exception):  # noqa: N818 - it is a verdict on an answer
    """A check cannot finish because of the answer, which is therefore wrong."""


class CheckedDomain(Domain):
    """Base class of domains that run some checks in killable children."""

    def __init__(self, children: ChildPool) -> None:
        self._children = children

    def run_check(self, function: str, *arguments: Any, control: Sequence[Any]) -> Any:
        """Run a check in a child.

        control: arguments with a harmless answer. A check that fails is repeated with them, to see
        whose fault it is. Raises AnswerFault if that succeeds, and else ChildError.
        """
        try:
            return self._children.call(function, *arguments)
        except ChildHostError:
            raise
        except ChildError as error:
            try:
                self._children.call(function, *control)
            except ChildHostError:
                raise
            except ChildError:
                raise error from None
            raise AnswerFault(str(error)) from error

    def close(self) -> None:
        """End the children. Domains may share them; a later check starts new ones."""
        self._children.close()


def task_id(prompt: Prompt) -> str:
    """First 16 bytes, in hex, of the hash of everything the model sees."""
    seen: list[Any] = [
        prompt.domain,
        [(m.role, m.content) for m in prompt.messages],
        [(t.name, t.description, dict(t.parameters)) for t in prompt.tools],
    ]
    calls = [[(c.name, dict(c.arguments)) for c in m.tool_calls] for m in prompt.messages]
    return digest(json.dumps(seen + ([calls] if any(calls) else [])))


def digest(text: str) -> str:
    """First 16 bytes, in hex, of the hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_heldout(key: str) -> bool:
    """Return True if a task with this `split_key` is held out."""
    return int(key[:8], 16) % HELDOUT_SHARE == 0


def demonstration(prompt: Prompt, *, thinking: bool, careless: bool = False) -> list[Message]:
    """Return the turns of the task's solution, with or without reasoning.

    careless: return the turns of `Prompt.careless` instead, if the task has them.

    Raises ValueError for a task without a demonstration, such as most tasks from files.
    """
    if not prompt.demonstration:
        raise ValueError(
            f"the task {prompt.source or prompt.id} has no demonstration: generated tasks have "
            "one, and rows of GSM8K and MATH"
        )
    turns = prompt.careless if careless and prompt.careless else prompt.demonstration
    return [m if thinking else replace(m, reasoning="") for m in turns]


def failed(error: Exception) -> Verdict:
    """Return the verdict of a check that raised `error`."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, AnswerFault):
        return Verdict(0.0, details={"reason": str(error)}, fault="answer")
    on_host = isinstance(error, SandboxError | ChildHostError | OSError | MemoryError)
    return Verdict(None, text, fault="host" if on_host else "row")


def final_text(response: Sequence[Message]) -> str:
    """Last assistant turn without its reasoning; empty if the last reasoning was never closed.

    Reasoning opens at the start of the turn or of a line.
    """
    last = response[-1] if response else None
    if last is None or last.role != "assistant":
        return ""
    content = last.content.rpartition("</think>")[2].strip()
    if content.startswith("<think>") or "\n<think>" in content:
        return ""
    return content


def opens_box(text: str) -> bool:
    r"""Return True if the text opens a `\boxed{`."""
    return _BOX.search(text) is not None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, with balanced braces; None without one.

    The last opening decides: if it is never closed, its content ends with the line or the formula.
    Escaped braces, as in `\{1, 2\}`, are text.
    """
    start = max((box.end() for box in _BOX.finditer(text)), default=None)
    if start is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    cut = _CUT.search(text, start)
    return text[start : None if cut is None else cut.start()].strip()

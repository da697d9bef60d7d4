"""Base classes of all domains: training/held-out split, rows from files, final message."""

from __future__ import annotations

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from nemocascade.runtime.jsonl import read_objects
from nemocascade.runtime.logging import LOGGER
from nemocascade.sandbox.child import ChildError, ChildHostError, ChildPool
from nemocascade.types import (
    ROLES,
    Message,
    Prompt,
    Role,
    Row,
    SandboxError,
    Tool,
    ToolSession,
    Verdict,
)

HELDOUT_SHARE = 4
"""One task in this many is held out, decided by the hash of its text."""
TRIES = 2000
"""A difficulty is exhausted after this many consecutive tasks that were seen before."""
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class Domain(ABC):
    """Base class of environments, with the parts that all domains share."""

    domain: str
    by_group = False

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
        """Return a released row's `answer`. Raises ValueError, KeyError or TypeError if broken."""

    def prepare(self, row: Row, folder: Path) -> Row:
        """Return a claimed row with a `prompt`, built from its other fields if it has none.

        folder: folder of the file; names in the row are relative to it.
        """
        return row

    @abstractmethod
    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """Return the verdict. An exception becomes an error verdict."""

    def prompts(
        self, *, seed: int, count: int, difficulty: int = 0, heldout: bool = False
    ) -> Iterator[Prompt]:
        """Yield `count` distinct tasks, the same for the same arguments.

        The split depends on the problem of a task alone, so no task is in both splits, whatever
        the seeds. Raises ValueError if there are fewer than `count`.
        """
        rng = random.Random(f"{self.domain}/{seed}/{difficulty}/{heldout}")
        seen: set[str] = set()
        tries = 0
        while len(seen) < count:
            prompt = self.make(rng, difficulty)
            task = task_id(prompt)
            tries += 1
            if tries > TRIES:
                raise ValueError(
                    f"{self.domain} has about {len(seen)} tasks of difficulty {difficulty} on "
                    f"this side of the split, {count} were asked for: ask for fewer, or raise "
                    "the difficulty"
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

    def read(self, path: str | Path) -> Iterator[Prompt]:
        """Yield this domain's tasks from a JSONL file (`.jsonl` or `.jsonl.gz`) of released rows.

        A file may mix domains; rows of other domains are counted and logged. Raises ValueError
        naming `file:line` for a broken row, and if no row belongs to this domain.
        """
        others = found = 0
        for where, row in read_objects(path):
            if not self.claims(row):
                others += 1
                continue
            found += 1
            yield self._task(row, Path(path).parent, where)
        if not found:
            raise ValueError(f"{path}: none of its {others} rows is of {self.domain}")
        if others:
            LOGGER.info("%s: %d rows of other domains than %s", path, others, self.domain)

    def _task(self, row: Row, folder: Path, where: str) -> Prompt:
        """Build the task of a row. Raises ValueError naming `where` for a broken row."""
        try:
            return self._prompt(self.prepare(row, folder), where)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error

    def _prompt(self, row: Row, where: str) -> Prompt:
        params = row.get("responses_create_params") or {}
        turns = params.get("input") or row.get("prompt")
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        if not turns:
            raise ValueError("'responses_create_params.input' and 'prompt' are both empty")
        messages = tuple(_message(turn) for turn in turns)
        if messages[-1].role not in ("user", "tool"):
            raise ValueError(f"the prompt ends with a turn of {messages[-1].role}, not of the user")
        prompt = Prompt(
            id="",
            domain=self.domain,
            messages=messages,
            answer=dict(self.parse(row)),
            tools=tuple(_tool(tool) for tool in params.get("tools") or ()),
            source=where,
            pass_rate=_pass_rate(row),
        )
        return replace(prompt, id=task_id(prompt))

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
            return self.check(prompt, response)
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
    seen = (
        prompt.domain,
        [(m.role, m.content) for m in prompt.messages],
        [(t.name, t.description, dict(t.parameters)) for t in prompt.tools],
    )
    return digest(json.dumps(seen))


def digest(text: str) -> str:
    """First 16 bytes, in hex, of the hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_heldout(key: str) -> bool:
    """Return True if a task with this `split_key` is held out."""
    return int(key[:8], 16) % HELDOUT_SHARE == 0


def demonstration(prompt: Prompt, *, thinking: bool, careless: bool = False) -> list[Message]:
    """Return the turns of the task's solution, with or without reasoning.

    careless: return the turns of `Prompt.careless` instead, if the task has them.

    Raises ValueError for a task without a demonstration, such as a task from a file.
    """
    if not prompt.demonstration:
        raise ValueError(
            f"task {prompt.id} has no demonstration: only tasks made by `prompts` have one"
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

    The last opening decides: if it is never closed, there is no answer. Escaped braces, as in
    `\{1, 2\}`, are text.
    """
    start = max((box.end() for box in _BOX.finditer(text)), default=len(text))
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return None


def _pass_rate(row: Row) -> float | None:
    rate = row.get("pass_rate")
    if rate is not None and not 0 <= float(rate) <= 1:
        raise ValueError(f"'pass_rate' is {rate}, a share of tries lies in 0..1")
    return None if rate is None else float(rate)


def _message(turn: Row) -> Message:
    role = "system" if turn["role"] == "developer" else turn["role"]
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}, known are {', '.join(ROLES)}")
    content = turn["content"]
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    return Message(cast(Role, role), content)


def _tool(tool: Row) -> Tool:
    function = tool.get("function") or tool
    return Tool(
        function["name"], function.get("description") or "", dict(function.get("parameters") or {})
    )

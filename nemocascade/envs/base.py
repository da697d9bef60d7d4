"""What the domains share: the split into training and held-out tasks, rows, the final message."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from nemocascade.runtime.jsonl import read_objects
from nemocascade.runtime.logging import LOGGER
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import ROLES, Message, Prompt, Role, Row, Tool, ToolSession, Verdict

HELDOUT_SHARE = 4
"""One task in this many is held out, decided by the hash of its text."""
TRIES = 2000
"""Tasks made in a row that are all known before a difficulty counts as exhausted."""


class Domain(ABC):
    """The part of an `Environment` that is the same everywhere."""

    domain: str
    by_group = False

    @property
    def collective(self) -> bool:
        """No verifier works on all ranks at once, unless the domain says otherwise."""
        return False

    @property
    def activity(self) -> int:
        """None to tell of, unless the domain has a judge."""
        return 0

    @abstractmethod
    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """A random task with its demonstration; `difficulty` 0 is the easiest."""

    @abstractmethod
    def claims(self, row: Row) -> bool:
        """Whether a released row is of this domain."""

    @abstractmethod
    def parse(self, row: Row) -> Mapping[str, Any]:
        """The `answer` of a released row. Raises ValueError, KeyError or TypeError if broken."""

    def prepare(self, row: Row, folder: Path) -> Row:
        """A claimed row, with the `prompt` that is built from its other fields where it has none.

        folder: of the file, for names in the row that are relative to it.
        """
        return row

    @abstractmethod
    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """The verdict; what it raises becomes an error verdict."""

    def prompts(
        self, *, seed: int, count: int, difficulty: int = 0, heldout: bool = False
    ) -> Iterator[Prompt]:
        """`count` different tasks, the same for the same arguments.

        Which side of the split a task belongs to is a property of what has to be solved, so no task
        stands on both sides whatever the seeds. Raises ValueError where there are fewer than
        `count`.
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
        """A task of one turn, which `reply` solves. careless: the reply of `Prompt.careless`."""
        return Prompt(
            id="",
            domain=self.domain,
            messages=(Message("user", ask),),
            answer=answer,
            demonstration=(Message("assistant", reply, reasoning),),
            careless=(Message("assistant", careless, reasoning),) if careless else (),
        )

    def split_key(self, prompt: Prompt) -> str:
        """A hash of what a made task asks for, in hex, which decides its side of the split. The
        same for prompts that ask for the same and read differently."""
        return task_id(prompt)

    def read(self, path: str | Path) -> Iterator[Prompt]:
        """This domain's tasks in a JSONL file (`.jsonl` or `.jsonl.gz`) of released rows.

        A file may mix domains; rows that this one does not claim are counted and logged. Raises
        ValueError naming `file:line` for a row that is broken, and if no row is of this domain.
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
        """The task of a row; what is wrong with it becomes a ValueError that names its place."""
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
        """No tools, unless the domain says otherwise."""
        return None

    def score(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """The verdict on `response`. A verifier that fails reports an error, never a zero."""
        if prompt.domain != self.domain:
            raise ValueError(f"{self.domain} cannot score a task of {prompt.domain}")
        try:
            return self.check(prompt, response)
        except Exception as error:  # any failure of a verifier is reported, and none is a zero
            return Verdict(None, f"{type(error).__name__}: {error}")

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        """Each response by itself, unless the domain compares them."""
        return [[self.score(prompt, r) for r in responses] for prompt, responses in groups]

    def begin_group(
        self, prompt: Prompt, written: Mapping[int, Sequence[Message]], new: int
    ) -> None:
        """Nothing to begin with, unless the domain compares responses."""
        return

    def close(self) -> None:
        """Nothing to end, unless the domain says otherwise."""
        return


class CheckedDomain(Domain):
    """A domain some of whose checks run in killable children."""

    def __init__(self, children: ChildPool) -> None:
        self._children = children

    def close(self) -> None:
        """End the children; domains may share them, and a later check starts new ones."""
        self._children.close()


def task_id(prompt: Prompt) -> str:
    """16 bytes of the hash of what the model sees, in hex."""
    seen = (
        prompt.domain,
        [(m.role, m.content) for m in prompt.messages],
        [(t.name, t.description, dict(t.parameters)) for t in prompt.tools],
    )
    return digest(json.dumps(seen))


def digest(text: str) -> str:
    """16 bytes of the hash of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_heldout(key: str) -> bool:
    """The side of the split that a task with this `split_key` belongs to."""
    return int(key[:8], 16) % HELDOUT_SHARE == 0


def demonstration(prompt: Prompt, *, thinking: bool, careless: bool = False) -> list[Message]:
    """The turns of a solution, with its reasoning or without: of the right one.

    careless: the turns of `Prompt.careless`; those of the right solution where the task has none.

    Raises ValueError for a task that has none, as tasks from files.
    """
    if not prompt.demonstration:
        raise ValueError(
            f"task {prompt.id} has no demonstration: only tasks made by `prompts` have one"
        )
    turns = prompt.careless if careless and prompt.careless else prompt.demonstration
    return [m if thinking else replace(m, reasoning="") for m in turns]


def final_text(response: Sequence[Message]) -> str:
    """The last assistant turn without its reasoning; empty if it never left its reasoning."""
    last = response[-1] if response else None
    if last is None or last.role != "assistant":
        return ""
    content = last.content
    if "</think>" in content:
        content = content.rpartition("</think>")[2]
    elif content.lstrip().startswith("<think>"):
        return ""
    return content.strip()


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, braces balanced; None without one."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : i].strip()
        start = text.rfind("\\boxed{", 0, start)
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

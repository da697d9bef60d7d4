"""Tool-integrated reasoning: a domain whose tasks offer a Python interpreter with state."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemocascade.envs.base import Domain, task_id
from nemocascade.recipe.envs import PythonToolConfig, SandboxConfig
from nemocascade.runtime.row_errors import reject_row
from nemocascade.sandbox.ray_sandbox import AnySandbox, AnySession, RaySandbox, open_sandbox
from nemocascade.types import (
    Environment,
    Message,
    Prompt,
    Row,
    SandboxError,
    Status,
    Tool,
    ToolCall,
    Verdict,
)

TOOL = Tool(
    # The name and the parameter of the released rows.
    "stateful_python_code_exec",
    "Run Python code. Variables and imports persist between calls.",
    {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
)
_LOST: Mapping[Status, str] = {
    "time": "error: the call did not stop at its time limit",
    "output": "error: the call wrote too much",
    "failed": "error: the interpreter has crashed",
}


class PythonTool:
    """Interpreters for the episodes of all domains with the tool, in one sandbox. Thread-safe.

    config: limits of the calls. sandbox: of the processes; its time limit is replaced.
    """

    def __init__(self, config: PythonToolConfig, sandbox: SandboxConfig) -> None:
        self.config = config
        self._sandbox_config = replace(sandbox, time_s=config.time_s)
        self._sandbox: AnySandbox | None = None
        self._lock = threading.Lock()

    def session(self) -> PythonSession:
        """Return the tool of one episode. Raises SandboxUnavailable if nothing can be isolated, and
        if every node of Ray is lost."""
        with self._lock:
            if self._sandbox is None:
                self._sandbox = open_sandbox(self._sandbox_config)
            elif isinstance(self._sandbox, RaySandbox):
                self._sandbox.check()
            return PythonSession(self._sandbox, self.config)

    def close(self) -> None:
        """End every interpreter; a later session starts a new sandbox."""
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()
                self._sandbox = None


class PythonSession:
    """The interpreter of one episode. It starts with the first call, and `close` ends it.

    Whatever the code does is answered with text: its output, its error, or why its state is lost.
    A failure of the host raises SandboxError, and so does a call after `close`.
    """

    def __init__(self, sandbox: AnySandbox, limits: PythonToolConfig) -> None:
        self._sandbox, self._limits = sandbox, limits
        self._interpreter: AnySession | None = None
        self._calls = 0
        # An interrupted run closes an episode while a thread works on its calls.
        self._lock = threading.Lock()
        self._closed = False

    @property
    def done(self) -> bool:
        """Return False: no call ends the episode."""
        return False

    def step(self, calls: Sequence[ToolCall]) -> list[Message]:
        """Run the code of `calls` in order."""
        with self._lock:
            return [Message("tool", self._answer(call)) for call in calls]

    def close(self) -> None:
        """End the interpreter with everything that it has started, once its calls have ended."""
        with self._lock:
            self._closed = True
            if self._interpreter is not None:
                self._interpreter.close()
                self._interpreter = None

    def _answer(self, call: ToolCall) -> str:
        code = call.arguments.get("code")
        if call.name != TOOL.name:
            return f"error: unknown tool {call.name}, the only one is {TOOL.name}"
        if not isinstance(code, str) or len(call.arguments) > 1:
            return f"error: {TOOL.name} has one parameter, code, given {sorted(call.arguments)}"
        self._calls += 1
        if self._calls > self._limits.calls:
            return f"error: more than {self._limits.calls} calls: answer without the tool"
        if self._closed:
            raise SandboxError("the episode has ended")
        if self._interpreter is None:
            self._interpreter = self._sandbox.session(self._limits.calls)
        found = self._interpreter.run(code)
        text = _shortened(found.output.rstrip("\n"), self._limits.result_chars)
        if found.status == "ok":
            return text
        self._interpreter = None
        return f"{text}\n{_LOST[found.status]}: variables and imports are lost".lstrip("\n")


class ToolIntegrated(Domain):
    """The tasks of another domain with the Python tool; that domain verifies the final answer.

    Held-out tasks are those of the other domain. A demonstration calls the tool if the task's
    `answer` has `cells`: programs whose last output is the expected answer.
    """

    def __init__(self, inner: Domain, tool: PythonTool) -> None:
        self.domain = inner.domain
        self._inner, self._tool = inner, tool
        inner.answered_tools = (TOOL.name,)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        return self._inner.make(rng, difficulty)

    def claims(self, row: Row) -> bool:
        return self._inner.claims(row)

    def parse(self, row: Row) -> Mapping[str, Any]:
        return self._inner.parse(row)

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        return self._inner.check(prompt, response)

    def prompts(
        self, *, seed: int, count: int, difficulty: int = 0, heldout: bool = False
    ) -> Iterator[Prompt]:
        """Yield the tasks of the inner domain with the tool."""
        found = self._inner.prompts(seed=seed, count=count, difficulty=difficulty, heldout=heldout)
        yield from map(self._equipped, found)

    def read(
        self,
        path: str | Path,
        bad: Callable[[str, str], object] = reject_row,
        others: Collection[Environment] = (),
    ) -> Iterator[Prompt]:
        """Yield the tasks of the inner domain with the tool. Raises as the inner domain."""
        yield from map(self._equipped, self._inner.read(path, bad, others))

    def forms(self, prompt: Prompt) -> Collection[str]:
        return self._inner.forms(prompt)

    def dummy(self, prompt: Prompt) -> Sequence[Message] | None:
        return self._inner.dummy(prompt)

    def session(self, prompt: Prompt) -> PythonSession:
        """Return the interpreter of one episode."""
        return self._tool.session()

    def score(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """Return the inner domain's verdict on the final answer, with the number of calls."""
        found = self._inner.score(prompt, response)
        calls = sum(len(message.tool_calls) for message in response)
        return replace(found, details={**found.details, "tool_calls": calls})

    def close(self) -> None:
        """End the processes of the tool and of the inner domain."""
        self._tool.close()
        self._inner.close()

    def _equipped(self, prompt: Prompt) -> Prompt:
        turns, note = prompt.messages, self._tool.config.prompt
        if note and turns[0].role == "system":
            turns = (replace(turns[0], content=f"{turns[0].content}\n\n{note}"), *turns[1:])
        elif note:
            turns = (Message("system", note), *turns)
        tools = prompt.tools
        if self._tool.config.declare:
            tools = (*(tool for tool in tools if tool.name != TOOL.name), TOOL)
        equipped = replace(prompt, messages=turns, tools=tools)
        if cells := prompt.answer.get("cells"):
            equipped = replace(
                equipped,
                demonstration=_calling(cells, prompt),
                # The answer without the tool.
                careless=prompt.demonstration,
            )
        return replace(equipped, id=task_id(equipped))


def _calling(cells: Sequence[str], prompt: Prompt) -> tuple[Message, ...]:
    """Return an episode that runs the cells in order and answers with what the last one prints."""
    (final,) = prompt.demonstration
    turns: list[Message] = []
    for cell in cells:
        call = ToolCall(TOOL.name, {"code": cell})
        output = prompt.answer["expected"] if cell is cells[-1] else ""
        turns += [Message("assistant", "", f"run {cell}", (call,)), Message("tool", output)]
    return (*turns, final)


def _shortened(text: str, limit: int) -> str:
    """Cut a text in the middle: its start shows what it is, and its end the error."""
    if len(text) <= limit:
        return text
    end = limit // 2
    note = f"[{len(text) - limit} of {len(text)} characters omitted]"
    return f"{text[: limit - end]}\n{note}\n{text[len(text) - end :]}"

"""Tool calling: compares the office after the predicted calls with that after the true ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemocascade.envs.base import Domain
from nemocascade.envs.office import EMPTY, Office, OfficeError, tools
from nemocascade.envs.words import (
    COLORS,
    FEW_COLORS,
    FEW_NOUNS,
    FEW_VERBS,
    NAMES,
    NOUNS,
)
from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import parse_tools
from nemocascade.types import Message, Prompt, Row, Tool, ToolCall, ToolSession, Verdict

MAX_CALLS = 64
"""Maximum executed calls of one episode; an answer with more scores 0."""
_KNOWN = {tool.name: tool for tool in tools()}


class OfficeSession:
    """The office of one episode. It executes only calls of `allowed` tools."""

    def __init__(self, office: Office, allowed: frozenset[str]) -> None:
        self.office = office
        self._allowed = allowed
        self._calls = 0

    @property
    def done(self) -> bool:
        """Return False: no call ends an episode in the office."""
        return False

    def close(self) -> None:
        """Do nothing: the office is in memory only."""

    def step(self, calls: Sequence[ToolCall]) -> list[Message]:
        """Execute `calls` in order; a call that cannot be executed is answered with the reason."""
        return [Message("tool", self._answer(call)) for call in calls]

    def _answer(self, call: ToolCall) -> str:
        self._calls += 1
        try:
            if self._calls > MAX_CALLS:
                raise OfficeError(f"more than {MAX_CALLS} calls")
            if call.name not in self._allowed:
                raise OfficeError(f"unknown tool {call.name}")
            return self.office.call(call.name, call.arguments)
        except OfficeError as error:
            return f"error: {error}"


class ToolCalling(Domain):
    """1 if the end states are equal, else 0. A call that fails changes and costs nothing.

    Predicted and true calls run on fresh offices with the same initial state, so the verdict
    depends on the response alone. Tools that were not declared to the model cannot be called.
    """

    domain = "tool_calling"

    def claims(self, row: Row) -> bool:
        return isinstance(row.get("ground_truth"), list)

    def parse(self, row: Row) -> Mapping[str, Any]:
        calls = [
            {"name": call["name"], "arguments": _arguments(call["arguments"])}
            for call in row["ground_truth"]
        ]
        declared = parse_tools((row.get("responses_create_params") or {}).get("tools"))
        names = [tool.name for tool in declared] or sorted(_KNOWN)
        unknown = sorted({*names, *(call["name"] for call in calls)} - set(_KNOWN))
        if unknown:
            raise ValueError(
                f"the office has no tools {unknown}: rows of another office need its database; "
                f"known are {sorted(_KNOWN)}"
            )
        answer = {"office": row.get("office") or dict(EMPTY), "calls": calls, "allowed": names}
        _true_state(answer)
        return answer

    def session(self, prompt: Prompt) -> ToolSession:
        """Return a fresh office for one episode."""
        return _session(prompt.answer)

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        wanted = _true_state(prompt.answer)
        calls = [call for message in response for call in message.tool_calls]
        if len(calls) > MAX_CALLS:
            return Verdict(0.0, details={"calls": len(calls), "limit": MAX_CALLS})
        end = response[-1].content if response else ""
        if end.rfind("<tool_call>") > end.rfind("</tool_call>"):
            return Verdict(0.0, details={"calls": len(calls), "reason": "the last call is open"})
        session = _session(prompt.answer)
        answers = session.step(calls)
        failed = [m.content for m in answers if m.content.startswith("error: ")]
        state = session.office.state()
        different = sorted(table for table in wanted if wanted[table] != state[table])
        return Verdict(
            float(not different),
            details={"calls": len(calls), "failed": failed, "different": different},
        )

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task. 0: a call of one argument. 1: two arguments. 2: two calls. 3: tool schemas.

        Below 3, a system turn lists the tools in a short form, for models with a small context.
        """
        jobs = [_JOBS[rng.choice(_EASY if difficulty <= 0 else _HARD)](rng)]
        if difficulty >= 2:
            jobs.append(_JOBS[rng.choice([n for n in _HARD if n != jobs[0].calls[0].name])](rng))
        office: dict[str, list[dict[str, Any]]] = {name: [] for name in EMPTY}
        for job in jobs:
            for table, row in job.rows:
                office[table].append({"id": len(office[table]) + 1, **row})
        calls = tuple(call for job in jobs for call in job.calls)
        names = {call.name for call in calls}
        other = rng.choice([n for n in _HARD if n not in names])
        names.add(other)
        shown = sorted(names)
        answer = {
            "office": office,
            "calls": [{"name": c.name, "arguments": dict(c.arguments)} for c in calls],
            "allowed": shown,
        }
        request = Message("user", " Then ".join(job.request for job in jobs))
        compact = Message("system", "\n".join(_compact(_KNOWN[name]) for name in shown))
        declared = difficulty >= 3
        return Prompt(
            id="",
            domain=self.domain,
            messages=(request,) if declared else (compact, request),
            tools=tuple(_KNOWN[name] for name in shown) if declared else (),
            answer=answer,
            demonstration=_turns(answer, calls),
            # A declared tool that the request does not need; the failure goes unnoticed.
            careless=_turns(answer, [ToolCall(other, call.arguments) for call in calls]),
        )


def _turns(answer: Mapping[str, Any], calls: Sequence[ToolCall]) -> tuple[Message, ...]:
    """Return an episode that makes all `calls` in one turn and ends."""
    reasoning = "\n".join(f"call {c.name}: {', '.join(c.arguments.values())}" for c in calls)
    return (
        Message("assistant", "", reasoning, tuple(calls)),
        *_session(answer).step(calls),
        # Every turn of a thinking model starts with reasoning, even the last.
        Message("assistant", "Done.", "all is done."),
    )


def _session(answer: Mapping[str, Any]) -> OfficeSession:
    return OfficeSession(Office(answer["office"]), frozenset(answer["allowed"]))


def _true_state(answer: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the end state of the true calls. Raises ValueError if one cannot be executed."""
    office = Office(answer["office"])
    for call in answer["calls"]:
        office.call(call["name"], call["arguments"])
    return office.state()


def _arguments(value: Any) -> dict[str, Any]:
    loaded = parse_field(value, "arguments") if isinstance(value, str) else value
    if not isinstance(loaded, dict):
        raise ValueError(f"arguments must be an object, they are {value!r}")
    return loaded


def _compact(tool: Tool) -> str:
    return f"{tool.name}({', '.join(tool.parameters['properties'])})"


@dataclass(frozen=True)
class _Job:
    """A request, its calls, and the initial state that they need."""

    request: str
    calls: tuple[ToolCall, ...]
    rows: tuple[tuple[str, dict[str, Any]], ...] = ()


def _job(request: str, name: str, /, *rows: tuple[str, dict[str, Any]], **arguments: str) -> _Job:
    return _Job(request, (ToolCall(name, arguments),), rows)


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(COLORS)} {rng.choice(NOUNS)}"


def _chore(rng: random.Random) -> str:
    return f"{rng.choice(FEW_VERBS)} {rng.choice(FEW_COLORS)} {rng.choice(FEW_NOUNS)}"


def _add_task(rng: random.Random) -> _Job:
    title = _chore(rng)
    return _job(f"Add a task: {title}.", "add_task", title=title)


def _finish_task(rng: random.Random) -> _Job:
    title = _chore(rng)
    row = {"title": title, "due": "", "done": False}
    return _job(f"I did this: {title}.", "finish_task", ("tasks", row), title=title)


def _delete_task(rng: random.Random) -> _Job:
    title = _chore(rng)
    row = {"title": title, "due": "", "done": False}
    return _job(f"Drop the task {title}.", "delete_task", ("tasks", row), title=title)


def _delete_file(rng: random.Random) -> _Job:
    path = f"{rng.choice(FEW_COLORS)} {rng.choice(FEW_NOUNS)}"
    row = {"path": path, "text": "", "shared": []}
    return _job(f"Delete the file {path}.", "delete_file", ("files", row), path=path)


def _write_file(rng: random.Random) -> _Job:
    path, text = _thing(rng), rng.choice(NOUNS)
    return _job(f"Write {text} to the file {path}.", "write_file", path=path, text=text)


def _share_file(rng: random.Random) -> _Job:
    path, name = _thing(rng), rng.choice(NAMES)
    row = {"path": path, "text": "", "shared": []}
    request = f"Share the file {path} with {name}."
    return _job(request, "share_file", ("files", row), path=path, name=name)


def _add_contact(rng: random.Random) -> _Job:
    name, email = rng.choice(NAMES), f"{rng.choice(NAMES)}@{rng.choice(NOUNS)}"
    return _job(f"Add {name} with mail {email}.", "add_contact", name=name, email=email)


def _send_mail(rng: random.Random) -> _Job:
    to, subject = rng.choice(NAMES), _thing(rng)
    return _job(f"Mail {to} about {subject}.", "send_mail", to=to, subject=subject)


def _set_due(rng: random.Random) -> _Job:
    title, due = _thing(rng), f"2026-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}"
    row = {"title": title, "due": "", "done": False}
    request = f"The task {title} is due {due}."
    return _job(request, "set_due", ("tasks", row), title=title, due=due)


def _add_event(rng: random.Random) -> _Job:
    title, day = _thing(rng), f"2026-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}"
    return _job(f"Plan {title} on {day}.", "add_event", title=title, day=day)


_EASY = ("add_task", "finish_task", "delete_task", "delete_file")
_HARD = ("write_file", "share_file", "add_contact", "send_mail", "set_due", "add_event")
_JOBS: dict[str, Callable[[random.Random], _Job]] = {
    "add_task": _add_task,
    "finish_task": _finish_task,
    "delete_task": _delete_task,
    "delete_file": _delete_file,
    "write_file": _write_file,
    "share_file": _share_file,
    "add_contact": _add_contact,
    "send_mail": _send_mail,
    "set_due": _set_due,
    "add_event": _add_event,
}

"""Tool calling: compares an application after the predicted calls with that after the true ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemocascade.envs.applications import (
    MAX_CALLS,
    Application,
    ApplicationSession,
    CallError,
)
from nemocascade.envs.base import Domain
from nemocascade.envs.office import EMPTY, Office
from nemocascade.envs.prompt_rows import turns_of
from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.words import (
    COLORS,
    FEW_COLORS,
    NAMES,
    NOUNS,
    SOME_NOUNS,
)
from nemocascade.envs.workplace import Workplace
from nemocascade.envs.workplace.invented import check_invented, made_tables
from nemocascade.envs.workplace.tables import read_tables
from nemocascade.recipe.envs import ToolCallingConfig
from nemocascade.runtime.strict_json import parse_field
from nemocascade.types import Message, Prompt, Row, Tool, ToolCall, ToolSession, Verdict

_OFFICE = {tool.name: tool for tool in Office.tools()}
_WORKPLACE = {tool.name: tool for tool in Workplace.tools()}
WORKPLACE = "workplace_assistant"
"""`environment_name` of NeMo Gym's rows."""
_OTHER_DATA = (
    "the row is about another workplace than the invented one: set "
    "envs.tool_calling.workplace_data to csv_data of NeMo Gym's workplace_assistant"
)


class ToolCalling(Domain):
    """1 if the end states are equal, else 0. A call that fails changes and costs nothing.

    Predicted and true calls run on fresh applications with the same initial state, so the verdict
    depends on the response alone. A row is about the office, whose state it holds, or about NeMo
    Gym's workplace, whose state is in the files of `workplace_data`, else invented. Tools of the
    office that were not declared to the model cannot be called; the workplace, as published,
    executes all of its tools.
    """

    domain = "tool_calling"
    row_forms = (
        RowForm(
            "calls of office tools",
            read={
                "ground_truth": "list of the true calls, each with `name` and `arguments`",
                "office": "the tables before the first call; empty ones by default",
                "environment_name": "`workplace_assistant`: the tools and tables of NeMo Gym's",
            },
        ),
    )

    def __init__(self, config: ToolCallingConfig | None = None) -> None:
        """Raises DataError if the files of `workplace_data` cannot be read."""
        folder = (config or ToolCallingConfig()).workplace_data
        self._published = Workplace(read_tables(folder)) if folder else None

    def claims(self, row: Row) -> bool:
        truth = row.get("ground_truth")
        return isinstance(truth, list) or (
            isinstance(truth, str) and row.get("environment_name") == WORKPLACE
        )

    def parse(self, row: Row) -> Mapping[str, Any]:
        truth = row["ground_truth"]
        calls = [
            {"name": call["name"], "arguments": _arguments(call["arguments"])}
            for call in (parse_field(truth, "ground_truth") if isinstance(truth, str) else truth)
        ]
        messages, declared = turns_of(row)
        shown = [tool.name for tool in declared]
        named = {*shown, *(call["name"] for call in calls)}
        if row.get("environment_name") == WORKPLACE or (named and named <= set(_WORKPLACE)):
            known, answer = _WORKPLACE, {"workplace": True, "calls": calls}
        else:
            known, answer = _OFFICE, {"office": row.get("office") or dict(EMPTY), "calls": calls}
        if unknown := sorted(named - set(known)):
            raise ValueError(
                f"there are no tools {unknown}: known are those of the office, {sorted(_OFFICE)}, "
                f"and those of the workplace, {sorted(_WORKPLACE)}"
            )
        allowed = sorted(known) if known is _WORKPLACE else shown or sorted(known)
        answer["allowed"] = allowed
        if known is _WORKPLACE and self._published is None:
            try:
                check_invented("\n".join(m.content for m in messages), calls)
            except CallError as error:
                raise ValueError(f"{error}: {_OTHER_DATA}") from error
        self._true_end(answer)
        return answer

    def session(self, prompt: Prompt) -> ToolSession:
        """Return a fresh application for one episode."""
        return self._session(prompt.answer)

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        wanted = self._true_end(prompt.answer)
        calls = [call for message in response for call in message.tool_calls]
        if len(calls) > MAX_CALLS:
            return Verdict(0.0, details={"calls": len(calls), "limit": MAX_CALLS})
        end = response[-1].content if response else ""
        if end.rfind("<tool_call>") > end.rfind("</tool_call>"):
            return Verdict(0.0, details={"calls": len(calls), "reason": "the last call is open"})
        session = self._session(prompt.answer)
        answers = session.step(calls)
        failed = [m.content for m in answers if m.content.startswith("error: ")]
        different = session.application.differences(wanted)
        return Verdict(
            float(not different),
            details={"calls": len(calls), "failed": failed, "different": different},
        )

    def forms(self, prompt: Prompt) -> Collection[str]:
        return ("office" if "office" in prompt.answer else "workplace",)

    def _application(self, answer: Mapping[str, Any]) -> Application:
        """Return the task's application in its initial state."""
        if "office" in answer:
            return Office(answer["office"])
        return self._published.copy() if self._published else Workplace(made_tables())

    def _session(self, answer: Mapping[str, Any]) -> ApplicationSession:
        return ApplicationSession(self._application(answer), frozenset(answer["allowed"]))

    def _true_end(self, answer: Mapping[str, Any]) -> Application:
        """Return the application after the true calls.

        Raises CallError if one cannot be executed. In files of the workplace such a call is
        skipped, as published.
        """
        application = self._application(answer)
        skips = "workplace" in answer and self._published is not None
        for call in answer["calls"]:
            try:
                application.call(call["name"], call["arguments"])
            except CallError:
                if not skips:
                    raise
        return application

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
        compact = Message("system", "\n".join(_compact(_OFFICE[name]) for name in shown))
        declared = difficulty >= 3
        return Prompt(
            id="",
            domain=self.domain,
            messages=(request,) if declared else (compact, request),
            tools=tuple(_OFFICE[name] for name in shown) if declared else (),
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
        *ApplicationSession(Office(answer["office"]), frozenset(answer["allowed"])).step(calls),
        # Every turn of a thinking model starts with reasoning, even the last.
        Message("assistant", "Done.", "all is done."),
    )


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


# Words that many domains copy, so that a tiny model does, after a fixed one: at the start of an
# argument a word is another token than within the request.
def _own_thing(rng: random.Random) -> str:
    return f"my {rng.choice(FEW_COLORS)} {rng.choice(SOME_NOUNS)}"


def _add_task(rng: random.Random) -> _Job:
    title = _own_thing(rng)
    return _job(f"Add a task: {title}.", "add_task", title=title)


def _finish_task(rng: random.Random) -> _Job:
    title = _own_thing(rng)
    row = {"title": title, "due": "", "done": False}
    return _job(f"I did this: {title}.", "finish_task", ("tasks", row), title=title)


def _delete_task(rng: random.Random) -> _Job:
    title = _own_thing(rng)
    row = {"title": title, "due": "", "done": False}
    return _job(f"Drop the task {title}.", "delete_task", ("tasks", row), title=title)


def _delete_file(rng: random.Random) -> _Job:
    path = _own_thing(rng)
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

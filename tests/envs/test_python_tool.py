"""Tool-integrated reasoning: the Python tool of math and code tasks, in episodes and verdicts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import sentencepiece_tokenizer
from helpers.sandbox import open_sessions, sandbox_or_skip

from nemocascade.data.chat_template import Conversation, encode
from nemocascade.envs.base import Domain
from nemocascade.envs.mathematics import Mathematics
from nemocascade.envs.python_tool import TOOL, PythonSession, ToolIntegrated
from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.recipe import (
    EnvConfig,
    PythonToolConfig,
    RolloutConfig,
    SandboxConfig,
    SftRecipe,
    load_recipe,
)
from nemocascade.rl.demonstrations import demonstration_rows
from nemocascade.rl.episodes import Episodes
from nemocascade.rl.tasks import Task
from nemocascade.rl.trial import try_verifiers
from nemocascade.rl.verification import Verification
from nemocascade.rollout.engine import Completion, Request
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.stopping import StopRequest
from nemocascade.runtime.watchdog import Watchdog
from nemocascade.sandbox import launch
from nemocascade.sandbox.child import ChildPool
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.sandbox.session import SandboxSession
from nemocascade.types import Message, Prompt, SandboxError, SandboxUnavailable, ToolCall

LIMITS = PythonToolConfig(domains=("math", "code"), calls=4, time_s=1.0, result_chars=200)
CONFIG = EnvConfig(python_tool=LIMITS, sandbox=SandboxConfig(workers=2))


@pytest.fixture(scope="module")
def domains() -> Iterator[dict[str, Domain]]:
    sandbox_or_skip(CONFIG.sandbox).close()
    made = make_environments(CONFIG)
    yield made
    close_environments(made)


def math(domains: dict[str, Domain]) -> ToolIntegrated:
    found = domains["math"]
    assert isinstance(found, ToolIntegrated)
    return found


def task(domain: Domain, difficulty: int = 5) -> Prompt:
    return next(iter(domain.prompts(seed=1, count=1, difficulty=difficulty)))


@pytest.fixture
def session(domains: dict[str, Domain]) -> Iterator[PythonSession]:
    made = math(domains).session(task(math(domains)))
    yield made
    made.close()


def call(code: Any) -> ToolCall:
    return ToolCall(TOOL.name, {"code": code})


def test_calls_share_their_state_and_errors_are_text(session: PythonSession) -> None:
    answers = session.step([call("import math\nx = 6"), call("print(math.factorial(x))\nx + 1")])
    assert [(m.role, m.content) for m in answers] == [("tool", ""), ("tool", "720\n7")]
    (failed,) = session.step([call("x / 0")])
    assert failed.content.endswith("ZeroDivisionError: division by zero")
    assert session.step([call("x")])[0].content == "6"
    (rejected,) = session.step([call("x")])
    assert rejected.content == "error: more than 4 calls: answer without the tool"
    assert not session.done


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            ToolCall("python", {"code": "1"}),
            f"error: unknown tool python, the only one is {TOOL.name}",
        ),
        (ToolCall(TOOL.name, {}), f"error: {TOOL.name} has one parameter, code, given []"),
        (ToolCall(TOOL.name, {"code": "1", "x": "2"}), "given ['code', 'x']"),
        (call(["1"]), "has one parameter, code"),
    ],
)
def test_a_call_that_is_none_starts_nothing(
    session: PythonSession, wrong: ToolCall, text: str
) -> None:
    assert text in session.step([wrong])[0].content
    assert session._interpreter is None


def test_long_output_is_cut_in_the_middle(session: PythonSession) -> None:
    (found,) = session.step([call("print('a' * 500)\n1 / 0")])
    assert found.content.startswith("a" * 100 + "\n[")
    assert "characters omitted]" in found.content
    assert found.content.endswith("ZeroDivisionError: division by zero")
    assert len(found.content) < 200 + 60


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os\nprint('a', flush=True)\nos._exit(1)", "a\nerror: the interpreter has crashed"),
        ("while True: print('x' * 1000)", "error: the call wrote too much"),
        (
            "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass",
            "error: the call did not stop at its time limit",
        ),
    ],
)
def test_a_lost_state_is_said_and_the_next_call_starts_afresh(
    session: PythonSession, code: str, why: str
) -> None:
    session.step([call("x = 1")])
    (found,) = session.step([call(code)])
    assert found.content.endswith(f"{why}: variables and imports are lost")
    assert "NameError" in session.step([call("x")])[0].content


def test_a_closed_episode_leaves_no_session(domains: dict[str, Domain]) -> None:
    tool = math(domains)._tool
    made = [tool.session() for _ in range(3)]
    for one in made:
        one.step([call("x = 1")])
    pool = tool._sandbox
    assert isinstance(pool, SandboxPool)
    assert open_sessions(pool) == 3
    made[0].close()
    made[0].close()
    with pytest.raises(SandboxError, match="the episode has ended"):
        made[0].step([call("x")])
    assert open_sessions(pool) == 2
    domains["code"].close()
    assert open_sessions(pool) == 0
    assert pool.process_ids() == []


def test_tasks_declare_the_tool_and_keep_their_split(domains: dict[str, Domain]) -> None:
    plain = make_environments(EnvConfig())["math"]
    for heldout in (False, True):
        arguments: Any = {"seed": 3, "count": 20, "difficulty": 4, "heldout": heldout}
        pairs = zip(math(domains).prompts(**arguments), plain.prompts(**arguments), strict=True)
        for ours, theirs in pairs:
            system, *turns = ours.messages
            assert (system.role, system.content) == ("system", LIMITS.prompt)
            assert tuple(turns) == theirs.messages
            assert ours.tools == (TOOL,)
            assert ours.id != theirs.id
            assert ours.answer == theirs.answer
            assert ours.careless == theirs.demonstration


@pytest.mark.parametrize("difficulty", [4, 5])
def test_demonstrations_hold_what_the_tool_answers_and_are_right(
    domains: dict[str, Domain], difficulty: int
) -> None:
    domain = math(domains)
    for prompt in domain.prompts(seed=1, count=3, difficulty=difficulty):
        session = domain.session(prompt)
        *turns, last = prompt.demonstration
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            assert session.step(asked.tool_calls) == [answered]
            assert asked.reasoning
        session.close()
        verdict = domain.score(prompt, prompt.demonstration)
        assert (verdict.reward, verdict.details["tool_calls"]) == (1.0, difficulty - 3)
        assert domain.score(prompt, prompt.demonstration[:-1]).reward == 0.0
        assert domain.score(prompt, [replace(last, content=r"\boxed{1}")]).reward == 0.0
    assert len(task(domain, 0).demonstration) == 1, "small sums need no tool"


def test_the_tiny_recipe_s_rows_call_the_tool_or_do_without() -> None:
    script = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "tool_math_sft.py"
    recipe = load_recipe(script, SftRecipe)
    few = replace(recipe.demonstrations.domains[0], tasks=200)
    few_rows = replace(recipe, demonstrations=replace(recipe.demonstrations, domains=(few,)))
    rows = list(demonstration_rows(few_rows, heldout=False))
    roles = [[turn["role"] for turn in row["messages"]] for row in rows]
    short, long = ("system", "user", "assistant"), ("system", "user", "assistant", "tool")
    assert {*map(tuple, roles)} == {short, (*long, "assistant")}
    assert 60 < sum(len(found) > 3 for found in roles) < 100
    call = next(row for row in rows if len(row["messages"]) > 3)["messages"]
    assert call[0]["content"] == f"{TOOL.name}(code)"
    assert call[2]["tool_calls"][0]["function"]["name"] == TOOL.name
    assert call[4]["content"] == rf"\boxed{{{call[3]['content']}}}"


def test_rows_with_and_without_the_tool(domains: dict[str, Domain], tmp_path: Path) -> None:
    declared = {"type": "function", "name": TOOL.name, "description": "x", "parameters": {}}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    rows = [
        {"responses_create_params": {"input": turns, "tools": [declared]}, "expected_answer": "4"},
        {"responses_create_params": {"input": turns[1:]}, "expected_answer": "4"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = domains["math"].read(path)
    assert first.tools == second.tools == (TOOL,)
    assert first.messages[0].content == f"Be brief.\n\n{LIMITS.prompt}"
    assert [m.role for m in second.messages] == ["system", "user"]
    # Without the tool, its calls would stay without an answer.
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{TOOL.name}.*add math to envs.python_"):
        list(Mathematics(ChildPool()).read(path))
    declared["name"] = "search"
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match=r"declares search, and nothing answers"):
        list(domains["math"].read(path))


def test_code_is_verified_as_without_the_tool(domains: dict[str, Domain]) -> None:
    domain = domains["code"]
    prompt = task(domain, 1)
    turns = [Message("assistant", "", tool_calls=(call("1"),)), Message("tool", "1")]
    verdict = domain.score(prompt, [*turns, *prompt.demonstration])
    assert (verdict.reward, verdict.details["tool_calls"]) == (1.0, 1)
    assert domain.score(prompt, turns).reward == 0.0


class Played:
    """An episode whose policy is a list of turns."""

    def __init__(self, domain: Domain, prompt: Prompt, turns: list[Message], max_turns: int = 8):
        self.tokenizer = sentencepiece_tokenizer()
        self.ids, _ = encode(
            self.tokenizer.template.render_prompt(
                Conversation(prompt.messages, prompt.tools), thinking=False
            ),
            self.tokenizer,
        )
        self.tasks = {0: Task(prompt, np.array(self.ids, np.int32), 0)}
        settings = RolloutConfig(thinking=False, max_turns=max_turns)
        self.episodes = Episodes(self.tokenizer, {"math": domain}, settings, self.tasks)
        self.verification = Verification(
            self.episodes,
            {"math": domain},
            self.tokenizer,
            self.tasks,
            groups={0: range(1)},
            scored=True,
            compared=True,
            threads=1,
        )
        tokens, written = list(self.ids), [False] * len(self.ids)
        for number, turn in enumerate(turns, start=1):
            said = self._said(turn)
            tokens, written = tokens + said, written + [True] * len(said)
            self.completion = Completion(
                Request(0, tuple(self.ids)),
                torch.tensor(tokens),
                torch.tensor(written),
                torch.zeros(len(tokens)),
                "stop",
                turns=number,
            )
            answer = self.episodes.respond(self.completion)
            if answer is None:
                break
            tokens, written = tokens + list(answer), written + [False] * len(answer)
        self.turns = number

    def _said(self, turn: Message) -> list[int]:
        rendered = self.tokenizer.template.render(
            Conversation((Message("user", ""), turn)), thinking=False
        )
        ids, trained = encode(rendered, self.tokenizer)
        return [token for token, mine in zip(ids, trained, strict=True) if mine]

    def verdict(self) -> Any:
        self.episodes.close(0)
        self.verification.add(self.completion)
        world: Any = SimpleNamespace(watch=Watchdog(), stop=StopRequest())
        found = self.verification.rollouts(world)[0].verdict
        self.verification.close()
        return found


def test_an_episode_calls_the_tool_and_answers(domains: dict[str, Domain]) -> None:
    prompt = task(math(domains))
    said = [m for m in prompt.demonstration if m.role == "assistant"]
    played = Played(domains["math"], prompt, said)
    assert played.turns == 3
    assert played.episodes.response(played.completion) == [
        replace(m, reasoning="") for m in prompt.demonstration
    ]
    assert played.verdict().reward == 1.0
    stopped = Played(domains["math"], prompt, said, max_turns=2)
    assert stopped.turns == 2
    assert stopped.verdict().reward == 0.0


def test_a_failure_of_the_host_is_no_wrong_answer(
    domains: dict[str, Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: SandboxSession, source: str) -> None:
        raise SandboxError("a worker is gone")

    monkeypatch.setattr(SandboxSession, "run", lost)
    prompt = task(math(domains))
    said = [m for m in prompt.demonstration if m.role == "assistant"]
    played = Played(domains["math"], prompt, said)
    assert played.turns == 1
    verdict = played.verdict()
    assert (verdict.reward, verdict.fault) == (None, "host")
    assert "a worker is gone" in str(verdict.error)


def test_a_host_without_isolation_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "missing", lambda isolation: "forbidden by this test")
    domain = make_environments(CONFIG)["math"]
    prompt = task(domain)
    with pytest.raises(SandboxUnavailable):
        Played(domain, prompt, [m for m in prompt.demonstration if m.role == "assistant"])
    with pytest.raises(DataError, match=r"math .*cannot be isolated here"):
        try_verifiers([prompt], {"math": domain})


def test_interpreters_are_ended_while_one_of_them_works(domains: dict[str, Domain]) -> None:
    """A stage is interrupted: closing waits for the call's limit and leaves nothing."""
    tool = math(domains)._tool
    busy = tool.session()
    thread = threading.Thread(target=busy.step, args=([call("while True: pass")],))
    thread.start()
    while busy._interpreter is None:
        thread.join(0.01)
    pool = tool._sandbox
    assert isinstance(pool, SandboxPool)
    tool.close()
    thread.join(20)
    assert not thread.is_alive()
    assert open_sessions(pool) == 0

"""Episodes of repair agents in a stage: trained tokens, limits, logs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import sentencepiece_tokenizer
from helpers.policy import filled
from helpers.swe import SANDBOX, agentic_domain, task, turn

from nemocascade.data.chat_template import Conversation, encode
from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.envs.swe_agentless import SweAgentless
from nemocascade.recipe import EnvConfig, GrpoConfig, GrpoRecipe, RolloutConfig
from nemocascade.recipe.commands import ReplaySettings
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.batches import pack_sequences
from nemocascade.rl.collector import Group, advantages_of
from nemocascade.rl.episodes import Episodes
from nemocascade.rl.policy import training_sequences
from nemocascade.rl.rollouts import Rollout, TokenSequence, whole_rollout
from nemocascade.rl.tasks import Task
from nemocascade.rl.trajectories import extremes, logged, replay, settings_of_run
from nemocascade.rollout.engine import Completion, Request
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message, Prompt, ToolCall, Verdict

NO_IDS = np.zeros(0, np.int32)

domain = pytest.fixture(scope="module")(agentic_domain)


def play(
    prompt: Prompt, turns: Sequence[Message], domain: SweAgentic, limit: int = 4000
) -> tuple[Rollout, list[bool]]:
    """An episode in which the model says `turns`, by the stage's own parts; and whose tokens
    are the environment's."""
    tokenizer = sentencepiece_tokenizer()
    settings = RolloutConfig(thinking=False, max_turns=len(turns))
    start, _ = encode(
        tokenizer.template.render_prompt(
            Conversation(prompt.messages, prompt.tools), thinking=False
        ),
        tokenizer,
    )
    request = Request(7, tuple(start))
    episodes = Episodes(tokenizer, {prompt.domain: domain}, settings, {7: Task(prompt, NO_IDS, 7)})
    ids, written = list(start), [False] * len(start)
    completion = None
    finish = "stop"
    for number, message in enumerate(turns, start=1):
        whole = Conversation((*prompt.messages, Message("assistant", "", "", message.tool_calls)))
        said, trained = encode(tokenizer.template.render(whole, thinking=False), tokenizer)
        said = [i for i, t in zip(said, trained, strict=True) if t]
        ids, written = ids + said, written + [True] * len(said)
        completion = Completion(
            request,
            torch.tensor(ids),
            torch.tensor(written),
            torch.zeros(len(ids)),
            finish,  # type: ignore[arg-type]
            turns=number,
        )
        answer = episodes.respond(completion)
        if answer is None:
            break
        if len(ids) + len(answer) > limit:
            finish = "length"
            break
        ids, written = ids + answer, written + [False] * len(answer)
    assert completion is not None
    response = episodes.response(completion)
    rollout = whole_rollout(
        TokenSequence(completion.tokens, completion.written, completion.logprob),
        domain.score(prompt, response),
        domain=prompt.domain,
        text=tokenizer.decode(completion.response),
        response=tuple(response),
        turns=completion.turns,
        truncated=finish == "length",
    )
    episodes.close_all()
    return rollout, [not w for w in written]


def test_tokens_of_the_environment_never_train(domain: SweAgentic) -> None:
    prompt = task(1)
    said = [m for m in prompt.demonstration if m.role == "assistant"]
    rollout, given = play(prompt, said, domain)
    assert (rollout.verdict.reward, rollout.turns) == (1.0, 3)
    group = Group(Task(prompt, NO_IDS, 0), (rollout, rollout_with(rollout, 0.0)))
    recipe = GrpoRecipe(grpo=GrpoConfig(capacity=2048))
    (group,) = advantages_of([group], recipe.rollout, recipe.grpo)
    (sequence, _) = filled(training_sequences([group], recipe))
    batch = pack_sequences([sequence], 2048, 0)
    length, advantage = len(given), batch.advantage
    assert advantage is not None
    for row in range(length - 1):
        trains = bool(batch.token_weight[row])
        assert trains == (not given[row + 1])
        assert bool(advantage[row]) == trains
    # Every turn of the model trains, and between them lie the tools' answers.
    changes = sum(a != b for a, b in itertools.pairwise(given))
    assert changes == 2 * 3 - 1


def rollout_with(rollout: Rollout, reward: float) -> Rollout:
    return replace(rollout, verdict=Verdict(reward))


def test_an_episode_without_context_left_scores_what_its_edits_earn(domain: SweAgentic) -> None:
    prompt = task(2)
    said = [m for m in prompt.demonstration if m.role == "assistant"]
    cut_off, _ = play(prompt, [said[2], turn(("list", {}))], domain, limit=0)
    assert cut_off.truncated
    assert not cut_off.verdict.details["submitted"]
    assert cut_off.verdict.reward == 1.0
    nothing, _ = play(prompt, [said[1], said[2]], domain, limit=0)
    assert (nothing.truncated, nothing.verdict.reward) == (True, 0.0)


@pytest.mark.parametrize("turns", [20, 200])
def test_an_episode_that_loops_ends_with_its_turns(domain: SweAgentic, turns: int) -> None:
    prompt = task(2)
    rollout, _ = play(prompt, [turn(("list", {}))] * turns, domain, limit=262_144)
    assert (rollout.turns, rollout.verdict.reward) == (turns, 0.0)
    assert len([m for m in rollout.response if m.role == "tool"]) == turns - 1


def test_a_logged_episode_is_replayed(domain: SweAgentic, tmp_path: Path) -> None:
    lines = []
    for difficulty, solve in ((0, True), (1, False), (3, True)):
        prompt = task(difficulty)
        said = [m for m in prompt.demonstration if m.role == "assistant"]
        rollout, _ = play(prompt, said if solve else said[:-1], domain)
        assert rollout.transcript is not None
        lines.append(logged(5, Group(Task(prompt, NO_IDS, 0), (rollout,)), 0, rollout.transcript))
    assert [line["reward"] for line in lines] == [1.0, 0.0, 1.0]
    calls = [t["calls"][0]["name"] for t in lines[0]["turns"] if "calls" in t]
    assert calls == [c.name for m in task(0).demonstration for c in m.tool_calls[:1]]
    assert calls[-1] == "edit"
    assert "def find" in lines[0]["turns"][1]["content"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "step_00000005.jsonl").write_text(text + json.dumps({"domain": "math"}) + "\n")
    found = replay(ReplaySettings(path=str(tmp_path)))
    assert [r.verdict.reward for r in found] == [1.0, 0.0, 1.0]
    assert all(r.same for r in found)
    lines[1]["reward"] = 1.0
    # A truncated rollout's own reward is compared.
    lines[2] |= {"reward": 0.0, "details": {"reward_before_stop_penalty": 1.0}}
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [r.same for r in replay(ReplaySettings(path=str(changed)))] == [True, False, True]
    # A domain without tools may be answered with calls too.
    bug = next(iter(SweAgentless().prompts(seed=1, count=1)))
    assert rollout.transcript is not None
    strange = replace(rollout.transcript, response=(turn(("list", {})),))
    line = logged(5, Group(Task(bug, NO_IDS, 0), (rollout,)), 0, strange)
    assert "turns" not in json.loads(json.dumps(line))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="none of its 0"):
        replay(ReplaySettings(path=str(tmp_path / "empty.jsonl")))


class Faulty(SweAgentic):
    """Tools that break, each in its own way."""

    def __init__(self, fault: str) -> None:
        super().__init__(SANDBOX)
        self.fault = fault

    def session(self, prompt: Prompt) -> Any:
        if self.fault == "open":
            raise ValueError("the snapshot is gone")
        return self

    done = False

    def step(self, calls: Sequence[ToolCall]) -> list[Message]:
        if self.fault == "step":
            raise KeyError("id")
        return [Message("tool", "a lone \ud800 surrogate") for _ in calls]


@pytest.mark.parametrize("fault", ["open", "step"])
def test_tools_that_fail_end_their_episode_and_no_other(fault: str) -> None:
    prompt = task()
    rollout, _ = play(prompt, [turn(("list", {})), turn(("submit", {}))], Faulty(fault))
    assert rollout.turns == 1


def test_no_output_of_a_program_can_stop_the_tokenizer() -> None:
    prompt = task()
    rollout, _ = play(prompt, [turn(("list", {})), turn(("submit", {}))], Faulty("text"))
    assert rollout.turns == 2
    assert rollout.response[1].content == "a lone \\ud800 surrogate"


def test_the_best_and_the_worst_of_a_group_are_logged(domain: SweAgentic) -> None:
    prompt = task()
    rollout, _ = play(prompt, [turn(("list", {}))], domain)
    rewards = (0.5, None, 1.0, 0.0, 0.0)
    rollouts = [
        replace(rollout, verdict=Verdict(r, None if r is not None else "x")) for r in rewards
    ]
    assert extremes(Group(Task(prompt, NO_IDS, 0), tuple(rollouts))) == [2, 3, 1]
    assert extremes(Group(Task(prompt, NO_IDS, 0), tuple(rollouts[3:]))) == [0]
    assert extremes(Group(Task(prompt, NO_IDS, 0), (rollouts[1],))) == [0]


def test_a_replay_has_the_settings_of_its_run(tmp_path: Path) -> None:
    envs = EnvConfig(sandbox=SandboxConfig(time_s=77.0, packages=("/opt/packages",)))
    (tmp_path / "rollouts").mkdir()
    assert settings_of_run(tmp_path / "rollouts").envs == EnvConfig()
    judged = replace(envs, judge=JudgeConfig(kind="artifact", artifact="gone"))
    said = asdict(GrpoRecipe(envs=judged))
    said["envs"]["of_another_version"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(said))
    for path in (tmp_path / "rollouts", tmp_path / "rollouts" / "step_00000001.jsonl"):
        found = settings_of_run(path)
        assert (found.path, found.envs) == (str(path), envs)

"""The journal of rollouts: exact, bound to what decides a rollout, and robust against damage."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.data import sentencepiece_tokenizer

from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig, RolloutConfig
from nemocascade.rl.collector import Collector, Group
from nemocascade.rl.drawing import Drawing, InformativeShare
from nemocascade.rl.journal import Journal, Journals
from nemocascade.rl.rollout_records import read_records, rollout_of
from nemocascade.rl.rollouts import NOT_SCORED, Rollout, TokenSequence, whole_rollout
from nemocascade.rl.tasks import GroupRequest, Task
from nemocascade.rl.work_queue import Queues
from nemocascade.rollout.engine import Completion, Sampling, Work
from nemocascade.runtime.world import World
from nemocascade.types import Message, Prompt, ToolCall, Verdict

COPIES = 3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture(autouse=True)
def shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nemocascade")


class Killed(BaseException):
    """Stands for a kill."""


class Said:
    """An engine that answers request n with tokens that follow from n. generated: what it has
    answered. dies_after: so many answers."""

    is_shared = True

    def __init__(self, dies_after: int = 1000, *, routed: bool = True) -> None:
        self.generated: list[int] = []
        self.dies_after, self.routed = dies_after, routed

    def run(self, work: Work, sampling: Sampling, respond: object) -> Iterator[Completion]:
        is_open = True
        while is_open:
            work.check()
            taken, _, is_open = work.poll(2, 0)
            for number in taken:
                if len(self.generated) == self.dies_after:
                    raise Killed
                self.generated.append(number)
                yield completion_of(work, number, self.routed)


def completion_of(work: Work, number: int, routed: bool) -> Completion:
    request = work.requests[number]
    generator = torch.Generator().manual_seed(number)
    count = len(request.prompt) + 3 + number % 5
    written = torch.arange(count) >= len(request.prompt)
    tokens = torch.randint(3, 90, (count,), generator=generator)
    tokens[: len(request.prompt)] = torch.tensor(request.prompt)
    return Completion(
        request,
        tokens,
        written,
        torch.where(written, -torch.rand(count, generator=generator), 0.0),
        "length" if number % 4 == 0 else "stop",
        routing=torch.randint(9, (count - 1, 3, 2), generator=generator, dtype=torch.uint8)
        if routed
        else None,
    )


@dataclass
class Judge:
    """Rewards by the number of the answer's tokens; `by_group` compares them. It counts its calls,
    fails for the host at `host_fails`, and dies after so many."""

    by_group: bool = False
    dies_after: int = 1000
    host_fails: bool = False
    scored: list[str] = field(default_factory=list)
    collective: bool = False
    domain: str = "d"
    activity: int = 0

    def session(self, prompt: Prompt) -> None:
        return None

    def begin_group(self, prompt: Prompt, written: Mapping[int, object], new: int) -> None:
        pass

    def score(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        if len(self.scored) == self.dies_after:
            raise Killed
        self.scored.append(prompt.id)
        if self.host_fails:
            return Verdict(None, "no sandbox", fault="host")
        return Verdict(size_of(response) % 3 / 2, details={"pairs": 2, "said": ["\ud800", 0.1]})

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        found = []
        for prompt, responses in groups:
            alone = [self.score(prompt, r).reward or 0.0 for r in responses]
            found.append([Verdict(reward - min(alone)) for reward in alone])
        return found


def size_of(response: Sequence[Message]) -> int:
    return sum(len(m.content) + len(m.reasoning) for m in response)


def tasks(count: int = 4, answer: str = "x") -> list[Task]:
    return [
        Task(Prompt(str(n), "d", (), {"answer": answer}), np.array([1, n + 4], np.int32), n)
        for n in range(count)
    ]


def step(
    world: World,
    folder: Path,
    engine: Said,
    judge: Judge,
    *,
    drawing: bool = False,
    wanted: Sequence[Task] = (),
    bound_to: Mapping[str, Any] = {"weights": 1, "rollout.top_k": 0},
    sampling: Sampling | None = None,
    scored: bool = True,
) -> tuple[list[Group], Collector]:
    """The groups of a step that has a journal in `folder`."""
    collector = Collector(
        world,
        cast(Any, engine),
        sentencepiece_tokenizer(),
        {"d": cast(Any, judge)},
        RolloutConfig(thinking=False, rollouts_per_prompt=COPIES),
        seed=1,
        threads=1,
        journals=Journals(folder, world, lambda: bound_to),
    )
    with collector.journalled("step_00000001"):
        requests = collector.requests(wanted or tasks(), COPIES, sampling)
        if drawing:
            found = Drawing(2, len(requests), COPIES, InformativeShare(), 1.0)
            return collector.generate(requests, found), collector
        return collector.roll_out_each(requests, scored=scored), collector


def bits(groups: Sequence[Group]) -> list[Any]:
    """Everything of every rollout."""
    found = []
    for r in (r for group in groups for r in group.rollouts):
        s, t = r.sequence, r.transcript
        assert s is not None
        assert t is not None
        routing = None if s.routing is None else (s.routing.dtype, s.routing.tolist())
        found.append(
            (
                *(s.tokens.tolist(), s.written.tolist(), s.logprob.tolist(), routing),
                *(t.text, t.response, t.verdict, r.verdict, r.error_kind, r.choices),
                *(r.tokens, r.length, r.turns, r.truncated, r.dropped),
            )
        )
    return found


FOLDER = "journal/step_00000001"
FILE = f"{FOLDER}/rank_00000.rollouts"


@pytest.mark.parametrize("drawing", [False, True])
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_a_killed_step_goes_on_where_it_was(
    world: World, tmp_path: Path, by_group: bool, drawing: bool, routed: bool
) -> None:
    """At every rollout and every verdict; nothing that is recorded is made again."""
    whole, _ = step(
        world, tmp_path / "whole", Said(routed=routed), Judge(by_group), drawing=drawing
    )
    # With a drawing, at least two groups are needed.
    for killed in range(1, 2 * COPIES if drawing else 4 * COPIES):
        for dies in ("engine", "judge"):
            folder = tmp_path / f"{dies}_{killed}"
            first = Said(killed if dies == "engine" else 1000, routed=routed)
            judge = Judge(by_group, killed if dies == "judge" else 1000)
            with pytest.raises(Killed):
                step(world, folder, first, judge, drawing=drawing)
            kept = recorded(folder)
            again, after = Said(routed=routed), Judge(by_group)
            groups, collector = step(world, folder, again, after, drawing=drawing)
            assert bits(groups) == bits(whole)
            assert collector.restored == len(kept["rollout"])
            assert not kept["rollout"].intersection(again.generated)
            if not (drawing or by_group):
                assert len(after.scored) == 4 * COPIES - len(kept["verdict"])


def recorded(folder: Path) -> dict[str, set[int]]:
    """Ids of the records of each kind."""
    found: dict[str, set[int]] = {"rollout": set(), "verdict": set()}
    for path in (folder / FOLDER).glob("*.rollouts"):
        for record in read_records(path):
            found[record.head["kind"]].add(record.head["id"])
    return found


def test_a_finished_step_is_restored_whole(world: World, tmp_path: Path) -> None:
    """Without an answer or a verdict; also where the verdicts are not wanted, and the other way."""
    whole, _ = step(world, tmp_path, Said(), Judge())
    groups, _ = step(world, tmp_path, engine := Said(), judge := Judge())
    assert (engine.generated, judge.scored) == ([], [])
    assert bits(groups) == bits(whole)
    groups, _ = step(world, tmp_path, engine, judge, scored=False)
    assert not any(r.is_scored for g in groups for r in g.rollouts)
    unscored, _ = step(world, tmp_path / "unscored", Said(), judge, scored=False)
    assert not judge.scored
    groups, _ = step(world, tmp_path / "unscored", engine, judge)
    assert bits(groups) == bits(whole)
    assert (engine.generated, len(judge.scored)) == ([], 4 * COPIES)
    assert bits(unscored) != bits(whole)


def test_what_the_host_failed_at_is_tried_again(world: World, tmp_path: Path) -> None:
    step(world, tmp_path, Said(), Judge(host_fails=True))
    groups, _ = step(world, tmp_path, engine := Said(), judge := Judge())
    assert (engine.generated, len(judge.scored)) == ([], 4 * COPIES)
    assert all(r.verdict.reward is not None for g in groups for r in g.rollouts)


@pytest.mark.parametrize(
    ("changes", "restored", "said"),
    [
        ({"bound_to": {"weights": 2, "rollout.top_k": 0}}, 0, "is of other weights: its rollouts"),
        ({"bound_to": {"weights": 1}}, 0, "is of other rollout.top_k: its rollouts are dropped"),
        ({"wanted": tasks(answer="y")}, 0, "24 records are of other prompts or sampling"),
        ({"sampling": Sampling(seed=2)}, 0, "24 records are of other prompts or sampling"),
        ({"wanted": tasks(2)}, 6, "6 of 6 rollouts restored"),
    ],
)
def test_a_journal_of_something_else_is_not_used(
    world: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    restored: int,
    said: str,
) -> None:
    step(world, tmp_path, Said(), Judge())
    caplog.clear()
    _, collector = step(world, tmp_path, engine := Said(), Judge(), **changes)
    assert collector.restored == restored
    assert len(engine.generated) == (0 if restored else 4 * COPIES)
    assert said in caplog.text


def test_a_record_that_is_cut_anywhere_costs_only_itself(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = step(world, tmp_path, Said(), Judge())
    path = tmp_path / FILE
    data, records = path.read_bytes(), list(read_records(path))
    last = [record for record in records if record.head["kind"] == "rollout"][-1]
    for end in (*range(last.start + 1, last.start + 25), last.end - 1):
        path.write_bytes(data[:end])
        caplog.clear()
        groups, collector = step(world, tmp_path, engine := Said(), Judge())
        assert bits(groups) == bits(whole)
        assert collector.restored == 4 * COPIES - 1 == 12 - len(engine.generated)
        assert "its last record is cut short; what follows is dropped" in caplog.text
        # The tail was cut off, so what was appended can be read.
        assert len(list(read_records(path))) == 8 * COPIES


@pytest.mark.parametrize("place", [0, 5, 17, 60, -1])
def test_a_flipped_bit_ends_the_reading_of_its_file(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    whole, _ = step(world, tmp_path, Said(), Judge())
    path = tmp_path / FILE
    fourth = list(read_records(path))[4]
    data = bytearray(path.read_bytes())
    data[fourth.end - 1 if place < 0 else fourth.start + place] ^= 4
    path.write_bytes(data)
    groups, collector = step(world, tmp_path, Said(), Judge())
    assert bits(groups) == bits(whole)
    assert 1 <= collector.restored <= 4
    assert f"{FILE}: " in caplog.text
    assert "what follows is dropped" in caplog.text


def test_no_prompts_are_prefilled_together_where_a_journal_is_kept(world: World) -> None:
    """A later start would find others beside them."""
    requests = [GroupRequest(task, range(n, n + 1), Sampling()) for n, task in enumerate(tasks())]
    queues = Queues(world)
    assert queues.open(requests).is_ordered
    assert not queues.open(requests, is_journalled=True).is_ordered


def test_a_full_disk_switches_the_journal_off(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = step(world, tmp_path / "other", Said(), Judge())
    (tmp_path / FOLDER).mkdir(parents=True)
    journals = Journals(tmp_path, world, dict)
    requests = [GroupRequest(task, range(n, n + 1), Sampling()) for n, task in enumerate(tasks())]
    with journals.opened("step_00000001") as journal:
        assert journal is not None
        (tmp_path / FILE).symlink_to("/dev/full")
        journal.kept(requests, lambda r: None)
        for number in range(3):
            journal.add(number, whole[0].rollouts[number])
    assert "No space left on device: the journal of rollouts is off" in caplog.text
    assert FILE in caplog.text
    with journals.opened("step_00000002") as nothing:
        assert nothing is None


def ranks_of(size: int, folder: Path, files: Sequence[int]) -> list[Journal]:
    """The journals of `size` ranks, whose collectives add and gather nothing."""
    return [
        Journal(
            folder,
            cast(
                World,
                SimpleNamespace(
                    rank=rank,
                    size=size,
                    watch=SimpleNamespace(meet=lambda: None),
                    sum_over_ranks=lambda table: table,
                    all_gather_object=lambda value: [value],
                ),
            ),
            files,
            "",
        )
        for rank in range(size)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_another_number_of_ranks_reads_each_file_once(
    world: World, tmp_path: Path, size: int
) -> None:
    whole, _ = step(world, tmp_path / "other", Said(), Judge())
    requests = [
        GroupRequest(task, range(n * COPIES, (n + 1) * COPIES), Sampling())
        for n, task in enumerate(tasks())
    ]
    rollouts = [r for group in whole for r in group.rollouts]
    writers = ranks_of(5, tmp_path, [])
    for number, rollout in enumerate(rollouts):
        writer = writers[number % 5]
        writer.kept(requests, lambda r: None)
        writer.add(number, rollout)
        # A group's verdicts may be given by another rank.
        writers[4].kept(requests, lambda r: None)
        writers[4].add_verdict(number, rollout)
    for writer in writers:
        writer.close()
    readers = ranks_of(size, tmp_path, range(5))
    found: list[int] = []
    for reader in readers:
        kept = reader.kept(requests, lambda r: r.verdict.reward)
        found += kept.rollouts
        for number, place in kept.rollouts.items():
            assert reader.owner(place) == reader.world.rank
            loaded = reader.load(place, None, "d")
            assert loaded.sequence is not None
            assert torch.equal(loaded.sequence.tokens, sequence_of(rollouts[number]).tokens)
    assert sorted(found) == list(range(12))


def sequence_of(rollout: Rollout) -> TokenSequence:
    assert rollout.sequence is not None
    return rollout.sequence


def test_records_are_exact(world: World, tmp_path: Path) -> None:
    """Half of a surrogate pair, the order of a call's arguments, and every float."""
    messages = (
        Message("assistant", "a\ud83d\x00\u2028", "think", (ToolCall("f", {"b": "2", "a": "1"}),)),
        Message("tool", "é"),
        Message("assistant", "", trained=False),
    )
    count = 40
    sequence = TokenSequence(
        torch.randint(0, 2**31 - 1, (count,)),
        torch.rand(count) > 0.5,
        torch.randn(count) * 1e-30,
        torch.randint(0, 500, (count - 1, 4, 3), dtype=torch.int16),
    )
    rollout = whole_rollout(
        sequence, NOT_SCORED, domain="", text="a\ud83d", response=messages, turns=2, truncated=True
    )
    journal = ranks_of(1, tmp_path, [])[0]
    journal.kept([GroupRequest(tasks()[0], range(1), Sampling())], lambda r: None)
    journal.add(0, rollout)
    journal.close()
    (record,) = read_records(tmp_path / "rank_00000.rollouts")
    found = rollout_of(record)
    assert found.transcript is not None
    assert found.transcript.response == messages
    assert list(found.response[0].tool_calls[0].arguments) == ["b", "a"]
    assert replace(found, sequence=None, transcript=None).__dict__ == (
        replace(rollout, sequence=None, transcript=None).__dict__
    )
    for name in ("tokens", "written", "logprob", "routing"):
        mine, other = getattr(sequence_of(found), name), getattr(sequence, name)
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)

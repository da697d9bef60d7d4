"""Rollouts stay on the rank that verified them, and go once to the ranks that train them.

512 synthetic rollouts on four ranks, and 2,048 in the slow tests: batches, rewards and logged texts
are those of one process, and what a rank receives is little more than what it trains.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {"DP4": {}, "TP2 DP2": {"tp": 2}}
PROMPTS, COPIES = 32, 16
MEAN_TOKENS, MOST_TOKENS = 600, 4_000
CAPACITY = 4_096
OUTCOME_BYTES = 512
"""Largest number of bytes that a rank receives of a rollout that it does not train."""
CASES = ("plain", "routed", "compared")


class Received:
    """Counts the bytes that this rank receives by torch's collectives."""

    def __init__(self, monkeypatch: Any) -> None:
        import torch.distributed as dist

        self.bytes = 0
        self._real = {n: getattr(dist, n) for n in ("all_reduce", "irecv", "all_gather_object")}
        for name in self._real:
            monkeypatch.setattr(dist, name, getattr(self, name))
        for name in ("all_gather", "all_gather_into_tensor", "broadcast", "all_to_all_single"):
            monkeypatch.setattr(dist, name, self.unknown)

    def all_reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist

        # A ring sends each part around twice, to sum it and to share the sum.
        ranks = dist.get_world_size(kwargs.get("group"))
        self.bytes += 2 * (ranks - 1) * tensor.numel() * tensor.element_size() // ranks
        return self._real["all_reduce"](tensor, *args, **kwargs)

    def irecv(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        self.bytes += tensor.numel() * tensor.element_size()
        return self._real["irecv"](tensor, *args, **kwargs)

    def all_gather_object(self, values: list[Any], value: Any, *args: Any) -> None:
        self._real["all_gather_object"](values, value, *args)
        self.bytes += sum(len(pickle.dumps(v)) for v in values) - len(pickle.dumps(value))

    def unknown(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective whose bytes are not counted")


class SyntheticEngine:
    """Texts that depend on the request alone. routed: with the experts of each token."""

    is_shared = True

    def __init__(self, world: Any, vocabulary: int, *, routed: bool) -> None:
        self.world, self.vocabulary, self.routed = world, vocabulary, routed

    def _taken(self, work: Any) -> Iterator[Any]:
        from nemocascade.rollout.engine import as_work
        from nemocascade.rollout.intake import Intake

        intake = Intake(self.world, as_work(work))
        while intake.is_open:
            found, _ = intake.poll(8, 0, idle=True, finished=intake.taken)
            yield from found

    def run(self, requests: Any, sampling: Any, respond: Any) -> Iterator[Any]:
        import torch

        from nemocascade.rollout.engine import Completion

        for request in self._taken(requests):
            generator = torch.Generator().manual_seed(request.id)
            scale = float(torch.randn((), generator=generator).mul(0.7).exp())
            count = len(request.prompt) + min(MOST_TOKENS, 1 + int(MEAN_TOKENS * scale))
            tokens = torch.randint(self.vocabulary, (count,), generator=generator)
            tokens[: len(request.prompt)] = torch.tensor(request.prompt)
            written = torch.arange(count) >= len(request.prompt)
            routing = torch.randint(100, (count - 1, 3, 2), generator=generator, dtype=torch.uint8)
            yield Completion(
                request,
                tokens,
                written,
                torch.where(written, -torch.rand(count, generator=generator), 0.0),
                "length" if request.id % 7 == 0 else "abort" if request.id % 97 == 1 else "stop",
                routing=routing if self.routed else None,
            )


class Lengths:
    """Rewards by the length of the text; some verifiers fail. compared: a judge on all ranks gives
    them, to whole groups."""

    domain, by_group, activity = "math", False, 0

    def __init__(self, *, compared: bool) -> None:
        self.collective = self.by_group = compared
        self.calls = self.scored = 0

    def score(self, prompt: Any, response: Any) -> Any:
        from nemocascade.types import Verdict

        self.scored += 1
        size = len(response[0].content) + len(response[0].reasoning)
        if size % 11 == 0:
            return Verdict(None, f"killed after {size} s", {"pairs": 3}, "host")
        return Verdict(size % 5 / 4, details={"pairs": 3, "unanswered": size % 2, "said": "x" * 99})

    def score_groups(self, groups: Any) -> Any:
        self.calls += 1
        return [[self.score(prompt, r) for r in responses] for prompt, responses in groups]


def train(
    parallel: dict[str, Any], case: str, prompts: int, sizes: Sequence[int] = ()
) -> dict[str, Any]:
    """Outcomes, batches by data-parallel rank, logged texts, and received bytes of this rank.

    prompts: number of them, each with `COPIES` rollouts. sizes: data-parallel sizes whose batches
    one process makes, of all ranks.
    """
    import numpy as np
    import pytest
    from helpers.data import sentencepiece_tokenizer

    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, GrpoRecipe, ParallelConfig, RolloutConfig
    from nemocascade.rl.collector import Collector, advantages_of
    from nemocascade.rl.exchange import send_sequences, send_transcripts
    from nemocascade.rl.policy import layout_of, my_batches, packed_bins, training_sequences
    from nemocascade.rl.tasks import Task
    from nemocascade.types import Prompt

    world = start_world(ParallelConfig(**parallel), EngineConfig(precision="fp32"))
    tokenizer = sentencepiece_tokenizer()
    rollout = RolloutConfig(overlong_filter=True, thinking=False)
    judge = Lengths(compared=case == "compared")
    engine: Any = SyntheticEngine(world, tokenizer.vocab_size, routed=case == "routed")
    collector = Collector(world, engine, tokenizer, {"math": judge}, rollout, seed=1, threads=2)  # type: ignore[dict-item]
    tasks = [
        Task(Prompt(str(n), "math", (), {}, source=f"rows:{n}"), np.arange(9, dtype=np.int32), n)
        for n in range(prompts)
    ]
    run: Any = SimpleNamespace(
        world=world, tokenizer=tokenizer, recipe=SimpleNamespace(capacity=CAPACITY)
    )
    with pytest.MonkeyPatch.context() as patch:
        received = Received(patch)
        groups = collector.roll_out(tasks, COPIES)
        planned = training_sequences(
            advantages_of(groups, rollout, GrpoRecipe().grpo), GrpoRecipe(rollout=rollout)
        )
        batches = [] if sizes else my_batches(run, planned)
        got = received.bytes
    rollouts = [r for group in groups for r in group.rollouts]
    chosen = [r for r in rollouts if r.error_kind][:9]
    texts = send_transcripts(world, chosen, [[0]] * len(chosen))
    made = {f"{world.dp_rank} of {world.dp_size}": [digest(b) for b in batches]}
    for ranks in sizes:
        fake = SimpleNamespace(
            world=SimpleNamespace(dp_size=ranks, parallel=world.parallel), recipe=run.recipe
        )
        layout = layout_of(fake, planned, CAPACITY)  # type: ignore[arg-type]
        whole = send_sequences(world, planned, [[[b for bins in layout for b in bins]]])
        made |= {
            f"{n} of {ranks}": [digest(b) for b in packed_bins(run, whole, bins, CAPACITY)]
            for n, bins in enumerate(layout)
        }
    share = sum(b.num_tokens for b in batches) * (9 + (6 if case == "routed" else 0))
    world.close()
    return {
        "outcomes": digest([seen(r) for r in rollouts]),
        "batches": made,
        "texts": [[t.text, repr(t.verdict)] for t in texts.values()],
        "errors": sum(r.verdict.reward is None for r in rollouts),
        "received": got,
        "share": share,
        "calls": judge.calls,
        "scored": judge.scored,
    }


def seen(rollout: Any) -> tuple[Any, ...]:
    """Everything that a rank knows of a rollout wherever it is; the owner differs by layout."""
    v = rollout.verdict
    numbers: Mapping[str, Any] = v.details
    return (
        *(rollout.tokens, rollout.length, rollout.turns, rollout.truncated, rollout.dropped),
        *(rollout.error_kind, rollout.choices, v.reward, v.error, v.fault, sorted(numbers.items())),
    )


def digest(value: Any) -> str:
    """A hash of the bits of a batch, or of anything that prints whole."""
    from dataclasses import fields

    import torch

    from nemocascade.types import PackedBatch

    found = hashlib.sha256()
    parts = [value]
    if isinstance(value, PackedBatch):
        parts = [getattr(value, f.name) for f in fields(value)]
    for part in parts:
        for item in part if isinstance(part, tuple) else (part,):
            data = item.numpy().tobytes() if isinstance(item, torch.Tensor) else repr(item).encode()
            found.update(data)
    return found.hexdigest()


def alone(prompts: int = PROMPTS) -> dict[str, Any]:
    """Every case on one process."""
    return {case: train({}, case, prompts, (2, 4)) for case in CASES}


def encode_a_share() -> dict[str, Any]:
    """Encoded prompts of a job, and how many of them this rank has encoded."""
    import pytest
    from helpers.data import sentencepiece_tokenizer

    from nemocascade.data.tokenizer import Tokenizer
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, ParallelConfig, RolloutConfig
    from nemocascade.rl.prompts import encode_prompts
    from nemocascade.types import Message, Prompt

    calls = []

    prompt_ids = Tokenizer.prompt_ids

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return prompt_ids(*arguments, **options)

    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    prompts = [
        Prompt(str(n), "math", (Message("user", "say " * (n % 60)),), {}, source=f"rows:{n}")
        for n in range(101)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "prompt_ids", counted)
        found = encode_prompts(
            prompts, sentencepiece_tokenizer(), RolloutConfig(max_prompt_tokens=80), world
        )
    world.close()
    return {"ids": [[p.id, ids.tolist()] for p, ids in found], "encoded": len(calls)}


def together(parallel: dict[str, Any], prompts: int = PROMPTS) -> dict[str, Any]:
    return {case: train(parallel, case, prompts) for case in CASES}


@pytest.fixture(scope="module", params=[PROMPTS, pytest.param(128, marks=pytest.mark.slow)])
def one(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """Number of prompts, and the cases of one process."""
    (found,) = run_ranks(alone, 1, {"prompts": request.param}, timeout_s=300)
    assert isinstance(found, dict)
    return request.param, found


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_have_the_rollouts_of_one_process_and_receive_little(
    name: str, one: tuple[int, dict[str, Any]]
) -> None:
    prompts, cases = one
    arguments = {"parallel": LAYOUTS[name], "prompts": prompts}
    ranks = run_ranks(together, 4, arguments, timeout_s=300)
    decided = prompts * COPIES * OUTCOME_BYTES
    for case in CASES:
        expected = cases[case]
        assert expected["errors"] > prompts * COPIES // 20
        assert len(expected["texts"]) == 9
        for number, found in enumerate(ranks):
            mine = found[case]
            assert mine["outcomes"] == expected["outcomes"], (case, number)
            for replica, batches in mine["batches"].items():
                assert batches == expected["batches"][replica]
                assert len(batches) > 10
            assert mine["texts"] == (expected["texts"] if number == 0 else [])
            assert mine["calls"] == (1 if case == "compared" else 0)
            if case != "compared":
                assert mine["scored"] > 0, "every rank verifies a share"
            # A judge's rank receives the texts of its groups as well.
            most = 1.2 * mine["share"] + decided * (2 if case == "compared" else 1)
            assert mine["share"] > 2 * decided
            assert mine["received"] <= most, (case, number, mine["received"], mine["share"])


def test_each_prompt_is_encoded_on_one_rank() -> None:
    (whole,) = run_ranks(encode_a_share, 1)
    shares = run_ranks(encode_a_share, 3)
    assert 50 < len(whole["ids"]) < 101, "some prompts are too long"
    assert [share["ids"] for share in shares] == [whole["ids"]] * 3
    assert [share["encoded"] for share in shares] == [33, 34, 34]

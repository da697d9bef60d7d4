"""Copies between host and device in a rollout: one read a step, one transfer a prefill.

`Remote` stands for a tensor on a GPU: it counts the reads of its values by the generation code.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from helpers.rollout import ODD, draw_tokens, make_model
from torch import Tensor

from nemocascade.megatron.generation import cached_layers, model_runner
from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.replay import RouteRecorder
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig
from nemocascade.rollout import live, slots
from nemocascade.rollout.engine import Completion, Request, Respond, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.world import World

READS = ("cpu", "numpy", "item", "tolist", "__bool__", "__int__", "__float__", "__index__")
FOLDERS = ("/nemocascade/rollout/", "/nemocascade/megatron/generation/")


class Remote(Tensor):
    """A tensor whose reads are counted, by the file of the innermost caller in `FOLDERS`."""

    reads: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func.__name__ not in READS:
            return out
        frame = sys._getframe(1)
        while "/nemocascade" not in frame.f_code.co_filename and frame.f_back is not None:
            frame = frame.f_back
        file = frame.f_code.co_filename
        if any(folder in file for folder in FOLDERS):
            cls.reads[file.rsplit("/", 1)[1]] += 1
        return out.as_subclass(Tensor) if isinstance(out, Tensor) else out


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def chunks(world: World) -> list[CascadeModel]:
    return make_model(world, ODD)


class RemoteRunner(ModelRunner):
    """A runner whose results are on the device. Operators lose the class of their arguments."""

    draws: ClassVar[int] = 0
    restores: ClassVar[int] = 0

    def restore(self, *args: Any, **kwargs: Any) -> None:
        RemoteRunner.restores += 1
        super().restore(*args, **kwargs)

    def draw(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        RemoteRunner.draws += 1
        tokens, logprob = super().draw(*args, **kwargs)
        return tokens.as_subclass(Remote), logprob.as_subclass(Remote)

    def _record_choices(self, recorder: RouteRecorder | None) -> None:
        super()._record_choices(recorder)
        if self.choices is not None:
            self.choices = self.choices.as_subclass(Remote)


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Make the tensors of the device `Remote`; the number of transfers by module."""
    found: Counter[str] = Counter()
    Remote.reads.clear()
    monkeypatch.setattr(RemoteRunner, "draws", 0)
    monkeypatch.setattr(RemoteRunner, "restores", 0)
    monkeypatch.setattr(live, "ModelRunner", RemoteRunner)
    for module in (model_runner, slots, cached_layers):

        def to_device(
            tensors: Sequence[Tensor], device: torch.device, name: str = module.__name__
        ) -> list[Tensor]:
            found[name.rsplit(".", 1)[1]] += 1
            return [t.clone().as_subclass(Remote) for t in tensors]

        monkeypatch.setattr(module, "to_device", to_device)
    return found


STOPS = Sampling(
    max_tokens=14,
    seed=3,
    stop_tokens=(*((t,) for t in range(0, ODD.vocab_size, 9)), (5, 7)),
    stop_strings=("<1", "7><8"),
)
REQUESTS = [
    Request(p, tuple(draw_tokens(ODD.vocab_size, 3 + 17 * (p // 2), seed=p // 2).tolist()))
    for p in range(8)
]


def decode(ids: Sequence[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


def answers(c: Completion) -> list[int] | None:
    return None if c.turns == 3 else [5] * (2 + 9 * c.turns)


@pytest.mark.parametrize("respond", [None, answers])
def test_a_step_reads_once(
    world: World, chunks: list[CascadeModel], transfers: Counter[str], respond: Respond | None
) -> None:
    """With stop strings and recorded experts, and for texts that end."""
    engine = LiveEngine(
        world, chunks, slots=4, decode=decode, record_routing=True, prefill_chunk=16
    )
    found = list(engine.run(REQUESTS, STOPS, respond))
    assert len({len(c.tokens) for c in found}) > 2
    counts = engine.counts
    # A prefill pass reads its experts, and its logits are drawn from once; so is a stored prompt.
    starts = RemoteRunner.draws - counts.steps
    assert counts.prefills <= starts <= sum(c.turns for c in found)
    assert Remote.reads == {
        "generation.py": RemoteRunner.draws,
        "prefill_queue.py": counts.prefill_chunks,
    }
    copies = starts - counts.prefills  # of a stored state to other slots
    # A text that waits for its answer may give up its slot, and return to one if it goes on.
    assert RemoteRunner.restores <= counts.offloads
    moves = counts.offloads + RemoteRunner.restores
    assert transfers["model_runner"] == counts.prefill_chunks + copies + moves
    # One for each start, and one for each batch whose sequences have changed.
    assert transfers["slots"] <= starts + sum(c.turns for c in found)


def test_a_batch_is_sent_only_after_it_has_changed(
    world: World, chunks: list[CascadeModel], transfers: Counter[str]
) -> None:
    engine = LiveEngine(world, chunks, slots=8, prefill_tokens=1000)
    list(engine.run(REQUESTS, Sampling(max_tokens=14)))
    assert engine.counts.steps == 13
    # The rows of the prefill, and the batch.
    assert transfers == {"model_runner": 1, "slots": 2}


def test_remote_tensors_change_nothing(
    world: World, chunks: list[CascadeModel], request: pytest.FixtureRequest
) -> None:
    def texts() -> dict[int, tuple[list[int], list[float]]]:
        engine = LiveEngine(world, chunks, slots=3, decode=decode)
        found = engine.run(REQUESTS, STOPS, answers)
        return {c.request.id: (c.tokens.tolist(), c.logprob.tolist()) for c in found}

    expected = texts()
    request.getfixturevalue("transfers")
    assert texts() == expected

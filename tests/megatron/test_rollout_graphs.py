"""The buffers of captured decode steps: sizes, padding, and recapture.

A capture on a CPU replaces a CUDA graph: its replay computes only from the static inputs into the
static output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.rollout import ODD, draw_tokens, make_model
from torch import Tensor

from nemocascade.megatron.generation.decode_graph import LEAST_LENGTH, DecodeGraphs
from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig
from nemocascade.runtime.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


class Captures:
    """Counts captures; replays by calling again."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.count += 1
        result = call().clone()

        def replay() -> None:
            result.copy_(call())

        return replay, result


def test_captured_steps_equal_plain_ones(world: World) -> None:
    """Whatever number of rows, with other slots untouched."""
    chunks = make_model(world, ODD)
    plain, captured = (ModelRunner(world, chunks, slots=6) for _ in range(2))
    prompts = [draw_tokens(ODD.vocab_size, 4 + 3 * i, seed=i) for i in range(6)]
    captures = Captures()
    captured._graphs = DecodeGraphs(
        captured._captured_step, most_rows=6, spare=6, device=world.device, capture=captures
    )
    for model in (plain, captured):
        model.refresh()
        model.prefill(prompts, [[i] for i in range(6)])
    held = [p.numel() for p in prompts]
    for rows in ([3], [0, 5], [4, 1, 2], [2, 3, 0, 1, 5], [5, 4, 3, 2, 1, 0], [1]):
        slots = torch.tensor(rows)
        positions = torch.tensor([held[r] for r in rows])
        tokens = torch.tensor([7 * r + 1 for r in rows])
        found = [m.decode(tokens, slots, positions, max(held) + 1) for m in (plain, captured)]
        assert found[0] is not None
        assert found[1] is not None
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        for r in rows:
            held[r] += 1
    # 1, 2, 4 and 6 rows: eight do not fit.
    assert captures.count == 4


def test_sizes() -> None:
    """A graph serves every size up to its own; it is captured again when a state has moved."""
    seen: list[tuple[int, int]] = []

    def call(tokens: Tensor, slots: Tensor, positions: Tensor, longest: int) -> Tensor:
        seen.append((tokens.numel(), longest))
        return torch.stack([tokens, slots, positions], 1).float()

    captures = Captures()
    graphs = DecodeGraphs(
        call, most_rows=48, spare=99, device=torch.device("cpu"), capture=captures
    )
    for rows, longest, expected in (
        (1, 1, (1, LEAST_LENGTH)),
        (3, LEAST_LENGTH, (4, LEAST_LENGTH)),
        (4, LEAST_LENGTH + 1, (4, 2 * LEAST_LENGTH)),
        (33, 5 * LEAST_LENGTH, (48, 8 * LEAST_LENGTH)),
    ):
        values = [torch.arange(rows) + k for k in (10, 20, 30)]
        out = graphs.step(values[0], values[1], values[2], longest)
        assert seen[-1] == expected
        assert torch.equal(out, torch.stack(values, 1).float())
    before = captures.count
    graphs.step(torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]), 9)
    assert captures.count == before
    graphs.clear()
    graphs.step(torch.tensor([5]), torch.tensor([1]), torch.tensor([0]), 9)
    assert captures.count == before + 1

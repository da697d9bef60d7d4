"""Captured decode steps: sizes, padding, memory pools, and recapture, on stand-ins for CUDA's."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from helpers.cuda_graphs import Cuda, install
from helpers.rollout import ODD, draw_tokens, make_model, make_runner
from torch import Tensor

from nemocascade.megatron.generation.decode_graph import LEAST_LENGTH, DecodeGraphs
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig
from nemocascade.runtime.world import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return install(monkeypatch.setattr)


def test_captured_steps_equal_plain_ones(world: World, cuda: Cuda) -> None:
    """For any number of rows, with other slots untouched."""
    chunks = make_model(world, ODD)
    plain, captured = (make_runner(world, chunks, slots=6) for _ in range(2))
    prompts = [draw_tokens(ODD.vocab_size, 4 + 3 * i, seed=i) for i in range(6)]
    captured._graphs = DecodeGraphs(
        captured._captured_step, most_rows=6, spare=6, device=world.device
    )
    for model in (plain, captured):
        model.refresh()
        model.prefill(prompts, [[i] for i in range(6)])
    held = [p.numel() for p in prompts]
    for rows in (
        *([3], [0, 5], [4, 1, 2], [2, 3, 0, 1, 5], [5, 4, 3, 2, 1, 0], [1]),
        # Padding after a step without it.
        *([1, 2, 3, 4, 5], [0]),
    ):
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
    assert len(cuda.captured) == 4


def make_graphs(cuda: Cuda, most_rows: int) -> tuple[DecodeGraphs, list[tuple[int, int]]]:
    """Graphs of a step that returns its inputs; and the sizes of its calls."""
    seen: list[tuple[int, int]] = []

    def call(tokens: Tensor, slots: Tensor, positions: Tensor, longest: int) -> Tensor:
        seen.append((tokens.numel(), longest))
        cuda.rows = tokens.numel()
        return torch.stack([tokens, slots, positions], 1).float()

    return DecodeGraphs(call, most_rows=most_rows, spare=99, device=CPU), seen


def step(graphs: DecodeGraphs, rows: int, longest: int, largest: int = 0) -> Tensor:
    """Replay a step, and check its logits."""
    values = [torch.arange(rows) + k for k in (10, 20, 30)]
    out = graphs.step(values[0], values[1], values[2], longest, largest)[:rows]
    assert torch.equal(out, torch.stack(values, 1).float())
    return out


def test_sizes(cuda: Cuda) -> None:
    """A graph serves every size up to its own; it is captured again when a state has moved."""
    graphs, seen = make_graphs(cuda, 48)
    for rows, longest, expected in (
        (1, 1, (1, LEAST_LENGTH)),
        (3, LEAST_LENGTH, (4, LEAST_LENGTH)),
        (4, LEAST_LENGTH + 1, (4, 2 * LEAST_LENGTH)),
        (33, 5 * LEAST_LENGTH, (48, 8 * LEAST_LENGTH)),
    ):
        step(graphs, rows, longest)
        assert seen[-1] == expected
    before = len(cuda.captured)
    step(graphs, 3, 9)
    assert len(cuda.captured) == before
    graphs.clear()
    step(graphs, 1, 9)
    assert len(cuda.captured) == before + 2


def test_graphs_share_a_pool_and_their_buffers(cuda: Cuda) -> None:
    """The largest size comes first, so that the others fit into its memory."""
    graphs, _ = make_graphs(cuda, 48)
    out = [step(graphs, rows, 9, largest=20) for rows in (3, 16, 1, 32, 3)]
    assert [rows for _, rows in cuda.captured] == [32, 4, 16, 1]
    # A larger length, and a size that the run did not announce.
    out += [step(graphs, rows, 600, largest=20) for rows in (1, 40)]
    assert [rows for _, rows in cuda.captured[4:]] == [32, 1, 48]
    assert {pool for pool, _ in cuda.captured} == {cuda.captured[0][0]}
    assert {t.data_ptr() for t in out} == {out[0].data_ptr()}
    memory = cuda.memory[cuda.captured[0][0]]
    assert out[0].untyped_storage().data_ptr() not in {
        t.untyped_storage().data_ptr() for t in memory
    }


def test_cleared_graphs_leave_their_pool(cuda: Cuda) -> None:
    graphs, _ = make_graphs(cuda, 4)
    step(graphs, 4, 9)
    first = cuda.captured[0][0]
    graphs.clear()
    gc.collect()
    assert not cuda.graphs[first]
    step(graphs, 4, 9)
    assert cuda.captured[1][0] != first


def test_a_capture_changes_the_spare_slot_only(cuda: Cuda) -> None:
    """Warm-up steps run on real states."""
    touched: set[int] = set()

    def call(tokens: Tensor, slots: Tensor, positions: Tensor, longest: int) -> Tensor:
        touched.update(slots.tolist())
        return tokens[:, None].float()

    graphs = DecodeGraphs(call, most_rows=4, spare=9, device=CPU)
    for rows in (4, 2, 1):
        graphs.step(torch.ones(rows).long(), torch.arange(rows), torch.zeros(rows).long(), 1)
    assert touched == {9}


def test_a_run_drops_its_graphs_at_its_end(world: World, cuda: Cuda) -> None:
    model = make_runner(world, make_model(world, ODD), slots=2)
    model.refresh()
    model._graphs = DecodeGraphs(model._captured_step, most_rows=2, spare=2, device=CPU)
    row = torch.tensor([0])

    def run() -> None:
        with model.graphs():
            model.decode(row, row, row, 1)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    gc.collect()
    assert cuda.captured
    assert not any(cuda.graphs.values())

"""Rows of experts on two "nodes" of two ranks: one hop and two give the same bits, and two send a
row over the network once for each node."""

from __future__ import annotations

import hashlib
import os
from typing import Any, cast

import pytest
from helpers.ranks import RankError, run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "EP4": {"ep": 4},
    "EP2 ETP2": {"ep": 2, "etp": 2},
    "TP2 EP4": {"tp": 2, "ep": 4},
}
EXCHANGES = ("direct", "hierarchical")
PASSES = ("kept", "recomputed")


def step_each() -> dict[str, Any]:
    """Loss, gradients and rows sent between the nodes of one MoE layer, by layout and exchange."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found: dict[str, Any] = {}
    for name, parallel in LAYOUTS.items():
        found[name] = {}
        for exchange in EXCHANGES:
            runs = {r: _step(parallel, exchange, recompute=r == "recomputed") for r in PASSES}
            for run in runs.values():
                gradients = run.pop("gradients")
                run["norm"] = gradients.norm().item()
                run["digest"] = hashlib.sha256(gradients.numpy().tobytes()).hexdigest()
            found[name][exchange] = runs
    return found


def _step(parallel: dict[str, Any], exchange: str, *, recompute: bool = False) -> dict[str, Any]:
    import torch
    from helpers.equivalence import random_batches
    from nemocascade_kernels import Nll

    from nemocascade.megatron.microbatch import Microbatch

    world, model = _model(parallel, exchange, recompute)
    packed = Microbatch.from_batch(random_batches(4, 512)[world.dp_rank], world.device)
    assert packed.batch is not None
    chosen: list[Any] = []
    model.decoder.layers[0].mixer.experts.register_forward_pre_hook(
        lambda _module, inputs: chosen.append(inputs[1].experts)
    )
    with _Network(world.rank, model.config.hidden_size) as forward:
        loss = model(packed, Nll(packed.batch.token_weight)).loss
    with _Network(world.rank, model.config.hidden_size) as backward:
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "loss": loss.item(),
        "gradients": torch.cat([g.flatten() for g in gradients]),
        "forward": forward.rows,
        "backward": backward.rows,
        "expected": _expected(chosen[0], world, model.config.shape.num_experts),
    }


def _model(parallel: dict[str, Any], exchange: Any, recompute: bool) -> tuple[Any, Any]:
    from dataclasses import replace

    from nemocascade.megatron.config import Accelerators, make_config
    from nemocascade.megatron.model import build_model
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, MoeTrainingConfig, ParallelConfig, tiny

    engine = EngineConfig(precision="fp32", expert_exchange=exchange, recompute=recompute)
    world = start_world(ParallelConfig(**parallel), engine)
    shape = replace(tiny(), pattern="E", vocab_size=512, hidden_size=64)
    moe = MoeTrainingConfig(load_balance_coef=1e-2)
    config = make_config(shape, world.parallel, engine, moe, seed=3)
    [model] = build_model(world, config, Accelerators())
    return world, model.train()


def _expected(experts: Any, world: Any, count: int) -> dict[str, int]:
    """Rows to the other node: one for each slot and rank of its expert, or one for each token."""
    etp, node = world.parallel.etp, world.rank // 2
    nodes = experts // (count // 2)
    away = (experts < count) & (nodes != node)
    return {"direct": int(away.sum()) * etp, "hierarchical": int(away.any(1).sum())}


class _Network:
    """Counts rows of hidden states that this rank sends to the other node."""

    def __init__(self, rank: int, hidden: int) -> None:
        self.rank, self.hidden, self.rows = rank, hidden, 0

    def __enter__(self) -> _Network:
        import torch.distributed as dist

        self.module = cast(Any, dist)
        self.send = self.module.all_to_all_single

        def counted(
            out: Any, x: Any, received: Any = None, sent: Any = None, group: Any = None
        ) -> Any:
            if sent is not None and x.ndim == 2 and x.shape[1] == self.hidden:
                ranks = dist.get_process_group_ranks(group)
                self.rows += sum(
                    n for n, r in zip(sent, ranks, strict=True) if r // 2 != self.rank // 2
                )
            return self.send(out, x, received, sent, group=group)

        self.module.all_to_all_single = counted
        return self

    def __exit__(self, *_error: object) -> None:
        self.module.all_to_all_single = self.send


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks(step_each, 4, timeout_s=500)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_hops_give_the_bits_of_one(name: str, steps: list[dict[str, Any]]) -> None:
    for rank in steps:
        one, two = (rank[name][exchange] for exchange in EXCHANGES)
        assert one["kept"]["norm"] > 0
        for way in PASSES:
            assert two[way]["loss"] == one["kept"]["loss"]
            assert two[way]["digest"] == one[way]["digest"] == one["kept"]["digest"]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_rows_between_nodes(name: str, exchange: str, steps: list[dict[str, Any]]) -> None:
    """A dispatch and a combine in each pass; they send as many rows, to or from the experts."""
    ranks = [rank[name][exchange]["kept"] for rank in steps]
    expected = sum(rank["expected"][exchange] for rank in ranks)
    assert sum(rank["forward"] for rank in ranks) == 2 * expected
    assert sum(rank["backward"] for rank in ranks) == 2 * expected
    slots = sum(rank["expected"]["direct"] for rank in ranks)
    assert 0 < sum(rank["expected"]["hierarchical"] for rank in ranks) < slots


STEPS = 3


def train_each(layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Losses and gradient norms of `STEPS` steps on two nodes of two ranks."""
    from helpers.equivalence import train

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return {
        name: {
            exchange: train(parallel, engine={"expert_exchange": exchange}, steps=STEPS)
            for exchange in EXCHANGES
        }
        for name, parallel in layouts.items()
    }


def train_one() -> list[list[float]]:
    """The same in one process."""
    from helpers.equivalence import train

    return train({}, steps=STEPS)


def test_steps_are_those_of_one_process() -> None:
    layouts = {"EP4": LAYOUTS["EP4"], "TP2 EP4": LAYOUTS["TP2 EP4"]}
    [one] = run_ranks(train_one, 1)
    for rank in run_ranks(train_each, 4, {"layouts": layouts}, timeout_s=500):
        for found in rank.values():
            assert found["hierarchical"] == found["direct"]
            for step, expected in zip(found["direct"], one, strict=True):
                assert step == pytest.approx(expected, rel=1e-5)


def start_uneven() -> None:
    """A world whose expert group does not fill its nodes."""
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    _model({"ep": 4}, "hierarchical", False)


def test_nodes_that_are_not_filled_are_rejected() -> None:
    with pytest.raises(RankError, match=r"do not fill nodes of 3: set --parallel\.ep to a "):
        run_ranks(start_uneven, 4)


def start_on_nodes_of_two_sizes(exchange: str) -> bool:
    """True if rows are exchanged without regard to nodes of 2, 1 and 1 ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = "2" if int(os.environ["RANK"]) < 2 else "1"
    world, _ = _model({"ep": 4}, exchange, False)
    return world.groups.expert_nodes is None


def test_ranks_agree_on_nodes_of_two_sizes() -> None:
    assert run_ranks(start_on_nodes_of_two_sizes, 4, {"exchange": "auto"}) == [True] * 4
    with pytest.raises(RankError, match="do not fill nodes of 1 and 2"):
        run_ranks(start_on_nodes_of_two_sizes, 4, {"exchange": "hierarchical"})


def step_by_deepep() -> dict[str, float]:
    """Relative differences of one step on two ranks by a stand-in for DeepEP's kernels and by the
    direct exchange."""
    from unittest import mock

    from megatron.core.transformer.moe import fused_a2a

    from nemocascade.megatron import model

    direct = _step({"ep": 2}, "direct")
    with (
        mock.patch.object(model, "deepep_limitation", return_value=""),
        mock.patch.object(fused_a2a, "fused_dispatch", _dispatch),
        mock.patch.object(fused_a2a, "fused_combine", _combine),
    ):
        deepep = _step({"ep": 2}, "deepep")
    error = (deepep["gradients"] - direct["gradients"]).norm() / direct["gradients"].norm()
    return {"loss": deepep["loss"] / direct["loss"] - 1.0, "gradients": error.item()}


def _dispatch(x: Any, ids: Any, weights: Any, num_experts: int, group: Any) -> tuple[Any, ...]:
    """The contract of Megatron's `fused_dispatch`, by gathering all tokens.

    Rows of tokens with a local expert; local ids, -1 elsewhere; weights, of which those of other
    experts hold NaN here.
    """
    import torch
    from torch.distributed.nn.functional import all_gather

    local, rank = num_experts // group.size(), group.rank()
    rows, weights = (torch.cat(all_gather(t, group=group)) for t in (x, weights))
    ids = torch.cat(all_gather(ids, group=group)) - rank * local
    ids = ids.masked_fill((ids < 0) | (ids >= local), -1)
    taken = (ids >= 0).any(1).nonzero()[:, 0]
    weights = weights[taken].masked_fill(ids[taken] < 0, float("nan"))
    return rows[taken], ids[taken], weights, None, (taken, len(rows))


def _combine(rows: Any, group: Any, handle: Any) -> tuple[Any, None]:
    """The contract of Megatron's `fused_combine`: the sum of each token's rows of all ranks."""
    from torch.distributed.nn.functional import all_reduce

    taken, total = handle
    whole = all_reduce(rows.new_zeros(total, rows.shape[1]).index_add(0, taken, rows), group=group)
    return whole.chunk(group.size())[group.rank()], None


def test_the_deepep_path_computes_the_same() -> None:
    for rank in run_ranks(step_by_deepep, 2):
        assert abs(rank["loss"]) < 1e-6
        assert 0 <= rank["gradients"] < 1e-5


def start_deepep() -> None:
    """A model for DeepEP on CPUs."""
    _model({"ep": 2}, "deepep", False)


def test_deepep_without_gpus_is_rejected() -> None:
    with pytest.raises(RankError, match=r"it needs GPUs, and the device is cpu: set --engine\.exp"):
        run_ranks(start_deepep, 2)

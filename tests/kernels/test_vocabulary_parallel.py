"""Two ranks with half of the vocabulary each give the result of one rank with all of it."""

from __future__ import annotations

import pytest
import torch
from helpers.heads import device_for, evaluate, make_head, make_objective
from helpers.ranks import run_ranks
from helpers.shard_ranks import SHAPE, truncation_for
from nemocascade_kernels import linear_logprob
from nemocascade_kernels.linear_policy_loss.op import OP
from nemocascade_kernels.testing import assert_same_bits, random_normal, rms_error
from torch import Tensor

CASES = [
    (backend, dtype)
    for backend, dtype in (
        ("torch", torch.float32),
        ("native", torch.float32),
        ("native", torch.bfloat16),
        ("triton", torch.float32),
    )
    # Two ranks on one GPU would need a collective that takes its tensors; gloo takes the CPU's.
    if device_for(backend).type == "cpu"
    and OP.serves(torch.zeros(1, 1, dtype=dtype), backend=backend)
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    """Results of each rank, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [(backend, str(dtype).removeprefix("torch.")) for backend, dtype in CASES]
    arguments = {"folder": str(folder), "cases": cases}
    run_ranks("helpers.shard_ranks:run_rank", 2, arguments, timeout_s=500)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{name}-{kind}" for name, kind in CASES])
def test_two_ranks_equal_one(case: int, ranks: list[list[dict[str, Tensor]]]) -> None:
    backend, dtype = CASES[case]
    first, second = ranks[0][case], ranks[1][case]
    head = make_head(*SHAPE, dtype=dtype, device=device_for(backend))
    objective = make_objective("mopd", SHAPE[0], head.hidden.device, trained=0.7)
    expected = evaluate(head, objective, backend, temperature=0.8)._asdict()
    hidden, weight = head.leaves()
    out = linear_logprob(hidden, weight, head.target, return_entropy=True, backend=backend)
    assert out.entropy is not None
    (random_normal(SHAPE[0], seed=5) * out.logprob + 0.5 * out.entropy).sum().backward()
    expected |= {
        "row_logprob": out.logprob.detach(),
        "row_entropy": out.entropy.detach(),
        "row_hidden_grad": hidden.grad,
        "row_weight_grad": weight.grad,
    }
    cut = evaluate(head, objective, backend, temperature=0.8, truncation=truncation_for(dtype))
    expected |= {f"cut_{name}": value for name, value in cut._asdict().items()}
    outside = cut.logprob == -torch.inf
    assert 0 < int(outside.sum()) < int((objective.token_weight != 0).sum())
    assert torch.equal(first["cut_logprob"] == -torch.inf, outside)
    for results in (expected, first, second):
        results["cut_logprob"] = results["cut_logprob"].nan_to_num(neginf=0.0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    for name, value in expected.items():
        if name.endswith("weight_grad"):
            found = torch.cat([first[name], second[name]])
        else:
            assert_same_bits(f"{name} on both ranks", first[name], second[name])
            found = first[name]
        assert rms_error(found, value) < tolerance, name
    parts = first["partial_hidden_grad"] + second["partial_hidden_grad"]
    assert rms_error(parts, expected["hidden_grad"]) < tolerance
    assert rms_error(first["partial_hidden_grad"], expected["hidden_grad"]) > 0.1

"""MoE ops on a GPU: no synchronisation, CUDA graphs, sizes past 2^31."""

from __future__ import annotations

import pytest
import torch
from nemocascade_kernels import Routing, moe_experts, moe_permute, moe_route, moe_unpermute
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer(logits: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Routing]:
    routing = moe_route(logits, 6, scale=2.5)
    return moe_experts(x, routing, w_up, w_down), routing


def inputs(tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    logits = normal(tokens, 128)
    x, w_up, w_down = normal(tokens, 256), normal(128, 192, 256) / 16, normal(128, 256, 192) / 14
    return logits, x.bfloat16(), w_up.bfloat16(), w_down.bfloat16()


def test_nothing_waits_for_the_device() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(512)]
    grad = torch.ones_like(leaves[1])
    layer(*leaves)[0].backward(grad)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*leaves)[0].backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_other_routings() -> None:
    logits, *others = inputs(512)
    with torch.no_grad():
        layer(logits, *others)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, routing = layer(logits, *others)
        logits.copy_(logits.flip(0) * 2)
        logits[:, 0] += 5
        graph.replay()
        expected, expected_routing = layer(logits, *others)
    assert torch.equal(routing.order, expected_routing.order)
    assert torch.equal(y, expected)


def test_a_token_does_not_see_its_neighbours() -> None:
    logits, x, w_up, w_down = inputs(700)
    outputs = []
    for others in range(2):
        if others:
            logits[:600] = torch.randn_like(logits[:600]) * 3
            x[:600] = torch.randn_like(x[:600])
        leaf = x.clone().requires_grad_()
        y, _ = layer(logits, leaf, w_up, w_down)
        y.backward(torch.ones_like(y))
        outputs.append((y[600:], leaf.grad[600:]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_more_than_2_to_31_elements() -> None:
    """[T * K, H] rows past the reach of 32-bit offsets: the last token's row is right."""
    tokens, hidden = 2**18 + 5, 4096
    x = torch.zeros(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    x[-1] = 1.0
    logits = torch.zeros(tokens, 8, device="cuda")
    logits[-1] = torch.arange(8)
    routing = moe_route(logits, 2)
    assert routing.order.numel() * hidden > 2**31
    rows = moe_permute(x, routing)
    assert torch.equal(moe_unpermute(rows, routing)[-1], x[-1])
    w_up = torch.full((8, 64, hidden), 2.0**-12, device="cuda", dtype=torch.bfloat16)
    w_down = torch.full((8, hidden, 64), 2.0**-6, device="cuda", dtype=torch.bfloat16)
    y = moe_experts(x, routing, w_up, w_down)
    torch.testing.assert_close(y[-1].float(), torch.ones(hidden, device="cuda"))
    assert not y[:-1].any()

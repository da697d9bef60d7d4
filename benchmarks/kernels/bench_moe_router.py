"""Benchmark of moe_route, with selection and sort, against the torch operators that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nemocascade_kernels import moe_route
from torch import Tensor

from benchmarks.measure import Case, Goal, Row, Unavailable, load

Route = Callable[[Tensor, Tensor, int], Tensor]
#: Biased scores [T, E], K -> ids [T, K].
Choose = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes: T tokens, E experts, K per token; sigmoid scores, a bias, normalised weights."""

    tokens: int
    experts: int
    top_k: int

    @property
    def forward_bytes(self) -> float:
        """Bytes of a forward: reads logits; writes weights, experts, positions and order."""
        return 4.0 * self.tokens * (self.experts + 4 * self.top_k)

    @property
    def training_bytes(self) -> float:
        """Bytes with backward: also reads gradient, experts, chosen logits; writes a gradient."""
        return self.forward_bytes + 4.0 * self.tokens * (self.experts + 3 * self.top_k)


CPU = (Shape(8192, 32, 4), Shape(4096, 128, 6), Shape(8192, 256, 8))
GPU = (Shape(4096, 128, 6), Shape(8192, 256, 8), Shape(8192, 512, 10), Shape(262_144, 128, 6))


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """Each router, forward alone and with its backward."""
    shapes = (Shape(64, 16, 2),) if tiny else {"cpu": CPU, "gpu": GPU}[suite]
    return [case(suite, device, shape, training) for shape in shapes for training in (False, True)]


def case(suite: str, device: torch.device, shape: Shape, training: bool) -> Case:
    """One case; all rows route the same logits."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape.tokens, shape.experts, generator=generator).to(device)
    bias = (torch.randn(shape.experts, generator=generator) * 0.01).to(device)
    upstream = torch.randn(shape.tokens, shape.top_k, generator=generator).to(device)

    def prepare(load: Callable[[], Route]) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            route = load()
            leaf = logits.clone().requires_grad_(training)

            def call() -> Tensor:
                leaf.grad = None
                weights = route(leaf, bias, shape.top_k)
                if training:
                    weights.backward(upstream)
                return weights.detach()

            return call

        return make

    moved = shape.training_bytes if training else shape.forward_bytes
    what = "forward and backward" if training else "forward"
    return Case(
        f"{what}, {shape.tokens} x {shape.experts}, top {shape.top_k}",
        {"T": shape.tokens, "E": shape.experts, "K": shape.top_k, "score": "sigmoid",
         "dtype": "float32"},
        [
            Row("ours", "ours", prepare(lambda: ours), bytes=moved),
            Row("chain of torch operators", "peer", prepare(lambda: chain)),
            Row("Megatron-Core", "peer", prepare(load_megatron)),
            Row("chain with quack's top-k", "peer", prepare(lambda: load_quack(shape, device))),
        ],
        goals(suite, shape, training),
        calls=10 if suite == "gpu" else 1,
    )  # fmt: skip


def goals(suite: str, shape: Shape, training: bool) -> list[Goal]:
    """Goals on a GPU: the best published forward time, and a fraction of the memory bandwidth."""
    if suite == "cpu":
        return [Goal("beside the chain", "ours", 1 / 3, "chain of torch operators")]
    found = [Goal("faster than the chain", "ours", 1.0, "chain of torch operators")]
    if shape.experts == 512 and not training:
        found.append(Goal("forward with counts and sort, seconds", "ours", 9e-6))
    if shape.tokens >= 65_536:
        moved = shape.training_bytes if training else shape.forward_bytes
        found.append(Goal("seconds at 2.5 TB/s", "ours", moved / 2.5e12))
    return found


def ours(logits: Tensor, bias: Tensor, top_k: int) -> Tensor:
    return moe_route(logits, top_k, expert_bias=bias, scale=2.5).weights


def torch_choice(biased: Tensor, top_k: int) -> Tensor:
    return biased.topk(top_k, dim=-1).indices


def chain(logits: Tensor, bias: Tensor, top_k: int, choose: Choose = torch_choice) -> Tensor:
    """The shortest chain of torch operators that produces all fields of `Routing`."""
    scores = logits.sigmoid()
    experts = choose((scores + bias).detach(), top_k)
    weights = scores.gather(1, experts)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
    flat = experts.reshape(-1)
    counts = torch.zeros_like(bias, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()).to(order))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    assert positions.shape == flat.shape
    assert offsets.numel() == bias.numel() + 1
    return weights


def load_quack(shape: Shape, device: torch.device) -> Route:
    """The chain around quack-kernels' top-k, whose sizes are powers of two."""
    if device.type != "cuda":
        raise Unavailable("quack-kernels needs a GPU")
    if shape.experts & (shape.experts - 1):
        raise Unavailable(f"quack's top-k takes a power of two of columns, not {shape.experts}")
    topk = load("quack.topk", "quack-kernels").topk_fwd
    rounded = 1 << (shape.top_k - 1).bit_length()

    def choose(biased: Tensor, top_k: int) -> Tensor:
        ids: Tensor = topk(biased, rounded)[1][:, :top_k].long()
        return ids

    return lambda logits, bias, top_k: chain(logits, bias, top_k, choose)


def load_megatron() -> Route:
    """Megatron-Core's routing: dense [T, E] maps of weights and choices, indexed by `permute`."""
    try:
        from megatron.core.transformer.moe import moe_utils
    except ImportError as error:
        raise Unavailable(f"megatron-core is not installed: {error}") from error

    def route(logits: Tensor, bias: Tensor, top_k: int) -> Tensor:
        weights, chosen = moe_utils.topk_routing_with_score_function(
            logits, top_k, scaling_factor=2.5, score_function="sigmoid", expert_bias=bias
        )
        counts = chosen.sum(dim=0)
        tokens = torch.arange(logits.shape[0], device=logits.device)
        order = tokens.expand(chosen.shape[1], -1).masked_select(chosen.t())
        assert order.numel() == logits.shape[0] * top_k
        assert counts.shape == bias.shape
        chosen_weights: Tensor = weights.gather(
            1, (logits.detach().sigmoid() + bias).topk(top_k, dim=-1).indices
        )
        return chosen_weights

    return route

"""The mixers and the residual layer as Megatron builds them: names, initial values, recompute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import LENGTHS, assert_isolated, draw, pack
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from nemocascade_kernels import PackedSeq
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemocascade.megatron.config import CascadeConfig, make_config
from nemocascade.megatron.init import Shard, generator_for, sharded_init
from nemocascade.megatron.layers import mamba
from nemocascade.megatron.layers.attention import Attention
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.layers.mlp import MLP
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig, ParallelConfig
from nemocascade.runtime.world import World

SHAPE = ModelConfig(
    pattern="M*-",
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mamba_heads=4,
    mamba_head_dim=6,
    mamba_state=5,
    mamba_groups=2,
    mlp_width=20,
)
MIXERS = {"mamba": MambaMixer, "attention": Attention, "mlp": MLP}
VARIANTS: dict[str, tuple[type, ModelConfig]] = {
    "mamba": (MambaMixer, SHAPE),
    "attention": (Attention, SHAPE),
    "attention with rope and norms": (Attention, replace(SHAPE, rope=True, qk_norm=True)),
    "relu2": (MLP, SHAPE),
    "swiglu": (MLP, replace(SHAPE, activation="swiglu")),
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def configure(shape: ModelConfig, precision: str = "fp32", seed: int = 1) -> CascadeConfig:
    engine = EngineConfig(precision=precision)
    return make_config(shape, ParallelConfig(), engine, MoeTrainingConfig(), seed=seed)


def layer(world: World, mixer: type, config: CascadeConfig, number: int = 1) -> ResidualBlock:
    """Built with every argument that HybridStack gives to one kind of layer or another."""
    block: ResidualBlock = build_module(
        ModuleSpec(module=ResidualBlock, params={"mixer": mixer}),
        config=config,
        layer_number=number,
        pp_layer_offset=0,
        pg_collection=world.groups,
        is_mtp_layer=False,
        add_layer_offset=False,
        name=None,
    )
    return block


def run(block: ResidualBlock, hidden: Tensor, packed: PackedSeq) -> Tensor:
    """Called with every argument that HybridStack gives."""
    out: Tensor = block(
        hidden_states=hidden.unsqueeze(1),
        attention_mask=None,
        inference_context=None,
        rotary_pos_emb=None,
        packed_seq_params=packed,
    ).squeeze(1)
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_layers_isolate_documents(world: World, variant: str, precision: str) -> None:
    mixer, shape = VARIANTS[variant]
    config = configure(shape, precision)
    block = layer(world, mixer, config)
    packed = pack(LENGTHS)
    hidden = draw(packed.total, shape.hidden_size, dtype=config.params_dtype)

    def rows(h: Tensor, p: PackedSeq) -> Tensor:
        return run(block, h, p)

    assert_isolated(rows, [hidden], packed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recompute_gives_the_same_bits(world: World, variant: str) -> None:
    mixer, shape = VARIANTS[variant]
    block = layer(world, mixer, configure(shape))
    packed = pack(LENGTHS)
    results = []
    for again in (False, True):
        hidden = draw(packed.total, shape.hidden_size).requires_grad_()
        block.zero_grad()
        if again:
            out = checkpoint(run, block, hidden, packed, use_reentrant=False)
        else:
            out = run(block, hidden, packed)
        out.square().sum().backward()
        grads = [p.grad for p in block.parameters()]
        assert all(g is not None for g in grads), "a parameter has no gradient"
        results.append([out.detach(), hidden.grad, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_residual_stream_passes_through(world: World) -> None:
    block = layer(world, MLP, configure(SHAPE))
    with torch.no_grad():
        block.mixer.linear_fc2.weight.zero_()
    hidden = draw(7, SHAPE.hidden_size)
    assert torch.equal(run(block, hidden, pack((7,))), hidden)


def test_mlp_activations(world: World) -> None:
    for activation in ("relu2", "swiglu"):
        config = configure(replace(SHAPE, activation=activation))
        mlp = MLP(config, layer_number=1, pg_collection=world.groups)
        x = draw(7, 1, SHAPE.hidden_size)
        up = x @ mlp.linear_fc1.weight.T
        if activation == "relu2":
            up = up.clamp(min=0) ** 2
        else:
            gate, up = up[..., : SHAPE.mlp_width], up[..., SHAPE.mlp_width :]
            up = gate * torch.sigmoid(gate) * up
        torch.testing.assert_close(mlp(x), up @ mlp.linear_fc2.weight.T)


NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "mamba": {
        "mixer.in_proj.weight": (2 * 24 + 2 * 10 + 4, 24),
        "mixer.conv1d.weight": (24 + 20, 1, 4),
        "mixer.conv1d.bias": (44,),
        "mixer.A_log": (4,),
        "mixer.D": (4,),
        "mixer.dt_bias": (4,),
        "mixer.norm.weight": (24,),
        "mixer.out_proj.weight": (24, 24),
    },
    "attention": {
        "mixer.linear_qkv.weight": ((4 + 2 * 2) * 8, 24),
        "mixer.linear_proj.weight": (24, 32),
    },
    "mlp": {"mixer.linear_fc1.weight": (20, 24), "mixer.linear_fc2.weight": (24, 20)},
}


@pytest.mark.parametrize("kind", MIXERS)
def test_names_and_shapes_are_megatrons(world: World, kind: str) -> None:
    block = layer(world, MIXERS[kind], configure(SHAPE))
    found = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert found == {"norm.weight": (24,), **NAMES[kind]}


def test_stored_parts_of_fused_tensors(world: World) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    metadata = {"dp_cp_group": world.groups.dp_cp}
    block = layer(world, MambaMixer, configure(SHAPE))
    stored = block.sharded_state_dict("layers.0.", metadata=metadata)
    factory = stored["layers.0.mixer.in_proj.weight"]
    assert isinstance(factory, ShardedTensorFactory)
    parts = {part.key: tuple(part.data.shape) for part in factory.build()}
    prefix = "layers.0.mixer.in_proj.weight."
    widths = {"z": 24, "x": 24, "B": 10, "C": 10, "dt": 4}
    assert parts == {prefix + name: (rows, 24) for name, rows in widths.items()}
    for name in ("A_log", "D", "dt_bias", "norm.weight", "conv1d.weight", "conv1d.bias"):
        assert f"layers.0.mixer.{name}" in stored

    gated = layer(world, MLP, configure(replace(SHAPE, activation="swiglu")))
    factory = gated.sharded_state_dict("", metadata=metadata)["mixer.linear_fc1.weight"]
    merged = factory.merge_fn([part.data for part in factory.build()])
    assert torch.equal(merged, gated.mixer.linear_fc1.weight)


@pytest.mark.parametrize("kind", MIXERS)
def test_initial_values_follow_seed_and_layer_alone(world: World, kind: str) -> None:
    def values(seed: int, number: int) -> dict[str, Tensor]:
        torch.manual_seed(seed * 17 + number)  # what the global generator holds must not matter
        block = layer(world, MIXERS[kind], configure(SHAPE, seed=seed), number)
        return {name: p.detach() for name, p in block.named_parameters()}

    first, other_seed, other_layer = values(1, 3), values(2, 3), values(1, 4)
    torch.rand(5)
    for name, value in values(1, 3).items():
        assert torch.equal(value, first[name])
        if not name.endswith(("norm.weight", ".D")):
            assert not torch.equal(value, other_seed[name]), name
            assert not torch.equal(value, other_layer[name]), name


def test_mamba_starts_as_published(world: World) -> None:
    shape = replace(SHAPE, mamba_heads=512, mamba_head_dim=1, mamba_groups=1)
    config = configure(shape, "bf16")
    mixer = MambaMixer(config, layer_number=1, pg_collection=world.groups)
    decay = mixer.A_log.detach().exp()
    assert 1 <= decay.min() < 1.3
    assert 15.7 < decay.max() <= 16.01
    step = F.softplus(mixer.dt_bias.detach().double())
    assert 0.99e-3 < step.min() < 1.1e-3
    assert 0.09 < step.max() < 0.1001
    # Log-uniform: the median is the geometric mean of the ends.
    assert abs(step.log().median() - math.log(1e-2)) < 0.3
    assert bool((mixer.D == 1).all())
    assert bool((mixer.norm.weight == 1).all())
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == mixer.D.dtype == torch.float32
    std = mixer.in_proj.weight.float().std()
    assert abs(std / shape.init_std - 1) < 0.1


@pytest.mark.parametrize("recompute", [False, True])
def test_a_recomputed_mixer_does_not_recompute_itself(
    world: World, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    config = replace(configure(SHAPE), recompute_layers="ME" if recompute else "E")
    mixer = MambaMixer(config, layer_number=1, pg_collection=world.groups)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(mamba, "mamba2", lambda *_, **settings: (seen.update(settings), None))
    packed = PackedSeq.from_cu_seqlens([0, 3], world.device)
    mixer.mix(torch.zeros(3, mixer.in_proj.weight.shape[0]), packed)
    assert seen["recompute"] is not recompute


@pytest.mark.parametrize("kind", MIXERS)
def test_meta_device_computes_nothing(world: World, kind: str) -> None:
    with torch.device("meta"):
        block = layer(world, MIXERS[kind], configure(SHAPE))
    assert all(p.is_meta for p in block.parameters())


def test_shards_tile_the_full_tensor() -> None:
    def fill(weight: Tensor) -> None:
        weight.normal_(generator=generator_for(7, "some.weight"))

    full = sharded_init((12, 6, 2), fill)
    blocks = (4, 8)
    pieces = [
        [sharded_init((12, 6, 2), fill, (Shard(0, i, 2, blocks), Shard(1, j, 3))) for j in range(3)]
        for i in range(2)
    ]
    joined = [torch.cat(row, 1) for row in pieces]
    assert torch.equal(torch.cat([joined[0][:2], joined[1][:2]]), full[:4])
    assert torch.equal(torch.cat([joined[0][2:], joined[1][2:]]), full[4:])
    half = sharded_init((12, 6, 2), fill, dtype=torch.bfloat16)
    assert torch.equal(half, full.bfloat16())
    with pytest.raises(ValueError, match="5 rows cannot be cut into 2 equal shards"):
        sharded_init((5,), fill, (Shard(0, 0, 2),))
    with pytest.raises(ValueError, match="add up to 4, not to 5"):
        sharded_init((5,), fill, (Shard(0, 0, 1, (2, 2)), Shard(0, 0, 2, (2, 2))))


def test_dropout_is_rejected(world: World) -> None:
    config: Any = configure(SHAPE)
    config.hidden_dropout = 0.1
    with pytest.raises(ValueError, match=r"hidden_dropout\(0.1\) is not supported"):
        layer(world, MLP, config)


class _Group:
    """A process group as far as constructors ask."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("mixer", "tp", "rule"),
    [
        (MambaMixer, 4, r"tp\(4\) does not divide model.mamba_groups\(2\)"),
        (Attention, 8, r"tp\(8\) must divide model.num_heads\(4\)"),
        (Attention, 3, r"tp\(3\) must divide model.num_heads\(4\)"),
    ],
)
def test_impossible_tensor_parallelism_is_named(mixer: Any, tp: int, rule: str) -> None:
    class Groups:
        tp_group = _Group(tp)

    groups: Any = Groups()
    groups.tp = Groups.tp_group
    with pytest.raises(ValueError, match=rule):
        mixer(configure(SHAPE), layer_number=1, pg_collection=groups)

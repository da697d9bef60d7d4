"""Documents of a pack are isolated, in every layer and in the loss.

One document's last token is changed. Every other document's final hidden states, log-probabilities
and input gradients must stay bit-identical. A packed document must also equal itself unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.packed import check_batch
from nemocascade_kernels import Nll

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, MoeTrainingConfig, ParallelConfig, tiny
from nemocascade.runtime.world import World
from nemocascade.types import Document, PackedBatch, pack_documents

VOCABULARY = 96
LENGTHS = (37, 1, 130, 64, 2, 80)
CAPACITY = 330
PATTERNS = ["M", "*", "E", "-", "MEM*E-"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def build(world: World, pattern: str, precision: str) -> CascadeModel:
    shape = replace(
        tiny(), pattern=pattern, vocab_size=VOCABULARY, hidden_size=64, rope=True, mlp_width=96
    )
    engine = EngineConfig(precision=precision)  # type: ignore[arg-type]
    config = make_config(
        shape,
        ParallelConfig(),
        engine,
        # The load-balance loss of a document is its own too.
        MoeTrainingConfig(load_balance="sequence", load_balance_coef=0.1, z_loss_coef=0.0),
        seed=1,
    )
    (model,) = build_model(world, config, Accelerators())
    trained: CascadeModel = model.train()
    return trained


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(2)
    return [
        Document(
            torch.randint(VOCABULARY, (n,), generator=generator, dtype=torch.int32),
            torch.ones(n, dtype=torch.bool),
            f"document {i}",
        )
        for i, n in enumerate(LENGTHS)
    ]


def run(
    model: CascadeModel, batch: PackedBatch, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final hidden states [C, H], log-probabilities [C], gradients of the embeddings [C, H]."""
    kept: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handles = [
        model.embedding.word_embeddings.register_forward_hook(keep),
        model.decoder.register_forward_hook(keep),
    ]
    packed = Microbatch.from_batch(batch, world.device)
    out = model(packed, Nll(batch.token_weight))
    out.loss.backward()
    for handle in handles:
        handle.remove()
    embedded, hidden = kept
    assert embedded.grad is not None
    return hidden.detach()[:, 0], out.logprob, embedded.grad[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("changed", [0, 2, 4])
def test_changing_a_last_token_changes_no_other_document(
    world: World, pattern: str, precision: str, changed: int
) -> None:
    model = build(world, pattern, precision)
    docs = documents()
    before = run(model, pack_documents(docs, CAPACITY), world)
    tokens = docs[changed].tokens.clone()
    tokens[-1] = (tokens[-1] + 1) % VOCABULARY
    docs[changed] = replace(docs[changed], tokens=tokens)
    batch = pack_documents(docs, CAPACITY)
    after = run(model, batch, world)

    starts = batch.cu_seqlens.tolist()
    mine = slice(starts[changed], starts[changed + 1])
    others = torch.ones(CAPACITY, dtype=torch.bool)
    others[mine] = False
    for name, a, b in zip(("hidden", "logprob", "gradient"), before, after, strict=True):
        assert torch.equal(a[others], b[others]), f"{name} of another document changed"
    assert not torch.equal(before[0][mine], after[0][mine]), "the change had no effect at all"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_equals_one_at_a_time(world: World, pattern: str) -> None:
    model = build(world, pattern, "fp32")
    docs = documents()
    batch = pack_documents(docs, CAPACITY)
    hidden, logprob, gradient = run(model, batch, world)
    starts = batch.cu_seqlens.tolist()
    for index, doc in enumerate(docs):
        rows = slice(starts[index], starts[index + 1])
        alone = run(model, pack_documents([doc], doc.tokens.numel()), world)
        for name, a, b in zip(
            ("hidden", "logprob", "gradient"), (hidden, logprob, gradient), alone, strict=True
        ):
            torch.testing.assert_close(
                a[rows], b, rtol=1e-4, atol=2e-5, msg=partial("{}: {}".format, name)
            )


def test_a_broken_batch_is_named() -> None:
    batch = pack_documents(documents(), CAPACITY)
    broken = replace(batch, token_weight=torch.ones(CAPACITY))
    with pytest.raises(AssertionError, match="last row"):
        check_batch(broken)
    check_batch(batch)
    with pytest.raises(ValueError, match="capacity"):
        pack_documents(documents(), 100)

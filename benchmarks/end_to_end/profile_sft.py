"""Profile of an SFT step: time by kind of layer, and by operator.

    python benchmarks/end_to_end/profile_sft.py
    python benchmarks/end_to_end/profile_sft.py --case small/2048 --threads 1 --rows 40

Parts are timed in isolation (forward and backward of one layer on one packed sequence), so their
sum only approximates the whole step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from nemocascade_kernels import Nll, linear_policy_loss  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.end_to_end.problems import PROBLEMS, draw_batches, make_trainer  # noqa: E402
from nemocascade.megatron.microbatch import Microbatch  # noqa: E402
from nemocascade.recipe.model import LAYER_SYMBOLS  # noqa: E402
from nemocascade.train.flops import layer_flops  # noqa: E402
from nemocascade.train.trainer import Trainer  # noqa: E402
from nemocascade.types import PackedBatch  # noqa: E402


def seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of a call, after two warm-up calls."""
    times = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        call()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _forward_backward(run_layer: Callable[[], torch.Tensor]) -> None:
    run_layer().sum().backward()


def parts(trainer: Trainer, batches: list[PackedBatch]) -> list[tuple[str, float, float]]:
    """Name, seconds per step, and FLOPs per step of every part."""
    shape, device = trainer.config.shape, trainer.world.device
    model, packed = trainer.modules[0], Microbatch.from_batch(batches[0], device)
    assert packed.batch is not None
    batch = packed.batch
    x = torch.randn(packed.total, 1, shape.hidden_size, device=device)
    leaf = x.to(trainer.config.params_dtype).requires_grad_()
    found = []
    for symbol, name in LAYER_SYMBOLS.items():
        count = shape.pattern.count(symbol) * len(batches)
        if not count:
            continue
        layer = model.decoder.layers[shape.pattern.index(symbol)]
        run_layer = functools.partial(layer, leaf, packed_seq_params=packed)
        with torch.no_grad():
            forward = seconds(run_layer)
        both = seconds(functools.partial(_forward_backward, run_layer))
        lengths = batch.cu_seqlens.diff()[: batch.num_documents].tolist()
        flops = count * sum(layer_flops(shape, symbol, n) for n in lengths)
        found.append((f"{name} forward", count * forward, flops))
        found.append((f"{name} backward", count * (both - forward), 2 * flops))
    rows = leaf.detach().flatten(0, 1).requires_grad_()
    head = seconds(
        lambda: linear_policy_loss(
            rows, model.lm_head(), batch.targets, Nll(batch.token_weight)
        ).loss.backward()
    )
    flops = 6.0 * shape.hidden_size * shape.vocab_size * packed.trained_rows * len(batches)
    found.append(("LM head and loss", len(batches) * head, flops))
    found.append(("optimizer", seconds(lambda: trainer.optimizer.step(1e-4)), 0.0))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=PROBLEMS, default="tiny/2048")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--rows", type=int, default=25, help="operators shown")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    problem = PROBLEMS[options.case]
    shape = problem.make_shape()
    batches = draw_batches(shape.vocab_size, problem.capacity, problem.sequences)
    trainer = make_trainer(shape)
    whole = seconds(lambda: trainer.train_step(batches), repeats=5)
    tokens = sum(batch.num_tokens for batch in batches)
    print(
        f"{options.case}, {torch.get_num_threads()} threads: {whole:.3f} s a step, "
        f"{tokens / whole:,.0f} tokens/s"
    )
    for name, part, flops in parts(trainer, batches):
        rate = f"{flops / part / 1e9:8.1f} GFLOP/s" if flops else ""
        print(f"  {name:20s} {part:8.3f} s {part / whole:7.1%} {rate}")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train_step(batches)
    table = profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=options.rows, max_name_column_width=48
    )
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

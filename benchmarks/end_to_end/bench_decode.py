"""Tokens per second of greedy generation in one process, compared with transformers' `generate`.

    python benchmarks/end_to_end/bench_decode.py
    python benchmarks/end_to_end/bench_decode.py --case tiny/64 --seconds 60
    python benchmarks/end_to_end/bench_decode.py --profile tiny/64
    python benchmarks/end_to_end/bench_decode.py --out benchmarks/results/<record>.json

Both use the same NemotronH weights and prompts. All prompts have one length and differ, so that
transformers needs no padding. All continuations have one length, so that no row of a batch idles.
Tokens must agree. Where they differ, transformers' forward pass without a cache must choose our
token, or the two logits must be equal to float32 rounding; the record counts such sequences. Ours
is `LiveEngine` with one slot per prompt and a joint prefill. transformers uses its cache and its
faster expert products, chosen by trial. The time includes the prefill; only generated tokens count.

Exit code: 0 fine; 1 tokens disagree, or slower than the record compared with; 3 a goal is missed
and `--strict` was given.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers.transformers_weights import from_nemotron_h, load_into  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import run  # noqa: E402
from benchmarks.end_to_end.problems import (  # noqa: E402
    ENGINE,
    initial,
    measure_cases,
    small,
    world,
)
from benchmarks.measure import Case, Goal, Prepared, Row  # noqa: E402
from nemocascade.megatron.config import Accelerators, make_config  # noqa: E402
from nemocascade.megatron.model import build_model  # noqa: E402
from nemocascade.megatron.parameters import count_parameters  # noqa: E402
from nemocascade.recipe import ModelConfig, MoeTrainingConfig, tiny  # noqa: E402
from nemocascade.rollout.engine import Request, Sampling  # noqa: E402
from nemocascade.rollout.live import LiveEngine  # noqa: E402

OURS, PEER = "ours, live weights", "transformers generate"
NEAR = 1e-4  # largest difference of two logits, in standard deviations of a row
EXPERTS = ("grouped_mm", "eager")  # transformers' expert products


@dataclass(frozen=True)
class Problem:
    """Sizes of one comparison. goal: required ratio of our tokens/s to those of transformers."""

    make_shape: Callable[[], ModelConfig]
    batch: int
    prompt: int
    written: int
    goal: float


PROBLEMS = {
    "tiny/1": Problem(tiny, 1, 128, 128, 1.0),
    "tiny/16": Problem(tiny, 16, 128, 128, 1.0),
    "tiny/64": Problem(tiny, 64, 128, 128, 3.0),
    "small/1": Problem(small, 1, 64, 32, 1.0),
    "small/16": Problem(small, 16, 64, 32, 1.0),
    "small/64": Problem(small, 64, 64, 32, 3.0),
}


def draw_prompts(problem: Problem) -> Tensor:
    """[batch, prompt] random ids."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = problem.make_shape().vocab_size
    return torch.randint(vocabulary, (problem.batch, problem.prompt), generator=generator)


def make_ours(problem: Problem, peer: dict[str, Any]) -> Prepared:
    """The timed call, and its tokens [batch, written] for the comparison with the peer."""
    shape = problem.make_shape()
    config = make_config(shape, world().parallel, ENGINE, MoeTrainingConfig(), seed=0)
    chunks = build_model(world(), config, Accelerators())
    weights = from_nemotron_h(dict(initial(shape).state_dict()), shape)
    load_into(chunks[0], weights, shape, world())
    engine = LiveEngine(
        world(), chunks, slots=problem.batch, prefill_tokens=problem.batch * problem.prompt
    )
    prompts = [tuple(row) for row in draw_prompts(problem).tolist()]
    requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
    sampling = Sampling(temperature=0.0, max_tokens=problem.written)

    written: list[Tensor] = []

    def call() -> None:
        found = sorted(engine.run(requests, sampling), key=lambda c: c.request.id)
        written[:] = [torch.tensor([c.response for c in found])]

    def result() -> Tensor:
        if "tokens" not in peer:
            return written[0]
        return beside(draw_prompts(problem), written[0], peer)

    return Prepared(call, result)


def beside(prompts: Tensor, ours: Tensor, peer: dict[str, Any]) -> Tensor:
    """Our tokens [batch, written], replaced by the peer's after a legitimate difference."""
    theirs, result, ways = peer["tokens"], ours.clone(), peer["ways"]
    ways |= {"unlike_its_own_forward": 0, "near_ties": 0}
    for row in torch.nonzero((ours != theirs).any(1))[:, 0].tolist():
        at = int(torch.nonzero(ours[row] != theirs[row])[0])
        text = torch.cat([prompts[row], ours[row, :at]])
        with torch.no_grad():
            logits = peer["model"](text[None], use_cache=False).logits[0, -1]
        gap = float((logits[ours[row, at]] - logits[theirs[row, at]]) / logits.std())
        if abs(gap) < NEAR:
            ways["near_ties"] += 1
        elif int(logits.argmax()) == int(ours[row, at]):
            ways["unlike_its_own_forward"] += 1
        else:
            continue
        result[row, at:] = theirs[row, at:]
    return result


def make_peer(problem: Problem, chosen: dict[str, Any]) -> Callable[[], Tensor]:
    """The timed call of transformers in its fastest configuration. chosen: receives that
    configuration, the model and its tokens."""
    model: Any = initial(problem.make_shape()).eval()
    model.config.use_cache = True
    chosen["model"] = model
    prompts = draw_prompts(problem)

    def call() -> Tensor:
        with torch.inference_mode():
            tokens: Tensor = model.generate(
                prompts,
                max_new_tokens=problem.written,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                eos_token_id=None,
            )
        written = tokens[:, problem.prompt :]
        chosen["tokens"] = written
        return written

    def seconds(experts: str) -> float:
        model.set_experts_implementation(experts)
        call()  # the first call of a shape is slower
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    experts = chosen["ways"]["experts"] = min(EXPERTS, key=seconds)
    model.set_experts_implementation(experts)
    return call


def make_case(name: str, problem: Problem, ways: dict[str, Any]) -> Case:
    """One case. ways: receives transformers' fastest configuration and the differing sequences."""
    shape, chosen = problem.make_shape(), {"ways": ways}
    tokens = problem.batch * problem.written
    return Case(
        name=name,
        settings={
            "model": asdict(shape),
            "parameters": count_parameters(shape).total,
            "dtype": "float32",
            "batch": problem.batch,
            "prompt_tokens": problem.prompt,
            "written_tokens": problem.written,
            "threads": torch.get_num_threads(),
        },
        rows=[
            Row(PEER, "peer", lambda: make_peer(problem, chosen), tokens=tokens),
            Row(OURS, "ours", lambda: make_ours(problem, chosen), tokens=tokens),
        ],
        goals=[Goal(f"{problem.goal:g} x {PEER}", OURS, 1 / problem.goal, PEER)],
        repeats=15,
        agree=0.0,
    )


def profile(problem: Problem) -> None:
    """Profile our time by Python function and by operator."""
    call = make_ours(problem, {}).call
    call()
    profiler = cProfile.Profile()
    profiler.runcall(call)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    with torch.profiler.profile() as operators:
        call()
    print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main(arguments: list[str] | None = None) -> int:
    parser = run.measuring_parser(__doc__, seconds=30.0)
    parser.add_argument("--case", choices=PROBLEMS, action="append", help="only this problem")
    parser.add_argument("--profile", choices=PROBLEMS, help="show where the time goes, and end")
    options = parser.parse_args(arguments)
    if options.profile:
        profile(PROBLEMS[options.profile])
        return 0

    def cases() -> Iterator[tuple[Case, dict[str, Any]]]:
        for name in options.case or PROBLEMS:
            problem = PROBLEMS[name]
            if options.dry_run:
                problem = replace(problem, prompt=16, written=4)
            ways: dict[str, Any] = {}
            yield make_case(name, problem, ways), {PEER: ways}

    return measure_cases("decode", "greedy tokens agree", cases(), options)


if __name__ == "__main__":
    sys.exit(main())

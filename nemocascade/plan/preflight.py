"""Everything that can be known to be wrong before a job starts, all at once, with remedies.

Three parts. What needs no other rank: settings, files, disk, tokenizer, checkpoint, predicted
memory. What needs the device: a matrix product and a copy, timed against the table. What needs the
other ranks: a timed collective on every parallel axis. And, without any of these, the dry run: in
a fake world of the job's real size, every rank's model is built on the meta device.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemocascade.data.tokenizer import check_vocabulary, load_tokenizer
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint import CheckpointError, latest_checkpoint
from nemocascade.megatron.fake import build_on_meta, fake_world
from nemocascade.plan.gpus import GPUS
from nemocascade.plan.job import Job
from nemocascade.plan.memory import GIB, available, every_rank
from nemocascade.plan.parameters import chunk_parameters, stage_chunks
from nemocascade.plan.search import nearest_fitting
from nemocascade.recipe import ParallelConfig
from nemocascade.runtime.world import World

# A device or link this far below the table is throttled, shared or wrongly set up.
SLOW = 0.5
_COLLECTIVE_BYTES = 16 << 20


@dataclass(frozen=True)
class Finding:
    """One check. problem: empty if the job can run. warning: it runs, but slower than it should.
    measured: what was seen, for people."""

    check: str
    problem: str = ""
    measured: str = ""
    warning: str = ""

    def line(self) -> str:
        mark = "FAIL" if self.problem else "slow" if self.warning else "ok  "
        return f"  {mark} {self.check}: {self.problem or self.warning or self.measured or 'fine'}"


@dataclass
class Preflight:
    """All findings of a job."""

    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [f.problem for f in self.findings if f.problem]

    @property
    def warnings(self) -> list[str]:
        return [f.warning for f in self.findings if f.warning]

    def add(
        self, check: str, problems: list[str], measured: str = "", warnings: Sequence[str] = ()
    ) -> None:
        """Note a check and everything that is wrong with it."""
        found = [Finding(check, p, measured) for p in problems]
        found += [Finding(check, "", measured, w) for w in warnings]
        self.findings += found or [Finding(check, "", measured)]

    @contextmanager
    def guarded(self, check: str) -> Iterator[None]:
        """A check that fails in a way of its own is a finding, and the others go on."""
        try:
            yield
        except Exception as error:  # whatever it is, it would end the job later
            self.add(check, [f"{check}: {type(error).__name__}: {error}"])

    def text(self) -> str:
        """A line a check."""
        lines = [f.line() for f in self.findings]
        count = len(self.problems)
        end = f"{count} problem(s)" if count else "all checks passed"
        return "\n".join(["preflight:", *lines, f"{end} in {self.seconds:.1f} s"])

    def as_json(self) -> str:
        """For machines."""
        value = {
            "passed": not self.problems,
            "seconds": self.seconds,
            "findings": [asdict(f) for f in self.findings],
        }
        return json.dumps(value, indent=1)


def check_settings(recipe: Any, world_size: int, into: Preflight) -> None:
    """Every rule the recipe breaks."""
    into.add("settings", recipe.problems(world_size), f"{world_size} ranks")


def check_files(recipe: Any, into: Preflight) -> None:
    """Inputs that can be read, a run folder that can be written and has room."""
    with into.guarded("files"):
        data = getattr(recipe, "data", None)
        paths = [*data.path, *data.heldout_path] if data is not None else []
        missing = [
            f"data: {p} does not exist: mend --data.path"
            for p in paths
            if not p.startswith("synthetic:") and not Path(p).exists()
        ]
        into.add("data files", missing, f"{len(paths)} named")
    with into.guarded("run folder"):
        run_dir = Path(recipe.run_dir)
        parent = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
        problems = []
        if not os.access(parent, os.W_OK):
            problems.append(f"{parent} cannot be written: choose another --run-dir")
        into.add("run folder", problems, str(run_dir))


def check_disk(job: Job, recipe: Any, into: Preflight) -> None:
    """Room for the checkpoints that stay, one more while it is written, and the artifact."""
    with into.guarded("disk"):
        run_dir = Path(recipe.run_dir)
        parent = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
        weights, states = whole_model_bytes(job)
        keep = max(1, recipe.checkpoint.keep)
        needed = (keep + 1) * (weights + states) + weights
        free = shutil.disk_usage(parent).free
        problems = []
        if free < needed:
            problems.append(
                f"{parent} has {free / GIB:.1f} GiB free; {keep + 1} checkpoints and the artifact "
                f"take {needed / GIB:.1f} GiB: make room, or lower --checkpoint.keep"
            )
        into.add("disk", problems, f"{needed / GIB:.1f} of {free / GIB:.1f} GiB free")


def whole_model_bytes(job: Job) -> tuple[float, float]:
    """Bytes of the weights in the run's precision, and of what a checkpoint holds besides."""
    listed = chunk_parameters(
        job.model, ParallelConfig(), job.moe, job.model.pattern, first=True, last=True
    )
    count = sum(p.numel for p in listed)
    width, main = (2, 4) if job.engine.precision == "bf16" else (4, 0)
    return float(count * width), float(count * (main + 8))


def check_start(recipe: Any, into: Preflight) -> None:
    """The checkpoint or artifact that the run would start from can be read and is whole."""
    with into.guarded("start"):
        problems = []
        found = "random weights"
        try:
            checkpoint = latest_checkpoint(Path(recipe.run_dir) / "checkpoints")
            if checkpoint is not None:
                found = f"checkpoint {checkpoint.name}"
            elif recipe.init_from:
                found = f"artifact {read_artifact(Path(recipe.init_from)).digest[:12]}"
        except CheckpointError as error:
            problems = [str(error)]
        into.add("start", problems, found)


def check_tokenizer(recipe: Any, into: Preflight) -> None:
    """The tokenizer can be read and its ids have rows in the embedding."""
    settings = getattr(recipe, "tokenizer", None)
    if settings is None:
        into.add("tokenizer", [], "comes with the artifact")
        return
    if not settings.path:
        too_many = settings.train_vocab_size > recipe.model.vocab_size
        into.add(
            "tokenizer",
            [
                f"tokenizer.train_vocab_size({settings.train_vocab_size}) is above "
                f"model.vocab_size({recipe.model.vocab_size}): lower it"
            ]
            * too_many,
            "trained at the first start",
        )
        return
    with into.guarded("tokenizer"):
        tokenizer = load_tokenizer(settings.path)
        check_vocabulary(tokenizer, recipe.model.vocab_size)
        into.add("tokenizer", [], f"{tokenizer.vocab_size} ids")


def check_memory(job: Job, into: Preflight) -> None:
    """No rank needs more than its device gives."""
    if job.problems():
        return
    with into.guarded("memory"):
        ranks = every_rank(job)
        worst = max(range(len(ranks)), key=lambda r: ranks[r].total)
        need, have = ranks[worst].total, available(job)
        problems = []
        if need > have:
            nearest = nearest_fitting(job)
            remedy = "no layout fits: use more ranks or a smaller capacity"
            if nearest is not None:
                remedy = f"the nearest layout that fits is {nearest.describe()}"
            problems.append(
                f"rank {worst} needs {need / GIB:.1f} GiB, a {job.gpu.name} gives "
                f"{have / GIB:.1f}: {remedy}; --engine.preflight False starts all the same"
            )
        into.add("memory", problems, f"{need / GIB:.1f} of {have / GIB:.1f} GiB on rank {worst}")


def check_dry_run(job: Job, into: Preflight) -> None:
    """Every rank's model is built on the meta device in a fake world of the job's size, and holds
    the parameters that the planner counts."""
    if job.problems():
        return
    started = time.perf_counter()
    p = job.parallel
    with into.guarded("dry run"):
        problems = []
        total = 0
        planned = [_listed(job, stage) for stage in range(p.pp)]
        for rank in range(job.world_size):
            with fake_world(rank, job.world_size, p) as world:
                chunks = build_on_meta(world, job.model, job.engine, job.moe)
                built = sum(t.numel() for c in chunks for t in c.parameters())
                listed = planned[world.pp_rank]
            total += built
            if built != listed:
                problems.append(f"rank {rank} builds {built} parameters, the planner says {listed}")
        seconds = time.perf_counter() - started
        into.add(
            "dry run",
            problems,
            f"{job.world_size} ranks built on the meta device in {seconds:.1f} s, "
            f"{total / job.world_size / 1e9:.3f} B parameters a rank",
        )


def _listed(job: Job, stage: int) -> int:
    """Parameters of a rank of a stage, as the planner counts them."""
    p = job.parallel
    return sum(
        parameter.numel
        for chunk, pattern in enumerate(stage_chunks(job.model, p, stage))
        for parameter in chunk_parameters(
            job.model,
            p,
            job.moe,
            pattern,
            first=stage == 0 and chunk == 0,
            last=stage == p.pp - 1 and chunk == p.vpp - 1,
        )
    )


def check_device(world: World, job: Job, into: Preflight) -> None:
    """A matrix product and a copy on this rank's device, against the table."""
    with into.guarded("device"):
        device = world.device
        on_gpu = device.type == "cuda"
        n = 8192 if on_gpu else 512
        dtype = torch.bfloat16 if on_gpu else torch.float32
        a = torch.randn(n, n, dtype=torch.float32).to(device, dtype)
        seconds = _time(lambda: a @ a, device)
        tflops = 2 * n**3 / seconds / 1e12
        x = torch.zeros((256 << 20) if on_gpu else (8 << 20), dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        copied = 2 * x.numel() / _time(lambda: y.copy_(x), device) / 1e9
        warnings = []
        if on_gpu and job.gpu.name in GPUS:
            for what, found, expected, unit in (
                ("matrix products", tflops, job.gpu.matmul_tflops, "TFLOP/s"),
                ("memory", copied, job.gpu.memory_gb_s, "GB/s"),
            ):
                if found < SLOW * expected:
                    warnings.append(
                        f"rank {world.rank} ({os.uname().nodename}): {what} run at {found:.0f} "
                        f"{unit}, {job.gpu.name} has {expected:.0f}: another program uses the "
                        "device, or it is throttled"
                    )
        seen = f"{tflops:.2f} TFLOP/s, copies {copied:.0f} GB/s"
        into.add("device", [], seen, warnings)


def check_axes(world: World, job: Job, into: Preflight) -> None:
    """A timed all-reduce on every parallel axis that has more than one rank."""
    axes = {
        "tp": world.groups.tp,
        "pp": world.groups.pp,
        "dp": world.groups.dp,
        "ep": world.groups.ep,
        "etp": world.groups.expt_tp,
        "expert dp": world.groups.expt_dp,
    }
    on_gpu = world.device.type == "cuda"
    size = _COLLECTIVE_BYTES if on_gpu else _COLLECTIVE_BYTES >> 4
    for name, group in axes.items():
        ranks = group.size()
        if ranks == 1:
            continue
        with into.guarded(f"collective on {name}"):
            data = torch.ones(size // 4, device=world.device)
            seconds = _time(functools.partial(dist.all_reduce, data, group=group), world.device)
            data.fill_(1)
            dist.all_reduce(data, group=group)
            problems = []
            if float(data[0]) != ranks or float(data[-1]) != ranks:
                problems.append(f"rank {world.rank}: a sum over {name} of {ranks} ones is wrong")
            speed = 2 * (ranks - 1) / ranks * size / seconds / 1e9
            warnings = []
            # A group of neighbours may cross nodes; only the network's speed is certain.
            if on_gpu and job.gpu.name in GPUS and speed < SLOW * job.gpu.network_gb_s:
                warnings.append(
                    f"rank {world.rank}: {name} ({ranks} ranks) moves {speed:.1f} GB/s, "
                    f"{job.gpu.network_gb_s:.0f} expected: look at NCCL_DEBUG=INFO"
                )
            seen = f"{ranks} ranks, {speed:.2f} GB/s"
            into.add(f"collective on {name}", problems, seen, warnings)


def _time(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of a few runs, after one to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    best = float("inf")
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def offline(
    recipe: Any, job: Job | None, world_size: int, *, dry_run: bool, ahead: bool = False
) -> Preflight:
    """Everything that needs neither device nor other ranks. job: None where the recipe's model is
    not known, which is a finding already. ahead: what stages before this one will write is not
    there yet."""
    started = time.perf_counter()
    found = Preflight()
    check_settings(recipe, world_size, found)
    check_files(recipe, found)
    if not ahead:
        check_start(recipe, found)
    check_tokenizer(recipe, found)
    if job is not None:
        check_disk(job, recipe, found)
        check_memory(job, found)
        if dry_run:
            check_dry_run(job, found)
    found.seconds = time.perf_counter() - started
    return found


def online(world: World, job: Job) -> Preflight:
    """Device and collectives of a job that has started; every rank calls it and gets the problems
    of all ranks."""
    started = time.perf_counter()
    found = Preflight()
    check_device(world, job, found)
    check_axes(world, job, found)
    elsewhere = world.all_gather_object((found.problems, found.warnings))
    for rank, (problems, warnings) in enumerate(elsewhere):
        if rank != world.rank and (problems or warnings):
            found.add(f"rank {rank}", problems, warnings=warnings)
    found.seconds = time.perf_counter() - started
    return found

"""Child processes that save checkpoints in a loop, and a parent that kills them with signal 9."""

from __future__ import annotations

import functools
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from helpers.checkpoint_jobs import batches_of, make_trainer
from helpers.ranks import join_group
from nemocascade.megatron.checkpoint import writing
from nemocascade.megatron.checkpoint.state import model_parts, model_shards, optimizer_shards
from nemocascade.megatron.world import start_world
from nemocascade.recipe import CheckpointConfig, EngineConfig, ParallelConfig
from nemocascade.runtime.world import World
from nemocascade.train.checkpointing import Checkpoints
from nemocascade.train.trainer import Trainer

# A child may also fail because another rank's child was killed first.
ALONE = os.environ.get("WORLD_SIZE", "1") == "1"


class Position:
    """Stands in for a data loader: a position that must come back."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["at"]


Child = Callable[[Path, int, Callable[..., None]], None]
"""A child's work: the run folder, the number of the round, and how to say an event."""


def random_kills(root: str, rounds: int, seed: int, asynchronous: bool) -> list[list[list[Any]]]:
    """In each round resume, save on and on, and be killed at a random moment: after the start of a
    save, or in every other round after the end of one, so that saves are finished on any machine.

    Returns each round's events of this rank: ["loaded", step], then ["saving" | "saved", step].
    """
    delay = random.Random(f"{seed}/{os.environ['RANK']}")
    child = functools.partial(_resume_and_save, asynchronous=asynchronous, at_operation=False)
    return [
        _round(root, i, delay.uniform(0.0, 0.3), child, until=b"saved" if i % 2 else b"saving")
        for i in range(rounds)
    ]


def kill_before_every_operation(root: str, asynchronous: bool) -> list[list[list[Any]]]:
    """In round n resume, and be killed before the n-th change that a save makes to a folder.

    Ends with the first n that a save does not reach.
    """
    rounds: list[list[list[Any]]] = []
    child = functools.partial(_resume_and_save, asynchronous=asynchronous, at_operation=True)
    while True:
        rounds.append(_round(root, len(rounds), None, child))
        if rounds[-1][-1][0] == "done":
            return rounds


def train_through_kills(root: str, rounds: int, steps: int) -> list[list[list[Any]]]:
    """Train `steps` steps with an asynchronous save after each, killed at a random moment after a
    save of each round has begun, and resumed; the last start is not killed. In the first round no
    write ends, so that its kill meets a save under way on any machine.

    Returns each round's events of this rank: ["loaded", step, leftovers], then ["saving", step].
    """
    delay = random.Random(os.environ["RANK"])
    child = functools.partial(_resume_and_train, steps=steps, rounds=rounds)
    return [
        _round(root, i, delay.uniform(0.0, 0.06) if i < rounds else None, child)
        for i in range(rounds + 1)
    ]


def _round(
    root: str, number: int, delay_s: float | None, work: Child, until: bytes = b"saving"
) -> list[list[Any]]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _child(Path(root), number, write, work)
    os.close(write)
    text = _read(read, until if delay_s is not None else None)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        text += _read(read, None)
    _, status = os.waitpid(child, 0)
    if delay_s is not None and ALONE:
        assert os.WIFSIGNALED(status), f"round {number}: the child ended by itself"
    os.close(read)
    return [json.loads(line) for line in text.splitlines()]


def _read(pipe: int, until: bytes | None) -> bytes:
    """Output of the child, up to the word `until` or to its end."""
    text = b""
    while until is None or until not in text:
        assert select.select([pipe], [], [], 120)[0], f"the child hangs after {text!r}"
        data = os.read(pipe, 65536)
        if not data:
            assert until is None or not ALONE, f"the child failed after {text!r}"
            break
        text += data
    return text


def _child(run_dir: Path, number: int, pipe: int, work: Child) -> NoReturn:
    def say(*event: Any) -> None:
        os.write(pipe, json.dumps(event).encode() + b"\n")

    try:
        work(run_dir, number, say)
    except BaseException as error:
        print(f"round {number}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _join(run_dir: Path, number: int, *, asynchronous: bool) -> tuple[World, Trainer, Checkpoints]:
    join_group(f"round {number}")
    world = start_world(ParallelConfig(), EngineConfig(timeout_s=300))
    settings = CheckpointConfig(keep=2, asynchronous=asynchronous)
    return world, make_trainer({}, world), Checkpoints(run_dir, settings, world)


def _resume_and_save(
    run_dir: Path,
    number: int,
    say: Callable[..., None],
    *,
    asynchronous: bool,
    at_operation: bool,
) -> None:
    world, trainer, checkpoints = _join(run_dir, number, asynchronous=asynchronous)
    position = Position()
    loader: Any = position
    checkpoints.start(trainer, loader, resume=True)
    assert position.step == trainer.step_number
    _check_all(trainer, world)
    say("loaded", trainer.step_number)
    for _ in range(2 if at_operation else 1000):
        trainer.step_number += 1
        position.step = trainer.step_number
        _fill_all(trainer, world, trainer.step_number)
        say("saving", trainer.step_number)
        if at_operation:
            _kill_before(run_dir, number)
        checkpoints.save(trainer, loader)
        # The next step changes every tensor while the last one is written.
        _fill_all(trainer, world, -1)
        checkpoints.finish()
        say("saved", trainer.step_number)
        if at_operation:
            say("done", trainer.step_number)
            return


def _resume_and_train(
    run_dir: Path, number: int, say: Callable[..., None], *, steps: int, rounds: int
) -> None:
    world, trainer, checkpoints = _join(run_dir, number, asynchronous=True)
    position = Position()
    loader: Any = position
    unfinished = [p.name for p in (run_dir / "checkpoints").glob(".tmp-step_*")]
    world.barrier()
    if checkpoints.start(trainer, loader, resume=True) is None:
        torch.manual_seed(100 + world.rank)
        random.seed(100 + world.rank)
    assert position.step == trainer.step_number
    say("loaded", trainer.step_number, unfinished)
    is_held = number == 0 < rounds
    if is_held:
        _hold_writes(say)
    while trainer.step_number < steps:
        trainer.train_step(batches_of(trainer.step_number, world))
        torch.rand(())
        position.step = trainer.step_number
        if not is_held:
            say("saving", trainer.step_number)
        checkpoints.save(trainer, loader)
        checkpoints.stop_if_asked(trainer, loader)
    checkpoints.finish()
    say("done", trainer.step_number)
    if number < rounds:
        say("saving")
        signal.pause()


def _hold_writes(say: Callable[..., None]) -> None:
    """Let the thread of a save say that it has begun, and never write."""

    def hold(*_: Any) -> NoReturn:
        say("saving")
        while True:
            time.sleep(60)

    module: Any = writing
    module.write_shards = hold


def _all_tensors(trainer: Trainer, world: World) -> list[torch.Tensor]:
    parts = model_parts(trainer.chunks, world)
    shards = model_shards(parts) + optimizer_shards(parts, trainer.optimizer)
    return [shard.tensor for shard in shards]


def _fill_all(trainer: Trainer, world: World, step: int) -> None:
    """Let every tensor say which step it is of."""
    for tensor in _all_tensors(trainer, world):
        tensor.fill_(step)


def _check_all(trainer: Trainer, world: World) -> None:
    if trainer.step_number:
        for tensor in _all_tensors(trainer, world):
            assert bool((tensor == trainer.step_number).all()), "a tensor of another step"


def _kill_before(folder: Path, number: int) -> None:
    """Let this process die before the `number`-th change of something in `folder` from now on."""
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if not (event in changes or writes):
            return
        # Deleting a tree names its entries relative to an open folder.
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not inside and not str(arguments[0]).startswith(str(folder)):
            return
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

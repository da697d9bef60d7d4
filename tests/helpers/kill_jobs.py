"""Child processes that save checkpoints in a loop, and a parent that kills them with signal 9."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from helpers.checkpoint_jobs import make_trainer
from helpers.ranks import join_group
from nemocascade.megatron.checkpoint.state import model_parts, model_pieces, optimizer_pieces
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


def random_kills(root: str, rounds: int, seed: int) -> list[list[list[Any]]]:
    """In each round resume, save on and on, and be killed at a random moment of a save.

    Returns each round's events of this rank: ["loaded", step], then ["saving" | "saved", step].
    """
    delay = random.Random(f"{seed}/{os.environ['RANK']}")
    return [_round(root, i, delay.uniform(0.0, 0.3)) for i in range(rounds)]


def kill_before_every_operation(root: str) -> list[list[list[Any]]]:
    """In round n resume, and be killed before the n-th change that a save makes to a folder.

    Ends with the first n that a save does not reach.
    """
    rounds: list[list[list[Any]]] = []
    while True:
        rounds.append(_round(root, len(rounds), None))
        if rounds[-1][-1][0] == "done":
            return rounds


def _round(root: str, number: int, delay_s: float | None) -> list[list[Any]]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _child(Path(root), number, write, at_operation=delay_s is None)
    os.close(write)
    text = _read(read, b"saving" if delay_s is not None else None)
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


def _child(run_dir: Path, number: int, pipe: int, *, at_operation: bool) -> NoReturn:
    try:
        _resume_and_save(run_dir, number, pipe, at_operation=at_operation)
    except BaseException as error:
        print(f"round {number}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _resume_and_save(run_dir: Path, number: int, pipe: int, *, at_operation: bool) -> None:
    def say(*event: Any) -> None:
        os.write(pipe, json.dumps(event).encode() + b"\n")

    join_group(f"round {number}")
    world = start_world(ParallelConfig(), EngineConfig(timeout_s=300))
    trainer, position = make_trainer({}, world), Position()
    checkpoints = Checkpoints(run_dir, CheckpointConfig(keep=2), world)
    loader: Any = position
    checkpoints.start(trainer, loader, resume=True)
    assert position.step == trainer.step_number
    _check_all(trainer, world)
    say("loaded", trainer.step_number)
    for _ in range(2 if at_operation else 1000):
        trainer.step_number += 1
        position.step = trainer.step_number
        _fill_all(trainer, world)
        say("saving", trainer.step_number)
        if at_operation:
            _kill_before(run_dir, number)
        checkpoints.save(trainer, loader)
        say("saved", trainer.step_number)
        if at_operation:
            say("done", trainer.step_number)
            return


def _all_tensors(trainer: Trainer, world: World) -> list[torch.Tensor]:
    parts = model_parts(trainer.chunks, world)
    pieces = model_pieces(parts) + optimizer_pieces(parts, trainer.optimizer)
    return [piece.tensor for piece in pieces]


def _fill_all(trainer: Trainer, world: World) -> None:
    """Let every tensor say which step it is of."""
    for tensor in _all_tensors(trainer, world):
        tensor.fill_(trainer.step_number)


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

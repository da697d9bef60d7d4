"""Transfer of the live weights to the servers: by broadcast, or through a folder.

Tensors go layer by layer from the rank that assembles them, so that every expert-parallel rank
sends its own experts. No rank holds more than a bucket besides its shard.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch.distributed as dist
from safetensors.torch import save_file

from nemocascade.megatron.convert import LiveTensors
from nemocascade.recipe.server import RolloutServerConfig
from nemocascade.rollout.server_calls import CALL_S, Calls, Failures, short
from nemocascade.rollout.servers import Server
from nemocascade.runtime.world import World
from nemocascade_vllm.link import Link, address_towards

_MEETING_S = 300.0
"""Longest time in which the ranks of a new group meet."""


class Transfer(Protocol):
    """Brings the current weights to servers that have paused; every rank calls it."""

    bytes_sent: int
    """Bytes that this rank sent in the last update."""

    def send(self, servers: Sequence[Server], failures: Failures) -> None:
        """Send all tensors; `failures` gets the servers that did not receive them."""

    def close(self) -> None:
        """Free what the transfer holds."""


class BroadcastTransfer:
    """Broadcast from each rank that owns tensors to all workers of all servers; nothing is written.

    It needs vLLM with the plugin `nemocascade_vllm`. The groups are made at the first update, and
    anew after a failure or for other servers.
    """

    def __init__(self, world: World, settings: RolloutServerConfig, tensors: LiveTensors) -> None:
        self.world, self.settings, self.tensors = world, settings, tensors
        self.calls, self.bytes_sent = Calls(world), 0
        self.senders = sorted({spec.owner for spec in tensors.specs})
        self._joined: tuple[str, ...] = ()
        self._link: Link | None = None
        self._store: dist.TCPStore | None = None

    def send(self, servers: Sequence[Server], failures: Failures) -> None:
        """See `Transfer.send`."""
        if tuple(s.url for s in servers) != self._joined:
            self._join(servers, failures)
        if not failures.reasons:
            timeout_s, specs = self.settings.update_timeout_s, self.tensors.specs
            info = {
                "names": [spec.name for spec in specs],
                "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in specs],
                "shapes": [list(spec.shape) for spec in specs],
                "links": [self.senders.index(spec.owner) for spec in specs],
            }

            def receive(server: Server) -> None:
                server.call("/start_weight_update", {}, CALL_S)
                server.call("/update_weights", {"update_info": info}, timeout_s)
                server.call("/finish_weight_update", {}, timeout_s)

            with self.calls.beside(servers, receive, failures):
                problem = self._send_all()
            if problem:
                failures.all_failed(servers, problem)
        if failures.reasons:
            self.close()

    def close(self) -> None:
        """Leave the group."""
        if self._link is not None:
            self._link.close()
        self._link, self._store, self._joined = None, None, ()

    def _send_all(self) -> str:
        """Send this rank's tensors; returns the failure of a rank, or an empty text."""
        problem, self.bytes_sent = "", 0
        for bucket in self.tensors.stream():
            for spec, tensor in bucket:
                if self._link is None:
                    continue
                try:
                    self._link.broadcast(tensor.contiguous())
                    self.bytes_sent += spec.num_bytes
                except Exception as error:
                    problem = f"rank {self.world.rank} could not send {spec.name}: {short(error)}"
                    # The servers wait for this rank's tensors: leaving the group ends that.
                    self._link.close()
                    self._link = None
        return self.calls.first_problem(problem)

    def _join(self, servers: Sequence[Server], failures: Failures) -> None:
        """Make a group of each sender and all workers."""
        self.close()
        world, settings = self.world, self.settings
        timeout_s = min(settings.update_timeout_s, _MEETING_S)
        sizes: dict[str, int] = {}

        def size_of(server: Server) -> None:
            reply = server.http.get(f"{server.url}/get_world_size", CALL_S)
            sizes[server.url] = int(json.loads(reply)["world_size"])

        self.calls.each(servers, size_of, failures)
        if failures.reasons:
            return
        found: dict[str, Any] = {}
        if world.is_main:
            host = address_towards(str(urlsplit(servers[0].url).hostname))
            self._store = _store(host, 0, timeout_s, is_master=True)
            found = {"host": host, "port": self._store.port, "name": uuid.uuid4().hex}
            found |= {"size": 1 + sum(sizes.values()), "timeout_s": settings.update_timeout_s}
            found |= {"transport": settings.weights, "links": len(self.senders)}
        found = world.broadcast_object(found)

        def join(server: Server) -> None:
            before = servers[: servers.index(server)]
            info = {**found, "rank_offset": 1 + sum(sizes[s.url] for s in before)}
            server.call("/init_weight_transfer_engine", {"init_info": info}, timeout_s)

        with self.calls.beside(servers, join, failures):
            problem = self._join_own(found, timeout_s)
        if problem:
            failures.all_failed(servers, problem)
        if not failures.reasons:
            self._joined = tuple(s.url for s in servers)

    def _join_own(self, found: dict[str, Any], timeout_s: float) -> str:
        """Join this rank's group, if it sends; returns the failure of a rank, or an empty text."""
        problem, rank = "", self.world.rank
        if rank in self.senders:
            try:
                if self._store is None:
                    self._store = _store(found["host"], found["port"], timeout_s, is_master=False)
                self._link = Link(
                    self.settings.weights,
                    self._store,
                    f"{found['name']}/{self.senders.index(rank)}",
                    0,
                    found["size"],
                    timeout_s=self.settings.update_timeout_s,
                    peer=found["host"],
                )
            except Exception as error:
                problem = f"rank {rank} could not join the servers: {short(error)}"
        return self.calls.first_problem(problem)


class FolderTransfer:
    """Safetensors in a folder that the servers see too, for servers without the plugin.

    A folder appears whole, under a new name; the one before is deleted.
    """

    def __init__(
        self, world: World, settings: RolloutServerConfig, tensors: LiveTensors, folder: Path
    ) -> None:
        self.world, self.settings, self.tensors = world, settings, tensors
        self.folder, self.calls = folder, Calls(world)
        self.bytes_sent, self._updates = 0, 0

    def send(self, servers: Sequence[Server], failures: Failures) -> None:
        """See `Transfer.send`."""
        self._updates += 1
        path = str(self._write(self.folder / f"update_{self._updates:06d}").resolve())
        fields: dict[str, Any]
        call, fields = "/update_weights_from_disk", {"model_path": path}
        if self.settings.api == "vllm":
            call = "/collective_rpc"
            fields = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        timeout_s = self.settings.update_timeout_s
        self.calls.each(servers, lambda s: s.call(call, fields, timeout_s), failures)

    def close(self) -> None:
        """Delete the weights."""
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, final: Path) -> Path:
        """Write the weights of all ranks to `final`."""
        world, partial = self.world, final.with_suffix(".partial")
        if world.is_main:
            for old in sorted(self.folder.glob("update_*"))[:-1]:
                shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        places: dict[str, str] = {}
        self.bytes_sent = 0
        for number, bucket in enumerate(self.tensors.stream()):
            name = f"model-{number:05d}-{world.rank:05d}.safetensors"
            if bucket:
                save_file({s.name: t.cpu().contiguous() for s, t in bucket}, partial / name)
            for spec, _ in bucket:
                places[spec.name] = name
                self.bytes_sent += spec.num_bytes
        ranks = world.all_gather_object(places)
        if world.is_main:
            index = {"metadata": {}, "weight_map": {n: at for r in ranks for n, at in r.items()}}
            text = json.dumps(index)
            (partial / "model.safetensors.index.json").write_text(text, encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        return final


def _store(host: str, port: int, timeout_s: float, *, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(
        host,
        port,
        is_master=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )

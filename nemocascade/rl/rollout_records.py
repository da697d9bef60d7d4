"""Records of rollouts in a file that is only appended to, each with a checksum.

    magic            4 bytes, "NCR1"
    size of head     uint32, little-endian as all numbers
    size of data     uint64
    CRC-32           uint32, of the two sizes, the head and the data
    head             JSON: everything but tensors
    data             a packed `TokenSequence`; empty in a record without one

A process that is killed may cut its last record short. So a reader stops at the first record that
is not whole.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from nemocascade.recipe import PicklableError
from nemocascade.rl.rollouts import NOT_SCORED, ChoiceShape, Rollout, TokenSequence, whole_rollout
from nemocascade.types import Message, ToolCall, Verdict

_MAGIC = b"NCR1"
_SIZES = struct.Struct("<IQ")
_CRC = struct.Struct("<I")
_START = len(_MAGIC) + _SIZES.size + _CRC.size

Head = dict[str, Any]


class Record(NamedTuple):
    """A record in a file. start, end: its place, in bytes."""

    head: Head
    data: bytes
    start: int
    end: int


class DamagedRecordError(PicklableError, ValueError):
    """A file holds something else than a whole record from `start` on; the message says what."""

    def __init__(self, start: int, reason: str) -> None:
        super().__init__(reason)
        self.start = start


def record_bytes(
    head: Mapping[str, Any], data: bytes | memoryview = b""
) -> list[bytes | memoryview]:
    """The parts of a record, to be written one after the other. Raises TypeError or ValueError if
    the head holds a value that JSON does not have."""
    text = json.dumps(head, separators=(",", ":")).encode("ascii")
    sizes = _SIZES.pack(len(text), len(data))
    crc = zlib.crc32(data, zlib.crc32(text, zlib.crc32(sizes)))
    return [_MAGIC + sizes + _CRC.pack(crc) + text, data]


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in order. Raises DamagedRecordError at the first that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            yield _read(file, size)


def read_record(path: Path, start: int) -> Record:
    """The record at `start`. Raises DamagedRecordError if it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(start)
        return _read(file, size)


def _read(file: BinaryIO, size: int) -> Record:
    start = file.tell()
    header = file.read(_START)
    if len(header) < _START:
        raise DamagedRecordError(start, "its last record is cut short")
    sizes = header[len(_MAGIC) : len(_MAGIC) + _SIZES.size]
    head_size, data_size = _SIZES.unpack(sizes)
    (wanted,) = _CRC.unpack(header[-_CRC.size :])
    end = start + _START + head_size + data_size
    if not header.startswith(_MAGIC):
        raise DamagedRecordError(start, f"no record begins at byte {start}")
    if end > size:
        raise DamagedRecordError(start, "its last record is cut short")
    text, data = file.read(head_size), file.read(data_size)
    if zlib.crc32(data, zlib.crc32(text, zlib.crc32(sizes))) != wanted:
        raise DamagedRecordError(start, f"the record at byte {start} has another checksum")
    try:
        head = json.loads(text)
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict):
        raise DamagedRecordError(start, f"the record at byte {start} is not a JSON object")
    return Record(head, data, start, end)


def rollout_record(rollout: Rollout) -> tuple[Head, memoryview]:
    """Head and data of a rollout without its verdict; on the owner only."""
    assert rollout.sequence is not None
    assert rollout.transcript is not None
    head = {
        "tokens": rollout.tokens,
        "choices": rollout.choices.code(),
        "turns": rollout.turns,
        "truncated": rollout.truncated,
        "text": rollout.transcript.text,
        "response": [asdict(message) for message in rollout.transcript.response],
    }
    return head, memoryview(rollout.sequence.packed().numpy())


def rollout_of(record: Record) -> Rollout:
    """The rollout of a record of `rollout_record`, not scored. Raises KeyError, TypeError or
    ValueError if it holds none."""
    head = record.head
    sequence = TokenSequence.unpacked(
        torch.frombuffer(bytearray(record.data), dtype=torch.uint8),
        head["tokens"],
        ChoiceShape.of_code(head["choices"]),
    )
    return whole_rollout(
        sequence,
        NOT_SCORED,
        domain="",
        text=head["text"],
        response=tuple(map(_message, head["response"])),
        turns=head["turns"],
        truncated=head["truncated"],
    )


def verdict_record(rollout: Rollout) -> Head:
    """Head of a record of a rollout's verdict, with what the reward in its group depends on; on the
    owner only."""
    verdict = rollout.verdict
    return {
        "length": rollout.length,
        "truncated": rollout.truncated,
        "verdict": {
            "reward": verdict.reward,
            "error": verdict.error,
            "details": dict(verdict.details),
            "fault": verdict.fault,
        },
    }


def verdict_of(record: Record) -> Verdict:
    """The verdict of a record of `verdict_record`. Raises KeyError, TypeError or ValueError."""
    return Verdict(**record.head["verdict"])


def scored_outcome(record: Record) -> Rollout:
    """Verdict, length and truncation of the rollout, by a record of `verdict_record`."""
    head = record.head
    return Rollout(0, head["length"], 0, verdict_of(record), truncated=head["truncated"])


def _message(fields: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in fields["tool_calls"])
    return Message(**{**fields, "tool_calls": calls})

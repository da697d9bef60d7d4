"""The commands in the code blocks of a page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def command_blocks(page: str, labels: tuple[str, ...] = ("", "sh")) -> list[list[str]]:
    """The command lines of each block of a page, with continued lines joined. Blocks of output and
    drawings have the label `text`; where lines begin with `$ `, the others are output."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = []
    for label, block in _BLOCK.findall(text):
        if label in labels:
            lines = [x for x in block.replace("\\\n", " ").splitlines() if x.strip()]
            typed = [line[2:] for line in lines if line.startswith("$ ")]
            blocks.append(typed or lines)
    return blocks


def command_lines(page: str, labels: tuple[str, ...] = ("", "sh")) -> list[str]:
    """The command lines of a page."""
    return [line for block in command_blocks(page, labels) for line in block]


def words_of(command: str) -> list[str]:
    """The words of a command without its comment and without `...`, which stands for others."""
    return [word for word in shlex.split(command, comments=True) if word != "..."]


def reduced(command: str, sizes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The words of a command with the smaller settings that `sizes` has for its recipe or its name.
    They replace its own."""
    words = words_of(command)
    name = next((word for word in words if word in sizes), "")
    for option, value in sizes.get(name, {}).items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words

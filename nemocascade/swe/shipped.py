"""Tasks from the repositories shipped with the project, with variable bugs and names.

Each folder of `repositories/` holds `repository/`, the correct code with its own tests; `tests/`,
the hidden tests; and `variation.json`:

    bugs: each with `path`, the `right` text, the `wrong` text, the `issue`, and the ids of the
        hidden tests that it breaks (`fail_to_pass`).
    choices: words that may be replaced, in all files and issues at once, by any of a list. The
        word itself is the first of them.
"""

from __future__ import annotations

import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemocascade.swe.protected import test_files
from nemocascade.swe.snapshots import read_snapshot
from nemocascade.types import ToolCall

Steps = tuple[tuple[tuple[ToolCall, ...], str], ...]
"""Turns of an agent: its calls, and the reasoning before them."""

FOLDER = Path(__file__).parent / "repositories"
VARIATION = "variation.json"


@lru_cache(maxsize=1)
def repositories() -> dict[str, dict[str, Any]]:
    """Return all shipped repositories by name: `files`, `tests`, `bugs`, `choices`."""
    found = {}
    for path in sorted(FOLDER.glob(f"*/{VARIATION}")):
        parts = {
            key: {p: data.decode() for p, data in read_snapshot(path.parent / folder).items()}
            for key, folder in (("files", "repository"), ("tests", "tests"))
        }
        found[path.parent.name] = {**parts, **json.loads(path.read_bytes())}
    return found


def repository_task(
    rng: random.Random, *, name_file: bool, brief: bool = False
) -> tuple[str, dict[str, Any], Steps]:
    """Return an issue, the verifier's answer, and the turns of a correct solution.

    name_file: the issue names the file. brief: the solution reads only the function.
    """
    shipped = repositories()
    chosen = shipped[rng.choice(sorted(shipped))]
    bug = rng.choice(chosen["bugs"])
    words = {word: rng.choice(others) for word, others in chosen["choices"].items()}
    return vary(chosen, bug, words, name_file=name_file, brief=brief)


def vary(
    chosen: dict[str, Any],
    bug: dict[str, Any],
    words: dict[str, str],
    *,
    name_file: bool,
    brief: bool = False,
) -> tuple[str, dict[str, Any], Steps]:
    """Return one bug of a repository with words replaced. Raises ValueError if it is broken."""

    def put(text: str) -> str:
        if not words:
            return text
        pattern = rf"(?<![A-Za-z0-9_])({'|'.join(map(re.escape, words))})(?![A-Za-z0-9_])"
        return re.sub(pattern, lambda match: words[match.group(1)], text)

    path, right, wrong = put(bug["path"]), put(bug["right"]), put(bug["wrong"])
    files = {put(p): put(text) for p, text in chosen["files"].items()}
    for text, what in ((right, "right"), (wrong, "wrong")):
        broken = files[path].replace(right, wrong)
        if (broken if what == "wrong" else files[path]).count(text) != 1:
            raise ValueError(f"{path}: the {what} text must occur there once: {text!r}")
    files[path] = files[path].replace(right, wrong)
    tests = {put(p): put(text) for p, text in chosen["tests"].items()}
    fails = [put(test) for test in bug["fail_to_pass"]]
    answer = {
        "files": files,
        "tests": tests,
        "fail_to_pass": fails,
        "pass_to_pass": [t for t in _ids(tests) if t not in fails],
        "framework": "unittest",
        "sealed": True,
    }
    issue = put(bug["issue"])
    steps = _short_steps if brief else _long_steps
    if name_file:
        issue += f"\n\nThe code in question is in {path}."
    return issue, answer, steps(files, path, right, wrong)


def _long_steps(files: dict[str, str], path: str, right: str, wrong: str) -> Steps:
    """List the files and read the whole file."""
    return (
        ((ToolCall("list", {}),), "Which files are there?"),
        ((ToolCall("read", {"path": path}),), f"The issue is about {path}."),
        (
            (ToolCall("edit", {"path": path, "old": wrong, "new": right}),),
            f"It must be: {right.strip().splitlines()[0]}",
        ),
        ((ToolCall("submit", {}),), "The repair is done."),
    )


def _short_steps(files: dict[str, str], path: str, right: str, wrong: str) -> Steps:
    """Search for the function, and read it up to the bug."""
    before, _, _ = files[path].partition(wrong)
    last = before.count("\n") + wrong.rstrip("\n").count("\n") + 1
    heads = [
        (number, line.strip().partition("(")[0])
        for number, line in enumerate(files[path].splitlines()[:last], start=1)
        if line.lstrip().startswith(("def ", "class "))
    ]
    first, head = heads[-1] if heads else (1, wrong.strip().splitlines()[0])
    part = {"path": path, "start": str(first), "end": str(last)}
    edit = ToolCall("edit", {"path": path, "old": wrong, "new": right})
    return (
        ((ToolCall("search", {"text": head}),), f"where is {head}"),
        ((ToolCall("read", part),), f"read {path}"),
        ((edit, ToolCall("submit", {})), right.strip().splitlines()[0]),
    )


def _ids(tests: dict[str, str]) -> list[str]:
    """Return the dotted ids of all test methods."""
    found = []
    for path in test_files(tests):
        module = path.removesuffix(".py").replace("/", ".")
        owner = ""
        for line in tests[path].splitlines():
            if match := re.match(r"class (\w+)\(", line):
                owner = match.group(1)
            elif match := re.match(r"    def (test\w*)\(self", line):
                found.append(f"{module}.{owner}.{match.group(1)}")
    return found

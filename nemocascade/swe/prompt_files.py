"""Selection of the repository files in a prompt: the golden ones and others relevant to the issue.

A prompt has a limited number of characters. The golden files, which are to be repaired, come first
and are never dropped. If they are too long, each is cut to the lines around those that the patch
changes. The mark before such lines is outside the fence with the file's text. The other files are
ranked by BM25.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath

import bm25s

from nemocascade.swe.patches import parse_patch
from nemocascade.swe.protected import test_files
from nemocascade.swe.tasks import folder_texts

SEPARATOR = "\n\n"
_TICKS = re.compile(r"`{3,}")
_Window = tuple[int, int]
"""First and last line, from 1."""
K1, B = 1.2, 0.75

_NAME = re.compile(r"[A-Za-z0-9_]+")
_HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_TEST_FOLDERS = {"test", "tests", "testing"}


class FileIndex:
    """BM25 index of a repository's files, without tests, which would reveal the repair.

    The idf is always positive (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25
    and Beyond", 2009, Eq. 3.15; idf as in Lucene).
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._paths = sorted(path for path in files if not is_test(path))
        texts = [words(f"{path}\n{files[path]}") for path in self._paths]
        self._index: bm25s.BM25 | None = None
        if any(texts):
            self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
            self._index.index(texts, show_progress=False)

    def rank(self, query: str, count: int, *, without: Collection[str] = ()) -> list[str]:
        """Return the paths of the `count` best matches of `query`, best first; ties by path.

        Files without a word of the query are excluded.
        """
        if self._index is None:
            return []
        asked = [word for word in words(query) if word in self._index.vocab_dict]
        if not asked:
            return []
        scored = zip(self._index.get_scores(asked), self._paths, strict=True)
        ranked = sorted((-score, path) for score, path in scored if score > 0)
        return [path for _, path in ranked if path not in without][: max(count, 0)]


@lru_cache(maxsize=8)
def folder_index(folder: str) -> FileIndex:
    """Index the texts in a folder; rows of one folder share the index."""
    return FileIndex(folder_texts(folder))


def is_test(path: str) -> bool:
    """Return True if a file is a test by its name or by the name of a parent folder."""
    folders = {part.lower() for part in PurePosixPath(path).parts[:-1]}
    return bool(test_files([path])) or bool(folders & _TEST_FOLDERS)


def words(text: str) -> list[str]:
    """Lower-case words; names in `snake_case` or `camelCase` give the name and its parts."""
    found = []
    for name in _NAME.findall(text):
        parts = _HUMP.findall(name)
        found += [part.lower() for part in parts]
        if len(parts) > 1:
            found.append(name.lower())
    return found


def shown_files(
    issue: str,
    files: Mapping[str, str],
    golden: Sequence[str],
    *,
    max_chars: int,
    retrieved: int,
    patch: str = "",
    hidden: Collection[str] = (),
    index: FileIndex | None = None,
) -> dict[str, str]:
    """Return the files' texts for the prompt, sorted by path so that the order reveals nothing.

    They are the golden files, and those of the `retrieved` best matches that still fit into
    `max_chars` characters. Tests and `hidden` files are excluded. Golden files that do not fit are
    shown in windows, see `_golden`.
    index: an existing index of the files.
    """
    blocks = _golden({p: files[p] for p in golden if p in files}, patch, max_chars)
    max_chars -= _size(blocks)
    index = index or FileIndex(files)
    for path in index.rank(issue, retrieved, without={*golden, *hidden}):
        block = _block(path, files[path], [])
        if len(block) + len(SEPARATOR) <= max_chars:
            blocks[path] = block
            max_chars -= len(block) + len(SEPARATOR)
    return dict(sorted(blocks.items()))


def _golden(files: Mapping[str, str], patch: str, max_chars: int) -> dict[str, str]:
    """Return the files whole if they fit, else the largest windows around changed lines that fit.

    A file that the patch does not change stays whole; without a patch, all do.
    """
    changed = _changed(patch)

    def cut(around: int) -> dict[str, str]:
        return {
            path: _block(path, text, _windows(changed.get(path, ()), around))
            for path, text in files.items()
        }

    whole = {path: _block(path, text, []) for path, text in files.items()}
    if _size(whole) <= max_chars:
        return whole
    least, most = 0, max((text.count("\n") for text in files.values()), default=0)
    while least < most:
        middle = (least + most + 1) // 2
        if _size(cut(middle)) <= max_chars:
            least = middle
        else:
            most = middle - 1
    return cut(least)


def _changed(patch: str) -> dict[str, set[int]]:
    """Return the numbers of the lines that a patch changes, by old path."""
    found: dict[str, set[int]] = {}
    for file in parse_patch(patch) if patch else ():
        lines = {line for hunk in file.hunks for line in hunk.changed}
        found.setdefault(file.path, set()).update(lines)
    return found


def _windows(changed: Collection[int], around: int) -> list[_Window]:
    """Return windows of `around` lines at the changed ones; adjacent windows are merged."""
    found: list[_Window] = []
    for line in sorted(changed):
        first, last = max(1, line - around), line + around
        if found and first <= found[-1][1] + 1:
            first = found.pop()[0]
        found.append((first, last))
    return found


def _block(path: str, text: str, windows: Sequence[_Window]) -> str:
    """Format a file under its path: whole if there are no windows, or if they cover every line."""
    longest = max((len(ticks) for ticks in _TICKS.findall(text)), default=2)
    fence = "`" * (longest + 1)
    lines = text.removesuffix("\n").split("\n")
    inside = [(first, min(last, len(lines))) for first, last in windows if first <= len(lines)]
    if not inside or inside == [(1, len(lines))]:
        return f"### {path}\n{fence}\n{text}\n{fence}"
    parts = [f"### {path}"]
    for first, last in inside:
        shown = "\n".join(lines[first - 1 : last])
        parts.append(f"[lines {first}-{last} of {len(lines)}]\n{fence}\n{shown}\n{fence}")
    return "\n".join(parts)


def _size(blocks: Mapping[str, str]) -> int:
    return sum(len(block) + len(SEPARATOR) for block in blocks.values())

"""The files of a repository that a prompt shows: those to repair, and others that an issue is near.

A prompt has room for so many characters. The golden files come first and are never left out: where
they are too long, each is cut to the lines around those that the patch changes. The mark before
such lines stands outside of the fence that holds a file's text. The other files are ranked by BM25.
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
    """The words of files that are no tests, which would say what a repair has to do.

    BM25 with the idf that stays above 0 (Robertson and Zaragoza, "The Probabilistic Relevance
    Framework: BM25 and Beyond", 2009, Eq. 3.15; idf as Lucene has it).
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._paths = sorted(path for path in files if not is_test(path))
        texts = [words(f"{path}\n{files[path]}") for path in self._paths]
        self._index: bm25s.BM25 | None = None
        if any(texts):
            self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
            self._index.index(texts, show_progress=False)

    def rank(self, query: str, count: int, *, without: Collection[str] = ()) -> list[str]:
        """Paths of the `count` files that match `query` best, best first; ties by path.

        Files that share no word with the query are left out.
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
    """Of the texts in a folder, shared by the rows that name it."""
    return FileIndex(folder_texts(folder))


def is_test(path: str) -> bool:
    """Whether a file is one of tests, by its name or by the folders that it lies in."""
    folders = {part.lower() for part in PurePosixPath(path).parts[:-1]}
    return bool(test_files([path])) or bool(folders & _TEST_FOLDERS)


def words(text: str) -> list[str]:
    """Words in lower case; a name of several, `snake_case` or `camelCase`, also in its parts."""
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
    room: int,
    retrieved: int,
    patch: str = "",
    hidden: Collection[str] = (),
    index: FileIndex | None = None,
) -> dict[str, str]:
    """What a prompt shows of each file, by path: so the order says nothing of which is golden.

    The golden files, and of the `retrieved` others that match the issue best those that still fit
    into `room` characters, but no test and nothing `hidden`. Where the golden files alone have no
    room, they are shown in windows, see `_golden`.
    index: over the files, where it is there already.
    """
    blocks = _golden({p: files[p] for p in golden if p in files}, patch, room)
    room -= _size(blocks)
    index = index or FileIndex(files)
    for path in index.rank(issue, retrieved, without={*golden, *hidden}):
        block = _block(path, files[path], [])
        if len(block) + len(SEPARATOR) <= room:
            blocks[path] = block
            room -= len(block) + len(SEPARATOR)
    return dict(sorted(blocks.items()))


def _golden(files: Mapping[str, str], patch: str, room: int) -> dict[str, str]:
    """The files, whole if they have room; else the changed lines of each, with as many before and
    after as have. A file that the patch does not change stays whole, and so does all without one.
    """
    changed = _changed(patch)

    def cut(around: int) -> dict[str, str]:
        return {
            path: _block(path, text, _windows(changed.get(path, ()), around))
            for path, text in files.items()
        }

    whole = {path: _block(path, text, []) for path, text in files.items()}
    if _size(whole) <= room:
        return whole
    least, most = 0, max((text.count("\n") for text in files.values()), default=0)
    while least < most:
        middle = (least + most + 1) // 2
        if _size(cut(middle)) <= room:
            least = middle
        else:
            most = middle - 1
    return cut(least)


def _changed(patch: str) -> dict[str, set[int]]:
    """Numbers of the lines that a patch changes, by the path before it."""
    found: dict[str, set[int]] = {}
    for file in parse_patch(patch) if patch else ():
        lines = {line for hunk in file.hunks for line in hunk.changed}
        found.setdefault(file.path, set()).update(lines)
    return found


def _windows(changed: Collection[int], around: int) -> list[_Window]:
    """The lines `around` the changed ones; windows that touch are one."""
    found: list[_Window] = []
    for line in sorted(changed):
        first, last = max(1, line - around), line + around
        if found and first <= found[-1][1] + 1:
            first = found.pop()[0]
        found.append((first, last))
    return found


def _block(path: str, text: str, windows: Sequence[_Window]) -> str:
    """A file under its path: all of it without windows, and if they leave out no line."""
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

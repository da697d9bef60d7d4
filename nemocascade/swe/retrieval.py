"""The files of a repository that an issue speaks of, by BM25."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import PurePosixPath

import bm25s

from nemocascade.swe.protected import test_files
from nemocascade.swe.tasks import folder_texts

K1, B = 1.2, 0.75

_NAME = re.compile(r"[A-Za-z0-9_]+")
_HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_TEST_FOLDERS = {"test", "tests", "testing"}


class Index:
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
def folder_index(folder: str) -> Index:
    """Of the texts in a folder, shared by the rows that name it."""
    return Index(folder_texts(folder))


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

"""The files of a repository that an issue speaks of, by BM25."""

from __future__ import annotations

import re
from collections.abc import Mapping

import bm25s

K1, B = 1.2, 0.75

_NAME = re.compile(r"[A-Za-z0-9_]+")
_HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def retrieve(query: str, files: Mapping[str, str], count: int) -> list[str]:
    """Paths of the `count` files that match `query` best, best first; ties by path.

    BM25 with the idf that stays above 0 (Robertson and Zaragoza, "The Probabilistic Relevance
    Framework: BM25 and Beyond", 2009, Eq. 3.15; idf as Lucene has it). Files that share no word
    with the query are left out.
    """
    paths = sorted(files)
    texts = [words(f"{path}\n{files[path]}") for path in paths]
    if count < 1 or not any(texts):
        return []
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(texts, show_progress=False)
    asked = [word for word in words(query) if word in index.vocab_dict]
    scores = index.get_scores(asked) if asked else [0.0] * len(paths)
    ranked = sorted(zip(scores, paths, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [path for score, path in ranked[:count] if score > 0]


def words(text: str) -> list[str]:
    """Words in lower case; a name of several, `snake_case` or `camelCase`, also in its parts."""
    found = []
    for name in _NAME.findall(text):
        parts = _HUMP.findall(name)
        found += [part.lower() for part in parts]
        if len(parts) > 1:
            found.append(name.lower())
    return found

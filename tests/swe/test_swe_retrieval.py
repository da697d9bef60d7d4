"""BM25 over the files of a repository, against its equation worked by hand."""

from __future__ import annotations

import math

import bm25s
import pytest

from nemocascade.recipe.envs import AgentlessConfig
from nemocascade.swe.prompt_files import K1, B, FileIndex, shown_files, words

# Words with those of their paths: a: 4, b: 6, c: 2; 4 on average.
FILES = {"a": "cart total cart", "b": "total total sum list item", "c": "sum"}


def by_hand(tf: int, length: int, matching: int) -> float:
    """idf tf / (tf + k1 (1 - b + b length / mean length))."""
    idf = math.log(1 + (3 - matching + 0.5) / (matching + 0.5))
    return idf * tf / (tf + K1 * (1 - B + B * length / 4))


def test_scores_are_those_of_the_equation() -> None:
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index([words(f"{path}\n{text}") for path, text in FILES.items()], show_progress=False)
    expected = [by_hand(2, 4, 1) + by_hand(1, 4, 2), by_hand(2, 6, 2), 0.0]
    assert index.get_scores(["cart", "total"]) == pytest.approx(expected, rel=1e-6)
    assert expected[0] == pytest.approx(0.8266, abs=1e-4)


@pytest.mark.parametrize(
    ("query", "count", "found"),
    [
        ("The cart has a wrong total.", 5, ["a", "b"]),
        ("total", 5, ["b", "a"]),
        ("total", 1, ["b"]),
        ("sum", 5, ["c", "b"]),
        ("nothing of it", 5, []),
        ("", 5, []),
        ("total", 0, []),
    ],
)
def test_files_are_ranked(query: str, count: int, found: list[str]) -> None:
    # "a" is a word of the first query and the name of a file: it is in no other.
    assert FileIndex(FILES).rank(query, count) == found


def test_a_repository_without_words() -> None:
    assert FileIndex({}).rank("total", 5) == []
    assert FileIndex({"_": "()"}).rank("total", 5) == []


def test_equal_files_stand_by_path() -> None:
    files = dict.fromkeys(("z.py", "b.py", "m.py"), "total")
    assert FileIndex(files).rank("total", 2) == ["b.py", "m.py"]


def test_tests_are_not_ranked_and_neither_is_what_is_omitted() -> None:
    tests = ("test_a.py", "a/b_test.py", "Tests/data.txt", "lib/testing/x.py", "test/y.txt")
    files = dict.fromkeys((*tests, "latest.py", "contest.py", "b.py"), "total")
    assert FileIndex(files).rank("total", 9) == ["b.py", "contest.py", "latest.py"]
    assert FileIndex(files).rank("total", 2, without=["b.py"]) == ["contest.py", "latest.py"]


def test_names_are_words_and_so_are_their_parts() -> None:
    assert words("getHTTPResponse") == ["get", "http", "response", "gethttpresponse"]
    assert words("max_size2 = 10") == ["max", "size", "2", "max_size2", "10"]


def test_a_prompt_shows_golden_files_and_the_best_others() -> None:
    files = {f"f{i}.py": "cart " * (i % 3) for i in range(20)} | {"gold.py": "none of it"}
    count = AgentlessConfig().retrieved
    golden = ["gold.py", "made by the patch.py"]
    shown = shown_files("the cart", files, golden, max_chars=10_000, retrieved=count)
    assert len(shown) == count + 1
    assert list(shown) == sorted(shown)
    assert "gold.py" in shown
    assert all(shown[path].count("cart") == 2 for path in shown if path != "gold.py")

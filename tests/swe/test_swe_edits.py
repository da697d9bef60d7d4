"""Search/replace edits: parsing, errors, and application to files."""

from __future__ import annotations

import pytest

from nemocascade.swe.edits import Edit, EditError, apply_edits, checked_path, edit_text, parse_edits
from nemocascade.swe.tasks import made_files, patched_files, row_files, texts_of, with_texts

ONE = "### a.py\n<<<<<<< SEARCH\nx = 1\n=======\nx = 2\n>>>>>>> REPLACE"
FILES = {"a.py": "x = 1\ny = 1\n", "b/c.py": "if x:\n    y = 1\n    y = 1\n"}


def block(search: str, replace: str, path: str = "a.py") -> str:
    lines = [f"### {path}", "<<<<<<< SEARCH", search, "=======", replace, ">>>>>>> REPLACE"]
    return "\n".join(line for line in lines if line)


def test_edits_are_read_in_order_and_prose_is_not_read() -> None:
    text = (
        f"First.\n## Why\n{ONE}\n### Because of this: a heading\n### `b/c.py`\n"
        "<<<<<<< SEARCH \n=======\n\nz\n>>>>>>> REPLACE\r\n"
        "<<<<<<< SEARCH\nif x:\n=======\n>>>>>>> REPLACE\nDone."
    )
    assert parse_edits(text) == [
        Edit("a.py", ("x = 1",), ("x = 2",)),
        Edit("b/c.py", (), ("", "z")),
        Edit("b/c.py", ("if x:",), ()),
    ]


def test_what_is_written_is_read() -> None:
    edits = [Edit("a.py", ("x", "", "  y"), ("z",)), Edit("b.py", ("q",), ())]
    assert parse_edits("\n".join(map(edit_text, edits))) == edits


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no edit"),
        ("x = 2", "no edit"),
        (ONE.removeprefix("### a.py\n"), "edit 1 names no file"),
        (ONE.removesuffix(">>>>>>> REPLACE"), "'>>>>>>> REPLACE' is missing"),
        ("### a.py\n<<<<<<< SEARCH\nx = 1", "'=======' is missing"),
        (ONE.replace("=======\n", ""), "'>>>>>>> REPLACE' where '=======' must come first"),
        (ONE.replace("x = 2", "======="), "'=======' where '>>>>>>> REPLACE' must come first"),
        (f"{ONE}\n>>>>>>> REPLACE", "'>>>>>>> REPLACE' without"),
        (f"{ONE}\n<<<<<<< SEARCH", "'=======' is missing"),
        ("\n".join([ONE] * 65), "65 edits are more than 64"),
        (ONE.replace("a.py", "../a.py"), "not a path inside"),
    ],
)
def test_faults_are_named(text: str, fault: str) -> None:
    with pytest.raises(EditError, match=fault):
        parse_edits(text)


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../a", "a/../../b", "a/..", "./a", "a//b", "a/", ".", "..", ""),
        *("~/a", "~root/a", ".git/config", "a/.GIT/hooks/x", "a\\b", "C:/a", "a\0b", "a\nb"),
        "a" * 600,
    ],
)
def test_paths_that_lead_outside_are_rejected(path: str) -> None:
    with pytest.raises(EditError, match="not a path inside of the repository"):
        checked_path(path)
    with pytest.raises(EditError, match="not a path inside of the repository"):
        apply_edits({path: "x = 1\n"}, [Edit(path, ("x = 1",), ("x = 2",))])
    with pytest.raises(ValueError, match="not a path inside of the repository"):
        row_files({path: "x"})


def test_edits_change_whole_lines_and_see_each_other() -> None:
    edits = parse_edits(f"{ONE}\n{block('x = 2', 'x = 3')}\n{block('', 'new', 'd/e.py')}")
    assert apply_edits(FILES, edits) == {**FILES, "a.py": "x = 3\ny = 1\n", "d/e.py": "new\n"}
    assert FILES["a.py"] == "x = 1\ny = 1\n"


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        (block("b", "c"), "a\r\nb\r\n", "a\r\nc\r\n"),
        (block("b", "c"), "a\nb", "a\nc"),
        (block("b", ""), "a\nb\nd\n", "a\nd\n"),
        (block("a\nb", "c"), "a\nb\nb\n", "c\nb\n"),
        (block("    y", "    z"), "y\n    y\n", "y\n    z\n"),
    ],
)
def test_line_ends_and_indentation_are_kept(text: str, before: str, after: str) -> None:
    assert apply_edits({"a.py": before}, parse_edits(text)) == {"a.py": after}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (block("x = 9", "x = 2"), "occur 0 times"),
        (block("x =", "x = 2"), "occur 0 times"),
        (block("    y = 1", "    y = 2", "b/c.py"), "occur 2 times"),
        (block("x = 1", "x = 1"), "changes nothing"),
        (block("x = 1", "x = 2", "z.py"), "z.py: no such file"),
        (block("", "x = 2"), "a.py: it exists"),
        (block("", "x", "a.py/b.py"), "a file and a folder"),
        (block("", "x", "b"), "a file and a folder"),
        (block("", "", "n.py"), "without any line"),
    ],
)
def test_edits_that_do_not_fit_are_rejected(text: str, fault: str) -> None:
    with pytest.raises(EditError, match=fault):
        apply_edits(FILES, parse_edits(text))


def test_only_texts_can_be_edited_and_the_rest_stays() -> None:
    files = {"a.py": b"x\n", "b.png": b"\xff\xfe", "c.txt": b"y" * (1 << 21)}
    assert texts_of(files) == {"a.py": "x\n"}
    assert with_texts(files, {"a.py": "z\n", "d.py": "w"}) == {
        **files,
        "a.py": b"z\n",
        "d.py": b"w",
    }


def test_the_files_of_a_patch() -> None:
    patch = (
        "diff --git a/x/y.py b/x/y.py\n--- a/x/y.py\t2020\n+++ b/x/y.py\n@@ -1 +1 @@\n-a\n+b\n"
        "--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+c\n"
        "--- a/gone.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-d\n"
    )
    assert patched_files(patch) == ["x/y.py", "new.py", "gone.py"]
    # A line that goes, and one that comes, look like the names of a file.
    sql = "--- a/q.sql\n+++ b/q.sql\n@@ -1,2 +1,2 @@\n--- old comment\n+++ more\n select 1;\n"
    assert patched_files(patch + sql) == ["x/y.py", "new.py", "gone.py", "q.sql"]
    assert made_files(patch + sql) == {"new.py"}
    mode = "diff --git a/run.sh b/run.sh\nold mode 100644\nnew mode 100755\n"
    image = "diff --git a/a.png b/a.png\nindex 1..2\nBinary files a/a.png and b/a.png differ\n"
    assert patched_files(mode + image) == []
    with pytest.raises(ValueError, match="not a unified diff"):
        patched_files("fix it")
    with pytest.raises(ValueError, match="not a path inside"):
        patched_files("--- a/../x\n+++ b/../x\n")

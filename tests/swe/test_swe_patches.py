"""Unified diffs: parsing by hunk counts, exact application, and errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nemocascade.swe.patches import FilePatch, PatchError, apply_patch, parse_patch

FILES = {"a.py": b"1\n2\n3\n4\n5\n6\n7\n8\n9\n", "b.sql": b"-- old comment\nselect 1;\n"}
ONE = "--- a/a.py\n+++ b/a.py\n@@ -2,3 +2,3 @@ def f():\n 2\n-3\n+three\n 4\n"


def test_hunks_are_read_by_their_counts() -> None:
    patch = "--- a/b.sql\n+++ b/b.sql\n@@ -1,2 +1,2 @@\n--- old comment\n+++ new\n select 1;\n"
    (file,) = parse_patch(patch)
    assert (file.old, file.new) == ("b.sql", "b.sql")
    assert apply_patch(FILES, patch)["b.sql"] == b"++ new\nselect 1;\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a b.py": "x\n"}, {"a b.py": "y\n"}),
        ({'caf\u00e9/\t"q".py': "x\n" * 9}, {'caf\u00e9/\t"q".py': "x\n" * 8 + "y\n"}),
        ({"a.py": "x"}, {"a.py": "x\n"}),
        ({"a.py": "x\n"}, {"a.py": "x"}),
        ({"a.py": "x\r\ny\r\n"}, {"a.py": "x\r\nz\r\n"}),
        ({"a.py": "x\x0cy\n\n\n"}, {"a.py": "x\x0cz\n\n\nw\n"}),
        ({"a.py": "x\n"}, {"a.py": "x\n", "new/__init__.py": "", "new/b.py": "--- a\n+++ b\n"}),
        ({"a.py": "x\n", "gone.py": "-- a\n", "empty": ""}, {"a.py": "x\n"}),
        ({"old.py": "x\n" * 9}, {"b/new.py": "x\n" * 9}),
        ({"old name.py": "x\n" * 9}, {"new.py": "x\n" * 8 + "y\n"}),
        (
            {"a.py": "".join(f"{i}\n" for i in range(90))},
            {"a.py": "".join(f"{i}\n" for i in range(-3, 95) if i not in (20, 60))},
        ),
    ],
)
def test_what_git_writes_is_applied(
    tmp_path: Path, before: dict[str, str], after: dict[str, str]
) -> None:
    """The peer is git itself: its patch of two folders leads from one to the other."""

    def git(*arguments: str) -> str:
        line = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(
            line, cwd=tmp_path, capture_output=True, check=True, encoding="utf-8"
        ).stdout

    def lay(files: dict[str, str]) -> None:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(text.encode())
        git("add", "-A", ".")

    git("init", "-q")
    lay(before)
    git("commit", "-qm", "before")
    git("rm", "-qr", ".")
    lay(after)
    done = subprocess.run(
        ["git", "diff", "--cached", "-M"], cwd=tmp_path, capture_output=True, check=True
    )
    patch = done.stdout.decode()
    found = apply_patch({p: text.encode() for p, text in before.items()}, patch)
    assert found == {p: text.encode() for p, text in after.items()}


def test_changed_lines_are_those_before() -> None:
    (file,) = parse_patch("--- a/a\n+++ b/a\n@@ -3,3 +3,4 @@\n 3\n-4\n+four\n 5\n+six\n")
    assert file.hunks[0].changed == {4, 5}
    (file,) = parse_patch("--- a/a\n+++ b/a\n@@ -7,0 +8,2 @@\n+x\n+y\n")
    assert file.hunks[0].changed == {7}
    assert apply_patch({"a": b"1\n2\n3\n4\n5\n6\n7\n8\n"}, "--- a/a\n+++ b/a\n@@ -7,0 +8 @@\n+x\n")[
        "a"
    ].endswith(b"7\nx\n8\n")


def test_prose_and_a_mail_around_a_patch_are_not_read() -> None:
    text = f"From: me\nSubject: it\n\n--- \nstat\n{ONE}-- \n2.39.5\n"
    assert [file.path for file in parse_patch(text)] == ["a.py"]


@pytest.mark.parametrize(
    ("patch", "fault"),
    [
        ("", "not a unified diff"),
        ("fix it", "not a unified diff"),
        ("@@ -1 +1 @@\n-a\n+b\n", "line 1 of the patch: a hunk of no file"),
        (ONE.replace("-2,3", "-2,4"), "a.py: hunk 1 has fewer lines"),
        (ONE.replace("2,3", "2,2"), "a.py: hunk 1 has more lines"),
        (ONE.replace("+2,3", "+2,2"), "does not fit the counts"),
        (ONE.replace("\n-3", "\n*3"), r"'\*3' does not fit"),
        (ONE.replace("b/a.py", "b/c.py"), "'a.py' becomes 'c.py', without"),
        (ONE.replace("/a.py", "/../a.py"), "not a path inside of the repository"),
        ("--- /dev/null\n+++ /dev/null\n", "names no file"),
        ("diff --git a/a b/b\ncopy from a\ncopy to b\n", "a copy of a file"),
        (ONE.replace("+three", "+\ud83d"), "the patch cannot be read"),
        (ONE.replace("2,3", "1" * 5000), "the patch cannot be read"),
        (ONE.replace("a.py", "a\0.py"), "the patch cannot be read"),
    ],
)
def test_patches_that_cannot_be_read_are_rejected(patch: str, fault: str) -> None:
    with pytest.raises(PatchError, match=fault):
        parse_patch(patch)


@pytest.mark.parametrize(
    ("patch", "fault"),
    [
        (ONE.replace(" 2\n", " two\n"), "a.py: hunk 1 does not apply, the lines from 2"),
        (ONE.replace("-2,3", "-3,3"), "a.py: hunk 1 does not apply"),
        (ONE + "@@ -3 +3 @@\n-3\n+x\n", "a.py: hunk 2 does not apply"),
        (ONE + "@@ -99,0 +99 @@\n+x\n", "a.py: hunk 2 does not apply"),
        (ONE.replace("a.py", "c.py"), "c.py: the patch changes it, but there is no"),
        ("--- /dev/null\n+++ b/a.py\n@@ -0,0 +1 @@\n+x\n", "a.py: the patch makes it, and it is"),
        ("--- a/a.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-1\n", "a.py: the patch deletes it, but"),
        ("diff --git a/a.py b/a.py\nindex 1..2\nGIT binary patch\ndelta 9\nzc\n", "binary file"),
        (ONE.replace("a.py", "x.bin"), "x.bin: the patch changes lines, but the file is not text"),
    ],
)
def test_patches_that_do_not_fit_are_rejected(patch: str, fault: str) -> None:
    with pytest.raises(PatchError, match=fault):
        apply_patch({**FILES, "x.bin": b"\xff"}, patch)


def test_modes_and_binaries_are_known() -> None:
    mode = "diff --git a/run me.sh b/run me.sh\nold mode 100644\nnew mode 100755\n"
    image = "diff --git a/a.png b/a.png\nnew file mode 100644\nBinary files /dev/null and b/a.png "
    assert parse_patch(mode + image + "differ\n") == (
        FilePatch("run me.sh", "run me.sh"),
        FilePatch(None, "a.png", is_binary=True),
    )

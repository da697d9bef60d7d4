"""`nemocascade import-swe`: each row becomes a complete task or none, from local clones."""

from __future__ import annotations

import datetime
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers.sandbox import sandbox_or_skip
from helpers.swe import SANDBOX, copy_pytest

from nemocascade import cli
from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.envs.swe_agentless import SweAgentless
from nemocascade.envs.swe_checking import check_tasks
from nemocascade.recipe.commands import CheckSettings, ImportSettings
from nemocascade.recipe.envs import EnvConfig
from nemocascade.runtime.row_errors import DataError
from nemocascade.swe.importing import Imported, import_rows
from nemocascade.swe.rows import folder_rows

OLD_TEST = "from cart import total\n\n\ndef test_none():\n    assert total([]) == 1\n"
NEW_TEST = OLD_TEST.replace("total([]) == 1", "total([]) == 0")
FILES = {
    "cart.py": "def total(xs):\n    return sum(xs) + 1\n",
    "tests/test_cart.py": OLD_TEST,
    "tests/test_more.py": "def test_more():\n    pass\n",
    "version.txt": "$Format:%H$\n",
    # An archive of git would leave the tests out and write the commit into the version.
    ".gitattributes": "tests export-ignore\nversion.txt export-subst\n*.lfs filter=lfs\n",
    "data.lfs": "pointer\n",
}
PATCH = "--- a/cart.py\n+++ b/cart.py\n@@ -2 +2 @@\n-    return sum(xs) + 1\n+    return sum(xs)\n"
TEST_PATCH = (
    "--- a/tests/test_cart.py\n+++ b/tests/test_cart.py\n@@ -5 +5 @@\n"
    "-    assert total([]) == 1\n+    assert total([]) == 0\n"
    "--- /dev/null\n+++ b/tests/data/x.json\n@@ -0,0 +1 @@\n+{}\n"
)


def git(folder: Path, *arguments: str) -> str:
    line = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, check=True, encoding="utf-8")
    return done.stdout.strip()


@pytest.fixture
def clones(tmp_path: Path) -> Path:
    """A folder with a clone of shop/cart, whose second commit has the repair."""
    folder = tmp_path / "clones" / "shop__cart"
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "link").symlink_to("cart.py")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "before")
    (folder / "cart.py").write_text("def total(xs):\n    return sum(xs)\n")
    git(folder, "commit", "-qam", "after")
    return folder.parent


@pytest.fixture
def row(clones: Path) -> dict[str, Any]:
    return {
        "instance_id": "shop__cart-1",
        "repo": "shop/cart",
        "base_commit": git(clones / "shop__cart", "rev-parse", "HEAD~"),
        "problem_statement": "The total of a cart is wrong.",
        "patch": PATCH,
        "test_patch": TEST_PATCH,
        "FAIL_TO_PASS": '["tests/test_cart.py::test_none"]',
        "PASS_TO_PASS": ["tests/test_more.py::test_more"],
        "version": "1.0",
    }


@pytest.fixture
def run(clones: Path, tmp_path: Path) -> Callable[..., Imported]:
    """Import rows into tmp_path/out."""

    def import_all(*rows: dict[str, Any], folder: Path = clones) -> Imported:
        path = tmp_path / "rows.jsonl.gz"
        with gzip.open(path, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        return import_rows(ImportSettings(str(path), str(tmp_path / "out"), str(folder)))

    return import_all


def files_below(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_row_becomes_a_task_that_both_domains_read(
    run: Callable[..., Imported], row: dict[str, Any], tmp_path: Path
) -> None:
    found = run(row)
    out = tmp_path / "out"
    snapshot = f"snapshots/shop__cart@{row['base_commit']}"
    assert (found.made, found.kept, found.failed) == (["shop__cart-1"], [], {})
    assert found.skipped == {snapshot: 1}
    assert "1 links and submodules are skipped" in found.text()
    assert sorted(p.name for p in out.iterdir()) == ["shop__cart-1", "snapshots"]
    # What git holds, untouched.
    assert files_below(out / snapshot) == FILES
    assert files_below(out / "shop__cart-1" / "tests") == {
        "tests/test_cart.py": NEW_TEST,
        "tests/data/x.json": "{}\n",
        "tests/test_more.py": FILES["tests/test_more.py"],
    }
    ((where, task),) = folder_rows(out)
    assert where == "shop__cart-1/row.json"
    assert "test_patch" not in task
    assert task["patch"] == PATCH
    assert task["golden_files"] == ["cart.py"]
    assert task["version"] == "1.0"
    (prompt,) = SweAgentic().read(out)
    assert prompt.answer["framework"] == "pytest"
    assert prompt.answer["fail_to_pass"] == ["tests/test_cart.py::test_none"]
    assert prompt.answer["tests"]["tests/test_cart.py"] == NEW_TEST
    (prompt,) = SweAgentless().read(out)
    text = prompt.messages[0].content
    assert "### cart.py" in text
    assert "def test_" not in text
    assert prompt.answer["tests"].files["tests/test_cart.py"] == NEW_TEST.encode()


def test_rows_of_one_commit_share_its_files_and_a_second_run_keeps_tasks(
    run: Callable[..., Imported], row: dict[str, Any], tmp_path: Path
) -> None:
    assert len(run(row, {**row, "instance_id": "b"}).made) == 2
    snapshots = tmp_path / "out" / "snapshots"
    assert len(list(snapshots.iterdir())) == 1
    before = files_below(tmp_path / "out")
    found = run(row, {**row, "instance_id": "c"})
    assert (found.made, found.kept) == (["c"], ["shop__cart-1"])
    after = files_below(tmp_path / "out")
    assert {path: text for path, text in after.items() if path[:2] != "c/"} == before


@pytest.mark.parametrize("place", ["shop/cart", "shop/cart.git", "shop__cart.git"])
def test_clones_may_be_bare_and_lie_by_owner(
    run: Callable[..., Imported], row: dict[str, Any], clones: Path, tmp_path: Path, place: str
) -> None:
    bare = tmp_path / "other" / place
    git(tmp_path, "clone", "-q", "--bare", str(clones / "shop__cart"), str(bare))
    assert run(row, folder=tmp_path / "other").made == ["shop__cart-1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"repo": "shop/cards"}, "has no clone of shop/cards: make one"),
        ({"repo": "../cart"}, r"repo\('../cart'\) must be owner/name"),
        ({"base_commit": "0" * 40}, f"has no commit {'0' * 40}, fetch it"),
        ({"base_commit": "--help"}, r"base_commit\('--help'\) must be the hash"),
        ({"instance_id": "../x"}, "must be the name of a folder"),
        ({"instance_id": "snapshots"}, "must be the name of a folder"),
        ({"instance_id": "shop__cart-1"}, "a row before it has this instance_id"),
        ({"problem_statement": ""}, "is empty"),
        ({"patch": None}, "'patch' must be a text"),
        ({"patch": "fix it"}, "not a unified diff"),
        ({"test_patch": " "}, "'test_patch' must be a text"),
        ({"test_patch": TEST_PATCH.replace("== 1", "== 2")}, "test_cart.py: hunk 1 does not apply"),
        ({"FAIL_TO_PASS": "[]"}, "names no test"),
        ({"FAIL_TO_PASS": ["tests/test_new.py::test_a"]}, "in neither the repository nor"),
    ],
)
def test_rows_that_cannot_be_imported_are_told_and_leave_nothing(
    run: Callable[..., Imported],
    row: dict[str, Any],
    tmp_path: Path,
    change: dict[str, Any],
    reason: str,
) -> None:
    found = run(row, {**row, "instance_id": "wrong", **change})
    assert found.made == ["shop__cart-1"]
    (told,) = found.failed.values()
    with pytest.raises(ValueError, match=reason):
        raise ValueError(told)
    assert "rows.jsonl.gz:2" in found.text()
    assert found.text().endswith("1 tasks made, 0 were there already, 1 rows cannot be imported")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"shop__cart-1", "snapshots"}
    assert len(list((out / "snapshots").iterdir())) == 1


def test_a_run_that_is_cut_off_leaves_nothing_half_written(
    run: Callable[..., Imported],
    row: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    path, out = tmp_path / "cut.jsonl", tmp_path / "out"
    path.write_text(json.dumps(row))
    with monkeypatch.context() as patched:
        patched.setattr("nemocascade.swe.importing.json.dumps", stop)
        with pytest.raises(KeyboardInterrupt):
            import_rows(ImportSettings(str(path), str(out), str(tmp_path / "clones")))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["snapshots"]
    assert len(list((tmp_path / "out" / "snapshots").iterdir())) == 1
    assert run(row).made == ["shop__cart-1"]


def test_nothing_is_fetched(
    run: Callable[..., Imported], row: dict[str, Any], clones: Path, tmp_path: Path
) -> None:
    """A clone without its blobs would have git ask its remote for them."""
    source = clones / "shop__cart"
    git(source, "config", "uploadpack.allowfilter", "true")
    partial = tmp_path / "partial" / "shop__cart"
    where = ["clone", "-q", "--bare", "--filter=blob:none", f"file://{source}", str(partial)]
    git(tmp_path, *where)
    found = run(row, folder=tmp_path / "partial")
    assert list(found.failed) == [f"{tmp_path}/rows.jsonl.gz:1 shop__cart-1"]
    assert not list((tmp_path / "out" / "snapshots").iterdir())


def test_rows_of_a_folder_with_other_columns_are_read(
    run: Callable[..., Imported], tmp_path: Path, row: dict[str, Any]
) -> None:
    folder, out = tmp_path / "rows", tmp_path / "out"
    folder.mkdir()
    column = {**row, "created_at": datetime.datetime(2024, 1, 1), "instance_id": "b"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([column]), folder / "b.parquet")
    (folder / "a.jsonl").write_text(f"{json.dumps(row)}\n{{\n3\n")
    (folder / "c.jsonl").write_text(json.dumps({**row, "tests": "\ud800"}))
    found = import_rows(ImportSettings(str(folder), str(out), str(tmp_path / "clones")))
    assert found.made == ["shop__cart-1", "b"]
    assert {where: reason[:20] for where, reason in found.failed.items()} == {
        f"{folder}/a.jsonl:2": "not JSON (Expecting ",
        f"{folder}/a.jsonl:3": "not an object",
        f"{folder}/c.jsonl:1": "half a surrogate pai",
    }


def test_a_file_that_cannot_be_read_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    with pytest.raises(DataError, match=f"{path}: no row can be read"):
        import_rows(ImportSettings(str(path), str(tmp_path / "out"), str(tmp_path / "clones")))


@pytest.mark.parametrize(("repo", "code"), [("shop/cart", None), ("shop/none", 1)])
def test_the_command_ends_with_1_where_a_row_failed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    row: dict[str, Any],
    repo: str,
    code: int | None,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "repo": repo}))
    arguments = [str(path), str(tmp_path / "out"), "--repositories", str(tmp_path / "clones")]
    monkeypatch.setattr(sys, "argv", ["nemocascade", "import-swe", *arguments])
    ended = None
    try:
        cli.main()
    except SystemExit as error:
        ended = error.code
    assert ended == code
    assert f"{int(code is None)} tasks made" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["nemocascade", "import-swe", "none.jsonl", *arguments[1:]])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def r2e_row(clones: Path, **change: Any) -> dict[str, Any]:
    """A row in R2E-Gym's form: the commit that repairs the cart, and two files of tests."""
    commit = git(clones / "shop__cart", "rev-parse", "HEAD")
    lines = [
        *(("context", "def total(xs):"), ("deleted", "    return sum(xs) + 1")),
        ("added", "    return sum(xs)"),
    ]
    hunk = {
        "descriptor": {
            "old_range": {"start": 1, "length": 2},
            "new_range": {"start": 1, "length": 2},
            "section": "",
        },
        "line_group": {"all_lines": [{"type": t, "content": c} for t, c in lines]},
    }
    names = {"minus_file": {"path": "a/cart.py"}, "plus_file": {"path": "b/cart.py"}}
    diffs = [
        {"header": {"file": {"path": "cart.py"}}, "hunks": [hunk], **names},
        {"header": {"file": {"path": "tests/test_cart.py"}}, "hunks": [hunk]},
        {"header": {"file": {"path": "notes.txt"}}, "hunks": []},
    ]
    log = (
        "=== short test summary info ===\nPASSED r2e_tests/test_2.py::test_kind\n"
        "\x1b[31mFAILED\x1b[0m r2e_tests/test_1.py::TestTotal::test_sums[1.5-x] - assert 2.5\n"
        "FAILED r2e_tests/test_2.py::test_later - assert False\n"
    )
    run = {
        "test_file_names": ["test_1.py", "test_2.py"],
        "test_file_codes": [
            "import pytest\nfrom cart import total\n\n\nclass TestTotal:\n"
            '    @pytest.mark.parametrize(("a", "b"), [(1.5, "x")])\n'
            "    def test_sums(self, a, b):\n        assert total([a]) == a\n",
            "def test_kind():\n    pass\n\n\ndef test_later():\n    assert False\n",
        ],
        "old_commit_res_stdout": log,
    }
    results = {"TestTotal.test_sums[1.5-x]": "PASSED", "test_kind": "PASSED"}
    return {
        "repo_name": "cart",
        "docker_image": f"someone/cart_final:{commit}",
        "commit_hash": commit,
        "parsed_commit_content": json.dumps(
            {"file_diffs": diffs, "old_commit_hash": f"{commit}^", "new_commit_hash": commit}
        ),
        "execution_result_content": json.dumps(run),
        "expected_output_json": json.dumps({**results, "\x1b[1mtest_later\x1b[0m": "FAILED"}),
        "prompt": "Write an issue about this repair: return sum(xs)",
        "problem_statement": "[ISSUE]\nThe total of a cart is wrong.\n[/ISSUE]",
        **change,
    }


def test_a_row_of_r2e_gym_becomes_a_task_without_its_image(
    run: Callable[..., Imported], clones: Path, tmp_path: Path
) -> None:
    row = r2e_row(clones)
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps(row))
    for domain in (SweAgentic(), SweAgentless()):
        with pytest.raises(DataError, match=r"docker_image.*images are not run.*import-swe"):
            list(domain.read(path))
    found = run(row)
    name = f"cart__{row['commit_hash'][:12]}"
    assert (found.made, found.failed) == ([name], {})
    for domain in (SweAgentic(), SweAgentless()):
        (prompt,) = domain.read(tmp_path / "out")
        assert "The total of a cart is wrong." in prompt.messages[-1].content
        assert "[ISSUE]" not in prompt.messages[-1].content
        assert "Write an issue" not in prompt.messages[-1].content
    (made,) = [row for _, row in folder_rows(tmp_path / "out")]
    assert made["FAIL_TO_PASS"] == ["r2e_tests/test_1.py::TestTotal::test_sums[1.5-x]"]
    assert made["PASS_TO_PASS"] == ["r2e_tests/test_2.py::test_kind"]
    assert made["golden_files"] == ["cart.py"]
    copy_pytest(tmp_path / "packages")
    sandbox = replace(SANDBOX, packages=(str(tmp_path / "packages"),))
    sandbox_or_skip(sandbox).close()
    (checked,) = check_tasks(CheckSettings(str(tmp_path / "out"), EnvConfig(sandbox=sandbox)))
    assert (checked.faults, checked.tested, checked.patched) == ((), True, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"repo_name": "kart"}, "has no clone of kart: make one"),
        ({"repo_name": "a/b/c"}, "must be the name of a folder"),
        ({"repo_name": "a b"}, "must be the name of a folder"),
        ({"parsed_commit_content": "{"}, "parsed_commit_content: not JSON"),
        ({"parsed_commit_content": "{}"}, "KeyError: 'file_diffs'"),
        ({"execution_result_content": "{}"}, "0 test_file_names have 0 test_file_codes"),
        ({"expected_output_json": '{"test_lost": "PASSED"}'}, "'test_lost' is defined in 0 of"),
        ({"expected_output_json": '{"test_kind": "PASSED"}'}, "FAIL_TO_PASS' names no test"),
        ({"expected_output_json": "[]"}, "expected_output_json must be an object, it is list"),
    ],
)
def test_rows_of_r2e_gym_are_rejected_one_by_one(
    run: Callable[..., Imported], clones: Path, change: dict[str, Any], reason: str
) -> None:
    good = r2e_row(clones)
    found = run({**good, "commit_hash": "f" * 40, **change}, good)
    assert len(found.made) == 1
    (told,) = found.failed.values()
    assert reason in told
    assert found.text().endswith("1 tasks made, 0 were there already, 1 rows cannot be imported")


def test_a_name_of_two_owners_is_rejected(run: Callable[..., Imported], clones: Path) -> None:
    (clones / "other").mkdir()
    git(clones, "clone", "-q", "--bare", "shop__cart", "other/Cart.git")
    found = run(r2e_row(clones))
    assert "has 2 clones of cart" in next(iter(found.failed.values()))

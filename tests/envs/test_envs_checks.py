"""Multiple choice, mathematics, structured output; children that hang, crash or are killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemocascade.envs.checks.schema import strict
from nemocascade.envs.mathematics import Mathematics
from nemocascade.envs.multiple_choice import MultipleChoice
from nemocascade.envs.structured_output import StructuredOutput
from nemocascade.recipe.envs import EnvConfig
from nemocascade.sandbox.child import ChildError, ChildHostError, ChildPool
from nemocascade.types import Message, Prompt, Verdict


@pytest.fixture(scope="module")
def hasty() -> Iterator[ChildPool]:
    """Children whose checks have a second of CPU time."""
    pool = ChildPool(timeout_s=1.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def children() -> Iterator[ChildPool]:
    pool = ChildPool(timeout_s=5.0)
    yield pool
    pool.close()


def ask(domain: Any, answer: dict[str, Any], text: str) -> Verdict:
    prompt = Prompt("x", domain.domain, (Message("user", "go"),), answer)
    verdict: Verdict = domain.score(prompt, [Message("assistant", text)])
    return verdict


OPTIONS = {"A": "red", "B": "dark blue", "C": "12", "D": "E. coli", "E": "green tea"}


def choice(mode: str = "strict_single_letter_boxed", *patterns: str) -> dict[str, Any]:
    return {"letter": "B", "options": OPTIONS, "patterns": list(patterns), "mode": mode}


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (r"\boxed{A} no, \boxed{B}", "B", "B"),
        (r"\boxed{A} no, \boxed{B", "B", "B"),
        (r"\boxed{\text{B}}", "B", "B"),
        (r"\boxed{\textbf{(B)}}", "B", "B"),
        (r"\boxed{ b. }", "B", "B"),
        (r"\boxed{B: dark blue}", "B", "B"),
        (r"\boxed{B) any text}", "B", "B"),
        (r"\boxed{B. dark blue}", "B", "B"),
        (r"\boxed{B - dark blue}", "B", "B"),
        (r"\boxed{(B) dark blue}", "B", "B"),
        (r"\boxed{\text{B: dark blue}}", "B", "B"),
        (r"\boxed{\text{B}: \text{dark blue}}", "B", "B"),
        (r"\boxed{\mathbf{(B)}\ 42}", "B", "B"),
        (r"\boxed{B dark blue}", "B", "B"),
        (r"\boxed{**B**}", "B", "B"),
        (r"\boxed{Option B}", "B", "B"),
        (r"\boxed{dark  blue}", None, "B"),
        (r"\boxed{\text{It is Dark Blue.}}", None, "B"),
        (r"\boxed{12}", None, "C"),
        (r"\boxed{E. coli}", None, "D"),
        (r"\boxed{E. none}", "E", "E"),
        (r"\boxed{a dog}", None, None),
        (r"\boxed{A dog}", None, None),
        (r"\boxed{red or dark blue}", None, None),
        (r"\boxed{A, B}", None, None),
        (r"\boxed{A) B)}", None, None),
        (r"\boxed{Z}", None, None),
        (r"\boxed{AB}", None, None),
        (r"\boxed{B2}", None, None),
        (r"\boxed{}", None, None),
        ("B", None, None),
        ("", None, None),
    ],
)
def test_the_last_boxed_option(
    children: ChildPool, text: str, strict: str | None, lenient: str | None
) -> None:
    for mode, chosen in (("strict_single_letter_boxed", strict), ("lenient_boxed", lenient)):
        verdict = ask(MultipleChoice(children), choice(mode), text)
        assert verdict.details["chosen"] == chosen
        assert verdict.reward == float(chosen == "B")


@pytest.mark.parametrize(
    ("text", "colon", "markdown"),
    [
        ("Answer: B", "B", "B"),
        ("Answer: A\nNo.\nANSWER : b", "B", "B"),
        ("**Answer:** B", "B", "B"),
        ("Answer:\n\nB) dark blue", "B", "B"),
        (r"Answer: \text{B}", "B", "B"),
        ("Answer: dark blue", "B", "B"),
        ("Answer: B because A is red", None, "B"),
        ("Answer: it must be B", None, "B"),
        ("Answer: B\nAnswer: unknown", None, "B"),
        ("Answer: A or B", None, None),
        ("Answer: \u0628", "B", "B"),
        (r"\boxed{B}", None, None),
    ],
)
def test_the_option_after_answer(
    children: ChildPool, text: str, colon: str | None, markdown: str | None
) -> None:
    for mode, chosen in (("lenient_answer_colon", colon), ("lenient_answer_colon_md", markdown)):
        assert ask(MultipleChoice(children), choice(mode), text).details["chosen"] == chosen


@pytest.mark.parametrize(
    ("patterns", "text", "reward"),
    [
        ([r"Answer:\s*([A-E])"], "Answer: A ... Answer: B", 1.0),
        ([r"Answer:\s*([A-E])"], "Answer: B ... Answer: A", 0.0),
        ([r"Answer:\s*([A-E])"], "ANSWER: b", 1.0),
        ([r"Answer:\s*([A-E])"], r"It is \boxed{B}", 1.0),
        ([r"Answer:\s*([A-E])"], r"\boxed{B}. Answer: A", 0.0),
        ([r"Answer:\s*(.+)"], "Answer: Dark blue", 1.0),
        ([r"[A-E](?=!)"], "A B! C", 1.0),
        ([r"Reply: (\w)", r"Antwort: (\w)"], "Antwort: B", 1.0),
        ([r"Reply: (\w)", r"Antwort: (\w)"], "Antwort: B. Reply: A", 0.0),
        ([r"is (A)\b|is (B)\b"], "it is B", 1.0),
    ],
)
def test_patterns_of_the_row(
    children: ChildPool, patterns: list[str], text: str, reward: float
) -> None:
    answer = choice("strict_single_letter_boxed", *patterns)
    assert ask(MultipleChoice(children), answer, text).reward == reward


def test_choices_of_released_rows(children: ChildPool) -> None:
    """Options as columns of one table are null where they belong to another entry."""
    domain = MultipleChoice(children)
    options = [{"a": 12, "B": None}, {"a": None, "B": "blue"}]
    row: dict[str, Any] = {"options": options, "expected_answer": "b", "grading_mode": None}
    parsed = {"letter": "B", "options": {"A": "12", "B": "blue"}, "patterns": []}
    assert domain.parse(row) == {**parsed, "mode": "strict_single_letter_boxed"}
    template = {"output_regex": ["x", "y"]}
    found = domain.parse({**row, "grading_mode": "lenient_boxed", "template_metadata": template})
    assert (found["mode"], found["patterns"]) == ("lenient_boxed", ["x", "y"])
    with pytest.raises(ValueError, match="'C' is not one of the options"):
        domain.parse({**row, "options": [*options, {"C": None}], "expected_answer": "C"})
    with pytest.raises(ValueError, match="grading_mode 'boxed' is not one of strict_single"):
        domain.parse({**row, "grading_mode": "boxed"})
    with pytest.raises(ChildError, match="unterminated"):
        domain.parse({**row, "answer_regex": ["x", "("]})


def test_a_pattern_has_a_time_limit(hasty: ChildPool) -> None:
    """An answer that a pattern cannot be matched with is wrong, a broken pattern is the row's."""
    domain = MultipleChoice(hasty)
    slow = ask(domain, choice("strict_single_letter_boxed", "(a+)+$"), "a" * 64 + "!")
    assert (slow.reward, slow.fault) == (0.0, "answer")
    assert "killed after 1 s of CPU time" in slow.details["reason"]
    broken = ask(domain, choice("strict_single_letter_boxed", "("), "a")
    assert (broken.reward, broken.fault) == (None, "row")
    assert "unterminated" in str(broken.error)
    good = ask(domain, choice("strict_single_letter_boxed", "B"), "B")
    assert good.reward == 1.0, "the pool continues"


@pytest.mark.parametrize(
    ("expected", "text", "reward"),
    [
        ("4", r"\boxed{4}", 1.0),
        ("4", r"\boxed{4.0}", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        ("0.5", r"\boxed{\dfrac{2}{4}}", 1.0),
        (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", 1.0),
        ("(1, 2)", r"\boxed{(1,2)}", 1.0),
        ("4", r"\boxed{5} so \boxed{4}", 1.0),
        ("4", r"\boxed{4} so \boxed{5}", 0.0),
        ("4", "4", 0.0),
        ("4", r"\boxed{}", 0.0),
        ("4", r"\boxed{four apples?}", 0.0),
        ("4", "\\boxed{" + "4" * 3000 + "}", 0.0),
    ],
)
def test_mathematics(children: ChildPool, expected: str, text: str, reward: float) -> None:
    verdict = ask(Mathematics(children), {"expected": expected}, text)
    assert verdict.error is None
    assert verdict.reward == reward


@pytest.mark.parametrize(
    ("expected", "text", "reward", "fault"),
    [
        ("1", r"\boxed{10^{10^{8}}}", 0.0, "answer"),
        ("1", r"\boxed{9^{9^{9^{9^{9}}}}+1}", 0.0, "answer"),
        ("10^{10^{8}}", r"\boxed{1}", None, "row"),
        ("10^{10^{8}}", r"\boxed{10^{10^{8}}}", 1.0, None),
        ("", r"\boxed{1}", None, "row"),
        ("1/2", r"\boxed{0.5}", 1.0, None),
    ],
)
def test_algebra_without_end_has_a_cause(
    hasty: ChildPool, expected: str, text: str, reward: float | None, fault: str | None
) -> None:
    start = time.monotonic()
    verdict = ask(Mathematics(hasty), {"expected": expected}, text)
    assert time.monotonic() - start < 30
    assert (verdict.reward, verdict.fault) == (reward, fault), verdict


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
LISTS = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}


@pytest.mark.parametrize(
    ("schema", "text", "fault"),
    [
        (LISTS, "[" * 900 + "]" * 900, "answer"),
        (LOOP, "[]", "row"),
        ({"type": "string", "pattern": "^(a+)+$"}, '"' + "a" * 64 + '!"', "answer"),
    ],
)
def test_schemas_without_end_have_a_cause(
    hasty: ChildPool, schema: dict[str, Any], text: str, fault: str
) -> None:
    verdict = ask(StructuredOutput(hasty), {"schema": schema}, text)
    assert (verdict.reward, verdict.fault) == (0.0 if fault == "answer" else None, fault), verdict


def test_a_host_that_kills_a_check_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ChildPool()
    monkeypatch.setattr(pool, "_timeout_s", 0.2)
    pool.call("time:sleep", 0)
    (child,) = pool.process_ids()
    os.kill(child, signal.SIGKILL)
    verdict = ask(Mathematics(pool), {"expected": "1/2"}, r"\boxed{0.5}")
    pool.close()
    assert (verdict.reward, verdict.fault) == (None, "host"), verdict


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {
            "type": "array",
            "items": {"type": "object", "properties": {"k": {"type": "string"}}},
        },
    },
}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"name": "a", "age": 1, "tags": [{"k": "x"}]}', 1.0),
        (' \n{"name": "a", "age": 1, "tags": []}\n', 1.0),
        ('{"name": "a", "age": 1}', 0.0),
        ('{"name": "a", "age": 1, "tags": [], "more": 1}', 0.0),
        ('{"name": "a", "age": 1, "tags": [{}]}', 0.0),
        ('{"name": "a", "age": 1, "tags": [{"k": "x", "l": 1}]}', 0.0),
        ('{"name": "a", "age": "1", "tags": []}', 0.0),
        ('{"name": "a", "age": NaN, "tags": []}', 0.0),
        ('```json\n{"name": "a", "age": 1, "tags": []}\n```', 0.0),
        ('Sure: {"name": "a", "age": 1, "tags": []}', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_structured_output(children: ChildPool, text: str, reward: float) -> None:
    verdict = ask(StructuredOutput(children), {"schema": PERSON}, text)
    assert verdict.error is None
    assert verdict.reward == reward


BOX = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "title": {"type": "string"},
        "open": {"type": "boolean"},
        "sizes": {"type": "array", "items": {"type": "number"}},
    },
}
BOXES = {"type": "object", "properties": {"box": BOX}}
TABLE = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "price": {"type": ["null", "number"]},
            "title": {"type": "string"},
        },
    },
}
LAUGHS = "\n".join(
    ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}*a{n - 1}]" for n in range(1, 12))]
)


@pytest.mark.parametrize(
    ("kind", "schema", "text", "reward"),
    [
        ("yaml", BOX, "id: 1\ntitle: a\nopen: yes\nsizes: [1.5, 2]\n", 1.0),
        ("yaml", BOX, '{"id": 1, "title": "a", "open": true, "sizes": []}', 1.0),
        ("yaml", BOX, "id: '1'\ntitle: a\nopen: yes\nsizes: []\n", 0.0),
        ("yaml", BOX, "id: 1\ntitle: a\nopen: yes\nsizes: []\nmore: 1\n", 0.0),
        ("yaml", BOX, "```yaml\nid: 1\n```", 0.0),
        ("yaml", {"type": "object", "patternProperties": {"^a": {}}}, "1: 2\n", 0.0),
        ("yaml", {}, "!!python/object/apply:os.getcwd []\n", 0.0),
        ("yaml", {}, "&a [*a]\n", 0.0),
        ("yaml", BOX, "[" * 100_000, 0.0),
        ("toml", BOX, 'id = 1\ntitle = "a"\nopen = true\nsizes = [1, 2.5]\n', 1.0),
        ("toml", BOX, 'id = 1\nid = 2\ntitle = "a"\nopen = true\nsizes = []\n', 0.0),
        (
            "xml",
            BOXES,
            "<box><id>1</id><title/><open>true</open><sizes><n>1</n><n>2.5</n></sizes></box>",
            1.0,
        ),
        ("xml", BOXES, "<box><id>1</id><title>a</title><open>0</open><sizes>3</sizes></box>", 1.0),
        ("xml", BOXES, "<box><id>x</id><title>a</title><open>0</open><sizes>3</sizes></box>", 0.0),
        ("xml", BOXES, "<box><id/><title>a</title><open>0</open><sizes>3</sizes></box>", 0.0),
        ("xml", BOXES, "<box><id>1</id>", 0.0),
        ("xml", {}, '<!DOCTYPE a [<!ENTITY b SYSTEM "/etc/passwd">]><a>&b;</a>', 0.0),
        ("csv", TABLE, 'id,price,title\n1,2.5,"a, b"\n2,,\n', 1.0),
        ("csv", TABLE, "id,price,title\none,2.5,a\n", 0.0),
        ("csv", TABLE, "id,price,title\n1,2.5,a,b\n", 0.0),
        ("csv", TABLE, "id,price\n1,2.5\n", 0.0),
        ("csv", TABLE, 'id,price,title\n1,2.5,"a', 0.0),
    ],
)
def test_structured_output_of_other_kinds(
    children: ChildPool, kind: str, schema: dict[str, Any], text: str, reward: float
) -> None:
    row = {"schema_str": json.dumps(schema), "schema_type": kind}
    domain = StructuredOutput(children)
    verdict = ask(domain, dict(domain.parse(row)), text)
    assert verdict.error is None
    assert verdict.reward == reward


def test_yaml_that_grows_without_end_is_a_wrong_answer(hasty: ChildPool) -> None:
    verdict = ask(StructuredOutput(hasty), {"schema": BOX, "kind": "yaml"}, LAUGHS)
    assert (verdict.reward, verdict.fault) == (0.0, "answer"), verdict


def test_schemas_are_made_strict_where_objects_are_described() -> None:
    leaf = {"type": "object", "properties": {"a": {}}}
    made = {**leaf, "required": ["a"], "additionalProperties": False}
    schema = {
        "$defs": {"x": leaf},
        "properties": {"properties": leaf, "required": {"type": "string"}},
        "items": [leaf],
        "anyOf": [leaf],
        "allOf": [leaf],
        "not": leaf,
    }
    found = strict(schema)
    assert found["$defs"]["x"] == made
    assert found["properties"]["properties"] == made
    assert found["properties"]["required"] == {"type": "string"}
    assert found["required"] == ["properties", "required"]
    assert found["items"] == found["anyOf"] == [made]
    assert (found["allOf"], found["not"]) == ([leaf], leaf)
    assert "required" not in leaf, "the schema given stays as it was"


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"$ref": "http://localhost:1/schema.json"}, "Unresolvable"),
        ({"$ref": "file:///etc/passwd"}, "Unresolvable"),
        ({"type": "no-such-type"}, "SchemaError"),
    ],
)
def test_schemas_that_cannot_be_used_are_errors(
    children: ChildPool, schema: dict[str, Any], error: str
) -> None:
    verdict = ask(StructuredOutput(children), {"schema": schema}, "{}")
    assert verdict.reward is None
    assert error in str(verdict.error)


def test_local_references(children: ChildPool) -> None:
    schema = {
        "$ref": "#/$defs/p",
        "$defs": {"p": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
    domain = StructuredOutput(children)
    assert ask(domain, {"schema": schema}, '{"a": 1}').reward == 1.0
    assert ask(domain, {"schema": schema}, "{}").reward == 0.0


class TestChildren:
    """Hang, crash, kill: an error within bounds, and the next call works."""

    def test_a_hang(self) -> None:
        pool = ChildPool(timeout_s=0.3)
        start = time.monotonic()
        with pytest.raises(ChildHostError, match=r"killed after 1\.2 s of wall time"):
            pool.call("time:sleep", 1000)
        assert time.monotonic() - start < 10
        assert pool.call("math:sqrt", 9) == 3.0
        pool.close()

    def test_a_loop(self) -> None:
        pool = ChildPool(timeout_s=1.0)
        with pytest.raises(ChildError, match=r"killed after 1 s of CPU time") as error:
            pool.call("builtins:sum", [[0] * 2] * 3 * 10**5, [])
        assert not isinstance(error.value, ChildHostError)
        assert pool.call("math:sqrt", 9) == 3.0
        pool.close()

    def test_a_check_without_a_cpu_is_repeated_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first try sleeps; the second waits for the check beside it, and finishes."""
        (tmp_path / "slow_once.py").write_text(
            "import os, time\n"
            "def first(path):\n"
            "    if not os.path.exists(path):\n"
            "        with open(path + '.partial', 'w') as file:\n"
            "            file.write(str(os.getpid()))\n"
            "        os.rename(path + '.partial', path)\n"
            "        time.sleep(100)\n"
            "    return time.monotonic()\n"
            "def beside(pid):\n"
            "    try:\n"
            "        while not os.kill(pid, 0):\n"
            "            time.sleep(0.01)\n"
            "    except ProcessLookupError:\n"
            "        time.sleep(0.2)\n"
            "    return time.monotonic()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        mark = tmp_path / "mark"
        pool = ChildPool(2, timeout_s=0.75)
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(pool.call, "slow_once:first", str(mark))
            while not mark.exists():
                assert not first.done()
                time.sleep(0.01)
            # Its limit is longer than what is left of the first one's.
            time.sleep(0.75)
            beside = threads.submit(pool.call, "slow_once:beside", int(mark.read_text()))
            assert first.result() > beside.result()
        pool.close()

    def test_several_checks_run_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each waits for the others, whatever else the machine does."""
        count = EnvConfig().check_workers
        (tmp_path / "meeting.py").write_text(
            "import os, time\n"
            "def meet(folder, number, count):\n"
            "    open(f'{folder}/{number}', 'w').close()\n"
            "    while len(os.listdir(folder)) < count:\n"
            "        time.sleep(0.01)\n"
            "    return number\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        folder = tmp_path / "arrived"
        folder.mkdir()
        pool = ChildPool(count, timeout_s=20.0)
        with ThreadPoolExecutor(count) as threads:
            calls = [
                threads.submit(pool.call, "meeting:meet", str(folder), number, count)
                for number in range(count)
            ]
            assert [call.result() for call in calls] == list(range(count))
        pool.close()

    def test_a_crash(self) -> None:
        pool = ChildPool()
        with pytest.raises(ChildError, match="died with status 7"):
            pool.call("os:_exit", 7)
        with pytest.raises(ChildError, match="died with status -6"):
            pool.call("os:abort")
        assert pool.call("math:sqrt", 9) == 3.0
        pool.close()

    def test_an_exception(self) -> None:
        pool = ChildPool()
        with pytest.raises(ChildError, match=r"math:sqrt: ValueError: math domain error"):
            pool.call("math:sqrt", -1)
        with pytest.raises(ChildError, match="ModuleNotFoundError"):
            pool.call("no_such_module:f")
        assert pool.call("math:sqrt", 9) == 3.0
        pool.close()

    def test_too_much_memory(self) -> None:
        pool = ChildPool(memory_mib=256)
        with pytest.raises(ChildError, match="MemoryError"):
            pool.call("operator:mul", "x", 1 << 30)
        assert pool.call("math:sqrt", 9) == 3.0
        pool.close()

    def test_a_kill_in_a_call(self) -> None:
        pool = ChildPool(timeout_s=60.0)
        pool.call("time:sleep", 0)
        (child,) = pool.process_ids()
        kill = threading.Timer(0.2, os.kill, (child, signal.SIGKILL))
        kill.start()
        start = time.monotonic()
        with pytest.raises(ChildError, match="died with status -9"):
            pool.call("time:sleep", 60)
        assert time.monotonic() - start < 30
        kill.join()
        assert pool.call("math:sqrt", 9) == 3.0
        pool.close()

    def test_what_a_check_prints_is_no_answer(self) -> None:
        pool = ChildPool()
        assert pool.call("builtins:print", '["ok", 1]') is None
        pool.close()

    def test_closing_leaves_no_process(self) -> None:
        pool = ChildPool()
        pool.call("math:sqrt", 9)
        (child,) = pool.process_ids()
        pool.close()
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
        assert pool.process_ids() == []

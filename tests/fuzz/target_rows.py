"""Rows of SFT, of every environment, and of repair tasks: JSON Lines, arrays and Parquet."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from fuzz.harness import Target
from fuzz.mutations import Choices, json_bytes, mutated, spoiled
from fuzz.row_seeds import FOLDERS, RL, SFT
from helpers.data import sentencepiece_tokenizer
from helpers.graded import WrittenJudge
from helpers.released import FORMS

from nemocascade.data.chat_template import encode
from nemocascade.data.readers import find_sources
from nemocascade.data.tokenization import ChunkTokenizer, read_conversations, read_sources
from nemocascade.envs.base import Domain
from nemocascade.envs.registry import make_environments
from nemocascade.judges.prompts import comparison_text, grade_text
from nemocascade.recipe.data import DataConfig
from nemocascade.recipe.envs import EnvConfig, SandboxConfig
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.prompts import encode_prompts
from nemocascade.runtime.row_errors import BadRows, DataError
from nemocascade.runtime.row_files import report_skipped
from nemocascade.types import Answer, Prompt, Verdict

Case = tuple[str, bytes]
"""Name of a file, and its content."""

PROGRAMS = ("code", "swe_agentless", "swe_agentic")
_ROWS = 10_000
_INSIDE = re.compile(
    r"\b(TypeError|KeyError|IndexError|AttributeError|RecursionError|NameError|UnboundLocalError"
    r"|AssertionError|ZeroDivisionError|OverflowError|Unicode\w+Error|NotImplementedError)\b"
)


class InsideError(Exception):
    """A verdict hides an error of the verifier itself."""


@functools.cache
def environments() -> dict[str, Domain]:
    """All domains, with a judge that knows language."""
    judge = WrittenJudge(Answer(f"{comparison_text(4, 2, 2)} {grade_text(0.5)}"))
    sandbox = SandboxConfig(workers=1, time_s=2.0)
    config = EnvConfig(
        check_workers=1, check_timeout_s=1.0, if_language_check="letters", sandbox=sandbox
    )
    return make_environments(config, judge=judge)


def sound(verdict: Verdict) -> None:
    """Raise InsideError for an error verdict that hides a mistake of the verifier."""
    if verdict.error and _INSIDE.search(verdict.error):
        raise InsideError(verdict.error)


def _file(choices: Choices, seeds: tuple[Any, ...]) -> Case:
    rows = [mutated(choices, seeds) for _ in range(1 + choices.below(2))]
    if choices.chance(8):
        return "rows.json", spoiled(choices, json_bytes(rows, indent=1))
    return "rows.jsonl", spoiled(choices, b"\n".join(map(json_bytes, rows)) + b"\n")


def _sft(choices: Choices) -> tuple[str, bytes, DataConfig]:
    settings = DataConfig(
        thinking=choices.chance(2),
        max_bad_rows=choices.of((0, _ROWS)),
        system_field=choices.of(("", "system", "absent")),
        format=choices.of(("auto", "auto", "messages", "qa", "nemotron", "sharegpt")),
    )
    return (*_file(choices, SFT), settings)


def _read_sft(case: tuple[str, bytes, DataConfig], folder: Path) -> None:
    name, data, settings = case
    (folder / name).write_bytes(data)
    (folder / "notes.txt").touch()
    report_skipped(folder)
    sources = find_sources([str(folder)])
    tokenizer = sentencepiece_tokenizer()
    bad = BadRows(settings.max_bad_rows)
    for _, conversation in read_conversations(sources, settings, bad):
        try:
            segments = tokenizer.template.render(conversation, thinking=settings.thinking)
        except DataError:
            continue
        ids, trained = encode(segments, tokenizer)
        assert len(ids) == len(trained)
        assert any(trained)
        tokenizer.decode(ids).encode()
    formats, chunks = read_sources(sources, settings)
    for chunk in chunks:
        found = ChunkTokenizer(formats, settings, tokenizer)(chunk)
        assert found.lengths.sum() == len(found.tokens)


COLUMNS: Mapping[str, Any] = {
    "time": pyarrow.array([0], pyarrow.timestamp("us")),
    "bytes": pyarrow.array([b"\xff"]),
    "price": pyarrow.array([1], pyarrow.decimal128(20, 2)),
    "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "kind": pyarrow.array(["a"]).dictionary_encode(),
    "nan": pyarrow.array([float("nan")]),
    "huge": pyarrow.array([2**64 - 1], pyarrow.uint64()),
    "half": pyarrow.array([1.5], pyarrow.float16()),
    "long": pyarrow.array([["a"]], pyarrow.large_list(pyarrow.large_string())),
    "no": pyarrow.array([None], pyarrow.null()),
    "nested": pyarrow.array([{"a": {"b": [None, {"c": 1}]}}]),
    "text": pyarrow.Array.from_buffers(
        pyarrow.string(),
        1,
        [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")],
    ),
}
"""Columns of one row, of types that JSON has and that it has not; `text` is not UTF-8."""


def _parquet(choices: Choices) -> Case:
    row = mutated(choices, SFT)
    rows = [{str(k): v for k, v in row.items()}] if isinstance(row, dict) else []
    table = _table(rows) or pyarrow.table({"question": ["a"], "answer": ["b"]})
    for _ in range(choices.below(3) if len(table) == 1 else 0):
        name = choices.of(list(COLUMNS))
        table = table.append_column(choices.of((name, "messages", "answer")), COLUMNS[name])
    sink = pyarrow.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(table, sink)
    except pyarrow.ArrowException:
        return "rows.parquet", b""
    return "rows.parquet", spoiled(choices, sink.getvalue().to_pybytes())


def _table(rows: list[dict[str, Any]]) -> Any:
    """The rows as a table; None if no type holds them."""
    try:
        return pyarrow.Table.from_pylist(rows) if rows else None
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return None


def _read_parquet(case: Case, folder: Path) -> None:
    _read_sft((*case, DataConfig(max_bad_rows=_ROWS)), folder)


@functools.cache
def _seeds() -> dict[str, tuple[Any, ...]]:
    """Rows by domain: every published form, and those of this project."""
    found = {domain: list(rows) for domain, rows in RL.items()}
    for domain, released in FORMS.values():
        found[domain] += [one.row for one in released]
    return {domain: tuple(rows) for domain, rows in found.items()}


def _rl(choices: Choices) -> tuple[str, str, bytes]:
    domain = choices.of(list(RL))
    return domain, *_file(choices, _seeds()[domain])


def _read_rl(case: tuple[str, str, bytes], folder: Path) -> None:
    domain, name, data = case
    for path, content in FOLDERS.items() if domain.startswith("swe") else ():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / name).write_bytes(data)
    environment = environments()[domain]
    others = [e for e in environments().values() if e is not environment]
    bad = BadRows(_ROWS)
    for prompt in environment.read(folder / name, bad.skip, others):
        _use(environment, prompt)


def _use(environment: Domain, prompt: Prompt) -> None:
    """Do what a stage does with a task before its first rollout."""
    encode_prompts([prompt], sentencepiece_tokenizer(), RolloutConfig())
    assert all(isinstance(form, str) for form in environment.forms(prompt))
    dummy = environment.dummy(prompt)
    session = environment.session(prompt)
    if session is not None:
        session.close()
    if dummy is not None and prompt.domain not in PROGRAMS:
        sound(environment.score(prompt, dummy))
        sound(environment.score(prompt, []))


TARGETS = (
    Target("rows of SFT", _sft, _read_sft, (DataError,), share=16),
    Target("rows in Parquet", _parquet, _read_parquet, (DataError,), share=6),
    Target("rows of RL", _rl, _read_rl, (DataError,), share=20),
)

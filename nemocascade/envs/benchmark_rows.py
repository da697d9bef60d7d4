r"""Rows of public benchmarks as they are published, in the form that the environments read.

Each function returns the row with the fields of its domain's own form, `prompt` among them. It
raises ValueError for a row that breaks its benchmark's form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from nemocascade.envs.base import last_boxed
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import find_files, read_rows
from nemocascade.runtime.turns import kind_of
from nemocascade.types import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STEPS_TO_BOX = r"Please reason step by step, and put your final answer within \boxed{}."
LETTER_TO_BOX = r"Choose the right option, and put its letter within \boxed{}."
WHOLE_FUNCTION = "Complete this function. Answer with the whole of it in a Python code block."
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


class Benchmark(NamedTuple):
    """A public benchmark. domain: scores its answers. fields: its rows hold all of these."""

    domain: str
    fields: tuple[str, ...]


BENCHMARKS = {
    "gsm8k": Benchmark("math", ("question", "answer")),
    "math": Benchmark("math", ("problem", "solution")),
    "mmlu_pro": Benchmark("multiple_choice", ("question", "options", "answer")),
    "humaneval": Benchmark("code", ("prompt", "test", "entry_point")),
    "ifeval": Benchmark("instruction_following", ("prompt", "instruction_id_list", "kwargs")),
    "ifbench": Benchmark("instruction_following", ("prompt", "instruction_id_list", "kwargs")),
}
"""Benchmarks by their names on the command line."""


def is_of(name: str, row: Row) -> bool:
    """Return True if the row has the benchmark's fields and not those of another one."""
    if name == "gsm8k" and "options" in row:
        return False
    return all(field in row for field in BENCHMARKS[name].fields)


def check_rows(name: str, path: str) -> None:
    """Raise DataError if a file is missing, or a row has no value for one of the fields of the
    benchmark's published rows."""
    needed = BENCHMARKS[name].fields
    bad = [
        f"{where} has no {', '.join(missing)}"
        for file in find_files(path)
        for where, row in read_rows(file)
        if isinstance(row, Mapping)
        if (missing := [field for field in needed if row.get(field) is None] or _marks(name, row))
    ]
    if bad:
        raise DataError(
            f"{path}: {len(bad)} rows are not of {name}, whose rows have {', '.join(needed)}: "
            f"{bad[0]}; name another file, or another benchmark of {', '.join(BENCHMARKS)}"
        )


def _marks(name: str, row: Row) -> list[str]:
    """Name the mark that the answer of a row of GSM8K needs, if it has none."""
    has_mark = name != "gsm8k" or "####" in str(row["answer"])
    return [] if has_mark else ["#### before the number that ends answer"]


def gsm8k_row(row: Row) -> dict[str, Any]:
    """GSM8K (arXiv 2110.14168): `question`, and `answer`, the steps and `#### number`."""
    question, answer = _text(row, "question"), _text(row, "answer")
    steps, mark, number = answer.rpartition("####")
    number = number.strip().replace(",", "")
    if not (mark and number) or "\n" in number or not f"\n{steps}".endswith("\n"):
        raise ValueError("answer does not end with a line '#### number', as GSM8K's do")
    worked = _CALCULATOR.sub("", steps).strip()
    return {
        "prompt": f"{question.strip()}\n\n{STEPS_TO_BOX}",
        "expected_answer": number,
        "worked": f"{worked}\nThe answer is \\boxed{{{number}}}.",
    }


def math_row(row: Row) -> dict[str, Any]:
    r"""MATH (arXiv 2103.03874): `problem`, `solution` with a box; in MATH-500 also `answer`."""
    problem, solution = _text(row, "problem"), _text(row, "solution")
    expected = row.get("answer") or last_boxed(solution)
    if not expected:
        raise ValueError(r"solution holds no \boxed{}, and the row has no answer")
    prompt = f"{problem.strip()}\n\n{STEPS_TO_BOX}"
    return {"prompt": prompt, "expected_answer": expected, "worked": solution.strip()}


def mmlu_pro_row(row: Row) -> dict[str, Any]:
    """MMLU-Pro (arXiv 2406.01574): `question`, `options`, a list of texts, and `answer`, a
    letter."""
    question, answer = _text(row, "question"), _text(row, "answer").strip().upper()
    options = row["options"]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"options must be a list of 2 to {len(LETTERS)} texts")
    index = row.get("answer_index")
    if isinstance(index, int) and LETTERS[index : index + 1] != answer:
        raise ValueError(f"answer_index({index}) is not that of answer({answer})")
    lettered = dict(zip(LETTERS, map(str, options), strict=False))
    shown = "\n".join(f"{letter}. {text}" for letter, text in lettered.items())
    return {
        "prompt": f"{question.strip()}\n{shown}\n\n{LETTER_TO_BOX}",
        "options": [{letter: text} for letter, text in lettered.items()],
        "expected_answer": answer,
    }


def humaneval_row(row: Row) -> dict[str, Any]:
    """HumanEval (arXiv 2107.03374): `prompt`, a function without its body, `test`, which defines
    `check`, and `entry_point`, the function's name."""
    prompt, test, name = (_text(row, field) for field in BENCHMARKS["humaneval"].fields)
    if not name.isidentifier():
        raise ValueError(f"entry_point({name[:80]!r}) is not the name of a function")
    if "def check(" not in test:
        raise ValueError("test defines no function check, as HumanEval's do")
    asked = f"{WHOLE_FUNCTION}\n\n```python\n{prompt.strip()}\n```"
    return {"prompt": asked, "start": prompt}


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text, it is {kind_of(value)}")
    return value

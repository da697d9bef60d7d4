"""Declared fields of released rows: what an environment reads, and what it knowingly ignores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemocascade.envs.prompt_rows import METADATA
from nemocascade.runtime.logging import LOGGER
from nemocascade.types import Row

_ABSENT: tuple[Any, ...] = (None, "", [], {})
_Tree = dict[str, "_Tree"]


@dataclass(frozen=True)
class RowForm:
    """A form of rows: what is done with each field, by its name, with dots for inner fields.

    read: fields that make the prompt or decide the verdict. No other field can be read. ignored:
    fields that decide nothing; `a.*` means all further fields inside `a`. rejected: fields
    that decide verdicts in a way that is unknown here; a row with one is rejected.
    """

    name: str
    read: Mapping[str, str]
    ignored: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)


_ID, _ORIGIN, _KIND = "a name of the row", "origin of the row", "a class of rows, for statistics"
_SAMPLING = "the run's own settings decide"
EVERY_ROW = RowForm(
    "rows of every environment",
    read={
        "responses_create_params.input": "the turns before the answer; precedes `prompt`",
        "responses_create_params.instructions": "the system turn",
        "responses_create_params.tools": "tools that the model may call",
        "prompt": "a text, or the turns before the answer",
        "pass_rate": "share of earlier attempts that were right, 0..1; filters tasks",
    },
    ignored={
        **dict.fromkeys(
            ("id", "key", "uid", "uuid", "hash_id", "task_id", "question_id", "problem_id"), _ID
        ),
        **dict.fromkeys(("source", "dataset", "dataset_name", "dataset_split", "split"), _ORIGIN),
        **dict.fromkeys(("license", "used_in", "created_at", "agent_ref"), _ORIGIN),
        **dict.fromkeys(
            ("category", "subcategory", "domain", "topic", "subject", "difficulty"), _KIND
        ),
        **dict.fromkeys(("subset", "subset_for_metrics", "metadata.*"), _KIND),
        **{
            f"responses_create_params.{name}": _SAMPLING
            for name in (
                *("max_output_tokens", "max_tool_calls", "model", "parallel_tool_calls"),
                *("reasoning", "store", "stream", "temperature", "top_p", "metadata"),
                "tool_choice",
            )
        },
    },
)


class DeclaredRow(dict[str, Any]):
    """A row that holds only declared fields; to ask for another one is an error of the code."""

    def __init__(self, row: Row, tree: _Tree, domain: str) -> None:
        super().__init__(
            {
                name: DeclaredRow(value, tree[name], domain)
                if tree[name] and isinstance(value, Mapping)
                else value
                for name, value in row.items()
                if name in tree
            }
        )
        self._tree, self._domain = tree, domain

    def __contains__(self, name: object) -> bool:
        self._check(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self._check(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._check(name)
        return super().get(name, default)

    def _check(self, name: object) -> None:
        if name not in self._tree:
            raise LookupError(f"{self._domain} reads {name!r}, which its row_forms do not declare")


class RowFields:
    """Fields of the rows of one source: the declared ones are passed on, others are counted."""

    def __init__(self, domain: str, forms: Sequence[RowForm]) -> None:
        self._domain = domain
        self._declares = bool(forms)
        forms = (EVERY_ROW, *forms)
        self._read = _tree(name for form in forms for name in form.read)
        self._known = _tree(n for f in forms for n in (*f.read, *f.ignored, *f.rejected))
        self._rejected = {name: why for form in forms for name, why in form.rejected.items()}
        self._unknown: Counter[str] = Counter()

    def declared(self, row: Row) -> Row:
        """Return the fields of a row that may be read; all of them without a declaration.

        Raises ValueError for a row with a field that is rejected.
        """
        if not self._declares:
            return row
        for name, why in self._rejected.items():
            if any(_value(row, n) not in _ABSENT for n in (name, f"{METADATA}.{name}")):
                raise ValueError(f"field {name!r} is not supported: {why}")
        self._unknown.update(_unknown(row, self._known))
        return DeclaredRow(row, self._read, self._domain)

    def prepared(self, row: Row) -> Row:
        """Return a row after `Domain.prepare`, with the fields that this has added."""
        if not self._declares:
            return row
        added: _Tree = {name: {} for name in row if name not in self._read}
        return DeclaredRow(row, self._read | added, self._domain)

    def report(self, path: Path) -> None:
        """Name the fields that nothing reads, once for all rows of a path."""
        if self._unknown:
            names = ", ".join(f"{name!r} in {n} rows" for name, n in self._unknown.items())
            LOGGER.warning(
                "%s: fields that %s does not know, and that may change a verdict: %s; "
                "docs/your_data.md has those it reads",
                path,
                self._domain,
                names,
            )


def _tree(names: Iterator[str]) -> _Tree:
    tree: _Tree = {}
    for name in names:
        inner = tree
        for part in name.split("."):
            inner = inner.setdefault(part, {})
    return tree


def _value(row: Row, name: str) -> Any:
    found: Any = row
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _unknown(row: Row, tree: _Tree) -> Iterator[str]:
    """Yield the names of fields that are set and not declared."""
    for name, value in row.items():
        if value in _ABSENT:
            continue
        inner = tree.get(name, tree.get("*"))
        if name == METADATA and isinstance(value, Mapping):
            inner = {**tree, **(inner or {})}
        if inner is None:
            yield name
        elif inner and isinstance(value, Mapping):
            yield from (f"{name}.{found}" for found in _unknown(value, inner))

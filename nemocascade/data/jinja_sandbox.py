"""Sandbox of jinja chat templates, with bounded time and size.

Templates are downloaded code. They run in jinja2's immutable sandbox, which keeps them from
attributes that lead out of it and from changing their arguments. Every loop and call checks a time
limit, and everything that is printed, joined or returned counts towards a size limit.

The environment is that of transformers' `apply_chat_template`: block trimming, loop controls,
`tojson` without HTML escapes, `raise_exception`, `strftime_now` and `{% generation %}`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20
"""Characters of a template."""
MAX_CHARACTERS = 1 << 29
"""Characters and list entries that one rendering may produce, intermediate values included."""
MAX_SECONDS = 5.0
"""CPU time of one rendering."""
MAX_NUMBER = 100_000
"""Largest number that a template may pass to a function, such as a width or a count."""

_SIZED = (str, list, tuple, dict, range)
_WIDE = re.compile(r"\d{6}")


@dataclass
class Rendering:
    """One rendering: what it has used, and the messages whose text it marks.

    messages: index by the id() of each message; empty if nothing is marked. marked: loops over
        messages that have started.
    """

    mark: str
    messages: Mapping[int, int]
    marked: set[int] = field(default_factory=set)
    characters: int = 0
    values: int = 0
    deadline: float = field(default_factory=lambda: time.thread_time() + MAX_SECONDS)

    def spend(self, value: object) -> None:
        if isinstance(value, _SIZED):
            self.characters += len(value)
        if self.characters > MAX_CHARACTERS:
            raise jinja2.TemplateError(f"it makes more than {MAX_CHARACTERS} characters")
        self.values += 1
        if self.values % 16 == 0 and time.thread_time() > self.deadline:
            raise jinja2.TemplateError(f"it runs for more than {MAX_SECONDS:g} s")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The sandbox. Templates compiled by it report loops, calls and outputs to the current run."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # The optimiser computes constants while it compiles, where no limit holds.
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._runs = threading.local()
        self.filters["tojson"] = _to_json
        self.filters["format"] = _formatted
        self.filters = {name: self._limited(f) for name, f in self.filters.items()}
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)

    @contextmanager
    def running(self, run: Rendering) -> Iterator[None]:
        """Account the templates that this thread renders to `run`."""
        self._runs.current = run
        try:
            yield
        finally:
            self._runs.current = None

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        instrumented: nodes.Template = _Instrument().visit(tree)
        instrumented.set_environment(self)
        return instrumented

    def spend(self, value: Any) -> Any:
        """Count `value` towards the limits and return it."""
        run = getattr(self._runs, "current", None)
        if run is not None:
            run.spend(value)
        return value

    def begin(self, loop: int, *targets: Any) -> str:
        """The mark at the start of a loop's body; empty if it is not a loop over messages."""
        run: Rendering = self._runs.current
        run.spend(None)
        index = next((run.messages[id(t)] for t in targets if id(t) in run.messages), None)
        if index is None:
            return ""
        run.marked.add(loop)
        return f"{run.mark}{loop}:{index};"

    def finish(self, loop: int) -> str:
        """Return the mark after a loop, if it was one over messages."""
        run: Rendering = self._runs.current
        return f"{run.mark}{loop}:;" if loop in run.marked else ""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function of the template. The parameters' names leave all others to `kwargs`."""
        # The sandbox wraps str.format.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if owner is __self:
            return __obj(*args)
        _check_numbers((*args, *kwargs.values()))
        if isinstance(owner, str) and __obj.__name__ in ("format", "format_map"):
            _check_widths(owner)
        return __self.spend(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` unless the result would be huge."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers:
            _check_numbers((left.bit_length() * right,))
        elif operator == "*" and numbers:
            _check_numbers((left.bit_length() + right.bit_length(),))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, _SIZED) and isinstance(times, int):
                    self.spend(range(max(0, len(value) * times)))
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
            if "*" in left:
                _check_numbers(right if isinstance(right, tuple) else (right,))
        return self.spend(super().call_binop(context, operator, left, right))

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            _check_numbers((*args[1:], *kwargs.values()))
            return self.spend(function(*args, **kwargs))

        return limited


def _formatted(value: str, *args: Any, **kwargs: Any) -> str:
    """Format as `%` does, unless a width is huge."""
    _check_widths(value)
    return value % (kwargs or args)


class _Instrument(NodeTransformer):
    """Inserts calls of `begin` and `finish` around loop bodies, and of `spend` at every value that
    is printed or joined. Attributes of the environment cannot be redefined by a template."""

    def __init__(self) -> None:
        self._loops = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802
        self._loops += 1
        loop, line = nodes.Const(self._loops), node.lineno
        self.generic_visit(node)
        names = [
            n for n in [node.target, *node.target.find_all(nodes.Name)] if type(n) is nodes.Name
        ]
        begin = _call("begin", line, loop, *(nodes.Name(n.name, "load") for n in names))
        node.body.insert(0, nodes.Output([begin]).set_lineno(line))
        return [node, nodes.Output([_call("finish", line, loop)]).set_lineno(line)]

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [
            n if isinstance(n, nodes.TemplateData) else _call("spend", n.lineno, n)
            for n in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("spend", node.lineno, node)


def _call(name: str, line: int, *arguments: nodes.Expr) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
    call.set_lineno(line)
    return call


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which transformers reads, renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _check_numbers(values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise jinja2.TemplateError(f"it passes {value:.3g}, at most {MAX_NUMBER} are allowed")


def _check_widths(form: str) -> None:
    if _WIDE.search(form):
        raise jinja2.TemplateError(f"it formats wider than {MAX_NUMBER}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace jinja2's `tojson`, which escapes for HTML and so would change the text."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

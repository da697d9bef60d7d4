"""Command lines of settings: parsing, and help by section. Needs no torch.

A section is a field of settings that are settings themselves, such as `data` of a recipe. Large
settings show their own options and a line for each section; `--help SECTION` shows a section's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_origin

import tyro

from nemocascade.recipe.rules import hints_of
from nemocascade.runtime.errors import record_exit_code

VALUES = (tyro.conf.FlagConversionOff,)
"""Form of the settings of recipes: a boolean is given with its value, `--resume False`."""
NAME_WIDTH = 24
"""Columns of a section's name in the list of sections."""


class Option(NamedTuple):
    """A field as the command line names it. name: without dashes; empty for settings whose fields
    are beside those of their parent."""

    name: str
    field: str
    hint: Any
    value: Any

    @property
    def is_section(self) -> bool:
        """True for settings, and for a list of them."""
        return dataclasses.is_dataclass(self.value) or (
            isinstance(self.value, tuple)
            and bool(self.value)
            and all(map(dataclasses.is_dataclass, self.value))
        )

    @property
    def is_positional(self) -> bool:
        """True for an argument that has no name on the command line."""
        return any(mark is tyro.conf.Positional for mark in _marks(self.hint))


def parse_settings[S](
    kind: type[S],
    arguments: Sequence[str] | None = None,
    *,
    default: S | None = None,
    prog: str | None = None,
    config: tuple[Any, ...] = VALUES,
) -> S:
    """The settings that the arguments, by default those of the process, make of `default`.

    Unknown names end the program with exit code 2 and a hint, `--help`, `--help SECTION` and
    `--help-all` after the help is printed.
    """
    found, _ = _parse(kind, arguments, default, prog, config, keep_unknown=False)
    return found


def parse_known_settings[S](
    kind: type[S],
    arguments: Sequence[str],
    *,
    prog: str,
    config: tuple[Any, ...] = (),
) -> tuple[S, list[str]]:
    """Parse like `parse_settings`; also returns the arguments that the settings do not have."""
    return _parse(kind, arguments, None, prog, config, keep_unknown=True)


def _parse[S](
    kind: type[S],
    arguments: Sequence[str] | None,
    default: S | None,
    prog: str | None,
    config: tuple[Any, ...],
    *,
    keep_unknown: bool,
) -> tuple[S, list[str]]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prog = prog or Path(sys.argv[0]).name
    if any(a in ("-h", "--help") for a in arguments):
        try:
            _print_help(default or unfilled(kind), arguments, prog, config)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough; Python flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    arguments = ["--help" if a == "--help-all" else a for a in arguments]
    try:
        found: Any = tyro.cli(
            kind,
            default=default,
            args=arguments,
            prog=prog,
            description=inspect.getdoc(kind),
            config=config,
            return_unknown_args=keep_unknown,  # type: ignore[call-overload]
        )
    except SystemExit as error:
        # A job's script must not start the same arguments again.
        if isinstance(error.code, int) and error.code:
            record_exit_code(error.code)
        # An unknown option in front of an argument without a name takes it as its value, and then
        # only the argument is said to be missing.
        is_first = bool(arguments) and arguments[0].startswith("--")
        if error.code == 2 and default is None and is_first:
            _show_misspelt(kind, arguments, prog)
        raise
    return found if keep_unknown else (found, [])


def _show_misspelt(kind: type[object], arguments: Sequence[str], prog: str) -> None:
    options = list(leaves(unfilled(kind)))
    names = {f"--{option.name}" for option in options}
    given = [a.partition("=")[0].replace("_", "-") for a in arguments if a.startswith("--")]
    unknown = [name for name in given if name not in names]
    near = nearest(unknown, kind)
    if near and any(option.is_positional for option in options):
        print(f"{prog} has {' and '.join(near)}, not {' and '.join(unknown)}", file=sys.stderr)


def unfilled[S](kind: type[S]) -> S:
    """Settings with their defaults, and tyro's mark where a field has none."""
    required = {
        f.name: tyro.MISSING
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.default is f.default_factory is dataclasses.MISSING
    }
    return kind(**required)


def options_of(settings: object) -> Iterator[Option]:
    """The fields of settings in order, as the command line names them."""
    kind_of: Any = type(settings)
    hints = hints_of(kind_of)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        hint = hints[field.name]
        value = getattr(settings, field.name)
        marks = _marks(hint)
        if tyro.conf.Suppress in marks:
            continue
        named = [m.name for m in marks if getattr(m, "name", None) is not None]
        name = named[0] if named else field.name.replace("_", "-")
        if name:
            yield Option(name, field.name, hint, value)
        else:
            yield from options_of(value)


def leaves(settings: object, prefix: str = "") -> Iterator[Option]:
    """Every option that sets one value, with its full dotted name."""
    for option in options_of(settings):
        name = prefix + option.name
        if not option.is_section:
            yield option._replace(name=name)
        elif isinstance(option.value, tuple):
            for number, value in enumerate(option.value):
                yield from leaves(value, f"{name}.{number}.")
        else:
            yield from leaves(option.value, f"{name}.")


def _marks(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _print_help(
    settings: object, arguments: Sequence[str], prog: str, config: tuple[Any, ...]
) -> None:
    """Print the help of the settings, or of the section that the arguments name."""
    at = next(i for i, a in enumerate(arguments) if a in ("-h", "--help"))
    named = arguments[at + 1] if len(arguments) > at + 1 else ""
    if not any(option.is_section for option in options_of(settings)):
        # Another argument of the command, such as its recipe.
        named = ""
    path = tuple(named.strip("-").replace("_", "-").split(".")) if named else ()
    node: Any = settings
    for depth, name in enumerate(path):
        options = {o.name: o for o in options_of(node)} if dataclasses.is_dataclass(node) else {}
        if name not in options:
            _reject(prog, path[:depth], name, [o for o in options.values() if o.is_section])
        node = options[name].value
    sections = list(_sections(node)) if dataclasses.is_dataclass(node) else []
    with contextlib.suppress(SystemExit):
        tyro.cli(
            type(shown := _narrowed(settings, path)),
            default=shown,
            args=["--help"],
            prog=prog,
            description=inspect.getdoc(type(node if sections else settings)),
            config=config,
        )
    if sections:
        print(_section_list(sections, path, sum(1 for _ in leaves(settings))))


def _sections(settings: object, prefix: str = "") -> Iterator[Option]:
    """The sections of settings; in place of one that has only sections, these."""
    for option in options_of(settings):
        if not option.is_section:
            continue
        found = option._replace(name=prefix + option.name)
        single = dataclasses.is_dataclass(option.value)
        if single and all(inner.is_section for inner in options_of(option.value)):
            yield from _sections(option.value, f"{found.name}.")
        else:
            yield found


def _section_list(sections: Sequence[Option], path: tuple[str, ...], count: int) -> str:
    """A line for each section: its name, what it is about, and its number of options."""
    width = max(70, min(shutil.get_terminal_size().columns, 110))
    lines = ["sections:"]
    for option in sections:
        name = ".".join((*path, option.name))
        many = isinstance(option.value, tuple)
        about = type(option.value[0] if many else option.value).__doc__ or ""
        number = sum(1 for _ in leaves(_Holder(option.value)))
        head, ending = f"  {name:{NAME_WIDTH}} ", f" ({number})"
        left = width - len(head) - len(ending)
        lines.append(head + textwrap.shorten(about, left, placeholder=" ...") + ending)
    example = ".".join((*path, sections[0].name))
    lines += [
        "",
        f"The number of options is in brackets. `--help SECTION`, such as `--help {example}`,",
        f"documents those of a section, `--help-all` all {count:,}.",
    ]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Holder:
    """A section as the only field of settings."""

    section: Any


def _narrowed(settings: Any, path: tuple[str, ...]) -> Any:
    """The settings with only the options of a section in their help: those that set one value, or
    all of a section without sections."""
    changed: list[tuple[str, Any, Any]] = []
    suppressed: Any = tyro.conf.Suppress
    kind_of: Any = type(settings)
    hints = hints_of(kind_of)
    shown = {o.field: o for o in options_of(settings)}
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        option = shown.get(field.name)
        if option is None:
            # Flattened settings, or suppressed already.
            if dataclasses.is_dataclass(value) and tyro.conf.Suppress not in _marks(hint):
                value = _narrowed(value, path)
                hint = Annotated[(type(value), *_marks(hint))]
        elif path and option.name == path[0] and dataclasses.is_dataclass(value):
            value = _narrowed(value, path[1:])
            hint = type(value)
        elif (path and option.name != path[0]) or (not path and option.is_section):
            hint = suppressed[hint]
        else:
            continue
        changed.append((field.name, hint, dataclasses.field(default_factory=_constant(value))))
    kind = dataclasses.make_dataclass(
        type(settings).__name__, changed, bases=(type(settings),), frozen=True
    )
    kind.__doc__ = type(settings).__doc__
    return kind(
        **{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        | {name: made.default_factory() for name, _, made in changed}
    )


def _constant(value: Any) -> Any:
    return lambda: value


def nearest(arguments: Sequence[str], kind: type[object]) -> list[str]:
    """The options of settings that are most like one of the arguments, at most two each."""
    names = [f"--{option.name}" for option in leaves(unfilled(kind))]
    given = [a.partition("=")[0] for a in arguments if a.startswith("--")]
    return [near for name in given for near in difflib.get_close_matches(name, names, 2, 0.75)]


def _reject(prog: str, path: tuple[str, ...], name: str, sections: Sequence[Option]) -> NoReturn:
    known = [".".join((*path, o.name)) for o in sections]
    wrong = ".".join((*path, name))
    near = difflib.get_close_matches(wrong, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    print(
        f"error: {prog} --help {wrong}: no such section: {meant}use one of {', '.join(known)}, "
        "or --help alone",
        file=sys.stderr,
    )
    raise SystemExit(2)

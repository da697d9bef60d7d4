"""Fenced code blocks of an answer, which of them is the program, and programs of several parts."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field

_FENCE = re.compile(r"(?P<run>`{3,}|~{3,})[ \t]*(?P<info>.*)")
_AFTER_TEXT = re.compile(r"`{3,}[\w+#-]*\s*")
"""A fence that may follow text in its line: more than a label would be more text."""
_PYTHON = re.compile(r"[{.\s]*(python|pypy|py)[\d.]*(?![\w+#-])", re.IGNORECASE)
_FUTURE_IMPORT = ["from", "__future__", "import"]
_MOST_TOKENS = 100
"""Tokens of a docstring, or of a `from __future__` import, which has at most the ten features that
Python knows. Each token costs the length of its line."""
_NESTED = 4
"""A fence indented by this much more than the opening one is text of the block (CommonMark)."""


@dataclass(slots=True)
class _Block:
    """A fenced block.

    run: its opening fence. info: the text after it. indent: column of the fence. is_opaque: fences
    inside are text; a Markdown block may hold a program, a program does not.
    """

    run: str
    info: str
    indent: int
    lines: list[str] = field(default_factory=list)
    is_python: bool = field(init=False)
    is_opaque: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_python = _PYTHON.match(self.info) is not None
        self.is_opaque = self.is_python or not self.info

    @property
    def source(self) -> str:
        """The lines without the indentation of the first one that is not blank."""
        first = next((line for line in self.lines if line.strip()), "")
        width = _indent(first)
        return "\n".join(line[min(width, _indent(line)) :] for line in self.lines)


def programs_of(text: str) -> list[str]:
    """Return the candidates for the program of an answer, the last one first choice.

    The last Python block is the only candidate if there is one. Otherwise those are all blocks
    with another label, then all without a label; the last that compiles is the program. An answer
    without a block is itself the candidate. The list is never empty.
    """
    blocks = _blocks(text)
    python = next((block for block in reversed(blocks) if block.is_python), None)
    if python is not None:
        return [python.source]
    sources = [block.source for block in sorted(blocks, key=lambda block: not block.info)]
    return [source for source in sources if source.strip()] or [text]


def joined_source(parts: Sequence[str]) -> str:
    """Join sources into one program that starts with the `from __future__` imports of them all.

    Python allows these imports only at the start of a program. Each is one wherever its part may
    have it; a later one stays where it is, and is the part's syntax error.
    """
    imports, rests = zip(*map(_split_future_imports, parts), strict=True)
    return "\n".join((*filter(None, imports), *rests))


def _split_future_imports(source: str) -> tuple[str, str]:
    """The lines with a part's `from __future__` imports, and the part with empty lines for them."""
    if "__future__" not in source:
        return "", source
    lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    imports: list[str] = []
    for first, end in _future_import_lines("\n".join(lines)):
        imports += lines[first:end]
        lines[first:end] = [""] * (end - first)
    return "\n".join(imports), "\n".join(lines)


def _future_import_lines(source: str) -> list[tuple[int, int]]:
    """First line and the one after the last of each import: those after an optional docstring and
    before other statements. The source is not compiled, and read only as far as that."""
    found: list[tuple[int, int]] = []
    words: list[str] = []
    start, may_be_docstring, strings = 0, True, 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            if token.type == tokenize.NEWLINE:
                if words:
                    found.append((start - 1, token.end[0]))
                words, may_be_docstring = [], False
            elif may_be_docstring and token.type == tokenize.STRING:
                strings += 1
                if strings > _MOST_TOKENS:
                    break
            else:
                start = start if words else token.start[0]
                words.append(token.string)
                expected = _FUTURE_IMPORT[: len(words)]
                if words[: len(expected)] != expected or len(words) > _MOST_TOKENS:
                    break
    except (tokenize.TokenError, SyntaxError, UnicodeEncodeError):
        pass  # running the program shows its error
    return found


def _blocks(text: str) -> list[_Block]:
    """Blocks in the order of their openings; one that is never closed runs to the end.

    A fence is a line of three or more backticks or tildes with an optional label. Text may precede
    an opening fence and, in the last line of the code, a closing one. A new label at the level of
    an open block starts the next block.
    """
    found: list[_Block] = []
    stack: list[_Block] = []  # open blocks, the outermost first
    for raw in text.split("\n"):
        line = raw.removesuffix("\r")
        top = stack[-1] if stack else None
        fence = _fence(line, top)
        if top is None:
            opened = fence
        elif fence is None:
            code = _before_closing(top, line)
            top.lines.append(line if code is None else code)
            if code is not None:
                stack.pop()
            continue
        elif fence.run.startswith(top.run):
            stack.pop()
            opened = fence if fence.info else None
        else:  # a fence of the other kind, or a shorter one
            opened = None if top.is_opaque else fence
            if opened is None:
                top.lines.append(line)
        if opened is not None:
            found.append(opened)
            stack.append(opened)
    return found


def _fence(line: str, top: _Block | None) -> _Block | None:
    """Return the block that a line would open; None if it is not a fence. top: the open block."""
    start = _indent(line)
    after = line.find("```", start) if top is None else -1
    if after > start and _AFTER_TEXT.fullmatch(line, after):
        start = after
    found = _FENCE.fullmatch(line, start)
    if found is None or (found["run"][0] == "`" and "`" in found["info"]):
        return None  # a line of text, perhaps with a span of code
    if top is not None and start >= top.indent + _NESTED:
        return None
    return _Block(found["run"], found["info"].strip(), start)


def _before_closing(block: _Block, line: str) -> str | None:
    """Return the code before a closing fence at the end of its line; None without one."""
    text = line.rstrip()
    code = text.rstrip("`")
    closes = len(text) - len(code) >= len(block.run) and block.run[0] == "`"
    return code if closes and code.strip() and "`" not in code else None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))

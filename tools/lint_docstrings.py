"""Finds docstrings without a subject: summary lines that begin with words such as Of, As or What.

python tools/lint_docstrings.py [FOLDER ...]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = (
    *("nemocascade", "nemocascade_vllm", "kernels", "recipes", "benchmarks", "tests", "tools"),
    "setup.py",
)
# Repositories that agents repair keep a style of their own.
EXCLUDED = Path("nemocascade/swe/repositories")
WORDS = {"Of", "As", "What", "Whether", "So", "Out", "Likewise"}


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that is a statement: docstrings, also of attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            value = node.value.value
            if isinstance(value, str):
                yield node.lineno, value


def main(names: list[str]) -> int:
    """Print each finding as `file:line: text`; the exit code is 1 if there is one."""
    found = 0
    for root in map(Path, names):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            if path.is_relative_to(EXCLUDED):
                continue
            for line, text in docstrings(path.read_text(encoding="utf-8")):
                if text.split(maxsplit=1)[:1] and text.split(maxsplit=1)[0] in WORDS:
                    found += 1
                    print(f"{path}:{line}: a docstring needs a subject: {text.strip()[:60]!r}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or list(FOLDERS)))

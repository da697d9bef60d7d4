"""Errors of file systems that name the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LASTING = (
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT),
)
"""Errors of a path: each further start would meet them."""


def may_pass(error: OSError) -> bool:
    """Return True if the same access may succeed later: after a full disk, an input/output error or
    a file server that does not answer."""
    return error.errno is not None and error.errno not in LASTING


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Context manager that adds the path to an OSError without one.

    The system names a file that cannot be opened, but not one that cannot be written further, for
    example on a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. An OSError names it, also on a full disk."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Replace a text file atomically, by way of a draft beside it, one for each process. Errors as
    of `write_text`."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    write_text(draft, text)
    draft.replace(path)

"""Execution of a program in a forked child: as a script, or by calls of its function.

Nothing here is trusted: the program shares this interpreter and may change it. It can affect only
its answers, which are judged outside against values that never enter the sandbox.
"""

from __future__ import annotations

import atexit
import base64
import builtins
import io
import json
import os
import sys
import types
from typing import Any

RESULT_FD = 3
JOB_FD = 4
_STREAMS = {f"/dev/{name}": number for number, name in enumerate(("stdin", "stdout", "stderr"))}
_STREAMS |= {f"/dev/fd/{number}": number for number in range(3)}
_builtin_open = open
LOST_OUTPUT = 120
"""Exit status if the output cannot be flushed, the same as Python's."""


def run() -> int:
    """Read the job, run it, write its results. Returns the exit status."""
    with open(JOB_FD, encoding="utf-8") as file:
        job = json.load(file)
    _lay_out(job.pop("files"))
    sys.stdin = io.TextIOWrapper(
        io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8", errors="replace"
    )
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="replace"
    )
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="replace", write_through=True
    )
    builtins.open = io.open = _open  # type: ignore[assignment,unused-ignore]
    status = 1
    try:
        status = _run_job(job)
    except SystemExit as end:
        status = _exit_status(end)
    except BaseException:  # the program's own failure, shown as Python shows it
        _show_exception()
    return status if _finish() else LOST_OUTPUT


def _open(file: Any, *arguments: Any, **options: Any) -> Any:
    """Open a file. Names of the standard streams work without /proc, to which they link."""
    number = _STREAMS.get(file) if isinstance(file, str) else None
    return _builtin_open(file if number is None else os.dup(number), *arguments, **options)


def _lay_out(files: dict[str, str]) -> None:
    """Write base64 files by relative path into the current folder."""
    for path, data in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))


def _run_job(job: dict[str, Any]) -> int:
    name = "solution" if job["function"] else "__main__"
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = ["program.py"]
    exec(compile(job["source"], "program.py", "exec"), module.__dict__)
    if not job["function"]:
        return 0
    function = _find(module, job["function"])
    with os.fdopen(RESULT_FD, "w", encoding="utf-8") as results:
        for arguments in job["calls"]:
            value = _plain(function(*arguments))
            results.write(json.dumps(value) + "\n")
            results.flush()
    return 0


def _find(module: types.ModuleType, name: str) -> Any:
    """Return the function, or the method of a class `Solution`, as in some problem collections."""
    found = getattr(module, name, None)
    if found is None and hasattr(module, "Solution"):
        found = getattr(module.Solution(), name, None)
    if found is None:
        raise NameError(f"the program defines no {name}")
    return found


def _plain(value: Any) -> Any:
    """Convert to JSON: tuples become lists, sets sorted lists. Raises TypeError for other types."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [_plain(v) for v in value]
    if type(value) in (set, frozenset):
        return sorted(_plain(v) for v in value)
    if type(value) is dict:
        return {str(k): _plain(v) for k, v in value.items()}
    raise TypeError(f"a result of type {type(value).__name__} cannot be compared")


def _exit_status(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _show_exception() -> None:
    import traceback

    traceback.print_exc()


def _finish() -> bool:
    """Wait for threads, run exit functions, and flush, as an interpreter does at exit.

    Returns False if the output cannot be flushed.
    """
    threading = sys.modules.get("threading")
    if threading is not None:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # the program closed them
        return False
    return True

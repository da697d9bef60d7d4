"""Execution of a program in a forked child: as a script, by calls of its function, or as the cells
of a session, which share one namespace.

Nothing here is trusted: the program shares this interpreter and may change it. It can affect only
its answers, which are judged outside against values that never enter the sandbox.
"""

from __future__ import annotations

import ast
import atexit
import base64
import builtins
import contextlib
import io
import json
import linecache
import os
import signal
import sys
import traceback
import types
from typing import Any

RESULT_FD = 3
JOB_FD = 4
_STREAMS = {f"/dev/{name}": number for number, name in enumerate(("stdin", "stdout", "stderr"))}
_STREAMS |= {f"/dev/fd/{number}": number for number in range(3)}
_builtin_open = open
LOST_OUTPUT = 120
"""Exit status if the output cannot be flushed, the same as Python's."""
INTERRUPTED = "TimeoutError: the time limit of a call was reached, variables are kept"
"""Shown as the error of a cell that was interrupted at its time limit."""


def run() -> int:
    """Read the job, run it, write its results. Returns the exit status."""
    with io.FileIO(JOB_FD) as file:
        job = json.loads(file.readall())
    _lay_out(job.pop("files"))
    _open_streams()
    status = 1
    try:
        status = _run_job(job)
    except SystemExit as end:
        status = 0 if job["any_exit"] else _exit_status(end)
    except BaseException:  # the program's own failure, shown as Python shows it
        traceback.print_exc()
    return status if _finish() or job["any_exit"] else LOST_OUTPUT


def serve() -> int:
    """Run the cells of a session until the job pipe closes. Returns the exit status.

    A line of the job pipe is a JSON list of a cell's number and source. The number on a line of the
    result pipe says that the cell has ended; its output has been written before.
    """
    _open_streams()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["session.py"]
    with open(JOB_FD, encoding="utf-8") as cells, open(RESULT_FD, "w", encoding="utf-8") as ends:
        for line in cells:
            number, source = json.loads(line)
            _run_cell(f"<cell {number}>", source, module.__dict__)
            ends.write(f"{number}\n")
            ends.flush()
    return 0


def _open_streams() -> None:
    """Open the standard streams, as an interpreter does at its start."""
    sys.stdin = io.TextIOWrapper(
        io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8", errors="replace"
    )
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="replace"
    )
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="replace", write_through=True
    )
    builtins.open = io.open = _open


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
    for source, path in ((job["preamble"], "preamble.py"), (job["source"], "program.py")):
        # Without this file's own flags: its future imports are not the program's.
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    if not job["function"]:
        return 0
    function = _find(module, job["function"])
    with os.fdopen(RESULT_FD, "w", encoding="utf-8") as results:
        for arguments in job["calls"]:
            value = _plain(function(*arguments))
            results.write(json.dumps(value) + "\n")
            results.flush()
    return 0


def _run_cell(name: str, source: str, scope: dict[str, Any]) -> None:
    """Run a cell and show the value of its last expression, or its error, with the cell's lines."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    # The supervisor interrupts a cell at its time limit, but nothing else.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        tree = ast.parse(source, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), scope)
        if isinstance(last, ast.Expr):
            shown = ast.Expression(last.value)
            value = eval(compile(shown, name, "eval", dont_inherit=True), scope)
            if value is not None:
                print(repr(value))
    except BaseException as error:  # the cell's own failure
        _show_cell_error(error, name)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the cell closed or replaced it
                stream.flush()


def _show_cell_error(error: BaseException, name: str) -> None:
    """Print the traceback from the cell's first line on, after the cell's output."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != name:
        trace = trace.tb_next
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        if isinstance(error, KeyboardInterrupt):
            print(INTERRUPTED, file=sys.stderr)
        else:
            traceback.print_exception(type(error), error, trace)


def _find(module: types.ModuleType, name: str) -> Any:
    """Return the method of a class `Solution`, as in some problem collections, or the function.

    The method comes first: the preamble may import a function of its name.
    """
    solution = getattr(module, "Solution", None)
    found = None if hasattr(solution, name) else getattr(module, name, None)
    if found is None and solution is not None:
        found = getattr(solution(), name, None)
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

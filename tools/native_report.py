"""Say what the native libraries hold: built with which CUDA, or why without."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch


def main() -> int:
    """Print a line for each library. Returns 1 when one is missing."""
    status = 0
    for package in ("nemocascade", "nemocascade_kernels"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            print(f"{package}: not installed: make setup")
            status = 1
            continue
        library = Path(spec.origin).parent / "_native.so"
        if not library.exists():
            print(f"{package}: {library} is missing: make setup")
            status = 1
            continue
        torch.ops.load_library(library)
        ops = getattr(torch.ops, package)
        cuda, reason = ops.cuda_built(), ops.cuda_unavailable_reason()
        print(f"{package}: CUDA {cuda}" if cuda else f"{package}: no CUDA: {reason}")
    return status


if __name__ == "__main__":
    sys.exit(main())

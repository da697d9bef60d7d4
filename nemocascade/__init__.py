"""NemoCascade: post-training of mixture-of-experts language models by cascade RL and MOPD."""


def __getattr__(name: str) -> str:
    """`__version__`, read from the kernel package's file without importing that package's torch."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.util import find_spec
    from pathlib import Path
    from runpy import run_path

    kernels = find_spec("nemocascade_kernels")
    assert kernels is not None
    assert kernels.origin is not None
    return str(run_path(str(Path(kernels.origin).with_name("version.py")))["__version__"])

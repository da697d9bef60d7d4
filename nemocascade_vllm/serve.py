"""Launcher of a vLLM server for rollouts: `nemocascade-vllm FOLDER [--announce DIR] [vLLM's own]`.

It starts `vllm serve` with what weight updates need, waits until the server answers, and announces
it: a JSON file in DIR with its address and a key of its own, readable by its owner alone. The file
goes when the server does. Arguments that it does not know are vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from nemocascade_vllm import BACKEND


def main() -> None:
    """Serve until a signal or the server ends; its exit status is the server's."""
    options, others = _parser().parse_known_args()
    port = options.port or _free_port()
    key = secrets.token_hex(16) if options.announce else ""
    url = f"http://{options.host}:{port}"
    server = subprocess.Popen(command(options, port, others), env=_environment(key))
    file = announcement(Path(options.announce), url) if options.announce else None

    def stop(number: int, _: object) -> None:
        server.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        while server.poll() is None and not _answers(url):
            time.sleep(1.0)
        if server.poll() is None and file is not None:
            announce(file, url, key)
            print(f"announced {url} in {file}", flush=True)
        status = server.wait()
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    sys.exit(status if status >= 0 else 128 - status)


def command(options: argparse.Namespace, port: int, others: list[str]) -> list[str]:
    """The command line of the server."""
    vllm = Path(sys.executable).with_name("vllm")
    return [
        *([str(vllm)] if vllm.is_file() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]),
        *("serve", options.model, "--host", options.bind or options.host, "--port", str(port)),
        *("--served-model-name", options.name),
        *([] if options.with_tokenizer else ["--skip-tokenizer-init"]),
        *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
        *others,
    ]


def announcement(folder: Path, url: str) -> Path:
    """The file in which the server at `url` announces itself."""
    return folder / f"{url.split('//')[1].replace(':', '_').replace('/', '_')}.json"


def announce(file: Path, url: str, key: str) -> None:
    """Write the file whole, readable by its owner alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump({"url": url, "key": key}, out)
    partial.rename(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemocascade-vllm", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False
    )
    parser.add_argument("model", help="Hugging Face folder with the shape and first weights")
    parser.add_argument("--announce", default="", help="folder for the announcement")
    parser.add_argument("--name", default="policy", help="name of the model (policy)")
    parser.add_argument(
        "--with-tokenizer", action="store_true", help="also serve text, as a judge does"
    )
    parser.add_argument(
        "--host", default=socket.gethostname(), help="name of this machine for the trainer"
    )
    parser.add_argument("--bind", default="", help="address to listen at (that of --host)")
    parser.add_argument("--port", type=int, default=0, help="port; 0 = a free one")
    return parser


def _environment(key: str) -> dict[str, str]:
    # Weight updates are among the endpoints that vLLM calls those of development.
    found = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    return {**found, "VLLM_API_KEY": key} if key else found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()

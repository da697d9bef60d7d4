"""Stand-ins of Slurm's programs, for job scripts that run without Slurm."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemocascade.plan.slurm import job_of_script, job_script
from nemocascade.plan.submission import SlurmJob, SubmitSettings

TINY = str(Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "sft.py")
SETTINGS = SubmitSettings(recipes=(TINY,), nodes=4, partition="gpu", time="2:00:00")

STUBS = {
    # Each call runs the next end, `end.1`, `end.2` and so on.
    "srun": """echo "$@" >> "$PLAYED/calls"; n=$(wc -l < "$PLAYED/calls"); . "$PLAYED/end.$n" """,
    "scontrol": """
        case "$1 $2" in
          requeue*) [ -e "$PLAYED/kept" ] && exit 1; touch "$PLAYED/requeued" ;;
          "show job")
            before=$(cat "$PLAYED/before" 2>/dev/null || echo "(null)")
            echo "JobId=7 ExcNodeList=$before StdOut=x" ;;
          "show hostnames") printf 'a\nb\nc\n' ;;
          update*)
            [ -e "$PLAYED/requeued" ] || exit 1
            [ -e "$PLAYED/denied" ] && exit 1
            echo "$3" >> "$PLAYED/updates" ;;
        esac
        true""",
    "sinfo": 'cat "$PLAYED/nodes" 2>/dev/null',
    "sleep": 'echo "$1" >> "$PLAYED/pauses"',
}


class Played:
    """A job script whose starts end as told, by stand-ins of Slurm's programs on hosts a, b, c."""

    def __init__(
        self,
        folder: Path,
        ends: list[str],
        *,
        job: SlurmJob | None = None,
        using: SubmitSettings | None = None,
        seconds: float = 60,
        **settings: Any,
    ) -> None:
        self.folder, run_dir = folder, folder / "run"
        for name, text in STUBS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        for number, end in enumerate(ends, start=1):
            (folder / f"end.{number}").write_text(f"run={run_dir}\n{end}\n")
        chosen = using or replace(SETTINGS, nodes=2, spare_nodes=1, **settings)
        script = folder / "job.sbatch"
        job = job or job_of_script(Path(TINY), str(run_dir), [])
        script.write_text(job_script(chosen, job))
        path = f"{folder}:{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b,c", "PLAYED": str(folder)}
        slurm["SLURMD_NODENAME"] = "127.0.0.1"  # else the name of this host is looked up
        self.done = subprocess.run(
            ["bash", str(script)],
            env={**os.environ, "PATH": path, **slurm},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self.lines("calls")

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

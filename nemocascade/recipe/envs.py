"""Settings of the verifiers, and of the sandbox that runs programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nemocascade.recipe.judge import JudgeConfig
from nemocascade.recipe.paths import InputPaths
from nemocascade.recipe.rules import Count, Natural, Range, Seconds, number_problems


@dataclass(frozen=True)
class SandboxConfig:
    """Sandbox for untrusted programs. Limits are per program."""

    isolation: Literal["auto", "bubblewrap", "namespaces"] = "auto"
    """Isolation backend: bubblewrap, or kernel namespaces without bubblewrap. `auto` takes the
    first that works on this host."""

    allow_unsafe: bool = False
    """If isolation is unavailable, run programs as ordinary processes of this user with resource
    limits only. They can then read and delete whatever the user can."""

    workers: Natural = 0
    """Number of concurrent programs; 0 = one per core that this process may use."""

    time_s: Seconds = 10.0
    """Limit in seconds of the CPU time of a program's processes together. The wall-clock limit is
    twice as long; a program that waited for a CPU for most of it is repeated without others."""

    memory_mib: Count = 512
    """Address space limit of each process. A program's total memory is at most this times
    `processes`, plus the scratch folder."""

    processes: Count = 16
    """Largest number of concurrent processes and threads; a pool of 8 processes needs 13."""

    output_kib: Count = 1024
    """Limit on the output to each of standard output and standard error."""

    scratch_mib: Count = 16
    """Size limit of the program's writable folder, which is in memory. For a repository, at least
    twice its size."""

    packages: InputPaths = ()
    """Folders, such as a site-packages, that programs may read and import from; for repositories
    that need more than the standard library."""

    @property
    def scratch_entries(self) -> int:
        """Largest number of files and folders in the scratch folder."""
        return 64 * self.scratch_mib

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = number_problems(self, "envs.sandbox")
        if 0 < self.memory_mib < 64:
            found.append(
                f"envs.sandbox.memory_mib({self.memory_mib}) is less than a Python process needs: "
                "at least 64"
            )
        return found


@dataclass(frozen=True)
class AgentConfig:
    """Limits of an agent's tools in one episode."""

    result_chars: Count = 16_000
    """Characters in one tool result; longer results are truncated and say by how much."""

    search_matches: Count = 100
    """Lines shown by one search."""

    calls: Count = 1000
    """Number of executed calls; a further call ends the episode."""

    test_runs: Count = 50
    """Number of runs of the repository's tests."""

    tests_time_s: Annotated[float, Range(1, 30 * 86_400)] = 1800.0
    """Total wall-clock seconds of the test runs; once they are used up, no further run starts. Each
    run has the sandbox's `time_s`."""

    changed_files: Count = 64
    """Number of files that edits may change or create."""

    file_kib: Count = 1024
    """Largest size of an edited file."""


@dataclass(frozen=True)
class AgentlessConfig:
    """Content of the prompt for repair without an agent."""

    prompt_chars: Count = 80_000
    """Characters in a prompt, which should fit `rollout.max_prompt_tokens`: source code has at
    least three characters per token. Files to repair come first and are truncated if too long."""

    retrieved: Natural = 5
    """Further files, the best by BM25 (Nemotron-Cascade 2, arXiv 2603.19220)."""


@dataclass(frozen=True)
class EnvConfig:
    """Settings of the verifiers."""

    if_grading: Literal["binary", "fraction"] = "binary"
    """Reward of instruction following: 1 if all instructions hold, or the fraction that holds."""

    if_language_check: Literal["langdetect", "letters"] = "langdetect"
    """Check of instructions to answer in English. `letters` checks the alphabet only; use it for
    answers of a few words, on which langdetect guesses."""

    check_workers: Count = 4
    """Child processes for checks that may not terminate: algebra, schemas, regular expressions.
    They start on demand, and each runs one check at a time."""

    check_timeout_s: Seconds = 5.0
    """CPU time limit of such a check in seconds; it is then killed. The answer is wrong if the
    check finishes without it; otherwise the row has no verdict."""

    check_memory_mib: Count = 2048
    """Address space limit of such a child process."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    agentless: AgentlessConfig = field(default_factory=AgentlessConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = number_problems(self, "envs") + self.sandbox.problems() + self.judge.problems()
        return list(dict.fromkeys(found))

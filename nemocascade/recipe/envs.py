"""Settings of the verifiers, and of the sandbox that runs programs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from nemocascade.recipe.judge import JudgeConfig


@dataclass(frozen=True)
class SandboxConfig:
    """How programs of the model are run. Limits are for one program."""

    isolation: Literal["auto", "bubblewrap", "namespaces"] = "auto"
    """What builds the walls: bubblewrap, or the namespace calls of the kernel without it. `auto`
    takes the first that works on this host."""

    allow_unsafe: bool = False
    """Where the host forbids isolation, run programs as ordinary processes of this user, with
    resource limits only. They can then read and delete whatever the user can."""

    workers: int = 0
    """Programs that run at once; 0 = one for each core that this process may use."""

    time_s: float = 10.0
    """Wall-clock time; the same bounds the processor time of each process."""

    memory_mib: int = 512
    """Address space of each process. All of a program's memory is at most this times `processes`,
    and the scratch folder."""

    processes: int = 8
    """Processes and threads at once."""

    output_kib: int = 1024
    """What a program may write to standard output and to standard error, each."""

    scratch_mib: int = 16
    """Size of the folder that a program may write to; its memory too. For a repository, at least
    twice its size."""

    packages: tuple[str, ...] = ()
    """Folders such as a site-packages that programs may read and import from, for repositories
    that need more than the standard library."""

    @property
    def scratch_entries(self) -> int:
        """Files and folders that fit in the scratch folder."""
        return 64 * self.scratch_mib

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        names = ("time_s", "memory_mib", "processes", "output_kib", "scratch_mib")
        found = [
            f"sandbox.{name}({getattr(self, name)}) must be above 0"
            for name in names
            if getattr(self, name) <= 0
        ]
        if self.workers < 0:
            found.append(f"sandbox.workers({self.workers}) must not be negative")
        if 0 < self.memory_mib < 64:
            found.append(
                f"sandbox.memory_mib({self.memory_mib}) is less than a Python process needs: "
                "at least 64"
            )
        return found


@dataclass(frozen=True)
class AgentConfig:
    """What an agent may do to a repository in one episode, and how much its tools answer."""

    result_chars: int = 16_000
    """Of one answer; what is longer is cut, and the answer says by how much."""

    search_matches: int = 100
    """Lines that one search shows."""

    calls: int = 1000
    """Calls that are executed; the next one ends the episode."""

    test_runs: int = 50
    """Runs of the repository's tests."""

    tests_time_s: float = 1800.0
    """Wall-clock time of all these runs together; once it is used up, no other one starts. Each
    has the sandbox's `time_s`."""

    changed_files: int = 64
    """Files that edits may change or make."""

    file_kib: int = 1024
    """Size of a file that an edit leaves."""

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        return [
            f"envs.agent.{f.name}({getattr(self, f.name)}) must be at least 1"
            for f in fields(self)
            if getattr(self, f.name) < 1
        ]


@dataclass(frozen=True)
class AgentlessConfig:
    """What the prompt of a repair without an agent shows."""

    prompt_chars: int = 80_000
    """Of a prompt, which should fit `rollout.max_prompt_tokens`: source code has three characters
    to a token or more. The files to repair come first, and are cut where they are too long."""

    retrieved: int = 5
    """Files beside those to repair, the best by BM25 (Nemotron-Cascade 2, arXiv 2603.19220)."""

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        found = []
        if self.prompt_chars < 1:
            found.append(f"envs.agentless.prompt_chars({self.prompt_chars}) must be at least 1")
        if self.retrieved < 0:
            found.append(f"envs.agentless.retrieved({self.retrieved}) must not be negative")
        return found


@dataclass(frozen=True)
class EnvConfig:
    """How responses are scored."""

    if_grading: Literal["binary", "fraction"] = "binary"
    """Instruction following: 1 if all instructions hold, or the share that holds."""

    if_language_check: Literal["langdetect", "letters"] = "langdetect"
    """How English is told where an instruction asks for it. `letters` looks at the alphabet alone:
    for answers of a few words, on which langdetect guesses."""

    check_workers: int = 1
    """Child processes for checks that may run for ever: algebra, schemas, regular expressions."""

    check_timeout_s: float = 5.0
    """Seconds after which such a check is killed and reported as an error."""

    check_memory_mib: int = 2048
    """Address space of such a child."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    agentless: AgentlessConfig = field(default_factory=AgentlessConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        found = [
            f"envs.{name}({getattr(self, name)}) must be above 0"
            for name in ("check_workers", "check_timeout_s", "check_memory_mib")
            if getattr(self, name) <= 0
        ]
        parts = (self.sandbox, self.agent, self.agentless, self.judge)
        return found + [problem for part in parts for problem in part.problems()]

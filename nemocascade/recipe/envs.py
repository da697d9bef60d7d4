"""Settings of the verifiers, and of the sandbox that runs programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from nemocascade.recipe.judge import JudgeConfig
from nemocascade.recipe.paths import InputPath, InputPaths
from nemocascade.recipe.rules import Count, Natural, Range, Seconds, number_problems


@dataclass(frozen=True)
class RayConfig:
    """Ray cluster whose nodes run programs, for `envs.sandbox.workers ray`. See docs/slurm.md."""

    address: str = ""
    """Address of the cluster, `host:port`; empty = the environment variable RAY_ADDRESS. A rank's
    own host must have joined it: `ray start --address=host:port --num-cpus=0`."""

    nodes: Natural = 0
    """Number of nodes to wait for at the start; 0 = one. Nodes that join later are used too."""

    wait_s: Seconds = 600.0
    """Longest wait for these nodes, and for another node once all are lost."""

    programs: Natural = 0
    """Programs and verifiers of a rank at a time; 0 = twice its share of the nodes' slots, so that
    no node is idle while another has a queue."""

    def problems(self, name: str = "envs.sandbox.ray") -> list[str]:
        """Every rule that these settings break. name: of these settings, for messages."""
        host, _, port = self.address.rpartition(":")
        is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
        plain = host and host.isascii() and host.isprintable() and not set(host) & set(" /")
        if self.address and not (plain and is_port):
            return [f"{name}.address({self.address!r}) is not an address: write it as host:port"]
        return []


@dataclass(frozen=True)
class SandboxConfig:
    """Sandbox for untrusted programs. Limits are per program."""

    isolation: Literal["auto", "bubblewrap", "namespaces"] = "auto"
    """Isolation backend: bubblewrap, or kernel namespaces without bubblewrap. `auto` takes the
    first that works on this host."""

    allow_unsafe: bool = False
    """If isolation is unavailable, run programs as ordinary processes of this user with resource
    limits only. They can then read and delete whatever the user can."""

    workers: Natural | Literal["local", "ray"] = 0
    """Who runs programs. A number: of concurrent programs on each rank's host, and of the rank's
    verifiers and tool calls; 0 or `local` = one per core, shared by the ranks of the host. `ray`:
    the nodes of a Ray cluster, each as many as it has CPUs, see `ray`."""

    ray: RayConfig = field(default_factory=RayConfig)

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

    @property
    def local_workers(self) -> int:
        """`workers` as a number; 0 for one per core, and for `ray`."""
        return self.workers if isinstance(self.workers, int) else 0

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = number_problems(self, "envs.sandbox")
        count = self.workers if self.workers not in ("local", "ray") else 0
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            found.append(
                f"envs.sandbox.workers({count}) must be a whole number of at least 0, local or ray"
            )
        if self.workers == "ray":
            found += self.ray.problems()
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
class CodeConfig:
    """Programs of the code domain. Their limits of time and memory are the sandbox's."""

    preamble: Literal["none", "livecodebench"] = "none"
    """Imports before a program: none, or those of LiveCodeBench."""

    recursion_limit: Natural = 0
    """Python's recursion limit; 0 = its default of 1000. LiveCodeBench sets 50000."""

    numpy: bool = False
    """Let programs import numpy, as installed beside this package."""

    decimals: Literal["exact", "tolerance"] = "tolerance"
    """Comparison of numbers: by value, as LiveCodeBench does, or within a relative and absolute
    tolerance of 1e-6 where the expected number is written as a float."""


@dataclass(frozen=True)
class ToolCallingConfig:
    """Applications of the tool-calling tasks."""

    workplace_data: InputPath = ""
    """Folder with the CSV files of NeMo Gym's workplace assistant (its `csv_data`), or with files
    of the same names and columns. Released rows are about these tables. Empty: invented tables, for
    rows that were written about them."""


@dataclass(frozen=True)
class PythonToolConfig:
    """Tool-integrated reasoning: tasks offer a Python interpreter that keeps its state during an
    episode. Its processes have the limits of `sandbox`, and its `packages`."""

    domains: tuple[Literal["math", "code"], ...] = ()
    """Domains whose tasks offer the tool, `math` and `code`. Each call is followed by a further
    turn, so raise `max_turns` too."""

    calls: Count = 100
    """Executed calls of an episode (Nemotron-Cascade 2, arXiv 2603.19220, appendix A); a further
    call is answered with an error."""

    time_s: Seconds = 10.0
    """Limit in seconds of the CPU time of a call; the wall-clock limit is twice as long. A call at
    its limit is interrupted; if it still runs, the interpreter is killed and its state is lost."""

    result_chars: Count = 8000
    """Characters in the answer to a call; longer answers are cut in the middle and say by how
    much."""

    prompt: str = "You can run Python code with the tool."
    """Text at the end of the system prompt; empty = none."""

    declare: bool = True
    """Declare the tool as the chat template declares tools. Off: only the prompt names it, for
    models with a small context."""

    def problems(self, name: str = "envs.python_tool") -> list[str]:
        """Every rule that these settings break. name: of these settings, for messages."""
        known = ("math", "code")
        return [
            f"{name}.domains names {d!r}: the tool is for {' and '.join(known)}"
            for d in self.domains
            if d not in known
        ]


@dataclass(frozen=True)
class EnvConfig:
    """Settings of the verifiers."""

    modules: tuple[str, ...] = ()
    """Modules with domains of your own, see docs/your_domain.md: dotted names, such as
    `my_package.my_domain`, or paths of `.py` files."""

    if_grading: Literal["binary", "fraction"] = "binary"
    """Reward of instruction following: 1 if all instructions hold, or the fraction that holds. A
    row's `grading_mode` precedes it."""

    if_language_check: Literal["langdetect", "letters"] = "langdetect"
    """Check of instructions to answer in English. `letters` checks the alphabet only; use it for
    answers of a few words, on which langdetect guesses."""

    if_tokenizer: Literal["punkt", "rule"] = "punkt"
    """Splitter of sentences and words. `punkt` is nltk's, as in IFEval and IFBench; where nltk or
    its data are missing, `rule` replaces it, with a warning. `rule` needs no library, and differs
    in some answers."""

    check_workers: Count = 4
    """Child processes for checks that may not terminate: algebra, schemas, regular expressions.
    They start on demand, and each runs one check at a time."""

    check_timeout_s: Seconds = 5.0
    """CPU time limit of such a check in seconds; it is then killed. The answer is wrong if the
    check finishes without it; otherwise the row has no verdict."""

    check_memory_mib: Count = 2048
    """Address space limit of such a child process."""

    tool_calling: ToolCallingConfig = field(default_factory=ToolCallingConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    code: CodeConfig = field(default_factory=CodeConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    agentless: AgentlessConfig = field(default_factory=AgentlessConfig)
    python_tool: PythonToolConfig = field(default_factory=PythonToolConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = number_problems(self, "envs") + self.sandbox.problems() + self.judge.problems()
        found += self.python_tool.problems()
        return list(dict.fromkeys(found))


def sandboxes(settings: Any) -> Iterator[SandboxConfig]:
    """Yield every sandbox in a tree of settings."""
    if isinstance(settings, SandboxConfig):
        yield settings
    elif is_dataclass(settings) and not isinstance(settings, type):
        for each in fields(settings):
            yield from sandboxes(getattr(settings, each.name))
    elif isinstance(settings, tuple):
        for inner in settings:
            yield from sandboxes(inner)

"""Shared data types, every field with its shape.

Shape letters: C capacity of a packed batch in tokens, D number of documents in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


Row = Mapping[str, Any]
"""One row of a data file, as read."""


@dataclass(frozen=True)
class ToolCall:
    """A tool call by the assistant. Arguments keep their order.

    In a call parsed from text, argument values are strings; the environment converts them by the
    tool's schema.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    content: the visible text.
    reasoning: text between the think tags; assistant turns only.
    tool_calls: calls at the end of an assistant turn.
    trained: False excludes an assistant turn from the loss (`weight: 0` in a row).
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    trained: bool = True


@dataclass(frozen=True)
class Tool:
    """A function that the assistant may call; `parameters` is its JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A task of an environment.

    id: identical for identical tasks, unique otherwise.
    domain: the environment that scores it.
    messages: turns before the assistant's answer.
    tools: functions declared to the assistant.
    answer: data for the verifier; never shown to the model.
    source: origin of the task, for messages.
    demonstration: turns of a correct solution with reasoning, if one is known.
    careless: turns of a solution with a habit that may cost the reward, if known.
    pass_rate: fraction of earlier attempts that solved it, in [0, 1]; None if unknown.
    """

    id: str
    domain: str
    messages: tuple[Message, ...]
    answer: Mapping[str, Any]
    tools: tuple[Tool, ...] = ()
    source: str = ""
    demonstration: tuple[Message, ...] = ()
    careless: tuple[Message, ...] = ()
    pass_rate: float | None = None


Fault = Literal["answer", "row", "host"]
"""The cause of a check that could not finish."""


@dataclass(frozen=True)
class Verdict:
    """The result of a verifier: a reward or an error. A verifier failure is not a reward of 0.

    reward: finite; None exactly when `error` is set.
    error: reason for a missing reward, such as a host on which no program can run.
    details: components of the reward, JSON values only.
    fault: cause of a check that could not finish. If it is the answer, the reward is 0; a row or a
        host that is at fault gives an error.
    """

    reward: float | None
    error: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.error is None):
            raise ValueError(
                f"a verdict holds a reward or an error, this one has reward={self.reward!r} "
                f"and error={self.error!r}"
            )
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"reward {self.reward} is not finite: report an error instead")
        if self.fault is not None and (self.fault == "answer") != (self.error is None):
            raise ValueError(f"a fault of the {self.fault} cannot have the error {self.error!r}")


@dataclass(frozen=True)
class Question:
    """A question for a judge.

    kind: the form of the answer: "compare" two responses, or "grade" one.
    messages: the conversation for a model judge; it specifies the answer's format.
    facts: the data behind the messages, for a rule-based judge.
    """

    kind: Literal["compare", "grade"]
    messages: tuple[Message, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A judge's answer: its text, or the error if the judge failed."""

    text: str | None
    error: str | None = None


class Judge(Protocol):
    """Answers questions about responses. Thread-safe unless collective.

    collective: the judge generates on the training ranks. Every rank must ask at the same time,
    outside generation, each its own questions, or none.
    """

    collective: bool

    @property
    def activity(self) -> int:
        """Progress counter, so that waiting for a working judge does not count as a stall."""

    def begin(self, questions: Sequence[Question]) -> None:
        """Announce questions that will be asked soon; the judge may start on them."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question, in order, in bounded time. Failures are answers, never raised."""

    def close(self) -> None:
        """Release the judge's resources."""


class ToolSession(Protocol):
    """The tools of one episode, with their state."""

    @property
    def done(self) -> bool:
        """True if a call has ended the episode: the policy gets no further turn."""

    def step(self, calls: Sequence[ToolCall]) -> list[Message]:
        """Execute `calls` in order; returns a `tool` turn for each. Errors become text."""

    def close(self) -> None:
        """Release all resources. Called once, even if the episode failed."""


class Environment(Protocol):
    """A domain: its tasks, and verdicts on their solutions. Thread-safe.

    by_group: a verdict depends on the other responses to the same prompt.
    collective: the verifier runs on all ranks at once, see `Judge`.
    """

    domain: str
    by_group: bool

    @property
    def collective(self) -> bool: ...

    @property
    def activity(self) -> int:
        """Progress counter of the judge, if there is one."""

    def prompts(
        self, *, seed: int, count: int, difficulty: int = 0, heldout: bool = False
    ) -> Iterable[Prompt]:
        """Make `count` different tasks from `seed`; `difficulty` 0 is the easiest.

        Held-out tasks are disjoint from the others for any seeds.
        """

    def claims(self, row: Row) -> bool:
        """Return True if a released row belongs to this domain."""

    def read(
        self, path: str | Path, bad: Callable[[str, str], object], others: Collection[Environment]
    ) -> Iterable[Prompt]:
        """Read the tasks of a file or folder of released rows.

        bad: called with `file:row` and the reason for each row that cannot be read. others: further
        domains that read the path.
        """

    def forms(self, prompt: Prompt) -> Collection[str]:
        """Return the ways in which the verifier treats the task, by name."""

    def dummy(self, prompt: Prompt) -> Sequence[Message] | None:
        """Return an answer that makes the verifier run in full; None if a judge decides."""

    def session(self, prompt: Prompt) -> ToolSession | None:
        """Fresh tools for one episode; None if the domain has no tools."""

    def score(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """Score the turns that answered `prompt`; never raises because of their content.

        For domains with verdicts by group, this is the absolute score of held-out tasks.
        """

    def begin_group(
        self, prompt: Prompt, written: Mapping[int, Sequence[Message]], new: int
    ) -> None:
        """Announce that response `new` of a group is complete, so that a judge may start early.

        written: the complete responses, by their index in the group.
        """

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        """Score all responses to each prompt, in order; see `score`."""

    def close(self) -> None:
        """Stop the verifier's processes."""


Status = Literal["ok", "failed", "time", "output"]


class SandboxError(RuntimeError):
    """The sandbox failed, not the program: the program's outcome is unknown."""


class SandboxUnavailable(SandboxError):  # noqa: N818 - it states a fact about the host
    """Isolation is unavailable on this host. The message holds reasons and remedies."""


@dataclass(frozen=True)
class Program:
    """Python source with its inputs.

    stdin: text on standard input.
    function, calls: call this function (or method of `Solution`) with each list of arguments;
        without a function the source runs as a script.
    files: content by relative path, written to the program's folder before it starts.
    preamble: source that runs before, in the same namespace.
    any_exit: an exit by `sys.exit` is status 0, whatever its own, and lost output is not a failure.
    """

    source: str
    stdin: str = ""
    function: str = ""
    calls: tuple[Sequence[Any], ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    preamble: str = ""
    any_exit: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of running a program.

    status: "ok", exit status 0; "failed", another exit status or a signal; "time", killed at the
        time limit; "output", killed because it wrote too much.
    exit_status: negative for a signal.
    stdout, stderr: decoded as UTF-8, with replacement characters.
    results: return values of the calls, as JSON values, up to the first that failed.
    wall_s, cpu_s: wall-clock and CPU seconds, including the setup of the isolation.
    """

    status: Status
    exit_status: int
    stdout: str
    stderr: str
    results: tuple[Any, ...]
    wall_s: float
    cpu_s: float


class Sandbox(Protocol):
    """Runs untrusted programs. Thread-safe."""

    def run(self, program: Program) -> Outcome:
        """Run one program in bounded time. Raises SandboxError if the sandbox itself fails."""

    def close(self) -> None:
        """Stop all workers."""


@dataclass(frozen=True)
class Document:
    """One tokenised training example.

    tokens: [n] int32 ids.
    trained: [n] bool, True for tokens written by the assistant, whose prediction is trained. The
        first token of a document has no predecessor and never trains.
    source: origin of the document, `file:line`, for messages.
    """

    tokens: Tensor
    trained: Tensor
    source: str


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's last hidden states of rows of a packed batch, and its LM head.

    rows: [N] int64 on the host, ascending. hidden: [N, H] on the host, in the dtype of activations.
    head: [V/tp, H], this rank's rows of the vocabulary, on its device.
    """

    rows: Tensor
    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed into a fixed capacity: the batch layout of every stage.

    Row t holds the state s_t after reading `tokens[t]` and the action y_t = `targets[t]`, which
    belongs to the same document. Padding at the end forms a document of its own, made of `pad_id`,
    with weight 0. Under context parallelism a batch holds R of the pack's C rows, see `shard`;
    otherwise R = C.

    tokens:        [R] int64, input ids.
    targets:       [R] int64, the next id within the document; 0 in a document's last row.
    positions:     [R] int64, position within the document, from 0.
    token_weight:  [R] float32, mask and normaliser of the loss; 0 = the row does not train.
    cu_seqlens:    [D+1] int32, starts of the documents and C at the end (padding included).
    num_tokens:    number of tokens in documents; the rest of C is padding.
    document_ids:  ids of the documents in the data set, in the order of the pack.
    advantage, ref_logprob, teacher_logprob, rollout_logprob: [R] float32 or None, the constants
        of GRPO's and MOPD's objectives.
    routing:       for each document [n or n - 1, L, K] integers, the experts that training replays
        in L MoE layers with K experts a token, or None; () for no document.
    taught:        the teachers' states of the rows that train, for an exact divergence; elsewhere,
        and on all but the last pipeline stage, ().
    cp_rank, cp_size: the context-parallel rank whose rows these are, and the number of ranks.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    token_weight: Tensor
    cu_seqlens: Tensor
    num_tokens: int
    document_ids: tuple[int, ...] = ()
    advantage: Tensor | None = None
    ref_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    routing: tuple[Tensor | None, ...] = ()
    taught: tuple[TeacherStates, ...] = ()
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def capacity(self) -> int:
        """C, the rows of the whole pack."""
        return self.tokens.numel() * self.cp_size

    @property
    def segments(self) -> list[slice]:
        """The rows of the pack that this batch holds, ascending."""
        if self.cp_size == 1:
            return [slice(0, self.capacity)]
        size = self.capacity // (2 * self.cp_size)
        numbers = (self.cp_rank, 2 * self.cp_size - 1 - self.cp_rank)
        return [slice(n * size, (n + 1) * size) for n in numbers]

    @property
    def num_own_tokens(self) -> int:
        """Number of document tokens among this batch's rows; the rows after them are padding."""
        return sum(min(max(self.num_tokens - s.start, 0), s.stop - s.start) for s in self.segments)

    def own_cu_seqlens(self) -> Tensor:
        """`cu_seqlens` among this batch's rows, [D+1] int64: a document may have none there."""
        bounds = self.cu_seqlens.long()
        parts = [(bounds - s.start).clamp(0, s.stop - s.start) for s in self.segments]
        return torch.stack(parts).sum(0)

    def shard(self, rank: int, size: int) -> PackedBatch:
        """The rows of context-parallel rank `rank` of `size`.

        The pack is cut into 2 size equal segments; a rank holds number `rank` and number
        2 size - 1 - rank, so that causal attention takes equally long on every rank. Documents
        (`cu_seqlens`, `num_tokens`, `document_ids`, `routing`) stay those of the whole pack.

        Raises ValueError if this batch is a shard, or its capacity no multiple of 2 size.
        """
        if size == 1:
            return self
        if self.cp_size > 1 or self.capacity % (2 * size):
            raise ValueError(
                f"a pack of {self.capacity} rows on {self.cp_size} ranks cannot be cut into "
                f"2 x {size} segments: use a whole pack and a multiple of {2 * size} rows"
            )
        cut = replace(self, tokens=self.tokens[: self.capacity // size], cp_rank=rank, cp_size=size)
        rows = torch.cat([torch.arange(s.start, s.stop) for s in cut.segments])
        own: dict[str, Any] = {
            f.name: value.index_select(0, rows)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "cu_seqlens"
        }
        return replace(cut, **own)

    @property
    def num_documents(self) -> int:
        """Number of documents without the padding."""
        return self.cu_seqlens.numel() - 1 - int(self.num_tokens < self.capacity)

    def num_trained(self) -> int:
        """Number of this batch's rows that train."""
        return int((self.token_weight != 0).sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`. The host does not wait for copies to a GPU:
        they are made from pinned memory, which torch reuses only after the copy."""
        target = torch.device(device)
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                if target.type == "cuda" and value.device.type == "cpu":
                    value = value.pin_memory()
                moved[f.name] = value.to(target, non_blocking=True)
        return replace(self, **moved)


def pack_documents(
    documents: Sequence[Document],
    capacity: int,
    *,
    pad_id: int = 0,
    document_ids: Sequence[int] = (),
) -> PackedBatch:
    """Pack `documents` into `capacity` tokens, each trained token with weight 1.

    Raises ValueError if they don't fit or one is empty.
    """
    lengths = [d.tokens.numel() for d in documents]
    total = sum(lengths)
    if total > capacity:
        raise ValueError(f"documents hold {total} tokens, the capacity is {capacity}")
    if 0 in lengths:
        raise ValueError(
            f"{documents[lengths.index(0)].source}: an empty document cannot be packed"
        )
    tokens = torch.full((capacity,), pad_id, dtype=torch.int64)
    targets = torch.zeros(capacity, dtype=torch.int64)
    positions = torch.zeros(capacity, dtype=torch.int64)
    weight = torch.zeros(capacity, dtype=torch.float32)
    cu = [0]
    for doc, n in zip(documents, lengths, strict=True):
        a, b = cu[-1], cu[-1] + n
        tokens[a:b] = doc.tokens
        targets[a : b - 1] = doc.tokens[1:]
        positions[a:b] = torch.arange(n)
        weight[a : b - 1] = doc.trained[1:].to(torch.float32)
        cu.append(b)
    if total < capacity:
        positions[total:] = torch.arange(capacity - total)
        cu.append(capacity)
    return PackedBatch(
        tokens=tokens,
        targets=targets,
        positions=positions,
        token_weight=weight,
        cu_seqlens=torch.tensor(cu, dtype=torch.int32),
        num_tokens=total,
        document_ids=tuple(document_ids),
    )


CONVERTED_FILE_BYTES = 1 << 30
"""Most bytes of a file of a converted artifact: one rank reads and hashes a file, so that more
files are shared by more ranks."""


@dataclass(frozen=True)
class Artifact:
    """The weights of a finished stage and their provenance: the manifest of an artifact folder.

    folder: path of the folder. digest: sha256 of the manifest, which covers every file; identifies
        the artifact.
    stage, step: the stage that wrote it, and its number of optimizer steps.
    model: the fields of ModelConfig. precision: of the weights, "fp32" or "bf16".
    recipe: the stage's resolved recipe. data: the training data, as the stage describes it.
    parent, parent_digest: the artifact it started from, None for random weights.
    scores: held-out scores by name.
    tokenizer: file name in the folder, or None.
    template: sha256 of the chat template of the training text, None if it is not known.
    context_length: longest training sequence of this stage and those before it, in tokens; for an
        imported model, what its config.json says. 0 if it is not known.
    """

    folder: Path
    digest: str
    stage: str
    step: int
    model: dict[str, Any]
    precision: str
    recipe: dict[str, Any]
    data: dict[str, Any]
    parent: str | None
    parent_digest: str | None
    scores: dict[str, float]
    tokenizer: str | None
    template: str | None = None
    context_length: int = 0

    @property
    def tokenizer_path(self) -> Path | None:
        """Path of the tokenizer's file, or None."""
        return None if self.tokenizer is None else self.folder / self.tokenizer

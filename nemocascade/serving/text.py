"""Text of an answer while its tokens arrive: incremental decoding, and the parts of the reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from nemocascade.data.reply import Reply
from nemocascade.data.tokenizer import Tokenizer

Part = Literal["reasoning", "content"]

_OPEN, _CLOSE, _CALL = "<think>", "</think>", "<tool_call>"
# Most tokens that one character needs: four bytes, and some that add no text.
_PENDING = 8


class TextDelta(NamedTuple):
    """New text of a reply."""

    part: Part
    text: str


class StreamDecoder:
    """Decodes tokens one by one. A character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0

    def add(self, token: int) -> str:
        """The text that a token adds."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._ids) - self._read < _PENDING:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text

    def rest(self) -> str:
        """The text of an incomplete character at the end."""
        return self._new_text()

    def _new_text(self) -> str:
        # The tokens before tell whether the next ones begin with a space.
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]


class ReplyText:
    """Splits the text of an assistant turn into reasoning and content as it arrives.

    The deltas of a part, joined, are that part of the parsed reply. Calls of tools are in the
    parsed reply alone; without `with_calls` they are content.

    reasoning: state of the reasoning block after the prompt, see `ChatTemplate.reasoning`; None:
    the text is not a turn, and all of it is content. ends: texts that end it; they are not
    part of it.
    """

    def __init__(
        self,
        reasoning: Literal["open", "closed", "free"] | None,
        ends: Sequence[str],
        *,
        with_calls: bool = True,
    ) -> None:
        self._reasoning, self._ends, self._with_calls = reasoning, tuple(ends), with_calls
        marks = () if reasoning is None else (_OPEN, _CLOSE, _CALL)
        self._marks = (*self._ends, *marks)
        self._longest = max(map(len, self._marks), default=1) - 1
        self._sent: dict[Part, str] = {"reasoning": "", "content": ""}
        self.raw = ""
        """The whole text up to an end."""
        self.is_ended = False

    def add(self, text: str) -> list[TextDelta]:
        """The deltas that are certain with this text."""
        if self.is_ended:
            return []
        # An end may begin in the text before.
        start = max(0, len(self.raw) - self._longest)
        self.raw += text
        found = [at for end in self._ends if (at := self.raw.find(end, start)) >= 0]
        self.is_ended = bool(found)
        self.raw = self.raw[: min(found)] if found else self.raw
        return self._new(self._certain())

    def finish(self, reply: Reply) -> list[TextDelta]:
        """The remaining deltas. reply: parsed from `raw`."""
        return self._new((reply.message.reasoning, reply.message.content))

    def rest(self) -> str:
        """The rest of a text that is not a turn."""
        return "".join(delta.text for delta in self._new(("", self.raw)))

    def _certain(self) -> tuple[str, str]:
        """Reasoning and content without what later text may make a mark, or cut off."""
        text = self.raw[: len(self.raw) - self._undecided()]
        if self._reasoning is None:
            return "", text
        start = text.lstrip()
        is_open = self._reasoning == "open"
        if self._reasoning == "free" and start.startswith(_OPEN):
            is_open, text = True, start.removeprefix(_OPEN)
        thought = ""
        if is_open:
            thought, closed, text = text.partition(_CLOSE)
            text = text.removeprefix("\n") if closed else ""
        elif self._reasoning == "free" and not start:
            text = ""
        # Line breaks before a mark belong to the template.
        if self._with_calls:
            text = text.partition(_CALL)[0]
        return thought.strip("\n"), text.rstrip("\n")

    def _undecided(self) -> int:
        """Number of last characters that may be the start of a mark."""
        tail = self.raw[-self._longest :] if self._longest else ""
        lengths = range(len(tail), 0, -1)
        return next((n for n in lengths if any(m.startswith(tail[-n:]) for m in self._marks)), 0)

    def _new(self, parts: tuple[str, str]) -> list[TextDelta]:
        deltas = []
        names: tuple[Part, Part] = ("reasoning", "content")
        for part, text in zip(names, parts, strict=True):
            sent = self._sent[part]
            if len(text) > len(sent) and text.startswith(sent):
                deltas.append(TextDelta(part, text[len(sent) :]))
                self._sent[part] = text
        return deltas

"""Chat templates, rendered as segments: control tokens apart from text, and what is trained.

A conversation's text is what plain jinja2 makes of the template. A segment is either one special
token that the template wrote (control) or text, and it is trained if the assistant writes it. Text
is tokenised with special tokens disabled, so a user's `<|im_end|>` becomes ordinary tokens.

Two kinds of marks find the segments, and every marked rendering must equal the plain one when its
marks are removed. Marks between the messages come from the template's loop over them, so a turn's
text is known even where a later turn changes how it is rendered. Marks inside the conversation's
own special tokens tell them from the template's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, Protocol

from nemocascade.data.errors import TokenizerError
from nemocascade.data.jinja_template import (
    JinjaTemplate,
    any_of,
    guarded,
    openai_form,
    split_messages,
    starts_of,
)
from nemocascade.data.reply import Reply, parse_reply
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message, Tool, ToolCall

SEGMENTS_VERSION = 2
"""Part of the cache key: increment it with every change of segments or masks."""

_MARKS = [chr(code) for code in range(0xE000, 0xE040)]
"""Private-use characters, unlikely to occur in text."""

_THINK = ("<think>", "</think>")
_CALL = ToolCall("look_up", {"word": "mirror"})
_LOOK_UP = Tool(
    "look_up",
    "Explain a word.",
    {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
)


@dataclass(frozen=True)
class Conversation:
    """Turns in order. A system turn is allowed only as the first."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


class Segment(NamedTuple):
    """One segment of a rendered conversation.

    control: the text is exactly one special token of the template, such as `<|im_end|>`.
    trained: the assistant writes this text, so the loss covers it.
    """

    text: str
    control: bool = False
    trained: bool = False


class Encoder(Protocol):
    """The part of a tokenizer that `encode` needs."""

    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, none of them special."""


class ChatTemplate:
    """A chat template and its special tokens.

    source: jinja source. digest: its sha256.
    ends: special tokens that end an assistant turn; generation stops there. The first ends a turn
        without calls.
    reads_calls: the calls that the template renders can be parsed again.
    """

    def __init__(
        self, source: str, special: Collection[str], tokens: Mapping[str, str] | None = None
    ) -> None:
        """Compile the template and render small conversations with it.

        special: texts of the special tokens. tokens: the template's variables, such as `bos_token`.

        Raises DataError for invalid source, and TokenizerError if the assistant's turns or their
        ends cannot be found in what it renders.
        """
        self.source = source
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        self._jinja = JinjaTemplate(source, tokens or {})
        texts = sorted(filter(None, special), key=len, reverse=True)
        self._special = any_of(texts)
        # By level: the special tokens of the conversation's own text that are marked. A template
        # may look for think tags in what the assistant wrote, and then must find them.
        self._guards = [
            (starts_of(texts), starts_of(texts)),
            (starts_of(texts), starts_of([t for t in texts if t not in _THINK])),
        ]
        self._openings = {thinking: self._opening(thinking) for thinking in (True, False)}
        self._headers: set[str] = set()
        for opening in self._openings.values():
            # A turn may have no think tag, or no line break after one that the prompt opens.
            self._headers |= {opening, opening.partition("<think>")[0]}
            if opening.rstrip().endswith("<think>"):
                self._headers.add(opening.rstrip())
        self.ends: tuple[str, ...] = ()
        self.ends = self._find_ends()
        self._json_calls = False
        self.reads_calls = self._parses_calls()
        if not self.reads_calls:
            self._json_calls = True
            self.reads_calls = self._parses_calls()

    def render(self, conversation: Conversation, *, thinking: bool) -> list[Segment]:
        """Render the whole conversation for training.

        The trained segments are the assistant's text after its generation prompt, up to and
        including the token that ends the turn. thinking: False omits all reasoning.

        Raises DataError if the template rejects the conversation, or if a trained turn or its end
        cannot be found in the text.
        """
        turns, mark = self._turns(conversation, thinking)
        segments: list[Segment] = []
        for number, text in turns:
            message = None if number is None else conversation.messages[number]
            writes = message is not None and message.role == "assistant" and message.trained
            if not writes or text.isspace():
                segments += self._segments(text, mark)
                continue
            start, end = self._written(text, f"message {number}")
            segments += self._segments(text[:start], mark)
            segments += self._segments(text[start:end], mark, trained=True)
            segments += self._segments(text[end:], mark)
        return segments

    def render_prompt(self, conversation: Conversation, *, thinking: bool) -> list[Segment]:
        """Render the conversation up to the assistant's next turn, with nothing trained.

        Raises DataError if the conversation ends with an assistant turn, or as `render`.
        """
        if not conversation.messages or conversation.messages[-1].role in ("assistant", "system"):
            raise DataError("a prompt must end with a user turn or with a tool's result")
        text, mark, _ = self._marked(conversation, thinking, prompt=True, turns=False)
        return self._segments(text, mark)

    def render_results(
        self, asked: Conversation, reply: Message, results: Sequence[Message], *, thinking: bool
    ) -> list[Segment]:
        """Render what follows an assistant turn: tool results and the next generation prompt.

        asked: the episode's prompt. reply: the turn, whose own text ends with one of `ends` and is
        not part of the result. Nothing is trained. Raises DataError as `render`.
        """
        # The turn's tokens exist already. Of its content, only the calls can matter to the rest.
        turn = replace(reply, content="" if reply.tool_calls else "x", reasoning="")
        whole = Conversation((*asked.messages, turn, *results), asked.tools)
        turns, mark = self._turns(whole, thinking, prompt=True)
        place = next(
            i for i, (n, t) in enumerate(turns) if n == len(asked.messages) and not t.isspace()
        )
        _, end = self._written(turns[place][1], "the reply")
        rest = turns[place][1][end:] + "".join(text for _, text in turns[place + 1 :])
        return self._segments(rest, mark)

    def parse(self, text: str, *, thinking: bool, with_calls: bool = True) -> Reply:
        """Parse what the assistant wrote after the generation prompt. Never raises.

        with_calls: False leaves calls in the content.
        """
        return parse_reply(
            text,
            reasoning=self.reasoning(thinking),
            ends=self.ends,
            json_calls=self._json_calls,
            with_calls=with_calls,
        )

    def reasoning(self, thinking: bool) -> Literal["open", "closed", "free"]:
        """State of the reasoning block after the generation prompt; free: it has none."""
        opening = self._openings[thinking].rstrip()
        if "<think>" not in opening:
            return "free"
        return "open" if opening.endswith("<think>") else "closed"

    def _parses_calls(self) -> bool:
        user, turn = Message("user", "x"), Message("assistant", "", tool_calls=(_CALL,))
        try:
            segments = self.render(Conversation((user, turn), (_LOOK_UP,)), thinking=False)
        except DataError:
            return False
        written = "".join(s.text for s in segments if s.trained)
        return self.parse(written, thinking=False).message.tool_calls == (_CALL,)

    def _opening(self, thinking: bool) -> str:
        """The generation prompt."""
        asked = openai_form([Message("user", "x")], [])
        without, full = (
            self._jinja.render(*asked, thinking=thinking, generation_prompt=prompt)
            for prompt in (False, True)
        )
        parts = self._split(without)
        # Some templates end a conversation that is complete with a special token.
        while not full.startswith("".join(parts)) and self._is_special(parts[-1]):
            parts.pop()
        start = "".join(parts)
        if not full.startswith(start):
            raise TokenizerError(
                "the chat template cannot be used: without add_generation_prompt it renders more "
                "than special tokens in place of the generation prompt"
            )
        return full[len(start) :]

    def _find_ends(self) -> tuple[str, ...]:
        user, turn, result = Message("user", "x"), Message("assistant", "x"), Message("tool", "x")
        calling = Message("assistant", "", tool_calls=(_CALL,))
        chat = Conversation((user, turn, user, turn))
        with_tools = Conversation((user, calling, result, turn), (_LOOK_UP,))
        found: list[str] = []
        for conversation in (chat, with_tools):
            try:
                for number, text in self._turns(conversation, thinking=False)[0]:
                    if number is not None and conversation.messages[number].role == "assistant":
                        _, end = self._written(text, f"message {number}")
                        found += self._special.findall(text[:end])[-1:]
            except DataError as error:
                # Many templates know no tools; a conversation that needs them is rejected later.
                if conversation is chat:
                    raise TokenizerError(f"the chat template cannot be used: {error}") from None
        return tuple(dict.fromkeys(found))

    def _turns(
        self, conversation: Conversation, thinking: bool, prompt: bool = False
    ) -> tuple[list[tuple[int | None, str]], str]:
        """The rendered text by message, in order, and the mark in the special tokens of its texts.

        Raises DataError if an assistant turn is not rendered in exactly one place.
        """
        text, mark, turn_mark = self._marked(conversation, thinking, prompt=prompt, turns=True)
        turns = split_messages(text, turn_mark)
        for number, message in enumerate(conversation.messages):
            places = sum(n == number and not t.isspace() for n, t in turns)
            if message.role == "assistant" and message.trained and places != 1:
                raise DataError(
                    f"message {number}: the chat template renders the assistant turn in {places} "
                    "places, so that its text cannot be found"
                )
        return [(n, t) for n, t in turns if t], mark

    def _marked(
        self, conversation: Conversation, thinking: bool, *, prompt: bool, turns: bool
    ) -> tuple[str, str, str]:
        """The rendered text with marks, the mark inside special tokens, and that of messages.

        Raises DataError if the marks change the rest of the text.
        """
        if not thinking:
            kept = tuple(replace(m, reasoning="") for m in conversation.messages)
            conversation = replace(conversation, messages=kept)
        messages, tools = openai_form(conversation.messages, conversation.tools)
        render = partial(self._jinja.render, thinking=thinking, generation_prompt=prompt)
        plain = render(messages, tools)
        free = (m for m in _MARKS if m not in plain)
        mark, turn_mark = next(free, ""), next(free, "")
        if not turn_mark:
            raise DataError(f"the text uses all of {_MARKS[0]!r}..{_MARKS[-1]!r}")
        for others, own in self._guards:
            text = render(
                [guarded(m, own if m["role"] == "assistant" else others, mark) for m in messages],
                [guarded(t, others, mark) for t in tools],
                mark=turn_mark if turns else "",
            )
            if "".join(t for _, t in split_messages(text, turn_mark)).replace(mark, "") == plain:
                return text, mark, turn_mark
        raise DataError(
            "the chat template acts on special tokens in the text, which therefore cannot be told "
            "from its own"
        )

    def _written(self, turn: str, where: str) -> tuple[int, int]:
        """Start and end in a turn's text of what the assistant writes."""
        start = max((len(h) for h in self._headers if turn.startswith(h)), default=-1)
        if start < 0:
            raise DataError(
                f"{where}: the assistant turn {turn[:40]!r} does not begin with the generation "
                f"prompt {self._openings[True]!r}"
            )
        found = list(self._special.finditer(turn, start))
        known = found and (not self.ends or found[-1].group() in self.ends)
        if not known or turn[found[-1].end() :].strip():
            raise DataError(
                f"{where}: the assistant turn ends with {turn[-40:]!r}, where no special token "
                f"({', '.join(self.ends) or 'of the tokenizer'}) shows that it is over"
            )
        return start, found[-1].end()

    def _segments(self, text: str, mark: str, *, trained: bool = False) -> list[Segment]:
        parts = self._split(text)
        return [Segment(p.replace(mark, ""), self._is_special(p), trained) for p in parts]

    def _split(self, text: str) -> list[str]:
        """Special tokens and the text between them."""
        return [p for p in re.split(f"({self._special.pattern})", text) if p]

    def _is_special(self, text: str) -> bool:
        return self._special.fullmatch(text) is not None


def encode(segments: Iterable[Segment], tokenizer: Encoder) -> tuple[list[int], list[bool]]:
    """Return token ids, and for each id a flag that says if it is trained.

    Adjacent text is tokenised as one run, split where training starts or ends, because generation
    starts at the same split. A tag that is not one token of the tokenizer is treated as text.
    """
    ids: list[int] = []
    trained: list[bool] = []
    run = ""
    run_trained = False

    def flush() -> None:
        nonlocal run
        if run:
            run_ids = tokenizer.encode(run)
            ids.extend(run_ids)
            trained.extend([run_trained] * len(run_ids))
            run = ""

    for segment in segments:
        special = tokenizer.special_tokens.get(segment.text) if segment.control else None
        if special is not None or segment.trained != run_trained:
            flush()
            run_trained = segment.trained
        if special is None:
            run += segment.text
        else:
            ids.append(special)
            trained.append(segment.trained)
    flush()
    return ids, trained

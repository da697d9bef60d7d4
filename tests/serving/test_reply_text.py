"""Text of answers as it arrives: characters of several tokens, reasoning, content and calls."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from nemocascade.data.reply import parse_reply
from nemocascade.data.tokenizer import load_tokenizer
from nemocascade.data.tokenizer_training import train_tokenizer
from nemocascade.recipe import DataConfig
from nemocascade.serving.text import ReplyText, StreamDecoder

ENDS = ("<|im_end|>",)
PARTS = [
    *("a", " b", "\n", "\n\n", "<", "</", "think", "<think>", "</think>", "<tool_call>", "é", "🙂"),
    *("</tool_call>", "<function=f>\n", "</function>", "<parameter=x>\n1\n</parameter>\n", "<|im"),
    "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
]


@pytest.mark.parametrize("reasoning", ["open", "closed", "free"])
@pytest.mark.parametrize("with_calls", [True, False])
def test_pieces_joined_are_the_parsed_reply(
    reasoning: Literal["open", "closed", "free"], with_calls: bool
) -> None:
    rng = random.Random(reasoning)
    streamed = 0
    for _ in range(2000):
        whole = "".join(rng.choices(PARTS, k=rng.randint(0, 12)))
        said = whole + rng.choice(["", "<|im_end|>", "<|im_end|> more"])
        text = ReplyText(reasoning, ENDS, with_calls=with_calls)
        pieces, at = [], 0
        while at < len(said):
            step = rng.randint(1, 9)
            pieces += text.add(said[at : at + step])
            at += step
        streamed += len(pieces)
        parse = partial(parse_reply, reasoning=reasoning, ends=ENDS, with_calls=with_calls)
        reply = parse(text.raw)
        assert reply == parse(said)
        assert with_calls or not (reply.message.tool_calls or reply.faults)
        pieces += text.finish(reply)
        for part in ("reasoning", "content"):
            joined = "".join(piece.text for piece in pieces if piece.part == part)
            assert joined == getattr(reply.message, part), repr(said)
    assert streamed > 2000, "nothing came before the end"


@pytest.mark.parametrize("stop", ["STOP", "\n"])
def test_a_text_ends_before_its_stop(stop: str) -> None:
    text = ReplyText(None, (stop,))
    pieces = [
        piece.text for part in ("some", stop[:1], stop[1:], "more") for piece in text.add(part)
    ]
    assert "".join(pieces) + text.rest() == "some"
    assert text.is_ended


def test_a_start_of_a_stop_is_text() -> None:
    text = ReplyText(None, ("STOP",))
    assert [p.text for p in text.add("a ST")] == ["a "]
    assert [p.text for p in text.add("ART")] == ["START"]


def test_characters_of_several_tokens_come_whole(tmp_path: Path) -> None:
    data = DataConfig(path=("synthetic:arithmetic",), max_rows=64)
    train_tokenizer(data, 400, str(tmp_path / "tokenizer.model"), seed=1)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    said = "naïve  café 🙂🙃 x\n\n  y"
    ids = tokenizer.encode(said)
    assert len(ids) > len(said), "bytes are tokens of their own here"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.add(token) for token in ids]
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)
    cut = StreamDecoder(tokenizer)
    shown = "".join(cut.add(token) for token in tokenizer.encode("a🙂")[:-1])
    assert (shown, set(cut.rest())) == ("a", {"\ufffd"})

"""Both kinds of tokenizer: round trips, special tokens, prefixes, errors, training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from helpers.data import (
    GSM8K_TEST,
    GSM8K_TRAIN,
    huggingface_tokenizer,
    needs_gsm8k,
    sentencepiece_tokenizer,
    words,
)

from nemocascade.data.errors import TokenizerError
from nemocascade.data.own_template import OWN_TEMPLATE
from nemocascade.data.sentencepiece_json import sentencepiece_to_json
from nemocascade.data.tokenizer import (
    CONTROL_TAGS,
    REQUIRED_TAGS,
    Tokenizer,
    check_vocabulary,
    load_artifact_tokenizer,
    load_tokenizer,
)
from nemocascade.data.tokenizer_training import (
    SMALLEST_VOCABULARY,
    train_sentencepiece,
    train_tokenizer,
)
from nemocascade.recipe.data import DataConfig
from nemocascade.types import Artifact

TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [sentencepiece_tokenizer, huggingface_tokenizer], ids=["sentencepiece", "hf"]
)
TEXTS = [
    "",
    " ",
    "  two  spaces, and\ttabs\n\n\nbreaks \n",
    "Ana has 12 apples.",
    "unknown: 日本語 \U0001f600 é\u0301",
    "def f(x):\n    return x  # a comment\n",
    "\u0000control\u007f",
]
OVERLAPPING = "<<|im_end|>><|im_<think>start|>|im_end|><think></think></tool_call>"


@TOKENIZERS
@pytest.mark.parametrize("text", [*TEXTS, OVERLAPPING])
def test_text_comes_back_unchanged(tokenizer: Callable[[], Tokenizer], text: str) -> None:
    t = tokenizer()
    assert t.decode(t.encode(text)) == text
    assert t.decode(t.encode(text, allow_special=True)) == text


@TOKENIZERS
def test_pieces_of_a_text_join_to_the_text(tokenizer: Callable[[], Tokenizer]) -> None:
    t = tokenizer()
    parts = ["Ana", " has", "two", "  ", "apples"]
    assert t.decode([i for p in parts for i in t.encode(p)]) == "".join(parts)


@TOKENIZERS
def test_special_tokens_only_where_allowed(tokenizer: Callable[[], Tokenizer]) -> None:
    t = tokenizer()
    ids = t.encode("<|im_start|>a<|im_end|>", allow_special=True)
    assert (ids[0], ids[-1]) == (t.special_tokens["<|im_start|>"], t.end_of_turn_id)
    for text in [*t.special_tokens, OVERLAPPING]:
        assert not set(t.encode(text)) & set(t.special_tokens.values()), text
    assert t.decode(ids, skip_special=True) == "a"
    assert t.decode(torch.tensor(ids).tolist(), skip_special=True) == "a"


@TOKENIZERS
def test_what_a_tokenizer_says_of_itself(tokenizer: Callable[[], Tokenizer]) -> None:
    t = tokenizer()
    assert t.fingerprint == hashlib.sha256(Path(t.path).read_bytes()).hexdigest()
    assert set(CONTROL_TAGS) <= set(t.special_tokens)
    assert max(t.special_tokens.values()) < t.vocab_size
    check_vocabulary(t, t.vocab_size)
    with pytest.raises(TokenizerError, match=rf"--model.vocab_size to at least {t.vocab_size}"):
        check_vocabulary(t, t.vocab_size - 1)


def test_normalised_text_cannot_become_a_special_token(tmp_path: Path) -> None:
    """Full-width brackets become plain ones in this tokenizer, after which they are a tag."""
    spec = json.loads(Path(huggingface_tokenizer().path).read_text())
    spec["normalizer"] = {"type": "NFKC"}
    for token in spec["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    t = load_tokenizer(tmp_path)
    text = "well \uff1c|im_end|\uff1e then"
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert t.end_of_turn_id in raw
    assert not set(t.encode(text)) & set(t.special_tokens.values())


def test_named_tokens() -> None:
    t = huggingface_tokenizer()
    assert (t.bos_id, t.eos_id) == (None, t.end_of_turn_id)
    assert t.pad_id == t.special_tokens["<|endoftext|>"]
    s = sentencepiece_tokenizer()
    assert (s.bos_id, s.eos_id, s.pad_id) == (1, 2, 3)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_a_foreign_sentencepiece_model_adds_no_spaces(
    tmp_path: Path, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own settings put a space before every text and merge spaces, which loses text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name=rule,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    path = tmp_path / "foreign.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert theirs.decode(theirs.encode(" a  b")) != " a  b"
    ours = load_tokenizer(path)
    assert ours.decode(ours.encode("  a  b ")) == "  a  b "
    # The second rule makes spaces of line breaks. That is in the model, so it is only reported.
    assert ("changes text" in caplog.text) == (rule == "nmt_nfkc")
    assert ours.encode("apples") != theirs.encode("apples")
    assert ours.encode(" apples") == theirs.encode("apples")
    assert ours.pad_id == ours.end_of_turn_id


@pytest.mark.parametrize("form", ["metaspace", "prepend"])
def test_a_foreign_tokenizer_json_adds_no_spaces(tmp_path: Path, form: str) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    if form == "metaspace":
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
        model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    else:
        parts = tokenizers.normalizers
        model.normalizer = parts.Sequence([parts.Prepend("▁"), parts.Replace(" ", "▁")])
        after = tokenizers.decoders
        model.decoder = after.Sequence(
            [after.Replace("▁", " "), after.Fuse(), after.Strip(content=" ", left=1, right=0)]
        )
    model.train_from_iterator(
        words(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", *CONTROL_TAGS[:2]], show_progress=False
        ),
    )
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    ours = load_tokenizer(path)
    assert ours.decode(ours.encode(" Ana") + ours.encode("Ana has")) == " AnaAna has"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("absent.model", None, "no such tokenizer file"),
        ("broken.model", b"not a model", "not a sentencepiece model"),
        ("empty.model", b"", "not a sentencepiece model"),
        ("tokenizer.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", b"[1]", "not a Hugging Face tokenizer.json"),
        ("vocab.txt", b"a", "sentencepiece .model or a tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizer(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=complaint):
        load_tokenizer(tmp_path / name)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_chat_tokens_is_rejected(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|im_end|>": 1}, "a"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"no token <\|im_start\|>, by which"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b"[" * 3000, "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be a text"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "default", "template": [1]}]}',
            "chat_template must be a text",
        ),
        ("tokenizer_config.json", b'{"chat_template": "\\ud83d"}', "holds half a character"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
    ],
)
def test_a_broken_file_beside_a_tokenizer_is_named(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(Path(huggingface_tokenizer().path).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=complaint):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("templates", ["[5, null]", '[{"template": "a"}]', "[]", "null"])
def test_templates_without_a_default_are_none(tmp_path: Path, templates: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(Path(huggingface_tokenizer().path).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": {templates}}}')
    assert load_tokenizer(tmp_path).chat_template is None


def test_text_that_would_become_a_control_token_is_rejected(tmp_path: Path) -> None:
    spec = json.loads(Path(huggingface_tokenizer().path).read_bytes())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"] = vocabulary["<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=r"'a' has id \d+, .* of '<\|im_end\|>': text would"):
        load_tokenizer(tmp_path)


def test_characters_outside_of_a_vocabulary_are_named(tmp_path: Path) -> None:
    tags = {tag: number for number, tag in enumerate(REQUIRED_TAGS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(tags, "[UNK]"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="cannot encode"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tag", [b"</s>", b"<|im_end|>"])
def test_a_sentencepiece_model_with_damaged_pieces_is_named(tmp_path: Path, tag: bytes) -> None:
    data = Path(sentencepiece_tokenizer().path).read_bytes()
    (tmp_path / "damaged.model").write_bytes(data.replace(tag, b"\xff" + tag[1:]))
    with pytest.raises(TokenizerError, match=r"damaged.model: it cannot be used"):
        load_tokenizer(tmp_path / "damaged.model")


def test_training_is_deterministic_and_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [train_sentencepiece(words(), 400, tmp_path / f"{i}" / "t.model") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_tokenizer(files[0]).vocab_size == 400
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(TokenizerError, match=f"bytes and tags alone are {SMALLEST_VOCABULARY}"):
        train_sentencepiece(words(), SMALLEST_VOCABULARY - 1, tmp_path / "t.model")
    with pytest.raises(TokenizerError, match=r"must end in \.model"):
        train_sentencepiece(words(), 400, tmp_path / "t.json")
    with pytest.raises(TokenizerError, match="no tokenizer can be made"):
        train_sentencepiece([], 400, tmp_path / "t.model")
    few = load_tokenizer(train_sentencepiece(["aaa bbb"], 5000, tmp_path / "few.model"))
    assert SMALLEST_VOCABULARY <= few.vocab_size < 300
    assert "pieces, not 5000" in caplog.text


def test_training_reads_what_the_settings_name(tmp_path: Path) -> None:
    config = DataConfig(path=("synthetic:arithmetic",), thinking=True, max_rows=200)
    t = train_tokenizer(config, 500, tmp_path / "t.model", seed=1)
    again = train_tokenizer(config, 500, tmp_path / "again.model", seed=1)
    other = train_tokenizer(config, 500, tmp_path / "other.model", seed=1, max_characters=5000)
    assert t.fingerprint == again.fingerprint != other.fingerprint
    assert len(t.encode("apples")) < len("apples")


@needs_gsm8k
def test_gsm8k_tokenizer_compresses_text_it_has_not_seen(tmp_path: Path) -> None:
    config = DataConfig(path=(str(GSM8K_TRAIN),), max_rows=2000)
    t = train_tokenizer(config, 2048, tmp_path / "t.model")
    assert t.vocab_size == 2048
    rows = [json.loads(line) for line in GSM8K_TEST.read_text().splitlines()[:200]]
    text = "\n".join(row["question"] + row["answer"] for row in rows)
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert len(text) / len(ids) > 2.2


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("form", ["identity", "nmt_nfkc"])
def test_a_sentencepiece_model_has_the_same_ids_as_json(
    kind: str, form: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()),
        model_prefix=str(path.with_suffix("")),
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name=form,
        user_defined_symbols=list(CONTROL_TAGS),
        minloglevel=2,
    )
    ours = load_tokenizer(path)
    theirs = tokenizers.Tokenizer.from_str(sentencepiece_to_json(path, ["<|im_end|>", "</s>"]))
    for text in (*TEXTS, *words()[:50], "aaaaaaaa aaa", "a<think>b <|im_end|>", "\u2581 x"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text, allow_special=True)
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    assert theirs.decode(theirs.encode("a</think>b<|im_end|></s>").ids) == "a</think>b"


def test_an_artifact_trained_on_another_template_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = sentencepiece_tokenizer()
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer.path).read_bytes())
    made = Artifact(tmp_path, "", "sft", 1, {}, "fp32", {}, {}, None, None, {}, "tokenizer.model")

    def said(**fields: str | None) -> str:
        caplog.clear()
        assert load_artifact_tokenizer(replace(made, **fields)).vocab_size  # type: ignore[arg-type]
        return caplog.text

    assert said(template=tokenizer.template.digest) == ""
    assert said(stage="convert") == ""
    assert "another chat template (not recorded)" in said()
    assert "another chat template (0123) than" in said(template="0123")
    # The template of the training text is beside the tokenizer and is used.
    (tmp_path / "chat_template.jinja").write_text(OWN_TEMPLATE.replace("These functions", "They"))
    assert "another chat template" in said(template=tokenizer.template.digest)
    assert said(template=load_tokenizer(tmp_path).template.digest) == ""

"""An exported folder is served as it was trained, by transformers alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from helpers.data import huggingface_tokenizer, sentencepiece_tokenizer

from nemocascade.cli import main
from nemocascade.data.chat_template import Conversation, encode
from nemocascade.data.errors import TokenizerError
from nemocascade.data.serving import serving_of
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer
from nemocascade.megatron.artifact import Provenance, read_artifact, write_artifact
from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig, ParallelConfig, tiny
from nemocascade.rollout.engine import Request, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.world import World
from nemocascade.types import Artifact, Message

transformers = pytest.importorskip("transformers")

OTHER = """{{- bos_token }}
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|over|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
CHAT = Conversation(
    (
        Message("system", "Be  brief.\n\n"),
        Message("user", "What is 12 and 7?\n"),
        Message("assistant", "It is 19. ", "Add ünï ☃ them."),
        Message("user", "  And 5 and 5?"),
    ),
)
SHAPES = {
    "nemotron_h": replace(tiny(), vocab_size=512),
    "qwen3_moe": replace(
        tiny(),
        vocab_size=512,
        pattern="*E*E",
        rope=True,
        qk_norm=True,
        activation="swiglu",
        router_score="softmax",
        router_bias=False,
        router_scale=1.0,
        shared_expert_width=0,
    ),
}


def other_tokenizer(folder: Path) -> Tokenizer:
    """Without ChatML tokens, with a template and an eos of its own, and a prefix before texts."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<bos>", "<|over|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<eos>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["What is it and what is 12"], trainer)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": OTHER}
    config |= {"tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "sentencepiece": lambda _: sentencepiece_tokenizer(),
    "hugging face": lambda _: huggingface_tokenizer(),
    "a template and an eos of its own": other_tokenizer,
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def build(world: World, shape: ModelConfig) -> CascadeModel:
    engine = EngineConfig(precision="fp32")
    config = make_config(shape, world.parallel, engine, MoeTrainingConfig(), seed=1)
    [model] = build_model(world, config, Accelerators())
    return model


def greedy(
    world: World, model: CascadeModel, prompt: list[int], stops: tuple[int, ...]
) -> list[int]:
    sampling = Sampling(temperature=0.0, max_tokens=24, stop_tokens=tuple((s,) for s in stops))
    [found] = LiveEngine(world, [model], slots=1).run([Request(0, tuple(prompt))], sampling)
    return found.response


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SHAPES)
def test_generate_gives_our_tokens_and_stops(
    kind: str, family: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = KINDS[kind](tmp_path / "tokenizer")
    model = build(world, SHAPES[family])
    segments = tokenizer.template.render_prompt(CHAT, thinking=False)
    prompt, _ = encode(segments, tokenizer)
    free = greedy(world, model, prompt, ())
    # Let the model end its turn where it wrote this token.
    late = next(t for i, t in enumerate(free) if i > 4 and t not in free[:i])
    head = model.output_layer.weight.data
    end = tokenizer.end_of_turn_id
    assert end not in free
    head[[late, end]] = head[[end, late]]
    ours = greedy(world, model, prompt, tokenizer.end_ids)
    assert ours[-1] == end
    assert 5 < len(ours) < 24

    made = Provenance("sft", 1, {}, {}, {}, context_length=777)
    source, folder = tmp_path / "artifact", tmp_path / "hf"
    path = Path(tokenizer.path)
    write_artifact(source, world, [model], made, tokenizer=path, template=tokenizer.template.source)
    monkeypatch.setattr(sys, "argv", ["nemocascade", "convert", str(source), str(folder)])
    main()
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [{"role": m.role, "content": m.content} for m in CHAT.messages]
    given = theirs.apply_chat_template(
        asked, add_generation_prompt=True, enable_thinking=False, return_tensors="pt"
    )
    assert given["input_ids"][0].tolist() == prompt
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = network.generate(**given, max_new_tokens=24)[0].tolist()
    assert written[len(prompt) :] == ours
    assert theirs.decode(prompt) == tokenizer.decode(prompt)
    assert theirs.model_max_length == network.config.max_position_embeddings == 777
    ids = (network.config.bos_token_id, network.config.eos_token_id, network.config.pad_token_id)
    assert ids == (tokenizer.bos_id, end, tokenizer.pad_id)
    back = load_tokenizer(folder)
    assert back.template.digest == read_artifact(source).template == tokenizer.template.digest
    assert (back.end_ids, encode(segments, back)[0]) == (tokenizer.end_ids, prompt)


def test_the_tokenizer_of_an_untrained_model_stays_as_it_came(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Artifact(
        tmp_path, "", "convert", 0, {}, "fp32", {}, {}, None, None, {}, "tokenizer.json"
    )
    (tmp_path / "tokenizer.json").write_bytes(Path(huggingface_tokenizer().path).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert serving_of(made) == ({}, {})
    assert "exported as it came: " in caplog.text
    assert "renders the assistant turn in 0 places" in caplog.text
    with pytest.raises(TokenizerError, match="in 0 places"):
        serving_of(replace(made, stage="sft"))

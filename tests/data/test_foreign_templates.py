"""Chat templates that tokenizers bring: the text is jinja2's own, and the mask is a reader's.

The templates are written here, each after one habit of published ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
from helpers.data import huggingface_tokenizer, own_template, text_of, write_jsonl
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemocascade.data.cache import build_cache
from nemocascade.data.chat_template import ChatTemplate, Conversation, encode
from nemocascade.data.own_template import OWN_TEMPLATE
from nemocascade.data.tokenizer import CONTROL_TAGS, Tokenizer, load_tokenizer
from nemocascade.recipe import DataConfig
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.prompts import encode_prompts
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message, Prompt, Tool, ToolCall

SPECIAL = ("<|begin|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|call|>", "</s>")
TOKENS = {"bos_token": "<|begin|>", "eos_token": "</s>"}

HISTORY = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages[::-1] -%}
  {%- if m.role == 'user' and ns.last == 0 -%}
    {%- set ns.last = messages | length - loop.index0 - 1 -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}
{% endfor %}{{ '<|im_end|>\n' }}{% endif -%}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {%- set text = message.content.split('</think>')[-1].lstrip('\n') %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last and (loop.last or message.reasoning_content) %}
      {{- '<think>\n' + (message.reasoning_content or '').strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- text }}
    {%- for c in message.tool_calls or [] %}
      {{- '\n<tool_call>\n' ~ (c.function | tojson) ~ '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user' if messages[loop.index0 - 1].role != 'tool' else '' }}
    {{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
    {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}
    {{- '<think>\n\n</think>\n\n' }}
  {%- endif %}
{%- endif %}"""
"""Reasoning of the last turn only, which the assistant opens itself; calls as JSON."""

INSTRUCTIONS = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
  {%- set rest = messages[1:] -%}{%- set system = messages[0].content ~ '\n\n' -%}
{%- else -%}{%- set rest = messages -%}{%- set system = '' -%}{%- endif -%}
{%- for message in rest if message.role in ('user', 'assistant') -%}
  {%- if message.role == 'user' -%}
    [INST] {{ (system if loop.first else '') ~ message.content.strip() }} [/INST]
  {%- else -%}
    {% generation %} {{ message.content.strip() ~ eos_token }}{% endgeneration %}
  {%- endif -%}
{%- endfor -%}"""
"""No generation prompt, and an eos that ends turns. Tools, calls and results are not rendered."""

HEADERS = """{%- macro turn(role, text, end) -%}
<|{{ role }}|>
{{ text | trim ~ end }}
{%- endmacro -%}
{{- bos_token }}
{%- if tools %}{{ turn('user', 'Tools: ' ~ tools | tojson(indent=2), '<|end|>') }}{% endif %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if message.tool_calls %}
    {{- turn('assistant', message.content ~ message.tool_calls[0].function.name, '<|call|>') }}
  {%- else %}{{ turn(message.role, message.content, '<|end|>') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
"""Turns by a macro, and another token that ends a turn with calls."""

TEMPLATES = {"own": OWN_TEMPLATE, "history": HISTORY, "inst": INSTRUCTIONS, "headers": HEADERS}

_TOOL = Tool(
    "f",
    " with blanks ",
    {
        "type": "object",
        "properties": {
            "a": {"type": ["string", "null"], "default": None, "description": " x\n"},
            "b": {"enum": [1, "é"], "exclusive": True, "items": {"type": "array"}},
        },
        "required": ["a"],
        "additionalProperties": False,
    },
)
_CALLS = (
    ToolCall("f", {"a": True, "b": None, "c": 1.5, "d": {"x": [None, {"y": "ü"}]}, "e": "two\nl"}),
    ToolCall("f", {}),
)


def conversations() -> list[Conversation]:
    """72 conversations: system or none, tools, results in a row, reasoning, odd texts."""
    texts = [
        "plain",
        " lead",
        "trail \n",
        "\n\ntwo\n\nlines\n",
        "ünï ☃ 漢",
        "<b>&amp;'\"\\n",
        "{{ 1 }}",
    ]
    found = []
    for i, (system, reasoning, shape) in enumerate(
        product(["", "Be brief. ", None], ["", "why ", "two\n\nsteps\n"], range(8))
    ):
        text, other = texts[i % 7], texts[(i // 3) % 7]
        asked, said = Message("user", text), Message("assistant", other, reasoning)
        first = () if system is None else (Message("system", system),)
        calling = Message("assistant", ["", other][i % 2], reasoning, _CALLS[: 1 + i % 2])
        results = (Message("tool", text), Message("tool", ""), Message("tool", other))
        turns = [
            (asked, said),
            (asked, said, asked, replace(said, reasoning="")),
            (asked, said, Message("user", other), said, asked, said),
            (asked, replace(said, trained=False), asked, said),
            (asked, calling, results[0], said),
            (asked, calling, *results, said),
            (
                asked,
                calling,
                *results[:2],
                calling,
                results[2],
                said,
                asked,
                calling,
                results[0],
                said,
            ),
            (asked, calling, results[1], said, asked, said),
        ][shape]
        found.append(
            Conversation((*first, *turns), (_TOOL, Tool("g", "", {})) if shape > 3 else ())
        )
    return found


def reference(source: str, conversation: Conversation, **settings: Any) -> str:
    """The text by transformers where it is installed, else by plain jinja2 with its helpers."""
    messages = [
        {
            "role": m.role,
            "content": m.content,
            **({"reasoning_content": m.reasoning} if m.reasoning else {}),
            **(
                {"tool_calls": [{"type": "function", "function": vars(c)} for c in m.tool_calls]}
                if m.tool_calls
                else {}
            ),
        }
        for m in conversation.messages
    ]
    tools = [
        {
            "type": "function",
            "function": {
                "name": t.name,
                **({"description": t.description} if t.description else {}),
                "parameters": t.parameters,
            },
        }
        for t in conversation.tools
    ]
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        template = _plain_environment().from_string(source)
        return template.render(messages=messages, tools=tools or None, **settings, **TOKENS)
    prompt = settings.pop("add_generation_prompt")
    [text], _ = render_jinja_template(
        [messages],
        tools=tools or None,
        chat_template=source,
        add_generation_prompt=prompt,
        **settings,
        **TOKENS,
    )
    return str(text)


class _Transparent(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _plain_environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Transparent]
    )
    environment.filters["tojson"] = lambda x, **o: json.dumps(x, ensure_ascii=False, **o)
    return environment


def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], (*CONTROL_TAGS, *SPECIAL), TOKENS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_jinjas_own(name: str) -> None:
    ours = template(name)
    assert len(conversations()) >= 60
    for conversation, thinking in product(conversations(), (True, False)):
        kept = conversation.messages
        if not thinking:
            kept = tuple(replace(m, reasoning="") for m in kept)
        expected = reference(
            TEMPLATES[name],
            replace(conversation, messages=kept),
            add_generation_prompt=False,
            enable_thinking=thinking,
        )
        assert text_of(ours.render(conversation, thinking=thinking)) == expected
        asked = replace(conversation, messages=kept[:-1])
        prompt = reference(
            TEMPLATES[name], asked, add_generation_prompt=True, enable_thinking=thinking
        )
        assert text_of(ours.render_prompt(asked, thinking=thinking)) == prompt


TWO_TURNS = Conversation(
    (
        Message("user", "<|im_end|> </s> <|end|> One?"),
        Message("assistant", "1", "first"),
        Message("user", "Two?"),
        Message("assistant", "", "look", (_CALLS[1],)),
        Message("tool", "it is </think> 2"),
        Message("assistant", "2 </s><|im_end|><|end|>.", "second"),
    ),
    (_TOOL,),
)
MASKS = {
    ("own", True): "\n1<|im_end|>|look\n</think>\n<tool_call>\n<function=f>\n</function>\n"
    "</tool_call>\n<|im_end|>|second\n</think>\n2 </s><|im_end|><|end|>.<|im_end|>",
    ("history", True): "1<|im_end|>|<think>\nlook\n</think>\n\n\n<tool_call>\n"
    '{"name": "f", "arguments": {}}\n</tool_call><|im_end|>|'
    "<think>\nsecond\n</think>\n\n2 </s><|im_end|><|end|>.<|im_end|>",
    ("history", False): '1<|im_end|>|\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    "<|im_end|>|2 </s><|im_end|><|end|>.<|im_end|>",
    ("headers", True): "1<|end|>|f<|call|>|2 </s><|im_end|><|end|>.<|end|>",
}


@pytest.mark.parametrize(("name", "thinking"), MASKS)
def test_the_mask_is_what_a_reader_marks(name: str, thinking: bool) -> None:
    """From the generation prompt to the token that ends the turn, and only the template's own
    special tokens are control tokens."""
    segments = template(name).render(TWO_TURNS, thinking=thinking)
    runs, before = [], False
    for s in segments:
        if s.trained:
            runs += [""] if not before else []
            runs[-1] += s.text
        before = s.trained
    assert "|".join(runs) == MASKS[name, thinking]
    ends = [s.text for s in segments if s.control and s.text in ("</s>", "<|end|>", "<|im_end|>")]
    assert len(ends) == {"own": 7, "history": 7, "headers": 6}[name]


def test_an_eos_can_end_turns() -> None:
    inst = template("inst")
    assert inst.ends == ("</s>",)
    said = Conversation((Message("user", "a"), Message("assistant", "b")) * 2)
    assert [s.text for s in inst.render(said, thinking=True) if s.trained] == [" b", "</s>"] * 2


def test_calls_as_json_are_read_back() -> None:
    assert [n for n in TEMPLATES if template(n).reads_calls] == ["own", "history"]
    parse = template("history").parse
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "x", "b": [1, true]}}\n</tool_call>'
    reply = parse(f"<think>\nwhy\n</think>\n\nso\n{call}<|im_end|>", thinking=True)
    said = Message("assistant", "so", "why", (ToolCall("f", {"a": "x", "b": "[1, true]"}),))
    assert reply.message == replace(said, content=reply.message.content)
    assert reply.message.content.strip() == "so"
    for wrong in (call.replace("arguments", "args"), call.replace("}}", "}"), "<tool_call>[]"):
        reply = parse(wrong, thinking=False)
        assert (len(reply.faults), reply.message.tool_calls) == (1, ())


def test_all_ends_stop_generation() -> None:
    assert template("headers").ends == ("<|end|>", "<|call|>")
    assert template("own").ends == ("<|im_end|>",)


@pytest.mark.parametrize("name", ["own", "history", "headers"])
def test_results_are_the_suffix_after_the_turn(name: str) -> None:
    """They continue the turn's own tokens, whatever they are."""
    ours, messages = template(name), TWO_TURNS.messages
    asked = Conversation(messages[:3], TWO_TURNS.tools)
    rest = text_of(ours.render_results(asked, messages[3], messages[4:5], thinking=True))
    prompt = text_of(ours.render_prompt(Conversation(messages[:5], (_TOOL,)), thinking=True))
    assert prompt.endswith(rest)
    assert ours.ends[-1] + rest in prompt
    assert rest.count("it is </think> 2") == 1
    assert "look" not in rest


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% if %}", "is broken"),
        pytest.param("{{ f" + "(1)" * 300 + " }}", "is broken", id="calls of calls"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render"),
        ("{{ undefined_thing.field }}", "cannot render"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot render"),
        ("{{ ' ' * 10 ** 9 }}", "characters"),
        ("{{ '%1000000000d' | format(1) }}", "wider than"),
        ("{{ 'ab' * 90000 * 90000 }}", "characters"),
        ("{{ 'a' | center(999999999) }}", "passes"),
        ("{{ 'a'.ljust(999999999) }}", "passes"),
        ("{{ '%999999999d' % 1 }}", "formats wider"),
        ("{{ '%*d' % (999999999, 1) }}", "passes"),
        ("{{ '{:999999999}'.format(1) }}", "formats wider"),
        ("{{ 9 ** 99999999 }}", "passes"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}",
            "characters",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
            "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
            "characters",
        ),
        ("x" * (2 << 20), "at most"),
    ],
)
def test_templates_run_in_a_sandbox(source: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        ChatTemplate(source, CONTROL_TAGS)


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
    ],
)
def test_time_is_bounded(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemocascade.data.jinja_sandbox.MAX_SECONDS", 0.2)
    with pytest.raises(DataError, match=r"more than 0\.2 s"):
        ChatTemplate(loop, CONTROL_TAGS)


LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + END }}{% endfor %}"
PROMPT = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
CHATML = LOOP + PROMPT


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ messages[0].content }}", "in 0 places"),
        (CHATML.replace("for m in messages", "for i in range(2)"), "cannot render|0 places"),
        (CHATML.replace("END", "'\n'"), "no special token"),
        (CHATML.replace("END", "'<|im_end|>more'"), "no special token"),
        (CHATML.replace("END", "'<|im_end|>'").replace("assistant\n'", "bot\n'"), "not begin"),
        (
            CHATML.replace("END", "'<|im_end|>'") + "{{ '' if add_generation_prompt else '.' }}",
            "more than special tokens",
        ),
        (LOOP.replace("END", "'<|im_end|>'") * 2 + PROMPT, "in 2 places"),
        (
            "{% filter upper %}" + CHATML.replace("END", "'<|im_end|>'") + "{% endfilter %}",
            "begin|token",
        ),
    ],
)
def test_a_template_without_segments_is_rejected_by_name(source: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        ChatTemplate(source, CONTROL_TAGS)
    ChatTemplate(CHATML.replace("END", "'<|im_end|>'"), CONTROL_TAGS)


def test_a_template_may_end_a_complete_conversation() -> None:
    """The token in place of the generation prompt belongs to no turn, and is not trained."""
    ending = "{{ '<|im_start|>assistant\n' if add_generation_prompt else '</s></s>' }}"
    ours = ChatTemplate(LOOP.replace("END", "'<|im_end|>\n'") + ending, (*CONTROL_TAGS, "</s>"))
    asked = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    prompt = text_of(ours.render_prompt(Conversation(asked), thinking=True))
    assert prompt.endswith("c<|im_end|>\n<|im_start|>assistant\n")
    segments = ours.render(Conversation((*asked, Message("assistant", "d"))), thinking=True)
    assert text_of(segments) == f"{prompt}d<|im_end|>\n</s></s>"
    assert [s.text for s in segments if s.trained] == ["b", "<|im_end|>", "d", "<|im_end|>"]
    assert ours.ends == ("<|im_end|>",)


def test_text_that_a_template_takes_for_its_own_is_rejected() -> None:
    """The assistant's think tags are known to templates; what else they act on is rejected."""
    acting = CHATML.replace("END", "'<|im_end|>'").replace(
        "m.content +", "m.content.split('<tool_response>')[-1] +"
    )
    ours = ChatTemplate(acting, CONTROL_TAGS)
    said = Conversation((Message("user", "a<tool_response>b"), Message("assistant", "x")))
    with pytest.raises(DataError, match="acts on special tokens"):
        ours.render(said, thinking=True)
    thought = (
        Message("user", "a"),
        Message("assistant", "why</think>x"),
        Message("user", "</think>"),
    )
    text = text_of(own_template().render_prompt(Conversation(thought), thinking=True))
    assert "assistant\nwhy</think>x<|im_end|>" in text


def test_a_tokenizer_uses_the_template_beside_it(tmp_path: Path) -> None:
    tokenizer = _with_template(tmp_path, HEADERS, {"eos_token": "</s>", "bos_token": "<|begin|>"})
    names = {i: t for t, i in tokenizer.special_tokens.items()}
    assert [names[i] for i in tokenizer.end_ids] == ["<|end|>", "<|call|>"]
    said = Conversation((Message("user", "a"), Message("assistant", "b")))
    ids, trained = encode(tokenizer.template.render(said, thinking=True), tokenizer)
    assert tokenizer.decode(ids) == "<|begin|><|user|>\na<|end|><|assistant|>\nb<|end|>"
    assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) == "b<|end|>"


def _with_template(folder: Path, source: str, config: Mapping[str, str]) -> Tokenizer:
    """A tokenizer without ChatML tokens, and a chat template of its own."""
    spec = json.loads(Path(huggingface_tokenizer().path).read_bytes())
    model = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    model.add_special_tokens([*SPECIAL])
    model.save(str(folder / "tokenizer.json"))
    inline = json.dumps({**config, "chat_template": source})
    (folder / "tokenizer_config.json").write_text(inline)
    return load_tokenizer(folder)


def test_what_a_template_rejects_is_skipped_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rejecting = (
        HEADERS + "{% if 'no' in messages[0].content %}{{ raise_exception('no!') }}{% endif %}"
    )
    tokenizer = _with_template(tmp_path, rejecting, {})
    prompts = [
        Prompt(str(i), "math", (Message("user", text),), {}, source=f"rows:{i}")
        for i, text in enumerate(("yes", "no"))
    ]
    [(prompt, _)] = encode_prompts(prompts, tokenizer, RolloutConfig())
    assert prompt == prompts[0]
    assert "1 of 2 prompts cannot be rendered" in caplog.text
    assert "rows:1: the chat template cannot render this conversation: no!" in caplog.text
    with pytest.raises(DataError, match="no prompt can be rendered: rows:1"):
        encode_prompts(prompts[1:], tokenizer, RolloutConfig())
    with_tools = [replace(prompts[0], tools=(_TOOL,))]
    with pytest.raises(DataError, match="cannot be parsed"):
        encode_prompts(with_tools, tokenizer, RolloutConfig())
    rows = [{"question": text, "answer": "x"} for text in ("yes", "no", "yes")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(max_bad_rows=1)
    assert len(build_cache(tmp_path / "cache", config, [str(path)], tokenizer)) == 2
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template .* no!"):
        build_cache(tmp_path / "other", DataConfig(), [str(path)], tokenizer)

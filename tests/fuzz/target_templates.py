"""Chat templates, which are downloaded code: escapes, endless loops, size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzz.harness import Target
from fuzz.mutations import TEXTS, Choices, edited, mutated
from fuzz.row_seeds import SFT
from helpers.data import sentencepiece_tokenizer

from nemocascade.data.chat_template import ChatTemplate
from nemocascade.data.formats import detect_format, parse_row
from nemocascade.data.own_template import OWN_TEMPLATE
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import DataError, RowError

LONGEST = 64 << 20
"""Most characters of a rendering: far above what a context holds."""
TEMPLATES = (
    OWN_TEMPLATE,
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}{% endfor %}",
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
    "{{ strftime_now('%Y') }}{{ messages[0].content | trim }}",
    "{% macro f(x) %}{{ x }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(a=[]) %}{% for i in range(9) %}{% set ns.a = ns.a + [i] %}{% endfor %}",
)
PARTS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(10 ** 9) | list | length }}",
    "{{ ('x' * 999) | center(10 ** 9) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('touch /nemocascade_fuzz') }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(messages) }}",
    "{{ strftime_now('%Y' * 9999) }}",
    "{{ strftime_now(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends messages %}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ messages | sort(attribute='x') }}",
    "{{ lipsum(n=9999) }}",
    "{{ namespace }}",
    "{{ joiner(1)() }}",
    "{% set x = 'x' %}{% for i in range(40) %}{% set x = x ~ x %}{% endfor %}{{ x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ undefined.a.b }}",
    "{% break %}",
    "{% for i in [1] %}{% continue %}{% endfor %}",
    "{{ loop }}",
    "{{ (" * 200,
    "{{" + "(" * 500 + "1" + ")" * 500 + "}}",
    *TEXTS,
)


def _make(choices: Choices) -> tuple[str, Any, bool]:
    template = choices.of(TEMPLATES)
    for _ in range(choices.below(4)):
        template = edited(choices, template, PARTS)
    # Half a surrogate pair is rejected where the template's file is read.
    template = template.encode(errors="replace").decode()
    row = mutated(choices, SFT) if choices.chance(3) else choices.of(SFT)
    return template, row, choices.chance(2)


def _render(case: tuple[str, Any, bool], folder: Path) -> None:
    source, row, thinking = case
    special = sentencepiece_tokenizer().special_tokens
    template = ChatTemplate(source, special, {"bos_token": "<s>", "eos_token": "</s>"})
    settings = DataConfig()
    if not isinstance(row, dict):
        return
    try:
        conversation = parse_row(row, detect_format(row, settings), settings)
    except RowError:
        return
    segments = template.render(conversation, thinking=thinking)
    text = "".join(s.text for s in segments)
    assert len(text) <= LONGEST
    assert "root:" not in text


TARGETS = (Target("chat template", _make, _render, (DataError,), share=6),)

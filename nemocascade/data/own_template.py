"""The chat template of models whose tokenizer brings none, in the form of Nemotron-Cascade 2 (arXiv
2603.19220).

Every turn is `<|im_start|>role\\n...<|im_end|>\\n`, and a system block, possibly empty, comes
first. An assistant turn opens with `<think>\\nREASONING\\n</think>\\n`. Before the last user turn
the reasoning is omitted, which gives `<think></think>\\n`; a turn that never had any opens with
`<think></think>`, as generation without thinking does. Tools are declared in the system block,
calls end an assistant turn, and consecutive results share a user turn.
"""

from __future__ import annotations

import json

TOOLS_INTRO = "# Tools\n\nThese functions can be called:\n\n"
TOOLS_USAGE = (
    "\n\nA call ends the reply and has this form, one block for each call:\n\n"
    "<tool_call>\n<function=NAME>\n<parameter=PARAMETER>\nVALUE\n</parameter>\n</function>\n"
    "</tool_call>\n\nGive every required parameter. A value may span lines."
)

_SOURCE = """
{%- macro shown(value) -%}
{%- if value is string -%}{{- value -}}
{%- elif value is mapping or value is sequence -%}{{- value | tojson -}}
{%- else -%}{{- value | string -}}
{%- endif -%}
{%- endmacro -%}
{%- macro others(fields, known) -%}
{%- for key, value in (fields if fields is mapping else {}) | items if key not in known -%}
{{- '\\n<' ~ key ~ '>' ~ shown(value) ~ '</' ~ key ~ '>' -}}
{%- endfor -%}
{%- endmacro -%}
{%- macro told(name, text) -%}
{{- '\\n<' ~ name ~ '>' ~ text ~ '</' ~ name ~ '>' -}}
{%- endmacro -%}
{%- macro declaration(function) -%}
{{- '\\n<function>' ~ told('name', function.name) -}}
{%- if function.description is defined -%}
{{- told('description', function.description | trim) -}}
{%- endif -%}
{{- '\\n<parameters>' -}}
{%- set schema = function.parameters if function.parameters is mapping else {} -%}
{%- for name, field in (schema.properties if schema.properties is mapping else {}) | items -%}
{{- '\\n<parameter>' ~ told('name', name) -}}
{{- told('type', field.type | string) if field.type is defined else '' -}}
{{- told('description', field.description | trim) if field.description is defined else '' -}}
{{- told('enum', field.enum | tojson) if field.enum is defined else '' -}}
{{- others(field, ['name', 'type', 'description', 'enum']) ~ '\\n</parameter>' -}}
{%- endfor -%}
{{- others(schema, ['type', 'properties', 'required']) -}}
{{- told('required', schema.required | tojson) if schema.required is defined else '' -}}
{{- '\\n</parameters>' ~ others(function, ['type', 'name', 'description', 'parameters']) -}}
{{- '\\n</function>' -}}
{%- endmacro -%}
{%- macro call(function) -%}
{{- '<tool_call>\\n<function=' ~ function.name ~ '>\\n' -}}
{%- for name, value in (function.arguments or {}) | items -%}
{{- '<parameter=' ~ name ~ '>\\n' ~ shown(value) ~ '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>\\n' -}}
{%- endmacro -%}
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set first = messages[0] if messages else {} -%}
{%- set system = first.content or '' if first.role == 'system' else '' -%}
{{- '<|im_start|>system\n' ~ system -}}
{%- if tools -%}
{{- '\n\n' if system else '' -}}
{{- TOOLS_INTRO ~ '<tools>' -}}
{%- for tool in tools -%}
{{- declaration(tool.function if tool.function is defined else tool) -}}
{%- endfor -%}
{{- '\n</tools>' ~ TOOLS_USAGE -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages -%}
{%- set text = message.content or '' -%}
{%- if message.role == 'user' -%}
{{- '<|im_start|>user\n' ~ text ~ '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\n' if loop.first or loop.previtem.role != 'tool' else '' -}}
{{- '<tool_response>\n' ~ text ~ '\n</tool_response>\n' -}}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
{%- elif message.role == 'assistant' -%}
{%- set reasoning = message.reasoning_content or '' -%}
{%- if reasoning | trim -%}
{%- set text = '<think>\n' ~ reasoning ~ '\n</think>\n' ~ text -%}
{%- elif '<think>' not in text and '</think>' not in text -%}
{%- set text = '<think></think>' ~ text -%}
{%- endif -%}
{%- set old = loop.index0 < ns.last_user -%}
{%- if old and '</think>' in text and ('<think>' in text or message.tool_calls) -%}
{%- set text = '<think></think>' ~ text.split('</think>')[-1] -%}
{%- elif old and message.tool_calls -%}
{%- set text = '<think></think>' ~ text.split('<think>')[0] -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if message.tool_calls -%}
{{- (text if old else text | trim) ~ '\n' -}}
{%- for tool_call in message.tool_calls -%}
{{- call(tool_call.function if tool_call.function is defined else tool_call) -}}
{%- endfor -%}
{%- else -%}
{{- text | trim -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n<think>' ~ ('\n' if thinking else '</think>') -}}
{%- endif -%}
"""

OWN_TEMPLATE = (
    _SOURCE.replace("TOOLS_INTRO", json.dumps(TOOLS_INTRO))
    .replace("TOOLS_USAGE", json.dumps(TOOLS_USAGE))
    .lstrip("\n")
)
"""Jinja source, written to artifacts and exports as `chat_template.jinja`."""

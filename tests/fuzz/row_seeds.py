"""Valid rows of every form: the seeds of the row targets."""

from __future__ import annotations

import json
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_task",
            "description": "Add a task.",
            "parameters": {
                "type": "object",
                "properties": {"title": {"type": "string"}},
                "required": ["title"],
            },
        },
    }
]
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "add_task", "arguments": '{"title": "tea", "n": 1.5}'},
}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Plan tea."}]},
    {"role": "assistant", "content": None, "reasoning_content": "so.", "tool_calls": [CALL]},
    {"role": "tool", "content": "done", "tool_call_id": "1"},
    {"role": "assistant", "content": "<think>\nyes\n</think>\nIt is planned.", "weight": 1},
]
INLINE = (
    "<think>\nplan\n</think>\nI add it.\n<tool_call>\n<function=add_task>\n<parameter=title>\ntea"
    "\n</parameter>\n</function>\n</tool_call>\n"
)
SFT: tuple[Any, ...] = (
    {"messages": TURNS, "tools": TOOLS},
    {"messages": TURNS, "tools": json.dumps(TOOLS)},
    {"messages": json.dumps(TURNS)},
    {"question": "What is 1 + 1?", "answer": "2", "system": "Add."},
    {
        "conversations": [
            {"from": "human", "value": "Plan tea."},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "It is planned."},
        ],
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
    },
    {
        "generator": "x",
        "messages": [
            {"role": "user", "content": "Plan tea."},
            {"role": "assistant", "content": INLINE},
            {
                "role": "user",
                "content": "<|im_start|>user\n<tool_response>\ndone\n</tool_response>",
            },
            {"role": "assistant", "content": "It is planned."},
        ],
    },
)

ASK = {"responses_create_params": {"input": [{"role": "user", "content": "Do it."}]}}
OFFICE = {
    "mail": [],
    "events": [{"id": 1, "title": "tea", "day": "2026-01-10", "time": "09:00", "guests": ["ana"]}],
    "contacts": [{"id": 1, "name": "ana", "email": "ana@hat"}],
    "tasks": [{"id": 1, "title": "tea", "due": "", "done": False}],
    "files": [{"id": 1, "path": "a", "text": "b", "shared": []}],
}
SHOP = "def total(xs):\n    return sum(xs) + 1\n"
PATCH = """diff --git a/shop.py b/shop.py
--- a/shop.py
+++ b/shop.py
@@ -1,2 +1,2 @@
 def total(xs):
-    return sum(xs) + 1
+    return sum(xs)
"""
REPAIR = {
    "instance_id": "shop-1",
    "problem_statement": "Totals are one too high.",
    "patch": PATCH,
    "FAIL_TO_PASS": ["tests.test_shop.ShopTest.test_total"],
    "PASS_TO_PASS": '["tests.test_shop.ShopTest.test_none"]',
}
HIDDEN = {"tests/test_shop.py": "import unittest\n", "tests/a.bin": {"base64": "//4A"}}

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "multipleOf": 1},
        "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 9},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "uniqueItems": True},
    },
    "$defs": {"tag": {"enum": ["a", 1, None]}},
    "allOf": [{"if": {"required": ["age"]}, "then": {"minProperties": 1}}],
}

RL: dict[str, tuple[Any, ...]] = {
    "instruction_following": (
        {
            **ASK,
            "instruction_id_list": [
                "keywords:existence",
                "keywords:frequency",
                "length_constraints:nth_paragraph_first_word",
            ],
            "kwargs": [
                {"keywords": ["tea"], "relation": None},
                {"keyword": "tea", "frequency": 2, "relation": "at least"},
                {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "tea"},
            ],
            "pass_rate": 0.5,
        },
        {
            "prompt": "Write.",
            "instruction_id_list": [
                "detectable_format:multiple_sections",
                "combination:repeat_prompt",
                "length_constraints:number_words",
            ],
            "kwargs": [
                {"section_spliter": "Part", "num_sections": 2},
                {"prompt_to_repeat": "Write."},
                {"num_words": 3, "relation": "less than"},
            ],
        },
        {
            "prompt": "Write.",
            "instruction_id_list": [
                "keywords:forbidden_words",
                "keywords:letter_frequency",
                "length_constraints:number_sentences",
                "detectable_content:number_placeholders",
                "detectable_content:postscript",
                "startend:end_checker",
                "change_case:capital_word_frequency",
                "change_case:english_capital",
            ],
            "kwargs": [
                {"forbidden_words": ["tea"]},
                {"letter": "a", "let_frequency": 2, "let_relation": "at least"},
                {"num_sentences": 2, "relation": "at least"},
                {"num_placeholders": 2},
                {"postscript_marker": "P.S."},
                {"end_phrase": "tea"},
                {"capital_frequency": 1, "capital_relation": "less than"},
                {},
            ],
        },
    ),
    "multiple_choice": (
        {**ASK, "options": [{"A": "one"}, {"B": "two"}], "expected_answer": "a", "pass_rate": 1},
        {
            **ASK,
            "options": [{"A": "one"}, {"B": "two"}],
            "expected_answer": "B",
            "template_metadata": {"output_regex": r"Answer: ([A-Z])"},
        },
    ),
    "tool_calling": (
        {
            "responses_create_params": {"input": TURNS[:4], "tools": TOOLS},
            "ground_truth": [{"name": "add_task", "arguments": '{"title": "tea"}'}],
            "office": OFFICE,
        },
        {
            **ASK,
            "ground_truth": [
                {"name": "share_file", "arguments": {"path": "a", "name": "ben"}},
                {"name": "set_due", "arguments": {"title": "tea", "due": "2026-02-28"}},
                {"name": "add_event", "arguments": {"title": "x", "day": "2026-02-28"}},
            ],
            "office": OFFICE,
        },
    ),
    "structured_output": (
        {**ASK, "schema_str": json.dumps(SCHEMA), "schema_type": "json"},
        {**ASK, "schema": SCHEMA},
        {**ASK, "schema": {"anyOf": [{"type": "null"}, {"type": "array", "contains": {}}]}},
    ),
    "math": (
        {**ASK, "expected_answer": "\\frac{1}{2}", "pass_rate": 0.25},
        {"prompt": "Add.", "expected_answer": 5},
        {"prompt": "Add.", "expected_answer": "\\{1, 2\\}"},
    ),
    "code": (
        {
            **ASK,
            "verifier_metadata": {
                "unit_tests": {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]}
            },
        },
        {
            **ASK,
            "verifier_metadata": {
                "unit_tests": json.dumps({"inputs": ["[1]\n2"], "outputs": ["3"], "fn_name": "f"})
            },
        },
    ),
    "preference": ({**ASK, "baseline": "This is done."}, {"prompt": [TURNS[1]]}),
    "long_context": (
        {**ASK, "ground_truth": "42", "metadata": {"grading": "exact"}},
        {
            "question": "Who?",
            "documents": ["a", {"title": "t", "text": "b"}, *"cde"],
            "answer": "x",
        },
        {
            "question": "Who?",
            "context": "a {0}",
            "answer": ["ana", "ben of the house of tea and x"],
        },
    ),
    "swe_agentless": (
        {
            **REPAIR,
            "files": {"shop.py": SHOP, "tests/test_shop.py": "import unittest\n"},
            "tests": {"files": {"tests/test_shop.py": "import unittest\n"}},
        },
        {
            **REPAIR,
            "repository": [{"path": "shop.py", "content": SHOP}],
            "golden_files": ["shop.py"],
        },
        {**REPAIR, "repository": "shop", "tests": {"files": HIDDEN}},
        {**REPAIR, "repository": "shop", "tests": {"files": "hidden", "framework": "unittest"}},
    ),
    "swe_agentic": (
        {**REPAIR, "repository": "shop", "tests": {"files": "hidden", "sealed": False}},
        {**REPAIR, "repository": "shop", "tests": {"files": HIDDEN, "FAIL_TO_PASS": ["a.py::b"]}},
        {
            "issue": "Wrong.",
            "repository": "shop",
            "tests": {"files": HIDDEN, "framework": "pytest"},
            "fail_to_pass": ["tests/test_shop.py::ShopTest::test_total"],
            **ASK,
        },
    ),
}
FOLDERS: dict[str, bytes] = {
    "shop/shop.py": SHOP.encode(),
    "shop/data.bin": b"\xff\xfe\x00",
    "shop/tests/test_shop.py": b"import unittest\n",
    "hidden/tests/test_shop.py": b"import unittest\n",
}
"""Files that rows of repair tasks name."""

"""Long context: questions over documents, scored by exact answers or by a judge."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemocascade.envs.base import final_text, last_boxed, opens_box
from nemocascade.envs.document_tasks import make_task
from nemocascade.envs.graded import GradedDomain
from nemocascade.envs.row_forms import RowForm
from nemocascade.judges.prompts import grade_question
from nemocascade.judges.rule import knows_language
from nemocascade.types import Message, Prompt, Question, Row, Verdict

MIN_DOCUMENTS = 5
EXACT_WORDS = 5
"""References up to this many words are compared exactly, unless a row says otherwise."""

_MARK = re.compile(r"[ \t*#]*(?:final )?answer[ \t*]*(?:[:=]|$)", re.IGNORECASE)
_TEXT = re.compile(r"^\\(?:text|textbf|mathrm)\{(.*)\}$", re.DOTALL)
_ARTICLES = ("a", "an", "the")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_EDGE = string.punctuation.replace("-", "").replace("%", "") + "\u2018\u2019\u201c\u201d\u2026"
_OTHERS = ("instruction_id_list", "options", "schema_str", "schema", "problem_statement", "issue")
"""Fields of other domains' rows, which may also have `ground_truth` and `metadata`."""
_ASK = (
    "Answer the question from the documents alone. End with a line `Answer: ` and the answer alone."
    "\n\n{documents}\n\nQuestion: {question}"
)


class LongContext(GradedDomain):
    r"""1 for one of the right answers, else 0; or a judge's grade against a reference.

    The answer is the last `\boxed{...}`. Without one, it is the text after the last `Answer:` or
    `Answer` at the start of a line, on that line or the next; otherwise the whole final message. A
    last box or mark without an answer counts as an empty answer.
    Answers are compared without case, articles and punctuation around words, following SQuAD
    (Rajpurkar et al., arXiv 1606.05250). SQuAD also removes inner punctuation, which would make
    3.5 equal 35.

    `metadata.grading` is `judge` or `exact`. Without it, a row is judged if a reference has more
    than `EXACT_WORDS` words.
    """

    domain = "long_context"
    row_forms = (
        RowForm(
            "documents and a question",
            read={
                "question": "asked behind the documents; also shown to a judge",
                "documents": "list of texts, or of objects with `text` and perhaps `title`",
                "context": "one text instead of `documents`",
                "answer": "the right answer, or a list of right answers",
            },
        ),
        RowForm(
            "a prompt and a reference",
            read={
                "ground_truth": "the right answer, or a list; precedes `answer`",
                "metadata.grading": "`exact` or `judge`; the reference's length is the default",
            },
        ),
    )

    def claims(self, row: Row) -> bool:
        plain = "question" in row and ("documents" in row or "context" in row)
        released = isinstance(row.get("ground_truth"), str) and "metadata" in row
        return plain or (released and not any(name in row for name in _OTHERS))

    def prepare(self, row: Row, folder: Path) -> Row:
        """Build a plain row's `prompt` from `documents` (or `context`) and `question`."""
        if "question" not in row or row.get("responses_create_params") or row.get("prompt"):
            return row
        if "documents" in row:
            if not isinstance(row["documents"], list):
                kind = type(row["documents"]).__name__
                raise ValueError(f"'documents' is {kind}: give a list of texts, or of objects")
            documents = [_document(d, i) for i, d in enumerate(row["documents"], start=1)]
            if len(documents) < MIN_DOCUMENTS:
                raise ValueError(
                    f"{len(documents)} documents: a row needs at least {MIN_DOCUMENTS}, or one "
                    "text in 'context'"
                )
            text = "\n\n".join(documents)
        else:
            text = row["context"]
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"'context' is {kind}, not text: give 'documents', a list")
        return {**row, "prompt": _ASK.format(documents=text, question=row["question"])}

    def parse(self, row: Row) -> Mapping[str, Any]:
        """Parse `ground_truth` or `answer`: a text, or a list of right texts."""
        truth = row["ground_truth"] if "ground_truth" in row else row["answer"]
        several = truth if isinstance(truth, list) else [truth]
        expected = [str(text).strip() for text in several]
        if not expected or not all(normalised(text) for text in expected):
            raise ValueError(f"the reference answer {truth!r} is empty")
        grading = (row.get("metadata") or {}).get("grading")
        if grading is None:
            longest = max(len(normalised(text).split()) for text in expected)
            grading = "exact" if longest <= EXACT_WORDS else "judge"
        if grading not in ("exact", "judge"):
            raise ValueError(f"metadata.grading({grading!r}) must be exact or judge")
        if grading == "judge" and not knows_language(self.judge):
            raise ValueError(
                f"the reference {expected[0][:80]!r} needs a judge, and there is none: set "
                "envs.judge.kind to server or artifact (a rule knows nothing of language), or "
                "metadata.grading to exact"
            )
        return {"expected": expected, "exact": grading == "exact", "question": row.get("question")}

    def dummy(self, prompt: Prompt) -> Sequence[Message] | None:
        return super().dummy(prompt) if prompt.answer["exact"] else None

    def examine(self, prompt: Prompt, response: Sequence[Message]) -> Verdict | Question:
        text, expected = final_text(response), prompt.answer["expected"]
        found = answer_of(text)
        if not prompt.answer["exact"] and found:
            # The documents are long and the reference is right: the judge sees only the question.
            asked = prompt.answer.get("question")
            messages = [Message("user", asked)] if asked else prompt.messages
            return grade_question(messages, text, reference="\nor: ".join(expected))
        right = normalised(found) in map(normalised, expected)
        return Verdict(float(right), details={"found": found, "expected": expected})

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task, see `document_tasks.make_task`."""
        task = make_task(rng, difficulty)
        documents = "\n".join(f"{i}. {d}" for i, d in enumerate(task.documents, start=1))
        # After an article, which the verifier drops, a word is the same token as in the documents.
        reply = task.answer if task.answer.isdigit() else f"the {task.answer}"
        return self._made(
            f"{documents}\n{task.question}",
            {"expected": [task.answer], "exact": True, "question": task.question},
            reply,
            task.reasoning,
            # A whole sentence: the verifier accepts only the exact answer.
            careless=f"it is {task.answer}",
        )


def answer_of(text: str) -> str:
    """Extract the answer from a final message."""
    if opens_box(text):
        boxed = last_boxed(text) or ""
        inner = _TEXT.match(boxed)
        return inner[1] if inner else boxed
    lines = [line.rstrip() for line in text.split("\n")]
    marks = [i for i, line in enumerate(lines) if _MARK.match(line)]
    if not marks:
        return text.strip()
    line, start = lines[marks[-1]], 0
    while mark := _MARK.match(line, start):
        start = mark.end()
    answer = line[start:].strip("* \t")
    following = (later.strip("* \t") for later in lines[marks[-1] + 1 :])
    return answer or next((later for later in following if later), "")


def normalised(text: str) -> str:
    """Lower-case a text; drop articles, extra spaces, outer punctuation and commas in numbers."""
    words = [_bare(word) for word in _THOUSANDS.sub("", text.lower()).split()]
    words = [word for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _bare(word: str) -> str:
    """Strip punctuation around a word; a minus sign before a number is kept."""
    word = word.strip(_EDGE).rstrip("-")
    return word if re.match(r"-\.?\d", word) else word.lstrip("-")


def _document(document: Any, number: int) -> str:
    """Render a document for the prompt: a text, or an object with `text` and perhaps `title`."""
    if isinstance(document, str):
        return f"Document {number}:\n{document}"
    title = f" ({document['title']})" if document.get("title") else ""
    return f"Document {number}{title}:\n{document['text']}"

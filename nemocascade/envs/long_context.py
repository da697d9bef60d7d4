"""Long context: questions over documents, by exact answers or by a judge's grade."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemocascade.envs.base import final_text, last_boxed
from nemocascade.envs.document_tasks import make_task
from nemocascade.envs.graded import GradedDomain
from nemocascade.judges.prompts import grade_question
from nemocascade.judges.rule import knows_language
from nemocascade.types import Message, Prompt, Question, Row, Verdict

MIN_DOCUMENTS = 5
EXACT_WORDS = 5
"""References of at most this many words are exact, unless a row says otherwise."""

_MARK = r"[ \t*#]*(?:final )?answer[ \t*]*(?:[:=]|$)"
_ANSWER = re.compile(rf"^{_MARK}[*\s]*(?!{_MARK})(\S.*)", re.IGNORECASE | re.MULTILINE)
_TEXT = re.compile(r"^\\(?:text|textbf|mathrm)\{(.*)\}$", re.DOTALL)
_ARTICLES = ("a", "an", "the")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_EDGE = string.punctuation.replace("-", "").replace("%", "") + "\u2018\u2019\u201c\u201d\u2026"
_OTHERS = ("instruction_id_list", "options", "schema_str", "schema", "problem_statement", "issue")
"""Fields of rows of other domains, which may have `ground_truth` and `metadata` as well."""
_ASK = (
    "Answer the question from the documents alone. End with a line `Answer: ` and the answer alone."
    "\n\n{documents}\n\nQuestion: {question}"
)


class LongContext(GradedDomain):
    r"""1 if the answer is one of the right ones, else 0; or a judge's grade beside a reference.

    The answer is the last `\boxed{...}`, else what follows the last `Answer:` or `Answer` at the
    start of a line, on it or on the next, else the whole final message. Answers are compared
    without case, articles and the punctuation around words, as SQuAD does (Rajpurkar et al., arXiv
    1606.05250, which takes out all punctuation: 3.5 and 35 would be equal).

    A row is judged where `metadata.grading` says `judge`, or, where it says nothing, where a
    reference has more than `EXACT_WORDS` words; `exact` compares whatever the length is.
    """

    domain = "long_context"

    def claims(self, row: Row) -> bool:
        plain = "question" in row and ("documents" in row or "context" in row)
        released = isinstance(row.get("ground_truth"), str) and "metadata" in row
        return plain or (released and not any(name in row for name in _OTHERS))

    def prepare(self, row: Row, folder: Path) -> Row:
        """A plain row's `prompt`, from `documents` (or `context`) and `question`."""
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
        """`ground_truth` or `answer`: a text, or a list of texts each of which is right."""
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

    def examine(self, prompt: Prompt, response: Sequence[Message]) -> Verdict | Question:
        text, expected = final_text(response), prompt.answer["expected"]
        found = answer_of(text)
        if not prompt.answer["exact"] and found:
            # The documents are long and the reference is right: the judge sees the question alone.
            asked = prompt.answer.get("question")
            messages = [Message("user", asked)] if asked else prompt.messages
            return grade_question(messages, text, reference="\nor: ".join(expected))
        right = normalised(found) in map(normalised, expected)
        return Verdict(float(right), details={"found": found, "expected": expected})

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """See `document_tasks.make_task`."""
        task = make_task(rng, difficulty)
        documents = "\n".join(f"{i}. {d}" for i, d in enumerate(task.documents, start=1))
        return self._made(
            f"{documents}\n{task.question}",
            {"expected": [task.answer], "exact": True, "question": task.question},
            task.answer,
            task.reasoning,
            # A sentence; the verifier takes the exact answer alone.
            careless=f"it is {task.answer}",
        )


def answer_of(text: str) -> str:
    """The answer that a final message gives."""
    boxed = last_boxed(text)
    if boxed is not None:
        inner = _TEXT.match(boxed.strip())
        return inner[1] if inner else boxed
    lines = _ANSWER.findall(text)
    return str(lines[-1] if lines else text).strip()


def normalised(text: str) -> str:
    """Lower case, single spaces, no articles, no punctuation around words, no commas in numbers."""
    words = [_bare(word) for word in _THOUSANDS.sub("", text.lower()).split()]
    words = [word for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _bare(word: str) -> str:
    """A word without what stands around it; a minus sign stays before a number."""
    word = word.strip(_EDGE).rstrip("-")
    return word if re.match(r"-\.?\d", word) else word.lstrip("-")


def _document(document: Any, number: int) -> str:
    """A document as the prompt shows it: a text, or an object with `text` and perhaps `title`."""
    if isinstance(document, str):
        return f"Document {number}:\n{document}"
    title = f" ({document['title']})" if document.get("title") else ""
    return f"Document {number}{title}:\n{document['text']}"

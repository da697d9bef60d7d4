"""lm-eval against the server: log-likelihoods and generation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.integrations import installed
from helpers.serving import client_of, model_of, served, start_artifact

from nemocascade.data.serving import serving_of
from nemocascade.data.tokenizer import load_artifact_tokenizer
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.convert import Serving, export_huggingface

CHOICES = ("one two", "a much longer answer")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start_artifact(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def server(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from served(artifact, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    return client_of(server)


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """A task of lm-eval on rows of a local file."""
    rows = [{"question": f"Say {n}:", "choices": CHOICES, "answer": n % 2} for n in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }


def expected_accuracy(server: str, name: str, folder: str) -> float:
    """Share of the rows whose right choice has the larger log-likelihood, by our own requests."""
    tokenizer = load_artifact_tokenizer(read_artifact(Path(folder)))
    right = 0
    for n in range(6):
        sums = []
        for choice in CHOICES:
            context, whole = (tokenizer.encode(t) for t in (f"Say {n}:", f"Say {n}: {choice}"))
            body = {"model": name, "prompt": [whole], "max_tokens": 1, "echo": True, "logprobs": 1}
            reply = httpx2.post(f"{server}/v1/completions", json=body, timeout=60).json()
            sums.append(sum(reply["choices"][0]["logprobs"]["token_logprobs"][len(context) : -1]))
        right += sums.index(max(sums)) == n % 2
    return right / 6


@pytest.mark.slow
@pytest.mark.integration
def test_lm_eval_reads_log_likelihoods_and_answers(
    server: str,
    client: Any,
    artifact: str,
    task: dict[str, Any],
    tmp_path: Path,
) -> None:
    lm_eval = installed("lm_eval")
    folder = tmp_path / "published"
    serving = Serving(*serving_of(read_artifact(Path(artifact))))
    export_huggingface(Path(artifact), folder, serving=serving)
    name = model_of(client)
    likelihoods = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": name,
            "base_url": f"{server}/v1/completions",
            "tokenizer": str(folder),
            "max_length": 512,
            "batch_size": 3,
        },
        tasks=[task | likelihoods],
        bootstrap_iters=0,
    )
    accuracy = found["results"]["choices"]["acc,none"]
    assert accuracy == pytest.approx(expected_accuracy(server, name, artifact))
    generation = {
        "task": "answers",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": name, "base_url": f"{server}/v1/chat/completions"},
        tasks=[task | generation],
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    answers = [sample["resps"][0][0] for sample in found["samples"]["answers"]]
    assert len(answers) == 6
    assert found["results"]["answers"]["exact_match,none"] == 0.0

"""Log-probabilities of a prompt's own tokens: `echo` with `logprobs` of the completions API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemocascade.megatron.microbatch import Microbatch
from nemocascade.serving.api import Asked, ServedAnswer, logprob_fields
from nemocascade.serving.model import OpenModel
from nemocascade.serving.text import StreamDecoder
from nemocascade.types import Document, pack_documents

_ROWS = 256
"""Rows whose logits are in memory together."""


@dataclass(frozen=True)
class PromptScores:
    """Scores of the tokens of a prompt but the first, at temperature 1.

    logprobs: of each token given those before it, over all rows of the LM head, as those of sampled
    tokens. best: the most probable id of the tokenizer in its place, and its log-probability.
    """

    logprobs: list[float]
    best: list[tuple[int, float]]


@torch.no_grad()
def score_prompt(model: OpenModel, prompt: Sequence[int]) -> PromptScores:
    """Score a prompt in one pass over its tokens, in the engine's thread and process."""
    (chunk,), device = model.engine.chunks, model.world.device
    tokens = torch.tensor(prompt, dtype=torch.int32)
    document = Document(tokens, torch.ones(len(prompt), dtype=torch.bool), source="prompt")
    batch = pack_documents([document], len(prompt))
    chunk.eval()
    hidden = chunk(Microbatch.from_batch(batch, device)).squeeze(1)
    head, known = chunk.lm_head(), model.tokenizer.vocab_size
    following = tokens[1:].long().to(device)
    scores = PromptScores([], [])
    for start in range(0, len(prompt) - 1, _ROWS):
        rows = slice(start, min(start + _ROWS, len(prompt) - 1))
        logprobs = (hidden[rows] @ head.t()).float().log_softmax(-1)
        values, ids = logprobs[:, :known].max(-1)
        chosen = logprobs.gather(1, following[rows, None]).squeeze(1)
        scores.logprobs.extend(chosen.tolist())
        scores.best.extend(zip(ids.tolist(), values.tolist(), strict=True))
    return scores


def echo_fields(
    asked: Asked,
    prompt: Sequence[int],
    scores: PromptScores | None,
    answer: ServedAnswer,
    model: OpenModel,
) -> dict[str, Any]:
    """The text and the log-probabilities of a choice that repeats its prompt. The first token of
    the prompt has none, as no token precedes it."""
    decoder = StreamDecoder(model.tokenizer)
    names = [decoder.add(token) for token in prompt]
    text = "".join(names) + decoder.rest()
    fields: dict[str, Any] = {"text": text + answer.text}
    if scores is None:
        return fields
    ids = [*prompt, *answer.ids]
    found = logprob_fields(
        asked, ids, [0.0, *scores.logprobs, *answer.logprobs], [*names, *answer.names]
    )
    assert found is not None
    found["token_logprobs"][0] = None
    best = [
        {f"token_id:{i}" if asked.ids_as_names else model.tokenizer.decode([i]): logprob}
        for i, logprob in scores.best
    ]
    greedy = asked.sampling.temperature == 0
    shown = found["tokens"][len(prompt) :]
    drawn = [
        {name: logprob} if greedy else None
        for name, logprob in zip(shown, answer.logprobs, strict=True)
    ]
    return fields | {"logprobs": found | {"top_logprobs": [None, *best, *drawn]}}

"""A judge that is an artifact of this project and runs on the training ranks by weight swap.

It needs no server and no second model. After the rollouts are generated, the judge's weights are
swapped into the training model and all questions are answered at once. The policy's weights are
then restored bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from nemocascade.data.chat_template import Conversation, encode
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.verification import shows
from nemocascade.rollout.engine import Engine, Request, Sampling
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Answer, Artifact, Question

WEIGHTS = "judge"
"""Name of the judge's weight set in the `WeightSwap`."""


class ArtifactJudge:
    """Answers questions by generation on all training ranks at the same time.

    artifact: the result of `open_judge`. chunks: the policy's model. engine: generates on those
    chunks. An answer depends on the seed and the question only, not on the other questions.
    """

    collective = True
    activity = 0

    def __init__(
        self,
        settings: JudgeConfig,
        artifact: Artifact,
        world: World,
        chunks: Sequence[Any],
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        seed: int,
    ) -> None:
        self.settings, self.world = settings, world
        self.engine, self.tokenizer, self.seed = engine, tokenizer, seed
        self.swap = WeightSwap(world, chunks)
        self.swap.load(WEIGHTS, artifact)
        LOGGER.info("judge: %s (%s)", artifact.folder, artifact.digest[:12])

    def begin(self, questions: Sequence[Question]) -> None:
        """Does nothing: the ranks are busy with the policy until all questions are known."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question, in order. Every rank passes the same and gets all answers."""
        if not questions:
            return []
        prompts = [self._prompt(question) for question in questions]
        numbers = [_number(prompt) for prompt in prompts]
        # Repeated questions are deduplicated.
        different = dict(zip(numbers, prompts, strict=True))
        world = self.world
        mine = sorted(different)[world.replica_rank :: world.num_replicas]
        requests = [Request(number, different[number]) for number in mine]
        texts: dict[int, str] = {}
        with self.swap.using(WEIGHTS):
            for completion in self.engine.run(requests, self._sampling()):
                texts[completion.request.id] = self._read(completion.response)
        everything: dict[int, str] = {}
        world.watch.meet()
        for part in world.all_gather_object(texts if shows(world) else {}):
            everything |= part
        return [Answer(everything[number]) for number in numbers]

    def close(self) -> None:
        """Drop the judge's weights."""
        if WEIGHTS in self.swap.names:
            self.swap.drop(WEIGHTS)

    def _sampling(self) -> Sampling:
        s = self.settings
        return Sampling(
            temperature=s.temperature,
            top_p=s.top_p,
            max_tokens=s.max_tokens,
            stop_tokens=tuple((end,) for end in self.tokenizer.end_ids),
            seed=self.seed,
        )

    def _prompt(self, question: Question) -> tuple[int, ...]:
        conversation = Conversation(question.messages, ())
        template = self.tokenizer.template
        segments = template.render_prompt(conversation, thinking=self.settings.thinking)
        ids, _ = encode(segments, self.tokenizer)
        return tuple(ids)

    def _read(self, ids: list[int]) -> str:
        """Decode the text after the reasoning; empty if the reasoning was not closed."""
        text = self.tokenizer.decode(ids)
        reply = self.tokenizer.template.parse(text, thinking=self.settings.thinking)
        return reply.message.content


def _number(prompt: tuple[int, ...]) -> int:
    """Request id, which seeds the sampling: a hash of the prompt alone."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    return int.from_bytes(digest[:7])

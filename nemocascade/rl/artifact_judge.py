"""A judge that is an artifact of this project: its weights take turns with the policy's.

No server and no second model. After the rollouts are written, the judge's weights are put into the
training ranks' model, all questions are generated at once, and the policy's weights come back bit
for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from nemocascade.data.chat_template import Conversation, encode, render_prompt
from nemocascade.data.reply import parse_reply
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.verification import shows
from nemocascade.rollout.engine import Engine, Request, Sampling
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Answer, Artifact, Question

WEIGHTS = "judge"
"""Name of the judge's weights, where they wait."""


class ArtifactJudge:
    """Answers by generating on the training ranks, all of them at the same time.

    artifact: of `open_judge`. chunks: the policy's model. engine: generates on those chunks. An
    answer is a function of the seed and the question, not of what else is asked.
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
        """The ranks are at work on the policy until all questions are asked."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each question, in order, on every rank; every rank asks the same."""
        if not questions:
            return []
        prompts = [self._prompt(question) for question in questions]
        numbers = [_number(prompt) for prompt in prompts]
        # A question that is asked twice is answered once.
        different = dict(zip(numbers, prompts, strict=True))
        world = self.world
        mine = sorted(different)[world.dp_rank :: world.dp_size]
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
        """Let go of the judge's weights."""
        if WEIGHTS in self.swap.names:
            self.swap.drop(WEIGHTS)

    def _sampling(self) -> Sampling:
        s = self.settings
        return Sampling(
            temperature=s.temperature,
            top_p=s.top_p,
            max_tokens=s.max_tokens,
            stop_tokens=((self.tokenizer.end_of_turn_id,),),
            seed=self.seed,
        )

    def _prompt(self, question: Question) -> tuple[int, ...]:
        conversation = Conversation(question.messages, ())
        segments = render_prompt(conversation, thinking=self.settings.thinking)
        ids, _ = encode(segments, self.tokenizer)
        return tuple(ids)

    def _read(self, ids: list[int]) -> str:
        """What was written after the reasoning; empty where that did not end."""
        text = self.tokenizer.decode(ids)
        return parse_reply(text, thinking=self.settings.thinking).message.content


def _number(prompt: tuple[int, ...]) -> int:
    """The request's id, which decides its draws: of what is asked alone."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    return int.from_bytes(digest[:7])

"""A judge that is an artifact of this project and runs on the training ranks by weight swap.

It needs no server and no second model. After the rollouts are generated, the judge's weights are
swapped into the training model and all questions are answered at once. The policy's weights are
then restored bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.exchange import send_objects
from nemocascade.rollout.engine import Engine, Request, Sampling
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Answer, Artifact, Question

WEIGHTS = "judge"
"""Name of the judge's weight set in the `WeightSwap`."""


class ArtifactJudge:
    """Answers questions by generation on all training ranks at the same time.

    artifact: the result of `open_judge`. world: in the generation layout. swap: of the policy's
    model. engine: generates with its weights. An answer depends on the seed and the question only,
    not on the other questions.
    """

    collective = True
    activity = 0

    def __init__(
        self,
        settings: JudgeConfig,
        artifact: Artifact,
        world: World,
        swap: WeightSwap,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        seed: int,
    ) -> None:
        self.settings, self.world = settings, world
        self.engine, self.tokenizer, self.seed = engine, tokenizer, seed
        self.swap = swap
        self.swap.load(WEIGHTS, artifact)
        LOGGER.info("judge: %s (%s)", artifact.folder, artifact.digest[:12])

    def begin(self, questions: Sequence[Question]) -> None:
        """Does nothing: the ranks are busy with the policy until all questions are known."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question, in order. Every rank asks at the same time, each its own questions.

        Equal questions of all ranks are answered once, by the data-parallel ranks in turn. Prompts
        go as token ids to the ranks that answer them, and the texts come back.
        """
        world = self.world
        asked = [self._prompt(question) for question in questions]
        mine = [_number(prompt) for prompt in asked]
        prompts = dict(zip(mine, asked, strict=True))
        numbers, askers, lengths = _gathered(world, prompts)
        # The first rank that asks one of several equal questions sends it.
        first = {number: k for k, number in reversed(list(enumerate(numbers)))}
        order = sorted(first)
        if not order:
            return []
        replicas = world.replicas()
        owners = [askers[first[number]] for number in order]
        answering = [replicas[k % len(replicas)] for k in range(len(order))]
        arrived = world.deliver(
            owners,
            [4 * lengths[first[number]] for number in order],
            answering,
            lambda k: torch.tensor(prompts[order[k]], dtype=torch.int32).view(torch.uint8),
        )
        requests = [
            Request(number, _ids(arrived[k]) if k in arrived else prompts[number])
            for k, number in enumerate(order)
            if world.rank in answering[k]
        ]
        texts: dict[int, str] = {}
        with self.swap.using(WEIGHTS), world.leaving_together():
            self.engine.weights_changed()
            for completion in self.engine.run(requests, self._sampling()):
                texts[completion.request.id] = self._read(completion.response)
        self.engine.release()
        self.engine.weights_changed()
        wanted: dict[int, set[int]] = {number: set() for number in order}
        for number, asker in zip(numbers, askers, strict=True):
            wanted[number].add(asker)
        back = send_objects(
            world,
            [ranks[0] for ranks in answering],
            {k: texts[number] for k, number in enumerate(order) if number in texts},
            [sorted(wanted[number]) for number in order],
        )
        known = {order[k]: text for k, text in back.items()}
        return [Answer(known[number]) for number in mine]

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
            stop_tokens=self.tokenizer.stop_tokens,
            seed=self.seed,
        )

    def _prompt(self, question: Question) -> tuple[int, ...]:
        thinking = self.settings.thinking
        return tuple(self.tokenizer.prompt_ids(question.messages, thinking=thinking))

    def _read(self, ids: list[int]) -> str:
        """Decode the text after the reasoning; empty if the reasoning was not closed."""
        text = self.tokenizer.decode(ids)
        reply = self.tokenizer.template.parse(text, thinking=self.settings.thinking)
        return reply.message.content


def _gathered(
    world: World, prompts: Mapping[int, tuple[int, ...]]
) -> tuple[list[int], list[int], list[int]]:
    """The number, the rank and the prompt length of every rank's questions, in rank order."""
    world.watch.meet()
    counts = torch.zeros(world.size, dtype=torch.int64)
    counts[world.rank] = len(prompts)
    counts = world.sum_over_ranks(counts)
    start = int(counts[: world.rank].sum())
    table = torch.zeros(2, int(counts.sum()), dtype=torch.int64)
    if prompts:
        mine = [[*prompts], [len(prompt) for prompt in prompts.values()]]
        table[:, start : start + len(prompts)] = torch.tensor(mine)
    numbers, lengths = world.sum_over_ranks(table).tolist()
    return numbers, torch.arange(world.size).repeat_interleave(counts).tolist(), lengths


def _ids(data: torch.Tensor) -> tuple[int, ...]:
    return tuple(data.view(torch.int32).tolist())


def _number(prompt: tuple[int, ...]) -> int:
    """Request id, which seeds the sampling: a hash of the prompt alone."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    return int.from_bytes(digest[:7])

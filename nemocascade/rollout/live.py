"""The engine on the live training weights: continuous batching over slots.

A step reads one token of every text under way and draws the next ones. A slot whose text finished
is given to the next request at once. A prompt is read once, however many requests continue it,
and what an environment adds is read onto the states of its slot: no token is read twice.

**Memory.** A pass reads at most `prefill_chunk` tokens of a text and goes on from the states which
the pass before it left, so activations do not grow with prompts. The keys and values of attention
do.

**Reproducibility.** A draw depends on the seed, the request's id, the position and the logits, and
a row's logits on its own text: prompts are read alone unless `prefill_tokens` says otherwise, and
on a CPU the steps of `nemocascade_kernels.decode_step` give a row the same bits whatever rows stand
beside it. On a GPU the shapes of a step are fixed by the number of slots, and may matter.

**Ranks.** The ranks of one data-parallel group run the same requests and make the same decisions;
the last pipeline stage draws, the others are told. Where experts are spread over several
data-parallel ranks, those agree before each pass on what they do, and one that has finished goes
along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nemocascade.megatron.generation.slot_model import SlotModel
from nemocascade.megatron.model import CascadeModel
from nemocascade.rollout.engine import Completion, Counts, Request, Respond, Sampling
from nemocascade.rollout.generation import Generation
from nemocascade.rollout.stops import Decode
from nemocascade.runtime.world import World


class LiveEngine:
    """An `Engine` on the chunks of `build_model`, whose weights it reads where they lie.

    slots: texts under way at a time on this data-parallel rank. prefill_tokens: prompts are read
    together up to this many tokens; 0 reads each by itself. prefill_chunk: tokens of one text that
    are read at once; 0 is all of them. decode: ids to text, for stop strings. vocabulary: ids from
    here on are never drawn; 0 excludes none. record_routing: completions carry the experts of their
    tokens, for router replay.

    Raises ValueError if there is no slot, or a size is negative.
    """

    def __init__(
        self,
        world: World,
        chunks: Sequence[CascadeModel],
        *,
        slots: int = 64,
        prefill_tokens: int = 0,
        prefill_chunk: int = 0,
        decode: Decode | None = None,
        vocabulary: int = 0,
        record_routing: bool = False,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots({slots}) must be at least 1")
        if prefill_tokens < 0 or prefill_chunk < 0:
            raise ValueError(
                f"prefill_tokens({prefill_tokens}) and prefill_chunk({prefill_chunk}) must be at "
                "least 0"
            )
        self.world, self.chunks = world, list(chunks)
        self.slots = slots
        self.prefill_tokens, self.prefill_chunk = prefill_tokens, prefill_chunk
        self.decode = decode
        self.record_routing = record_routing
        self.vocabulary = vocabulary or chunks[0].config.shape.vocab_size
        self.counts = Counts()
        self._model: SlotModel | None = None

    def run(
        self, requests: Sequence[Request], sampling: Sampling, respond: Respond | None = None
    ) -> Iterator[Completion]:
        """As `Engine.run`. Every rank of a data-parallel group passes the same requests, and all
        ranks that share experts call it at the same time and read it to its end."""
        if len({r.id for r in requests}) < len(requests):
            raise ValueError("two requests have one id: their random numbers would be the same")
        if self._model is None:
            # One slot beyond keeps the state of a prompt whose requests have not all begun.
            self._model = SlotModel(
                self.world, self.chunks, self.slots + 1, record_routing=self.record_routing
            )
        self.counts = Counts()
        return Generation(
            self.world,
            self._model,
            requests,
            sampling,
            respond,
            slots=self.slots,
            prefill_tokens=self.prefill_tokens,
            prefill_chunk=self.prefill_chunk,
            decode=self.decode,
            vocabulary=self.vocabulary,
            counts=self.counts,
        ).completions()

    def release(self) -> None:
        """Give the memory of the slots back, until the next run."""
        self._model = None

"""Router replay: one pass uses the experts that another pass chose.

Generation and training round differently. Where two experts have nearly equal scores, the last bits
decide which one runs, and the log-probabilities then differ much more than by rounding. With
replay, training uses the choices of the rollout. The weights of the chosen experts still come from
the training pass's own scores, so the gradient reaches the router (arXiv 2510.11370).

Both objects are fields of a `Microbatch`; every MoE layer reads its own part.

Shape letters: T tokens of the packed sequence, L MoE layers of the whole model, K experts a token,
E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from nemocascade_kernels.common.transfer import to_device
from torch import Tensor

from nemocascade.recipe import ModelConfig

_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def choice_dtype(shape: ModelConfig) -> torch.dtype:
    """The smallest integer dtype for the ids 0..E; E means "no expert"."""
    if shape.num_experts <= torch.iinfo(torch.uint8).max:
        return torch.uint8
    return torch.int16 if shape.num_experts <= torch.iinfo(torch.int16).max else torch.int32


def moe_index(shape: ModelConfig, layer_number: int) -> int:
    """Index among the MoE layers. layer_number: from 1, over the whole model."""
    return shape.pattern[: layer_number - 1].count("E")


class RouteRecorder:
    """Records the experts that a forward pass chooses.

    choices: [T, L, K] on the device, of `choice_dtype`. Rows and layers of other ranks hold 0
        until `gathered`; padding holds E.
    """

    def __init__(self, shape: ModelConfig, tokens: int, device: torch.device) -> None:
        self.shape = shape
        layers = shape.pattern.count("E")
        self.choices = torch.zeros(
            tokens, layers, shape.experts_per_token, dtype=choice_dtype(shape), device=device
        )

    def keep(self, layer_number: int, rows: slice, experts: Tensor) -> None:
        """Record a layer's choices [rows, K] int32 for `rows` of the packed sequence."""
        self.choices[rows, moe_index(self.shape, layer_number)] = experts.to(self.choices.dtype)

    def gathered(self, groups: ProcessGroupCollection) -> Tensor:
        """Choices of all rows and layers, [T, L, K], on every rank of this model replica.

        Tensor-parallel ranks hold different rows (sequence parallelism), pipeline ranks different
        layers. Each element has one writer, so a sum of bytes combines them.
        """
        whole = self.choices.clone()
        for group in (groups.tp, groups.pp):
            if group.size() > 1:
                dist.all_reduce(whole.view(torch.uint8), group=group)
        return whole


@dataclass(frozen=True, eq=False)
class RouteReplay:
    """Choices that MoE layers use instead of their own.

    shape: of the model.
    choices: [T, L, K] integers on the device. E as a token's first choice means "not recorded":
        the router chooses for such a token.
    complete: every token of the documents is recorded.
    """

    shape: ModelConfig
    choices: Tensor
    complete: bool

    @classmethod
    def from_choices(
        cls, shape: ModelConfig, choices: Tensor, num_tokens: int, device: torch.device
    ) -> RouteReplay:
        """Replay `choices` [T, L, K], integers on the host; tokens past `num_tokens` are padding.

        Raises ValueError naming all faults if they do not fit the model.
        """
        layers, top_k = shape.pattern.count("E"), shape.experts_per_token
        faults = []
        if choices.dtype not in _INTEGERS:
            faults.append(f"they are {choices.dtype}, and must be integers")
        if choices.ndim != 3 or choices.shape[1:] != (layers, top_k):
            faults.append(
                f"their shape is {list(choices.shape)}, and must be [T, {layers}, {top_k}] for "
                f"{layers} MoE layers with {top_k} experts a token"
            )
        elif choices.numel():
            low, high = int(choices.min()), int(choices.max())
            if low < 0 or high > shape.num_experts:
                faults.append(f"they hold {low}..{high}, and must be in 0..{shape.num_experts}")
        if faults:
            raise ValueError(
                "recorded choices do not fit the model: " + "; ".join(faults)
                + ". Record them with the model that replays them"
            )  # fmt: skip
        recorded = choices[:num_tokens, :, 0] < shape.num_experts
        [on_device] = to_device([choices.to(choice_dtype(shape))], device)
        return cls(shape, on_device, bool(recorded.all()))

    def of_layer(self, layer_number: int, rows: slice) -> Tensor:
        """A layer's choices for `rows` of the packed sequence, [rows, K] int32."""
        return self.choices[rows, moe_index(self.shape, layer_number)].to(torch.int32)


def lay_choices(
    shape: ModelConfig, documents: Sequence[Tensor | None], cu_seqlens: Tensor
) -> Tensor:
    """Pack the choices of documents as a packed batch packs the documents.

    documents: [n, L, K] integers, or None, for each document in order. A document may be longer
        than its record: the last sampled token went through no layer. Tokens without a record
        hold E.
    cu_seqlens: [D + 1] integers, of the packed batch; its padding may be one more document.

    Returns [T, L, K]. Raises ValueError if a record is longer than its document, or if there are
    more records than documents.
    """
    bounds = cu_seqlens.tolist()
    if len(documents) >= len(bounds):
        raise ValueError(
            f"{len(documents)} records for {len(bounds) - 1} documents: give one a document"
        )
    size = (bounds[-1], shape.pattern.count("E"), shape.experts_per_token)
    laid = torch.full(size, shape.num_experts, dtype=choice_dtype(shape))
    for index, choices in enumerate(documents):
        if choices is None:
            continue
        first, rows = bounds[index], bounds[index + 1] - bounds[index]
        if choices.shape[0] > rows:
            raise ValueError(
                f"document {index} has {rows} tokens and its record {choices.shape[0]}: cut the "
                "record as the document was cut"
            )
        laid[first : first + choices.shape[0]] = choices.to(laid.dtype)
    return laid

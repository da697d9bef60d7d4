"""Packing plan of one epoch: which documents each packed sequence holds."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from nemocascade.data.documents import DocumentSet
from nemocascade.data.packing import PackingPlan, WorkModel, plan_packing
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import SHOWN_BAD_ROWS, DataError
from nemocascade.types import PackedBatch, pack_documents


def plan_epoch(
    documents: DocumentSet, config: DataConfig, work: WorkModel, *, seed: int, epoch: int
) -> PackingPlan:
    """Pack every document once. The plan depends only on the arguments, so all ranks agree.

    Documents that truncation leaves without a trained token are dropped.

    Raises DataError if documents are longer than `config.capacity` and `config.over_long` is
    "refuse", or if no document is left.
    """
    lengths = documents.lengths
    too_long = np.flatnonzero(lengths > config.capacity)
    if len(too_long) and config.over_long == "refuse":
        shown = [f"{documents.source(i)}: {lengths[i]} tokens" for i in too_long[:SHOWN_BAD_ROWS]]
        raise DataError(
            f"{len(too_long)} documents are longer than data.capacity ({config.capacity}): raise "
            "it, or set data.over_long to truncate or drop\n  " + "\n  ".join(shown)
        )
    untrained = documents.untrained(config)
    if len(untrained):
        LOGGER.info(
            "%d documents have no trained token among their first %d and are dropped, first: %s",
            len(untrained),
            config.capacity,
            documents.source(int(untrained[0])),
        )
    kept = np.delete(np.arange(len(documents)), untrained)
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    try:
        plan = plan_packing(
            lengths[kept],
            config.capacity,
            group=config.balance_group,
            work=work,
            seed=int.from_bytes(digest[:8]) >> 1,
            over_long=config.over_long,
        )
    except OSError as error:
        raise DataError(str(error)) from error
    if not len(plan):
        raise DataError(
            f"all {len(documents)} documents are longer than data.capacity ({config.capacity}) and "
            "dropped, or not trained before it: raise it, or set data.over_long to truncate"
        )
    if not len(untrained):
        return plan
    return replace(
        plan,
        documents=kept[plan.documents],
        truncated=kept[plan.truncated],
        dropped=np.sort(np.concatenate([kept[plan.dropped], untrained])),
    )


def pack_sequence(
    documents: DocumentSet, plan: PackingPlan, index: int, *, pad_id: int
) -> PackedBatch:
    """Packed sequence `index` of `plan`; `document_ids` are document numbers in `documents`."""
    numbers = plan.bin(index).tolist()
    return pack_documents(
        [documents.document(n, plan.capacity) for n in numbers],
        plan.capacity,
        pad_id=pad_id,
        document_ids=numbers,
    )

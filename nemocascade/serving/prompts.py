"""`nemocascade generate`: answers to a file of prompts, as JSON lines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemocascade.data.formats import parse_turns
from nemocascade.megatron.checkpoint.folder import file_sha256
from nemocascade.recipe import RecipeError
from nemocascade.rollout.engine import Completion, Request
from nemocascade.runtime.files import naming
from nemocascade.runtime.jsonl import json_text, keep_settings, read_undamaged, write_objects
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import BadRows, DataError, RowError
from nemocascade.runtime.row_files import read_rows
from nemocascade.runtime.turns import kind_of, parse_tools
from nemocascade.serving.api import call_fields, messages_of
from nemocascade.serving.model import OpenModel, open_model
from nemocascade.serving.settings import GenerateSettings
from nemocascade.types import Message, Tool


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A row with its prompt. number: of the row, from 0."""

    number: int
    row: Mapping[str, Any]
    ids: list[int]
    tools: tuple[Tool, ...]


def generate(settings: GenerateSettings) -> dict[str, Any]:
    """Write OUTPUT; every rank calls it. Returns the numbers of rows, answers and written tokens on
    the main rank, and {} on the others.

    Raises RecipeError for settings that cannot run, and DataError for rows that cannot be read.
    """
    if problems := settings.problems():
        raise RecipeError(problems)
    with open_model(settings) as model:
        prompts = _read(settings, model)
        folder = Path(f"{settings.output}.progress")
        if model.world.is_main:
            _check_settings(folder, settings, model)
        model.world.barrier()
        done = _finished(folder)
        # A replica's ranks must answer the same requests, so all have read before one writes.
        model.world.barrier()
        wanted = [
            (prompt, sample)
            for prompt in prompts
            for sample in range(settings.samples)
            if (prompt.number, sample) not in done
        ]
        LOGGER.info("%d answers, %d of them finished before", len(wanted) + len(done), len(done))
        # Replicas may end hours apart.
        with model.world.leaving_together():
            _answer(folder, settings, model, wanted[model.world.dp_rank :: model.world.dp_size])
        return _merge(folder, settings, prompts) if model.world.is_main else {}


def _read(settings: GenerateSettings, model: OpenModel) -> list[_Prompt]:
    """The prompts of the file. Raises DataError if too many rows are bad, or all of them."""
    found, bad = [], BadRows(settings.max_bad_rows, setting="max_bad_rows")
    for number, (where, row) in enumerate(read_rows(settings.prompts)):
        try:
            messages, tools = _turns_of(row)
            ids = model.tokenizer.prompt_ids(messages, tools, thinking=settings.thinking)
            model.max_new_tokens(ids, settings.max_tokens)
        except ValueError as error:
            bad.add(where, str(error))
        else:
            found.append(_Prompt(number, row, ids, tools))
    bad.check()
    if bad.count:
        LOGGER.warning("%s: %s", settings.prompts, bad.summary())
    if not found:
        raise DataError(f"{settings.prompts} has no rows: name another file")
    return found


def _turns_of(row: Any) -> tuple[Sequence[Message], tuple[Tool, ...]]:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be an object, this is {kind_of(row)}")
    turns = row.get("messages", row.get("prompt"))
    if isinstance(turns, str) and turns:
        turns = [{"role": "user", "content": turns}]
    if turns is None:
        raise ValueError(f"neither 'messages' nor 'prompt'; the row has {sorted(row)}")
    return messages_of(parse_turns(turns)), parse_tools(row.get("tools"))


def _check_settings(folder: Path, settings: GenerateSettings, model: OpenModel) -> None:
    """Keep the settings that affect the answers. Raises DataError if earlier ones had others."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "thinking", "seed", "context")
    now = {name: getattr(settings, name) for name in names}
    now |= {
        "model": model.digest,
        "prompts": file_sha256(Path(settings.prompts)),
        "samples": settings.samples,
        "precision": settings.engine.precision,
    }
    keep_settings(folder, now, "answers")


def _finished(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The answers so far, by row and sample. A kill may have cut the last line of a file short."""
    found = {}
    for file in sorted(folder.glob("rank_*.jsonl")):
        for _, line in read_undamaged(file, lambda line: None):
            found[line["row"], line["sample"]] = line["response"]
    return found


def _answer(
    folder: Path,
    settings: GenerateSettings,
    model: OpenModel,
    wanted: Sequence[tuple[_Prompt, int]],
) -> None:
    """Answer this replica's share, and append each answer to its file as it comes."""
    path = folder / f"rank_{model.world.rank}.jsonl"
    requests = [
        Request(
            prompt.number * settings.samples + sample,
            tuple(prompt.ids),
            replace(
                model.sampling, max_tokens=model.max_new_tokens(prompt.ids, settings.max_tokens)
            ),
        )
        for prompt, sample in wanted
    ]
    by_id = {r.id: pair for r, pair in zip(requests, wanted, strict=True)}
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("\n")
        for completion in model.engine.run(requests, model.sampling):
            if model.world.replica_rank:
                continue
            prompt, sample = by_id[completion.request.id]
            response = _response(completion, prompt, model)
            line = {"row": prompt.number, "sample": sample, "response": response}
            file.write(json_text(line) + "\n")
            file.flush()


def _response(completion: Completion, prompt: _Prompt, model: OpenModel) -> dict[str, Any]:
    """An answer as JSON values."""
    ids = completion.response
    said = model.reply(ids, thinking=model.settings.thinking).message
    found: dict[str, Any] = {"content": said.content}
    if said.reasoning:
        found["reasoning_content"] = said.reasoning
    if said.tool_calls:
        calls = call_fields(said.tool_calls, prompt.tools)
        found["tool_calls"] = [call["function"] for call in calls]
    return found | {
        "finish_reason": completion.finish,
        "token_ids": ids,
        "logprobs": completion.logprob[len(prompt.ids) :].tolist(),
    }


def _merge(folder: Path, settings: GenerateSettings, prompts: list[_Prompt]) -> dict[str, Any]:
    """Write the rows with their answers, in order, and delete the folder of the progress."""
    done = _finished(folder)
    answers = [[done[p.number, sample] for sample in range(settings.samples)] for p in prompts]
    rows = ({**p.row, "responses": a} for p, a in zip(prompts, answers, strict=True))
    write_objects(Path(settings.output), rows)
    tokens = sum(len(response["token_ids"]) for found in answers for response in found)
    shutil.rmtree(folder)
    return {"output": settings.output, "rows": len(prompts), "tokens": tokens}

"""Writes docs/your_data.md: every form of rows that the environments read, from their code.

python tools/row_forms.py > docs/your_data.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemocascade.envs.registry import make_environments
from nemocascade.envs.row_forms import EVERY_ROW, RowForm

HEAD = """# Rows of your data

An environment reads its tasks from data files whose rows have the fields below. `a.b` is the
field `b` inside of the field `a`. A field may also be inside of `verifier_metadata`.

- A field in no table is named once for a path, with a count: it may be meant to change a verdict.
- A field that is null or empty counts as missing.
- A row that cannot be verified as it asks is rejected, with its file, its number and the reason.
- Rows for SFT, and how much data is tokenised before a job, are at the end.

This page is written by `python tools/row_forms.py > docs/your_data.md`."""

SFT = """
## Rows for SFT

A stage tokenises small data itself, into `RUN/cache`. Tokenise large data once, before the job,
on processors alone:

```
nemocascade data build --recipe recipes/nemotron3_nano_30b/sft.py --init-from BASE \\
    --output data/sft_tokens
torchrun ... recipes/nemotron3_nano_30b/sft.py --init-from BASE --data.path data/sft_tokens
```

The first command needs `pip install 'nemocascade[data]'` (datatrove, 25 MB). Without `--recipe`,
name `--data.path`, `--tokenizer.path` and the other settings of `data` that the stage has. It
starts a process for each core (`--workers`), or a Slurm array:

```
nemocascade data build ... --output data/sft_tokens \\
    --slurm.partition cpu --slurm.time 04:00:00 --slurm.tasks 96
```

### The build

- The same command resumes a build that was killed: finished shards stay. It shows the progress of
  a Slurm array.
- One command builds a folder at a time, and the folder is not inside of `data.path`. Files that
  change while they are tokenised end the build.
- JSON Lines and Parquet files are cut into shards of `--shard-mib`. A compressed file or a JSON
  array is one shard: split large ones.
- Bad rows are named and limited by `data.max_bad_rows`, as in a stage. A higher limit resumes
  where the build failed.

### Its folder in a stage

- Every rank maps the folder into its memory. Packs and batches are those that the rows give:
  packing needs the lengths alone, and a run may continue from rows to a folder with
  `--accept-changes True`.
- Long documents are cut when they are packed, so `data.capacity` and `data.over_long` may change.
  Settings that decide the tokens may not: tokenizer, chat template, `data.thinking`,
  `data.non_thinking_path`, `data.format`, its fields, and `data.max_rows`. A stage that differs
  is rejected with the setting's name.
- Files are hashed while they are written, and afterwards checked by size and modification time.
  After a copy, or in doubt, `nemocascade data build --output data/sft_tokens --verify True` reads
  everything.
- `data.heldout_path` may name rows or a folder of its own. `data.heldout_rows` are split off the
  folder.

## Data sets by hub name

`pip install 'nemocascade[hub]'` brings the package `datasets`, which loads the rows:

```
python recipes/tiny/sft.py --data.path --data.hub openai/gsm8k:main:train --data.format qa
python recipes/tiny/if_rl.py --domains.0.hub my_org/my_tasks:train \\
    --domains.0.heldout-hub my_org/my_tasks:test
```

- Its rows come beside those of `path`, which `--data.path` without a value empties.
- A name is `name:split`, `name:config:split` or `name@revision:split`, a split may be a slice such
  as `train[:1000]`, and a name may be a local folder.
- A split is exported once to a Parquet file in `$HF_HOME/nemocascade`, and read from there: caches,
  manifests and resumes know its rows by their content, and later runs need neither the hub nor
  `datasets`. Delete the file to read the hub again. A local folder that changes is read anew.
- Every node exports for itself, unless they share `$HF_HOME`."""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD, *section("Every environment", [EVERY_ROW])]
    for domain, environment in make_environments().items():
        parts += section(f"`{domain}`", environment.row_forms)
    return "\n".join([*parts, SFT]) + "\n"


def section(title: str, forms: tuple[RowForm, ...] | list[RowForm]) -> Iterator[str]:
    """Yield a heading and a table for each form."""
    yield f"\n## {title}"
    for form in forms:
        yield f"\n{form.name[0].upper()}{form.name[1:]}:\n"
        yield "| field | use | what is done with it |\n|---|---|---|"
        for use, fields in (
            ("read", form.read),
            ("rejected", form.rejected),
            ("ignored", form.ignored),
        ):
            yield from lines(use, fields)


def lines(use: str, fields: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a table; fields of which the same is said share one."""
    names: dict[str, list[str]] = {}
    for name, text in fields.items():
        names.setdefault(text, []).append(f"`{name}`")
    for text, found in names.items():
        yield f"| {', '.join(found)} | {use} | {text} |"


if __name__ == "__main__":
    print(page(), end="")

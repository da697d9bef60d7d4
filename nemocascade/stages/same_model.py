"""Whether another artifact's weights can take the place of the policy's."""

from __future__ import annotations

from nemocascade.types import Artifact


def model_problems(named: str, other: Artifact, whose: str, policy: Artifact) -> list[str]:
    """Why `other` cannot stand in the model of `policy`: another shape, another tokenizer.

    named: how messages begin, such as "judge.artifact is FOLDER". whose: such as "the student's".
    """
    problems = []
    different = [
        f"{name} {other.model.get(name)} is not {policy.model.get(name)}"
        for name in sorted(other.model.keys() | policy.model.keys())
        if other.model.get(name) != policy.model.get(name)
    ]
    if different:
        problems.append(
            f"{named}, whose shape is not {whose}, {policy.folder} "
            f"({'; '.join(different)}): name an artifact of the same model"
        )
    if _tokenizer_bytes(other) != _tokenizer_bytes(policy):
        problems.append(
            f"{named}, whose tokenizer is not {whose}, {policy.folder}: ids would mean other "
            "texts; name an artifact with the same tokenizer"
        )
    return problems


def _tokenizer_bytes(artifact: Artifact) -> bytes | None:
    path = artifact.tokenizer_path
    return None if path is None else path.read_bytes()

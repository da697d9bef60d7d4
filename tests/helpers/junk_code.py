"""A code stage whose verdicts differ although a model of two steps writes junk.

python tests/helpers/junk_code.py FOLDER START ADDRESS: run it with the programs on this host, or on
the Ray cluster at ADDRESS; prints the hashes of its weights. Without START, make that artifact.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from nemocascade.envs.base import environment, final_text
from nemocascade.envs.code import Code
from nemocascade.recipe.envs import EnvConfig, RayConfig, SandboxConfig
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import Judge, Message, Prompt, Verdict

SOURCE = "import sys\nprint(sum(sys.stdin.read().encode()) % 3 == 0)"


@environment
class JunkCode(Code):
    """1 if a program finds the sum of the answer's bytes divisible by 3, on three tests."""

    domain = "junk_code"

    @classmethod
    def from_settings(cls, config: EnvConfig, judge: Judge, children: ChildPool) -> Self:
        return cls(config.sandbox, config.code)

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        tests = {"inputs": [final_text(response)] * 3, "outputs": ["True"] * 3}
        passed, reason = self._scripts(SOURCE, tests)
        return Verdict(float(passed == 3), details={"reason": reason})


def junk_recipe(start: str, folder: str, sandbox: SandboxConfig) -> Any:
    """Two steps of GRPO on the domain."""
    from helpers.journal_jobs import stage_recipe
    from nemocascade.recipe import DomainConfig

    return replace(
        stage_recipe("plain", {"start": start}, folder),
        domains=(DomainConfig("junk_code", tasks=64),),
        envs=EnvConfig(modules=(__file__,), sandbox=sandbox),
    )


def main() -> None:
    from helpers.journal_jobs import run_and_hash
    from helpers.start_policy import start_policy

    folder, start, address = sys.argv[1:]
    if not start:
        print(start_policy(folder, ("code",)))
        return
    on_ray = SandboxConfig(workers="ray", ray=RayConfig(address, nodes=2))
    sandbox = on_ray if address else SandboxConfig(workers=2)
    print(json.dumps(run_and_hash(junk_recipe(start, folder, sandbox))))


if __name__ == "__main__":
    main()

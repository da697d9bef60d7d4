"""Settings of low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemocascade.recipe.model import LAYER_SYMBOLS, ModelConfig
from nemocascade.recipe.paths import InputPath
from nemocascade.recipe.rules import Natural, Positive
from nemocascade.recipe.train import EngineConfig

SITES = {
    "linear_qkv": "*",
    "linear_proj": "*",
    "in_proj": "M",
    "out_proj": "M",
    "mlp.linear_fc1": "-",
    "mlp.linear_fc2": "-",
    "shared_experts.linear_fc1": "E",
    "shared_experts.linear_fc2": "E",
    "experts.linear_fc1": "E",
    "experts.linear_fc2": "E",
}
"""Weights that an adapter may adapt, with the kind of layer that has them."""
_REJECTED = {
    "router": "its choices would differ from those of the base, whose balance they keep",
    "output_layer": "it is not a layer of the stack, and may be the embedding",
    "embedding": "its rows are looked up, not multiplied",
}
_SYNONYMS = {"gate": "router", "lm_head": "output_layer", "embed_tokens": "embedding"}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): a weight W computes with W + alpha/rank B A, and
    only A and B are trained. B starts at zero."""

    rank: Natural = 0
    """Rows of A and columns of B; 0 = off, all weights are trained."""

    alpha: Positive = 32.0
    """The adapters' products are multiplied by alpha / rank."""

    targets: tuple[str, ...] = ()
    """Weights to adapt: linear_qkv and linear_proj of attention, in_proj and out_proj of Mamba-2,
    mlp, shared_experts, experts; the last three may name one weight, as in experts.linear_fc1.
    Empty: all of the model's but those of the experts."""

    adapter: InputPath = ""
    """Adapter folder to continue from, on the artifact that it was trained on; empty = a new
    one."""

    @property
    def scale(self) -> float:
        """alpha / rank; 0 without an adapter."""
        return self.alpha / self.rank if self.rank else 0.0

    @property
    def sites(self) -> frozenset[str]:
        """The adapted weights, names of `SITES`; none without an adapter."""
        if not self.rank:
            return frozenset()
        if not self.targets:
            return frozenset(site for site in SITES if not site.startswith("experts."))
        return frozenset(site for target in self.targets for site in _sites_of(target))

    def adapts(self, name: str) -> bool:
        """True if the weight of this global name, such as `layers.3.mixer.linear_qkv.weight`, has
        an adapter."""
        site = name.split(".mixer.")[-1].removesuffix(".weight")
        return (f"mlp.{site}" if site.startswith("linear_fc") else site) in self.sites

    def problems(self, engine: EngineConfig, model: ModelConfig | None = None) -> list[str]:
        """Every rule that these settings break, each with its remedy. model: None if it is not
        known yet."""
        if not self.rank:
            given = {"targets": ", ".join(self.targets), "adapter": self.adapter}
            return [
                f"lora.{name}({value}) has no effect, for lora.rank is 0: set --lora.rank 16, or "
                f"leave lora.{name} empty"
                for name, value in given.items()
                if value
            ]
        found = [problem for target in self.targets for problem in _target_problems(target)]
        if engine.linears == "fp8":
            found.append(
                "engine.linears(fp8) has no adapters: set --engine.linears bf16, or --lora.rank 0"
            )
        if engine.overlap_tensor_parallel:
            found.append(
                "engine.overlap_tensor_parallel(True) runs whole linears, without adapters: set "
                "--engine.overlap-tensor-parallel False, or --lora.rank 0"
            )
        if engine.experts == "fp8" and any(site.startswith("experts.") for site in self.sites):
            found.append(
                "engine.experts(fp8) multiplies whole weights, without adapters: set "
                "--engine.experts bf16, or leave experts out of --lora.targets"
            )
        return found if found or model is None else self._model_problems(model)

    def _model_problems(self, model: ModelConfig) -> list[str]:
        found = []
        for target in self.targets:
            if absent := [site for site in _sites_of(target) if not _has(model, site)]:
                kind = LAYER_SYMBOLS[SITES[absent[0]]]
                found.append(
                    f"lora.targets({target}) is in no layer: the pattern {model.pattern} has no "
                    f"{_missing(absent[0], kind)}; leave it out of --lora.targets"
                )
        if not found and not any(_has(model, site) for site in self.sites):
            found.append(
                f"lora.targets is empty, and the pattern {model.pattern} has experts only: set "
                "--lora.targets experts"
            )
        if self.rank > model.hidden_size:
            found.append(
                f"lora.rank({self.rank}) is above model.hidden_size({model.hidden_size}), so B A "
                "has more parameters than W: lower it"
            )
        return found


def _sites_of(target: str) -> list[str]:
    return [site for site in SITES if site == target or site.startswith(f"{target}.")]


def _has(model: ModelConfig, site: str) -> bool:
    shared = site.startswith("shared_experts.")
    return SITES[site] in model.pattern and not (shared and not model.shared_expert_width)


def _missing(site: str, kind: str) -> str:
    return "shared expert" if site.startswith("shared_experts.") else f"{kind} layer"


def _target_problems(target: str) -> Iterable[str]:
    if _sites_of(target):
        return
    known = dict.fromkeys(s if "linear_fc" not in s else s.split(".")[0] for s in SITES)
    name = target.split(".")[0]
    name = _SYNONYMS.get(name, name)
    why = f"is never adapted, for {_REJECTED[name]}" if name in _REJECTED else "is no such weight"
    yield f"lora.targets({target}) {why}: use {', '.join(known)}"

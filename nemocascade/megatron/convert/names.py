"""Map between the tensors of a Hugging Face model and those of an artifact.

The map is a list of moves: a box of one of their tensors is a box of one of ours. Moves only split,
concatenate and rename, so the same list converts both ways, and gradients as well as weights. Our
names are the keys of an artifact without `model/`; an artifact stores fused tensors by part.

Shape letters: H hidden size, d head dimension, E experts, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemocascade.megatron.checkpoint.boxes import Box, whole
from nemocascade.recipe import ModelConfig

Shape = tuple[int, ...]
Family = Literal["NemotronHForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]


@dataclass(frozen=True)
class Style:
    """Naming and storage variants of a folder.

    prefix: starts all names but the LM head's; published NemotronH folders say "backbone.".
    merged_experts: the experts of a layer are one tensor, as in memory, instead of one each.
    stored_head: the LM head is stored although it is tied to the embedding.
    """

    prefix: str = "model."
    merged_experts: bool = False
    stored_head: bool = False


@dataclass(frozen=True)
class Move:
    """`their_box` of their tensor `theirs` is `our_box` of our tensor `ours`.

    Sizes are equal except for leading axes of size 1, which only one of them may have.
    """

    theirs: str
    their_box: Box
    ours: str
    our_box: Box


@dataclass
class NameMap:
    """All tensors of both sides.

    theirs, ours: the shape of each. moves: they tile every tensor of both sides, with two
    exceptions. `copies` are names of theirs that repeat tensors of other moves. Names of ours
    without a move are zero and unused in the model.
    """

    theirs: dict[str, Shape] = field(default_factory=dict)
    ours: dict[str, Shape] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def same(self, theirs: str, ours: str, *shape: int) -> None:
        """Add a tensor that is only renamed."""
        self.theirs[theirs] = self.ours[ours] = shape
        self.moves.append(Move(theirs, whole(shape), ours, whole(shape)))

    def cut(self, theirs: str, ours: str, parts: dict[str, int], *rest: int, axis: int = 0) -> None:
        """Add a tensor of theirs that is fused along `axis`; ours are its parts, `ours.part` each.

        rest: the sizes of the other axes, in order.
        """
        start = 0
        self.theirs[theirs] = (*rest[:axis], sum(parts.values()), *rest[axis:])
        for part, size in parts.items():
            shape = (*rest[:axis], size, *rest[axis:])
            offset = tuple(start if i == axis else 0 for i in range(len(shape)))
            self.ours[f"{ours}.{part}"] = shape
            self.moves.append(Move(theirs, Box(offset, shape), f"{ours}.{part}", whole(shape)))
            start += size

    def attention(self, theirs: str, ours: str, shape: ModelConfig) -> None:
        """Add q, k and v; our rows are grouped by key/value head: its query heads, k, v."""
        hidden, d = shape.hidden_size, shape.head_dim
        queries, groups = shape.num_heads // shape.num_kv_heads, shape.num_kv_heads
        key = f"{ours}.linear_qkv.weight"
        self.ours[key] = (groups * (queries + 2) * d, hidden)
        for name, first, heads in (("q", 0, queries), ("k", queries, 1), ("v", queries + 1, 1)):
            source = f"{theirs}.{name}_proj.weight"
            self.theirs[source] = (groups * heads * d, hidden)
            for group in range(groups):
                size = (heads * d, hidden)
                there = Box((group * heads * d, 0), size)
                here = Box(((group * (queries + 2) + first) * d, 0), size)
                self.moves.append(Move(source, there, key, here))
        self.same(
            f"{theirs}.o_proj.weight", f"{ours}.linear_proj.weight", hidden, shape.num_heads * d
        )

    def experts(self, theirs: str, ours: str, rows: int, columns: int, count: int) -> None:
        """Add one tensor [rows, columns] for each expert; ours is [E, rows, columns].

        theirs: a name with `{}` for the expert's number.
        """
        self.ours[ours] = (count, rows, columns)
        for expert in range(count):
            name = theirs.format(expert)
            self.theirs[name] = (rows, columns)
            here = Box((expert, 0, 0), (1, rows, columns))
            self.moves.append(Move(name, whole((rows, columns)), ours, here))

    def head(self, theirs_embedding: str, shape: ModelConfig, style: Style) -> None:
        """Add the embedding, and the LM head, which is the embedding where they are tied."""
        size = (shape.vocab_size, shape.hidden_size)
        embedding = "embedding.word_embeddings.weight"
        self.same(theirs_embedding, embedding, *size)
        if not shape.tie_embeddings:
            self.same("lm_head.weight", "output_layer.weight", *size)
        elif style.stored_head:
            self.theirs["lm_head.weight"] = size
            self.copies.append("lm_head.weight")
            self.moves.append(Move("lm_head.weight", whole(size), embedding, whole(size)))


def default_style(family: Family, shape: ModelConfig) -> Style:
    """The style of a new folder."""
    nemotron = family == "NemotronHForCausalLM"
    # transformers does not tie NemotronH's embeddings by itself: it needs the head in the file.
    return Style(
        prefix="backbone." if nemotron else "model.", stored_head=nemotron and shape.tie_embeddings
    )


def name_map(family: Family, shape: ModelConfig, style: Style) -> NameMap:
    """The tensors of a model of `shape`, which `family` must be able to express."""
    names = NameMap()
    if family == "NemotronHForCausalLM":
        _nemotron_h(names, shape, style)
    else:
        _qwen3(names, shape, style)
    return names


def _nemotron_h(names: NameMap, shape: ModelConfig, style: Style) -> None:
    hidden = shape.hidden_size
    names.head(f"{style.prefix}embeddings.weight", shape, style)
    names.same(f"{style.prefix}norm_f.weight", "decoder.final_norm.weight", hidden)
    for layer, symbol in enumerate(shape.pattern):
        theirs, ours = f"{style.prefix}layers.{layer}", f"decoder.layers.{layer}"
        names.same(f"{theirs}.norm.weight", f"{ours}.norm.weight", hidden)
        theirs, ours = f"{theirs}.mixer", f"{ours}.mixer"
        if symbol == "*":
            names.attention(theirs, ours, shape)
        elif symbol == "M":
            _mamba(names, theirs, ours, shape)
        elif symbol == "-":
            _mlp(names, theirs, ours, hidden, shape.mlp_width)
        else:
            _nemotron_h_moe(names, theirs, ours, shape, style)


def _mamba(names: NameMap, theirs: str, ours: str, shape: ModelConfig) -> None:
    hidden, inner, heads = shape.hidden_size, shape.mamba_inner, shape.mamba_heads
    shared = shape.mamba_groups * shape.mamba_state
    conv = {"x": inner, "B": shared, "C": shared}
    for name in ("A_log", "D", "dt_bias"):
        names.same(f"{theirs}.{name}", f"{ours}.{name}", heads)
    fused = {"z": inner, **conv, "dt": heads}
    names.cut(f"{theirs}.in_proj.weight", f"{ours}.in_proj.weight", fused, hidden)
    names.cut(f"{theirs}.conv1d.weight", f"{ours}.conv1d.weight", conv, 1, shape.mamba_conv)
    names.cut(f"{theirs}.conv1d.bias", f"{ours}.conv1d.bias", conv)
    names.same(f"{theirs}.norm.weight", f"{ours}.norm.weight", inner)
    names.same(f"{theirs}.out_proj.weight", f"{ours}.out_proj.weight", hidden, inner)


def _mlp(names: NameMap, theirs: str, ours: str, hidden: int, width: int) -> None:
    names.same(f"{theirs}.up_proj.weight", f"{ours}.linear_fc1.weight", width, hidden)
    names.same(f"{theirs}.down_proj.weight", f"{ours}.linear_fc2.weight", hidden, width)


def _nemotron_h_moe(
    names: NameMap, theirs: str, ours: str, shape: ModelConfig, style: Style
) -> None:
    hidden, width, count = shape.hidden_size, shape.expert_width, shape.num_experts
    names.same(f"{theirs}.gate.weight", f"{ours}.router.weight", count, hidden)
    bias = f"{theirs}.gate.e_score_correction_bias"
    names.same(bias, f"{ours}.router.expert_bias", count)
    up, down = f"{ours}.experts.linear_fc1.up", f"{ours}.experts.linear_fc2"
    if style.merged_experts:
        names.same(f"{theirs}.experts.up_proj", up, count, width, hidden)
        names.same(f"{theirs}.experts.down_proj", down, count, hidden, width)
    else:
        names.experts(f"{theirs}.experts.{{}}.up_proj.weight", up, width, hidden, count)
        names.experts(f"{theirs}.experts.{{}}.down_proj.weight", down, hidden, width, count)
    if shape.shared_expert_width:
        shared = f"{ours}.shared_experts"
        _mlp(names, f"{theirs}.shared_experts", shared, hidden, shape.shared_expert_width)


def _qwen3(names: NameMap, shape: ModelConfig, style: Style) -> None:
    hidden = shape.hidden_size
    names.head(f"{style.prefix}embed_tokens.weight", shape, style)
    names.same(f"{style.prefix}norm.weight", "decoder.final_norm.weight", hidden)
    for layer in range(len(shape.pattern) // 2):
        theirs = f"{style.prefix}layers.{layer}"
        attention, mlp = (f"decoder.layers.{2 * layer + i}" for i in (0, 1))
        names.same(f"{theirs}.input_layernorm.weight", f"{attention}.norm.weight", hidden)
        names.same(f"{theirs}.post_attention_layernorm.weight", f"{mlp}.norm.weight", hidden)
        theirs_mixer, mixer = f"{theirs}.self_attn", f"{attention}.mixer"
        names.attention(theirs_mixer, mixer, shape)
        for letter in "qk":
            theirs_norm = f"{theirs_mixer}.{letter}_norm.weight"
            names.same(theirs_norm, f"{mixer}.{letter}_layernorm.weight", shape.head_dim)
        if shape.pattern[2 * layer + 1] == "E":
            _qwen3_experts(names, f"{theirs}.mlp", f"{mlp}.mixer", shape, style)
        else:
            _gated_mlp(names, f"{theirs}.mlp", f"{mlp}.mixer", hidden, shape.mlp_width)


def _gated_mlp(names: NameMap, theirs: str, ours: str, hidden: int, width: int) -> None:
    for half in ("gate", "up"):
        key = f"{ours}.linear_fc1.weight.{half}"
        names.same(f"{theirs}.{half}_proj.weight", key, width, hidden)
    names.same(f"{theirs}.down_proj.weight", f"{ours}.linear_fc2.weight", hidden, width)


def _qwen3_experts(
    names: NameMap, theirs: str, ours: str, shape: ModelConfig, style: Style
) -> None:
    hidden, width, count = shape.hidden_size, shape.expert_width, shape.num_experts
    names.same(f"{theirs}.gate.weight", f"{ours}.router.weight", count, hidden)
    # Their router has no selection bias: our buffer exists and is zero.
    names.ours[f"{ours}.router.expert_bias"] = (count,)
    fc1, fc2 = f"{ours}.experts.linear_fc1", f"{ours}.experts.linear_fc2"
    if style.merged_experts:
        halves = {"gate": width, "up": width}
        names.cut(f"{theirs}.experts.gate_up_proj", fc1, halves, count, hidden, axis=1)
        names.same(f"{theirs}.experts.down_proj", fc2, count, hidden, width)
        return
    for half in ("gate", "up"):
        one = f"{theirs}.experts.{{}}.{half}_proj.weight"
        names.experts(one, f"{fc1}.{half}", width, hidden, count)
    names.experts(f"{theirs}.experts.{{}}.down_proj.weight", fc2, hidden, width, count)

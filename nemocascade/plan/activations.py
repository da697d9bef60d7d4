"""Activation bytes of a micro-batch between forward and backward, by kind of layer.

A layer keeps the tensors that its operators save for backward. Shape letters: T tokens of the
micro-batch on a context-parallel rank, R its rows on a rank between layers (T / tp), H hidden size,
b bytes of an activation.
The terms follow `nemocascade/megatron/layers`; a test counts them on a CPU with autograd's
saved-tensor hooks.
"""

from __future__ import annotations

from nemocascade.megatron.layers.attention_core import SHORT_DOCUMENT
from nemocascade.megatron.workspace import SCAN_CHUNK, head_bytes, scan_bytes
from nemocascade.plan.job import Job
from nemocascade.plan.segments import crossed_segments
from nemocascade.recipe import ParallelConfig

Terms = dict[str, float]


class Activations:
    """Bytes by term for each kind of layer on one rank."""

    def __init__(self, job: Job) -> None:
        self.job, self.model, self.parallel = job, job.model, job.parallel
        self.width = 2 if job.engine.precision == "bf16" else 4
        self.tokens = job.tokens
        self.rows = self.tokens / job.parallel.tp
        self.stream = self.rows * job.model.hidden_size * self.width
        self.cut = crossed_segments(job.capacity, job.document_length, job.parallel.cp)

    def layer(self, symbol: str) -> Terms:
        """Bytes that a layer keeps; with recomputation, only its input and the routing."""
        if self.job.engine.recompute:
            chosen = self.rows * self.model.experts_per_token * 4 if symbol == "E" else 0.0
            return {"layer input": self.stream, "routing": chosen}
        return self.full_layer(symbol)

    def full_layer(self, symbol: str) -> Terms:
        """Bytes that a layer keeps without recomputation."""
        norm = {"layer input": self.stream, "norm": self.stream + 4 * self.rows}
        kinds = {"M": self._mamba, "*": self._attention, "E": self._moe}
        mixer = kinds[symbol]() if symbol in kinds else self._mlp(self.model.mlp_width, "MLP")
        return norm | mixer

    def _mamba(self) -> Terms:
        m, tp, tokens = self.model, self.parallel.tp, self.tokens
        inner = m.mamba_inner / tp
        terms = {
            "Mamba projection": tokens * m.mamba_in_proj / tp * self.width,
            "Mamba output": tokens * inner * self.width,
        }
        if self.cut.exchanges:
            # States of all segments, and their sums. Rows of documents that go on are copied.
            states = 2 * self.parallel.cp + self.cut.folded + self.cut.entering
            terms["Mamba borders"] = states * inner * m.mamba_state * 4
            terms["Mamba borders"] += self.cut.left * m.mamba_in_proj / tp * self.width
        if self.cut.entering:
            # A mixer with initial states runs again in backward, and keeps only its inputs.
            return terms
        if self.job.on_gpu and self.job.fla:
            terms["Mamba scan"] = tokens * inner * self.width
        elif self.job.on_gpu:
            # On a CPU the C++ scan recomputes the states.
            per_document = -(-self.job.document_length // SCAN_CHUNK) - 1
            # Chunks of a document that are followed by another chunk of it.
            chunks = per_document * tokens / self.job.document_length
            terms["Mamba states"] = chunks * inner * m.mamba_state * 4
        return terms

    def _attention(self) -> Terms:
        m, tokens, tp = self.model, self.tokens, self.parallel.tp
        heads = m.num_heads / tp
        kv = max(m.num_kv_heads / tp, 1.0)
        query = tokens * heads * m.head_dim * self.width
        both = 2 * self.cut.keys * kv * m.head_dim * self.width
        terms = {
            "attention q k v": query + both,
            "attention output": query,
            "attention sums": tokens * heads * 4,
        }
        if self.cut.exchanges:
            # The outputs of the two segments are concatenated.
            terms["attention output"] += query
        turned = m.qk_norm or m.rope
        if m.qk_norm:
            # Inputs of the norms; their outputs are counted as q and k above.
            terms["attention norms"] = query + both / 2 + tokens * (heads + kv) * 4
        if not self.job.on_gpu:
            # Torch's attention runs document by document, and the outputs are concatenated. Short
            # documents are gathered into batches; long ones read k and v from the projection.
            terms["attention output"] += query
            if self.job.document_length <= SHORT_DOCUMENT:
                terms["attention rows"] = 3 * 8.0 * tokens
            elif turned:
                terms["attention norms"] = query + both + tokens * (heads + kv) * 4
                terms["attention q k v"] = query + both / 2
            elif kv > 1:
                terms["attention q k v"] += query
        return terms

    def _mlp(self, width: int, name: str) -> Terms:
        tokens = self.tokens * width / self.parallel.tp * self.width
        return {name: tokens * (4 if self.model.activation == "swiglu" else 2)}

    def _moe(self) -> Terms:
        m, rows = self.model, self.rows
        scores = rows * m.num_experts * 4
        slots = rows * m.experts_per_token
        terms = {"router": scores + rows * 4 * m.experts_per_token}
        moe = self.job.moe
        if not moe.freeze_router and moe.load_balance != "none" and moe.load_balance_coef:
            # Backward computes the losses' scores again, from the logits and each token's document.
            terms["router losses"] = 8 * rows
        # Weights, experts, order and positions, 4 bytes each.
        terms["routing"] = 4 * 4 * slots
        terms |= self._experts(slots)
        if m.shared_expert_width:
            terms |= self._mlp(m.shared_expert_width, "shared expert")
        return terms

    def _experts(self, slots: float) -> Terms:
        m, p = self.model, self.parallel
        gates = 2 if m.activation == "swiglu" else 1
        hidden = m.expert_width / p.etp * gates * self.width
        if p.ep * p.etp == 1:
            return {"experts": slots * hidden}
        arrived = slots * p.etp * self.job.imbalance
        # A GPU gathers the rows by the routing; a CPU keeps an index.
        index = 0.0 if self.job.on_gpu else slots * p.etp * 8
        return {
            "experts": arrived * hidden,
            "dispatch": arrived * (m.hidden_size * self.width + 4 * 4)
            + index
            + slots * m.hidden_size * self.width,
        }

    def embedding(self) -> Terms:
        """Bytes of the first stage: the token ids."""
        return {"token ids": self.tokens * 8.0}

    def head(self) -> Terms:
        """Bytes of the last stage: the final norm's input, and the gradient of the full hidden
        states, which the loss computes in its forward pass."""
        whole = self.tokens * self.model.hidden_size * self.width
        return {"final norm": self.stream + 4 * self.rows, "LM head gradient": whole}

    def head_peak(self) -> float:
        """Peak bytes of the loss: gathered hidden states and the current chunks of logits."""
        tp, tokens = self.parallel.tp, self.tokens
        gathered = tokens * self.model.hidden_size * self.width if tp > 1 else 0.0
        logits = head_bytes(self.model, tokens, self.width, tp=tp, on_gpu=self.job.on_gpu)
        return gathered + self.stream + logits

    def backward_peak(self, symbol: str) -> float:
        """Peak bytes of one layer's backward, with all that the layer keeps.

        They are the same with recomputation, which runs the layer forward before. A term is dropped
        where its operator's backward has already run.
        """
        terms = self.full_layer(symbol)
        # The gradient of the layer's output stays until it is added to that of its input.
        moments = {
            "M": self._mamba_moments,
            "*": self._attention_moments,
            "E": self._moe_moments,
        }.get(symbol, self._mlp_moments)(terms)
        return self.stream + max(moments)

    def _whole(self) -> float:
        """Bytes of a gathered sequence and of its gradient, in backward of a parallel linear."""
        hidden = self.tokens * self.model.hidden_size * self.width
        return 2 * hidden if self.parallel.tp > 1 else hidden

    def _mamba_moments(self, terms: Terms) -> list[float]:
        # The gradient of the mixer's output has taken the place of the output itself.
        everything, gradient = sum(terms.values()), terms["Mamba projection"]
        if not self.job.on_gpu:
            return [everything + gradient]
        job, tp = self.job, self.parallel.tp
        scratch: float = scan_bytes(self.model, job.tokens, self.width, tp=tp, fla=job.fla)
        if self.cut.entering:
            # The convolution in float32, its output, two gradients of that, and y's.
            scratch += self.tokens * self.model.mamba_channels / tp * (2 * 4 + 3 * self.width)
            gradient = terms["Mamba output"]
            return [everything + gradient + scratch]
        # In torch the workspace holds the projection's gradient.
        return [everything + scratch + (gradient if job.fla else 0.0)]

    def _attention_moments(self, terms: Terms) -> list[float]:
        everything = sum(terms.values())
        inputs, sums = terms["attention q k v"], terms["attention sums"]
        query = self.tokens * self.model.num_heads / self.parallel.tp
        query *= self.model.head_dim * self.width
        # Gradients of the output and of q, k, v; then those of the projection.
        core = everything + query + inputs + sums
        if self.cut.exchanges:
            # Gradients of the whole pack's keys and values, before their sum over the ranks.
            core += (inputs - query) * self.job.capacity / self.cut.keys
        projection = everything - terms["attention output"] + inputs + self._whole()
        return [core, projection]

    def _mlp_moments(self, terms: Terms) -> list[float]:
        # Gradients of the activation's output and of its input.
        return [sum(terms.values()) + terms["MLP"], sum(terms.values()) + self._whole()]

    def _moe_moments(self, terms: Terms) -> list[float]:
        m, p = self.model, self.parallel
        shared = terms.get("shared expert", 0.0)
        gates = 2 if m.activation == "swiglu" else 1
        slots = self.rows * m.experts_per_token
        arrived = slots * p.etp * self.job.imbalance if p.ep * p.etp > 1 else slots
        columns = m.expert_width / p.etp
        moments = [sum(terms.values()) + shared + self._whole()] if shared else []
        # The shared expert runs backward first and leaves the gradient of its input. The experts'
        # activation is computed again beside its gradient; the rows of x follow, and their sum.
        experts = sum(terms.values()) - shared + (self.stream if shared else 0.0)
        experts += arrived * columns * (gates + 1) * self.width
        experts += arrived * m.hidden_size * self.width
        experts += self.stream + self.rows * m.num_experts * 4
        if p.ep * p.etp > 1:
            experts += arrived * m.hidden_size * self.width
        return [*moments, experts]


def in_flight(parallel: ParallelConfig, pp_rank: int, microbatches: int) -> float:
    """Micro-batches of a pipeline rank in flight, in units of all its layers: 1F1B (arXiv
    2104.04473) or its interleaved form."""
    ahead = parallel.pp - pp_rank
    if parallel.vpp == 1:
        return float(min(ahead, microbatches))
    chunks = 2 * (parallel.pp - pp_rank - 1) + (parallel.vpp - 1) * parallel.pp + 1
    return min(chunks, microbatches * parallel.vpp) / parallel.vpp

"""Activation bytes of a micro-batch between forward and backward, by kind of layer.

A layer keeps the tensors that its operators save for backward. Shape letters: T tokens of the
micro-batch on a context-parallel rank, R its rows on a rank between layers (T / tp), H hidden size,
b bytes of an activation.
The terms follow `nemocascade/megatron/layers`; a test counts them on a CPU with autograd's
saved-tensor hooks.
"""

from __future__ import annotations

from nemocascade.megatron.context import MOST_GATHERED
from nemocascade.megatron.layers.attention_core import SHORT_DOCUMENT
from nemocascade.megatron.workspace import SCAN_CHUNK, head_bytes, scan_bytes
from nemocascade.plan.expert_rows import expert_rows
from nemocascade.plan.job import Job
from nemocascade.plan.segments import crossed_segments, scan_rounds
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
        if symbol in self.job.engine.recomputed:
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
            terms["Mamba borders"] = self._border_states() * inner * m.mamba_state * 4
        # Rows of continued documents run again in backward, and keep only their inputs.
        tokens -= self.cut.entered
        if not tokens:
            return terms
        if self.job.on_gpu and self.job.mixer == "fla":
            terms["Mamba scan"] = tokens * inner * self.width
        elif self.job.on_gpu and self.job.mixer == "torch":
            # Triton's kernels, and C++ on a CPU, compute the states again.
            per_document = -(-self.job.document_length // SCAN_CHUNK) - 1
            # Chunks of a document that are followed by another chunk of it.
            chunks = per_document * tokens / self.job.document_length
            terms["Mamba states"] = chunks * inner * m.mamba_state * 4
        return terms

    def _border_states(self) -> int:
        """States that a mixer keeps of its own segments and of others."""
        cut = self.cut
        if self.parallel.cp > MOST_GATHERED:
            # In each round of the scan, those that arrive and their sums.
            return 4 * scan_rounds(cut.longest) + cut.entering
        # Those of all segments, and their sums.
        return 2 * self.parallel.cp + cut.folded + cut.entering

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
        if self.job.engine.experts == "fp8" and not self.job.on_gpu:
            # The definition keeps rows, pre-activations and activations in float32.
            hidden = 4 * (m.hidden_size + m.expert_width / p.etp * (gates + 1))
        if any(self.job.lora.adapts(f"experts.linear_fc{number}") for number in (1, 2)):
            # Separate operators also keep the rows, the activations and the outputs.
            hidden += (2 * m.hidden_size + m.expert_width / p.etp) * self.width
        if p.ep * p.etp == 1:
            return {"experts": slots * hidden}
        arrived = slots * p.etp * self.job.imbalance
        # A GPU gathers the rows by the routing; a CPU keeps an index.
        index = 0.0 if self.job.on_gpu else slots * p.etp * 8
        # Routings of tokens to nodes, of pairs to experts, and the pairs' weights with their mask.
        index += self._pairs() * (4 * 4 + m.experts_per_token * (4 * 4 + 1))
        return {
            "experts": arrived * hidden,
            "dispatch": arrived * (m.hidden_size * self.width + 4 * 4)
            + index
            + slots * m.hidden_size * self.width,
        }

    def _pairs(self) -> float:
        """Rows of the micro-batch's tokens, one for each node of their experts; 0 on one node."""
        job = self.job
        rows = expert_rows(self.model, self.parallel, job.gpu.per_node, job.engine.expert_exchange)
        return self.rows * rows.pairs

    def embedding(self) -> Terms:
        """Bytes of the first stage: the token ids."""
        return {"token ids": self.tokens * 8.0}

    def head(self) -> Terms:
        """Bytes of the last stage: the final norm's input, and the gradient of the full hidden
        states, which the loss computes in its forward pass."""
        whole = self.tokens * self.model.hidden_size * self.width
        return {"final norm": self.stream + 4 * self.rows, "LM head gradient": whole}

    def head_peak(self) -> float:
        """Peak bytes of the loss: gathered hidden states and the current chunks of logits. An exact
        divergence also has the states of a teacher's rows, and a copy of the student's."""
        tp, tokens, exact = self.parallel.tp, self.tokens, self.job.exact_teachers > 0
        hidden = tokens * self.model.hidden_size * self.width
        logits = head_bytes(
            self.model, tokens, self.width, tp=tp, on_gpu=self.job.on_gpu, heads=1 + exact
        )
        return hidden * ((tp > 1) + 2 * exact) + self.stream + logits

    def teacher_heads(self) -> float:
        """Bytes of the teachers' LM heads on the last stage, which an exact divergence needs."""
        head = self.model.vocab_size * self.model.hidden_size / self.parallel.tp * self.width
        return self.job.exact_teachers * head

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
        if self.cut.entering:
            return [everything + self._entering_scratch()]
        scratch: float = scan_bytes(self.model, job.tokens, self.width, tp=tp, backend=job.mixer)
        # In torch the workspace holds the projection's gradient.
        return [everything + scratch + (0.0 if job.mixer == "torch" else gradient)]

    def _entering_scratch(self) -> float:
        """Temporary bytes of a mixer some of whose rows continue documents, in its backward."""
        job, tp = self.job, self.parallel.tp
        m = self.model
        # A segment's new documents and the continued one are computed one after the other.
        scratch: float = scan_bytes(m, job.tokens // 2, self.width, tp=tp, backend=job.mixer)
        if job.mixer == "triton":
            # Beside the gradient of the projection's output, two of a segment's rows: of the state
            # that it passes on, and of that state's decay.
            return scratch + 2 * job.tokens * m.mamba_in_proj / tp * self.width
        run = self.cut.entered / self.cut.entering
        others = self.cut.entered - run
        # The convolution in float32 and its output; two gradients of that, and y's.
        scratch += run * m.mamba_channels / tp * (2 * 4 + 3 * self.width)
        # The gradient of the projection's output, so far.
        scratch += others * m.mamba_in_proj / tp * self.width
        if "M" in job.engine.recomputed:
            # Other runs of rows wait with their convolutions, and the gated norm in float32.
            waiting = m.mamba_channels * (2 * 4 + self.width) + m.mamba_inner * 6 * 4
            scratch += others * waiting / tp
        return scratch

    def _attention_moments(self, terms: Terms) -> list[float]:
        everything = sum(terms.values())
        inputs, sums = terms["attention q k v"], terms["attention sums"]
        query = self.tokens * self.model.num_heads / self.parallel.tp
        query *= self.model.head_dim * self.width
        # Gradients of the output and of q, k, v; then those of the projection.
        core = everything + query + inputs + sums
        if self.cut.exchanges:
            # Gradients of the whole pack's keys and values, before their sum over the ranks.
            core += (inputs - query) * self.job.capacity / self.cut.keys * 4 / self.width
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
        everything, overlaps = (
            sum(terms.values()),
            self.job.engine.overlaps_shared_expert(p, m),
        )
        moments = [everything + shared + self._whole()] if shared else []
        # The experts' activation is computed again beside its gradient; the rows of x follow. Rows
        # that arrived have one expert each: Triton's bf16 products need no sum of theirs.
        if overlaps:
            # The second product of the shared expert runs backward beside the exchange of the
            # rows' gradients, and the first one after the experts.
            rows = arrived * m.hidden_size * self.width
            moments = [everything + shared / 2 + self._whole() + rows]
            experts = everything
        else:
            # The shared expert runs backward first and leaves the gradient of its input.
            experts = everything - shared + (self.stream if shared else 0.0)
        if self.job.engine.experts == "fp8":
            experts += self._fp8_copies(arrived, columns, gates)
        else:
            experts += arrived * columns * (gates + 1) * self.width
        experts += (arrived + self._pairs()) * m.hidden_size * self.width
        experts += self.stream + self.rows * m.num_experts * 4
        if p.ep * p.etp > 1 and not (self.job.on_gpu and self.job.engine.experts == "bf16"):
            experts += arrived * m.hidden_size * self.width
        return [*moments, experts]

    def _fp8_copies(self, arrived: float, columns: float, gates: int) -> float:
        """Bytes of e4m3 copies beside the gradient of the experts' rows: of the gradient of h, with
        a scale for 128 values, and of w_up. On a CPU, of the gradients of h and act(h)."""
        if not self.job.on_gpu:
            return arrived * columns * (gates + 1) * 4
        m, p = self.model, self.parallel
        width = gates * -(-columns // 128) * 128
        return width * (arrived * (1 + 4 / 128) + m.num_experts / p.ep * m.hidden_size)


def in_flight(parallel: ParallelConfig, pp_rank: int, microbatches: int) -> float:
    """Micro-batches of a pipeline rank in flight, in units of all its layers: 1F1B (arXiv
    2104.04473) or its interleaved form."""
    ahead = parallel.pp - pp_rank
    if parallel.vpp == 1:
        return float(min(ahead, microbatches))
    chunks = 2 * (parallel.pp - pp_rank - 1) + (parallel.vpp - 1) * parallel.pp + 1
    return min(chunks, microbatches * parallel.vpp) / parallel.vpp

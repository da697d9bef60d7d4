"""The decode operators as the layers of a model call them: an implementation, chosen once."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from nemocascade_kernels.common.routing import RouterSettings
from nemocascade_kernels.decode_step.op import OP
from nemocascade_kernels.decode_step.routed_rows import RoutedRows, SharedExpert
from nemocascade_kernels.decode_step.sampling import SampleSettings
from nemocascade_kernels.decode_step.weights import MambaWeights


class Steps(Protocol):
    """An implementation: the functions of `op` without checks and choice of implementation, and
    some that do the work of several. FUSED: these take fewer launches; otherwise they are
    references."""

    FUSED: bool

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor: ...

    def route(
        self, logits: Tensor, bias: Tensor | None, real: int, settings: RouterSettings
    ) -> tuple[Tensor, Tensor]: ...

    def experts(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        swiglu: bool,
    ) -> Tensor: ...

    def up(self, x: Tensor, weight: Tensor, swiglu: bool) -> Tensor:
        """The activation of x [n, H] by weight [I, H] or [2 I, H], see `step_experts`; [n, I]."""
        ...

    def norm_route(
        self,
        hidden: Tensor,
        norm_weight: Tensor,
        eps: float,
        router: Tensor,
        bias: Tensor | None,
        slots: Tensor | None,
        spare: int,
        settings: RouterSettings,
    ) -> RoutedRows:
        """`step_norm` of hidden [n, H], and `step_route` of the float32 logits by router [E, H].
        Rows whose slots [n] are `spare` have no expert."""
        ...

    def mixture(
        self,
        routed: RoutedRows,
        w_up: Tensor,
        w_down: Tensor,
        first_expert: int,
        shared: SharedExpert | None,
        residual: Tensor | None,
        swiglu: bool,
    ) -> Tensor:
        """`residual + step_experts(x) + shared(x)` by the experts [first_expert, first_expert + E)
        of w_up and w_down, [n, H] in the residual's dtype; without one, float32."""
        ...

    def mamba(
        self,
        zxbcdt: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        slots: Tensor,
        w: MambaWeights,
    ) -> Tensor: ...

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        slots: Tensor,
        positions: Tensor,
        longest: int,
    ) -> Tensor: ...

    def draw(
        self,
        logits: Tensor,
        u: Tensor | None,
        temperature: float,
        limit: int,
        allowed: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

    def sample(
        self, logits: Tensor, keys: Tensor, positions: Tensor, settings: SampleSettings
    ) -> tuple[Tensor, Tensor]:
        """`step_draw` from logits [n, V], truncated, at the random numbers of the keys [n] at the
        positions [n]: tokens [n] int64 and their log-probabilities [n] float32."""
        ...


def decode_steps(*tensors: Tensor, backend: str | None = None) -> Steps:
    """The decode operators for these tensors, chosen once for thousands of calls.

    Arguments are those of the functions of `op`, all required; shapes are not checked.
    """
    steps: Any = OP.choose(*tensors, backend=backend)
    found: Steps = steps
    return found

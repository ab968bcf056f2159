"""Adapter to the forward kernels of fla-core: the delta rule on CUDA."""

from __future__ import annotations

from torch import Tensor


def delta_rule(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contract of `reference.delta_rule`, forward only: FLA's recurrent kernel for one token, its chunked for more.

    Raises ValueError for packed segments: FLA wants them as host-side tables.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    if segment is not None:
        raise ValueError("fla: packed segments are not supported; use the reference implementation")
    run = fused_recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
    out, state = run(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=g.float(),
        beta=beta.float(),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return out, state

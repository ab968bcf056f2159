"""The definition of right: each op in plain torch, and the path that laptops and tests run.

Softmax and delta arithmetic is float32 whatever comes in; results return in the dtype of v (attend, delta_rule) or x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl import memory
from infinitevl.memory import Delta, Window
from infinitevl.ops.where import DeltaWeights, Placed, Projected, Where, Windows

QUERY_BLOCK = 1024  # queries per mask: a T x T mask would be 1 GiB at 32,768 tokens
CHUNK = 64  # tokens solved at once by the chunked delta rule
L2_EPS = 1e-6


def rms_norm(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / rms(x) * weight: the root in float32, the product with the weight in x's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def linear(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    onto: Tensor | None,
) -> Tensor:
    """onto + act(norm(x) weight^T + bias): x [..., D], weight [N, D], bias [N], norm an RMS norm's (weight [D], eps).

    gated: the first half of the N channels is a gate, silu(gate) * rest, and N / 2 come out. onto: as the result.
    """
    y = x if norm is None else rms_norm(x=x, weight=norm[0], eps=norm[1])
    return finished(F.linear(y, weight, bias), gated, onto)


def finished(y: Tensor, gated: bool, onto: Tensor | None) -> Tensor:
    """What `linear` does to its product y [..., N]: the gate and the sum."""
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if onto is None else onto + y


def angles(*, positions: Tensor, frequency: Tensor, sections: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine float32 [B, T, hd] of mRoPE positions [3, B, T]: each range of the hd / 2 frequencies (float64)
    follows time, row or column. The phase is float64: float32 is off by 0.02 rad at position 1e6."""
    parts = zip(positions.double()[..., None], frequency.split(list(sections)), strict=True)
    half = torch.cat([axis * part for axis, part in parts], dim=-1)
    phase = torch.cat([half, half], dim=-1)
    return phase.cos().float(), phase.sin().float()


def place(*, positions: Tensor, seen: Tensor, clock: Tensor, held: Tensor, sinks: int, count: Tensor | None) -> Placed:
    """Where a chunk of positions [3, B, T] stands after `seen` [B] tokens, and what the ring's index `held` [B, W] and
    the clock [B] are after it. count int64 [B]: only so many tokens of a row are there, its first; None: all."""
    length = positions.shape[2]
    step, latest = torch.arange(length, device=seen.device), positions.amax(0)
    index = seen[:, None] + step
    if count is not None:
        there = step < count[:, None]
        index, latest = torch.where(there, index, -1), torch.where(there, latest, -1)
    target = memory.target_slots(index, held, sinks)
    after = seen + (length if count is None else count)
    return Placed(index, target, memory.write(held, target, index), after, torch.maximum(clock, latest.amax(1) + 1))


def rotate(*, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, hd] rotated by its tokens' angles [B, T, hd] (rotate-half), in float32, returned in x's dtype."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos[:, :, None] + turned * sin[:, :, None]).to(x.dtype)


def visible(q_index: Tensor, k_index: Tensor, window: int | None, sinks: int) -> Tensor:
    """Which keys each query sees: [B, T], [B, S] -> bool [B, T, S].

    A query sees itself and the window - 1 tokens before it, and the first `sinks` tokens of the stream. Index -1 is a
    token that is not there: as a key it is never seen; as a query it sees everything, because a softmax over nothing
    is NaN and nobody reads its output.
    """
    distance = q_index[:, :, None] - k_index[:, None, :]
    seen = (distance >= 0) & (k_index >= 0)[:, None, :]
    if window is not None:
        seen = seen & ((distance < window) | (k_index < sinks)[:, None, :])
    return seen | (q_index < 0)[:, :, None]


def attend(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    window: int | None,
    sinks: int,
    q_segment: Tensor | None,
    k_segment: Tensor | None,
) -> Tensor:
    """Grouped-query softmax attention masked by token index.

    q [B, T, H, hd]; k, v [B, S, G, hd]; q_index [B, T]; k_index [B, S]; segments likewise or None -> [B, T, H, hd].
    Query head i reads key head i // (H / G).
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    outputs = []
    for at in range(0, q.shape[2], QUERY_BLOCK):
        part = slice(at, at + QUERY_BLOCK)
        mask = visible(q_index[:, part], k_index, window, sinks)
        if q_segment is not None and k_segment is not None:
            mask = mask & (q_segment[:, part, None] == k_segment[:, None, :])
        outputs.append(F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=mask[:, None]))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_window(
    *, q: Tensor, k: Tensor, v: Tensor, where: Where, state: Window | None, window: int | None, sinks: int
) -> tuple[Tensor, Window | None]:
    """A chunk rotates, attends over ring ++ chunk, and only then is written: any chunking gives the same result.

    q [B, T, H, hd]; k, v [B, T, G, hd], not rotated -> [B, T, H, hd] and the window after (None stays None).
    """
    q, k = (rotate(x=x, cos=where.cos, sin=where.sin) for x in (q, k))
    keys, values, k_index = k, v, where.index
    if state is not None:
        assert where.held is not None and where.target is not None
        keys, values = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
        k_index = torch.cat([where.held, where.index], dim=1)
        state = Window(memory.write(state.keys, where.target, k), memory.write(state.values, where.target, v))
    out = attend(
        q=q,
        k=keys,
        v=values,
        q_index=where.index,
        k_index=k_index,
        window=window,
        sinks=sinks,
        q_segment=where.segment,
        k_segment=where.segment,
    )
    return out, state


def attend_patches(*, qkv: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None, width: int) -> Tensor:
    """Patches of a frame attend to those of their window, or (None) to all: qkv [F, P, 3, H, hd], q and k not rotated
    -> [F, P, width]: H * hd channels and, where `width` is more, a 1 and zeros. cos, sin float32 [1, P, hd]."""
    q, k, v = qkv.unbind(2)
    return padded(attend_rotated(rotate(x=q, cos=cos, sin=sin), rotate(x=k, cos=cos, sin=sin), v, windows), width)


def padded(x: Tensor, width: int) -> Tensor:
    """[F, P, H, hd] -> [F, P, width] as `attend_patches` returns it."""
    x = x.flatten(2)
    more = width - x.shape[-1]
    return x if not more else torch.cat([x, x.new_ones(*x.shape[:2], 1), x.new_zeros(*x.shape[:2], more - 1)], dim=-1)


def attend_rotated(q: Tensor, k: Tensor, v: Tensor, windows: Windows | None) -> Tensor:
    """`attend_patches` once q and k are rotated: [F, P, H, hd] each."""
    if windows is None:
        return _softmax(q, k, v, None)
    frames, count = q.shape[0], windows.place.shape[0]
    if windows.there is None:
        q, k, v = (x.unflatten(1, (count, -1)).flatten(0, 1) for x in (q, k, v))
        return _softmax(q, k, v, None).unflatten(0, (frames, count)).flatten(1, 2)
    q, k, v = (x[:, windows.place].flatten(0, 1) for x in (q, k, v))
    mask = windows.there[:, None, None, :].repeat(frames, 1, 1, 1)
    out = _softmax(q, k, v, mask).unflatten(0, (frames, count))
    return out.flatten(1, 2)[:, windows.there.flatten()]


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[N, P, H, hd] each -> [N, P, H, hd]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def delta_rule_recurrent(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, one token at a time: S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; o = S^T q.

    q, k [B, T, H, K]; v [B, T, H, V]; g (log decay), beta [B, T, H]; state [B, H, K, V]; segment [B, T] or None
    -> (o [B, T, H, V] in v's dtype, state). Computed in the state's dtype (float32; float64 in tests).
    """
    like = v.dtype
    q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        if segment is not None and t > 0:
            state = state * (segment[:, t] == segment[:, t - 1])[:, None, None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(like), state


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, size, ...] in the order of time, zeros after the end."""
    x = F.pad(x, (0,) * (2 * (x.dim() - 2)) + (0, -x.shape[1] % size))
    x = x.unflatten(1, (-1, size))
    return x.permute(0, 3, 1, 2, *range(4, x.dim()))


def _reach(segment: Tensor | None, shape: tuple[int, int], size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Who reaches whom across a change of segment, per chunk.

    -> within [B, 1, N, C, C], inward and outward [B, 1, N, C], through [B, 1, N].
    `within`: j <= i of one segment; `inward`: the state at the chunk's start still belongs to token i's segment;
    `outward`: token j's segment is the one that leaves the chunk; `through`: the state passes the whole chunk.
    """
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if segment is None:
        ones = torch.ones(1, 1, 1, size, dtype=torch.bool, device=device)
        return causal[None, None, None], ones, ones, ones[..., 0]
    rows, length = shape
    segment = torch.cat([segment, segment[:, -1:].expand(rows, -length % size)], dim=1)
    parts = segment.view(rows, 1, -1, size)
    before = torch.cat([segment[:, :1], segment[:, size - 1 : -1 : size]], dim=1).view(rows, 1, -1, 1)
    within = causal & (parts[..., :, None] == parts[..., None, :])
    inward, outward = parts == before, parts == parts[..., -1:]
    return within, inward, outward, inward[..., -1]


def delta_rule(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule in chunks: the same function as `delta_rule_recurrent`, parallel inside a chunk.

    With G the running sum of g inside a chunk and S the state before it, the rank-1 updates u solve
    (I + A) u = beta (v - exp(G) S^T k), A_ij = beta_i exp(G_i - G_j) k_i.k_j for j < i (Yang et al. 2024, eq. 8 to 10,
    with decay). A chunk is then an affine map of the state, so that only one small product per chunk runs in sequence.
    Only differences of G are exponentiated, and masked before exp: after it, the backward would meet inf * 0.
    """
    like, length = v.dtype, q.shape[1]
    size = min(CHUNK, length)
    within, inward, outward, through = _reach(segment, (q.shape[0], length), size, q.device)
    q, k, v, g, beta = (_chunks(x.to(state.dtype), size) for x in (q, k, v, g, beta))
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~within, float("-inf")).exp()
    from_start = total.exp() * inward
    to_end = (total[..., -1:] - total).exp() * outward
    system = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    system = system + torch.eye(size, dtype=system.dtype, device=system.device)
    known = torch.cat([beta[..., None] * v, (beta * from_start)[..., None] * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    u_new, u_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    k_end = (k * to_end[..., None]).mT
    added, kept = k_end @ u_new, -(k_end @ u_state)
    kept = kept + torch.diag_embed((total[..., -1].exp() * through)[..., None].expand(*kept.shape[:-1]))
    states = []
    for n in range(q.shape[2]):
        states.append(state)
        state = torch.matmul(kept[:, :, n], state) + added[:, :, n]
    before = torch.stack(states, dim=2)
    u = u_new - u_state @ before
    o = (q * from_start[..., None]) @ before + ((q @ k.mT) * decay) @ u
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length].to(like), state


def causal_conv(
    *, x: Tensor, weight: Tensor, tail: Tensor, present: Tensor | None, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, then SiLU, over the tokens that are there.

    x [B, T, C]; weight [C, taps], the last tap on the token itself; tail [B, taps - 1, C], the tokens before;
    present bool [B, T] or None (all there); segment [B, T] or None -> (y [B, T, C], the new tail).
    A token that is not there is skipped as if the sequence had been written without it.
    """
    taps = weight.shape[1]
    if present is None:
        line = torch.cat([tail, x], dim=1)
    else:
        first = torch.argsort((~present).to(torch.int8), dim=1, stable=True)
        line = torch.cat([tail, x.gather(1, first[..., None].expand_as(x))], dim=1)
        segment = None if segment is None else segment.gather(1, first)
    y = torch.zeros_like(x, dtype=torch.float32)
    for tap in range(taps):
        term = line[:, tap : tap + x.shape[1]].float() * weight[:, tap].float()
        back = taps - 1 - tap
        if segment is not None and back:
            same = F.pad(segment[:, back:] == segment[:, :-back], (min(back, x.shape[1]), 0))[:, : x.shape[1]]
            term = term * same[..., None]
        y = y + term
    if present is None:
        tail = line[:, x.shape[1] :].clone()  # a view would keep the whole chunk alive
    else:
        rank = (present.cumsum(1) - 1).clamp(min=0)
        y = y.gather(1, rank[..., None].expand_as(y))
        at = present.sum(1, keepdim=True) + torch.arange(taps - 1, device=x.device)
        tail = line.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
    return F.silu(y).to(x.dtype), tail


def gated_norm(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each head times weight times silu(gate): x, gate [..., V]; weight [V] -> [..., V] in gate's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float() * F.silu(gate.float())).to(gate.dtype)


def l2_normalised(x: Tensor) -> Tensor:
    """x [..., K] in float32, divided by its length; the epsilon is inside the root."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log decay g, write strength beta, float32 [B, T, H]; a token that is not there decays and writes nothing."""
    g = -A_log.exp() * F.softplus(a.float() + dt_bias)
    beta = b.float().sigmoid()
    if present is None:
        return g, beta
    return g * present[..., None], beta * present[..., None]


def gated_delta(
    *,
    projected: Projected,
    weights: DeltaWeights,
    where: Where,
    state: Delta,
    rule: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Delta]:
    """All of a delta mixer between its projections and its last one -> [B, T, H, V] and the state after the chunk.

    Convolution and SiLU on q, k, v; unit q (times K^-0.5) and k; the gated delta rule; gated norm of each head.
    """
    parts = projected[:3]
    joined, tail = causal_conv(
        x=torch.cat(parts, dim=-1),
        weight=torch.cat([weights.q_conv, weights.k_conv, weights.v_conv]),
        tail=state.tail,
        present=where.present,
        segment=where.segment,
    )
    convolved = joined.split([x.shape[-1] for x in parts], dim=-1)
    out, after = mixed(convolved, projected, weights, where, state.state, rule)
    return out, Delta(tail, after)


def mixed(
    convolved: Sequence[Tensor],
    projected: Projected,
    weights: DeltaWeights,
    where: Where,
    state: Tensor,
    rule: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """What a delta mixer does with q, k and v once they are convolved; `gated_delta` has the rest."""
    heads = projected.a.shape[-1]
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in convolved)
    g, beta = gates(projected.a, projected.b, weights.A_log, weights.dt_bias, where.present)
    q, k = l2_normalised(q) * q.shape[-1] ** -0.5, l2_normalised(k)
    out, after = rule(q=q, k=k, v=v, g=g, beta=beta, state=state, segment=where.segment)
    gate = projected.gate.unflatten(-1, (heads, -1))
    return gated_norm(x=out, gate=gate, weight=weights.norm, eps=weights.eps), after

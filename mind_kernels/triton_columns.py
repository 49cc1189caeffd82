"""The kept columns of a chunk in Triton, for a host that never learns how many they are.

What depends on their number k reads it on the device: products stop at k, and programs that would write beyond it end
at once. Two readings of G beside the products, one for the choice and one that does the rest:

    column_sums     Σ_n G² and Σ_n G of every column
    compact         G_K into a narrow buffer, and of what stays behind D 1 and D q
    head_mean       Wᵀq
    grad_hidden     G_K W_K + λ r (Wᵀq)ᵀ
    grad_weight     dW_K += G_Kᵀ X

Where the chunk is dense, k = V: nothing is compacted, there is no correction, and the same products take all columns
straight from G and look up each row of W. So a student that is sure of nothing pays for not waiting: one reading of G
for the choice, and two products of 2·m·V·H by these kernels, which are slower than the vendor's library; by how much is
not measured yet (`python -m bench.gpu` does). Give a tolerance to a student that is sure.

Sums over programs are made by a second reduction in a fixed order and no two programs write to the same place: results
are the same from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mind_kernels.pruning import GradientPruning, columns_to_drop, correction_factor, most_kept

# A program's share of a long axis: so many that a chunk of a thousand rows makes thousands of programs, and so few that
# their partial sums are small beside what is read.
SUM_ROWS = 256  # of G
COMPACT_COLUMNS = 8192  # of G
MEAN_ROWS = 2048  # of W

# 4 to 8 KiB of 16-bit numbers in flight a program, 16 bytes a load; 4 warps, so that several programs share a
# multiprocessor. What is known of 64 columns, fewer than a program has threads, each thread loads for itself: of more,
# one thread would, and tell the others through shared memory, three times a tile.
SUM_BLOCK = {"BLOCK_N": 16, "BLOCK_V": 256}
COMPACT_BLOCK = {"BLOCK_N": 32, "BLOCK_V": 64}
# Three and five programs of 4 warps to the registers of a multiprocessor; not told so, the compiler tries for more and
# spills (head_mean on sm_100 with Triton 3.8).
COMPACT_REGISTERS = {} if torch.version.hip else {"maxnreg": 168}
MEAN_REGISTERS = {} if torch.version.hip else {"maxnreg": 96}
MEAN_BLOCK = {"BLOCK_V": 32, "BLOCK_H": 128}

# Products. 128×128 results of 16-bit numbers, 64 at a time: 64 registers of sums a thread in 8 warps, and operands of
# 32 KiB at a time. Four of these are on their way on Hopper (128 of its 227 KiB), three on sm_80 and sm_89 (of 99 KiB).
# In grad_hidden each takes two stages, as the columns of W's rows come first. AMD's 64 KiB hold the two stages that are
# its default. fp32 in IEEE arithmetic has no tensor cores and wants smaller results.
HIDDEN_STAGES, WEIGHT_STAGES = 7, 4
GROUP = 8  # tiles of rows that go over the columns of W together, and find them in the second-level cache


@triton.jit
def fill(k):
    """Up to here G_K is read: a bound that loads of 16 bytes need not look at number by number."""
    return tl.cdiv(k, 16) * 16


@triton.jit(do_not_specialize=["m"])
def column_sums_kernel(
    G_ptr, stride_gn,  # (m, V)
    square_ptr, mass_ptr,  # (programs over rows, V) fp32, written
    m,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Σ_n G² and Σ_n G over ROWS rows, in fp32."""
    i_v, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_n = i_s * ROWS + tl.arange(0, BLOCK_N)
    m_v = o_v < V
    b_square = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    b_mass = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for _ in range(0, ROWS, BLOCK_N):
        m_g = (o_n < m)[:, None] & m_v[None, :]
        b_g = tl.load(G_ptr + o_n[:, None] * stride_gn + o_v[None, :], mask=m_g, other=0.0).to(tl.float32)
        b_square += b_g * b_g
        b_mass += b_g
        o_n += BLOCK_N
    tl.store(square_ptr + i_s * V + o_v, tl.sum(b_square, axis=0), mask=m_v)
    tl.store(mass_ptr + i_s * V + o_v, tl.sum(b_mass, axis=0), mask=m_v)


@triton.jit(do_not_specialize=["m"])
def compact_kernel(
    G_ptr, stride_gn,  # (m, V)
    position_ptr,  # (V,) int32: where a kept column goes; k or more: it is dropped
    num_kept_ptr,  # () int32: k
    q_ptr,  # (V,) fp32, 0 where kept
    kept_G_ptr, stride_kn,  # (m, ≥ k), written
    r_ptr, Dq_ptr,  # (programs over columns, m) fp32, written
    m,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """G_K, filled up with zeros to a multiple of 16 columns, and D 1 and D q over COLUMNS columns.

    Where nothing is dropped: no G_K, and zeros.
    """
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    k = tl.load(num_kept_ptr)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < m
    # Columns come first: Triton gives the lanes of a warp to the first axis where a store's addresses are not known to
    # be neighbours. Those of kept columns nearly are.
    b_r = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    b_Dq = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    if k < V:
        if i_s == 0:
            o_fill = k + tl.arange(0, 16)
            p_fill = kept_G_ptr + o_fill[:, None] + (o_n * stride_kn)[None, :]
            tl.store(p_fill, tl.zeros((16, BLOCK_N), tl.float32), mask=(o_fill < fill(k))[:, None] & m_n[None, :])
        for v in range(0, COLUMNS, BLOCK_V):
            o_v = i_s * COLUMNS + v + tl.arange(0, BLOCK_V)
            m_v = o_v < V
            b_position = tl.load(position_ptr + o_v, mask=m_v, other=V)
            m_kept = b_position < k
            m_read = m_v if HAS_CORRECTION else m_kept
            p_g = G_ptr + o_v[:, None] + (o_n * stride_gn)[None, :]
            b_g = tl.load(p_g, mask=m_read[:, None] & m_n[None, :], other=0.0)
            p_kept = kept_G_ptr + b_position[:, None] + (o_n * stride_kn)[None, :]
            tl.store(p_kept, b_g, mask=m_kept[:, None] & m_n[None, :])
            if HAS_CORRECTION:
                b_q = tl.load(q_ptr + o_v, mask=m_v, other=0.0)
                b_d = tl.where(m_kept[:, None], 0.0, b_g.to(tl.float32))
                b_r += b_d
                b_Dq += b_d * b_q[:, None]
    if HAS_CORRECTION:
        o_out = i_s.to(tl.int64) * m + o_n
        tl.store(r_ptr + o_out, tl.sum(b_r, axis=0), mask=m_n)
        tl.store(Dq_ptr + o_out, tl.sum(b_Dq, axis=0), mask=m_n)


@triton.jit
def head_mean_kernel(
    W_ptr, stride_wv,  # (V, H)
    q_ptr,  # (V,) fp32
    num_kept_ptr,  # () int32: k
    mean_ptr,  # (programs over V, H) fp32, written
    V: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Wᵀq over ROWS rows of W; zeros where nothing is dropped."""
    i_h, i_s = tl.program_id(0), tl.program_id(1)
    k = tl.load(num_kept_ptr)
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    b_mean = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    if k < V:
        for v in range(0, ROWS, BLOCK_V):
            o_v = i_s * ROWS + v + tl.arange(0, BLOCK_V)
            b_q = tl.load(q_ptr + o_v, mask=o_v < V, other=0.0)
            m_w = (b_q != 0.0)[:, None] & (o_h < H)[None, :]
            p_w = W_ptr + o_v.to(tl.int64)[:, None] * stride_wv + o_h[None, :]
            b_mean += b_q[:, None] * tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)
    tl.store(mean_ptr + i_s * H + o_h, tl.sum(b_mean, axis=0), mask=o_h < H)


@triton.jit(do_not_specialize=["m"])
def grad_hidden_kernel(
    G_ptr, stride_gn,  # (m, V), read where k = V
    kept_G_ptr, stride_kn,  # (m, ≥ k), read otherwise
    kept_ptr,  # (V,) int32: the kept columns, in the first k places
    num_kept_ptr,  # () int32: k
    W_ptr, stride_wv,  # (V, H)
    row_factor_ptr, mean_ptr,  # (m,), (H,) fp32
    dX_ptr, stride_dn,  # (m, H) fp32, written
    m,
    V: tl.constexpr,
    H: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dX = G_K W_K + row_factor ⊗ mean."""
    i, num_n, num_h = tl.program_id(0), tl.cdiv(m, BLOCK_N), tl.cdiv(H, BLOCK_H)
    first = i // (GROUP * num_h) * GROUP
    group = tl.minimum(num_n - first, GROUP)
    i_n, i_h = first + i % (GROUP * num_h) % group, i % (GROUP * num_h) // group
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    m_n, m_h = o_n < m, o_h < H
    k = tl.load(num_kept_ptr)
    # Selects, unlike branches, keep what is known of alignment: these loads are of 16 bytes.
    g_ptr, stride = tl.where(k == V, G_ptr, kept_G_ptr), tl.where(k == V, stride_gn, stride_kn)
    stop = tl.where(k == V, V, fill(k))
    b_dX = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)  # fp32: up to V terms
    for v in range(0, stop, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        m_v = o_v < k
        b_kept = tl.load(kept_ptr + o_v, mask=m_v, other=0)
        p_g = g_ptr + o_n[:, None] * stride + o_v[None, :]
        p_w = W_ptr + b_kept.to(tl.int64)[:, None] * stride_wv + o_h[None, :]
        b_g = tl.load(p_g, mask=m_n[:, None] & (o_v < stop)[None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_v[:, None] & m_h[None, :], other=0.0)
        b_dX = tl.dot(b_g, b_w, b_dX, input_precision=PRECISION)
    if HAS_CORRECTION:
        b_factor = tl.load(row_factor_ptr + o_n, mask=m_n, other=0.0)
        b_mean = tl.load(mean_ptr + o_h, mask=m_h, other=0.0)
        b_dX += b_factor[:, None] * b_mean[None, :]
    tl.store(dX_ptr + o_n[:, None] * stride_dn + o_h[None, :], b_dX, mask=m_n[:, None] & m_h[None, :])


@triton.jit(do_not_specialize=["m"])
def grad_weight_kernel(
    G_ptr, stride_gn,  # (m, V), read where k = V
    kept_G_ptr, stride_kn,  # (m, ≥ k), read otherwise
    kept_ptr,  # (V,) int32: the kept columns, in the first k places
    num_kept_ptr,  # () int32: k
    X_ptr, stride_xn,  # (m, H)
    dW_ptr, stride_wv,  # (V, H) fp32, its kept rows added to
    m,
    V: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dW_K += G_Kᵀ X. Programs of the same columns of G follow each other; X stays in the second-level cache."""
    num_h = tl.cdiv(H, BLOCK_H)
    i_v, i_h = tl.program_id(0) // num_h, tl.program_id(0) % num_h
    k = tl.load(num_kept_ptr)
    if i_v * BLOCK_V >= k:
        return
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    g_ptr, stride = tl.where(k == V, G_ptr, kept_G_ptr), tl.where(k == V, stride_gn, stride_kn)
    m_g = o_v < tl.where(k == V, V, fill(k))
    b_dW = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)  # fp32: m terms
    for n in range(0, m, BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < m
        b_g = tl.load(g_ptr + o_n[:, None] * stride + o_v[None, :], mask=m_n[:, None] & m_g[None, :], other=0.0)
        b_x = tl.load(X_ptr + o_n[:, None] * stride_xn + o_h[None, :], mask=m_n[:, None] & m_h[None, :], other=0.0)
        b_dW = tl.dot(tl.trans(b_g), b_x, b_dW, input_precision=PRECISION)
    m_v = o_v < k
    b_kept = tl.load(kept_ptr + o_v, mask=m_v, other=0).to(tl.int64)
    p_dW = dW_ptr + b_kept[:, None] * stride_wv + o_h[None, :]
    m_dW = m_v[:, None] & m_h[None, :]
    tl.store(p_dW, tl.load(p_dW, mask=m_dW, other=0.0) + b_dW, mask=m_dW)


def column_sums(G: Tensor) -> tuple[Tensor, Tensor]:  # (m, V) -> (V,), (V,)
    """Σ_n G² and Σ_n G in fp32. Bytes: e·m·V read, 16·V·m/256 for the partial sums."""
    m, V = G.shape
    programs = triton.cdiv(m, SUM_ROWS)
    square, mass = (torch.empty(programs, V, dtype=torch.float32, device=G.device) for _ in range(2))
    column_sums_kernel[(triton.cdiv(V, SUM_BLOCK["BLOCK_V"]), programs)](
        G, G.stride(0), square, mass, m, V=V, ROWS=SUM_ROWS, **SUM_BLOCK
    )
    return square.sum(0), mass.sum(0)


class TritonColumns(NamedTuple):
    """ChunkColumns where only the device knows how many are kept."""

    G: Tensor  # (m, V), whose columns are taken where all are kept
    kept_G: Tensor  # (m, ≥ k): G's kept columns where some are dropped
    kept: Tensor  # (V,) int32: the kept columns, ascending, in the first k places
    num_kept: Tensor  # () int32: k
    row_factor: Tensor | None
    column_mass: Tensor | None

    def grad_hidden_states(self, W: Tensor) -> Tensor:  # (V, H) -> (m, H) fp32
        """FLOP: 2·m·k·H. Bytes: G_K and W_K for every tile that needs them; with a correction W once more."""
        (m, V), H = self.G.shape, W.shape[1]
        W = W if W.stride(1) == 1 else W.contiguous()
        dX = torch.empty(m, H, dtype=torch.float32, device=W.device)
        row_factor = mean = dX  # not read
        if self.row_factor is not None and self.column_mass is not None:
            row_factor, mean = self.row_factor, self._head_mean(W, self.column_mass)
        block = product_block(W.dtype, V, "BLOCK_N", "BLOCK_H", "BLOCK_V", num_stages=HIDDEN_STAGES)
        grad_hidden_kernel[(triton.cdiv(m, block["BLOCK_N"]) * triton.cdiv(H, block["BLOCK_H"]),)](
            self.G, self.G.stride(0),
            self.kept_G, self.kept_G.stride(0),
            self.kept,
            self.num_kept,
            W, W.stride(0),
            row_factor, mean,
            dX, dX.stride(0),
            m,
            V=V,
            H=H,
            HAS_CORRECTION=self.row_factor is not None,
            PRECISION=product_precision(),
            GROUP=GROUP,
            **block,
        )  # fmt: skip
        return dX

    def _head_mean(self, W: Tensor, q: Tensor) -> Tensor:  # (H, V) @ (V,)
        V, H = W.shape
        programs = triton.cdiv(V, MEAN_ROWS)
        means = torch.empty(programs, H, dtype=torch.float32, device=W.device)
        head_mean_kernel[(triton.cdiv(H, MEAN_BLOCK["BLOCK_H"]), programs)](
            W, W.stride(0), q, self.num_kept, means, V=V, H=H, ROWS=MEAN_ROWS, **MEAN_BLOCK, **MEAN_REGISTERS
        )
        return means.sum(0)

    def add_grad_weight_(self, total: Tensor, X: Tensor) -> None:
        """FLOP: 2·m·k·H. Bytes: G_K and X for every tile that needs them, 8·k·H of the fp32 total."""
        (m, V), H = self.G.shape, X.shape[1]
        block = product_block(X.dtype, V, "BLOCK_V", "BLOCK_H", "BLOCK_N", num_stages=WEIGHT_STAGES)
        grad_weight_kernel[(triton.cdiv(V, block["BLOCK_V"]) * triton.cdiv(H, block["BLOCK_H"]),)](
            self.G, self.G.stride(0),
            self.kept_G, self.kept_G.stride(0),
            self.kept,
            self.num_kept,
            X, X.stride(0),
            total, total.stride(0),
            m,
            V=V,
            H=H,
            PRECISION=product_precision(),
            **block,
        )  # fmt: skip


def choose_triton_columns(
    G: Tensor,  # (m, V) ∂loss/∂product
    targets: Tensor,  # (m,) int64, columns that are kept whatever they hold
    pruning: GradientPruning,
) -> TritonColumns:
    """choose_columns without its wait: a dense chunk is one whose columns are all kept.

    Bytes beside columns_to_drop: e·m·V read twice (with no correction once, and the sectors that hold kept columns),
    e·m·k written.
    """
    m, V = G.shape
    assert G.stride(1) == 1
    square, mass = column_sums(G)
    dropped = columns_to_drop(square, targets, pruning)
    dropped.record(m)
    order, num_dropped = dropped.order, dropped.num_dropped
    num_kept = V - num_dropped
    columns = torch.arange(V, device=G.device)
    is_kept = torch.empty(V, dtype=torch.bool, device=G.device).scatter_(0, order, columns >= num_dropped)
    # A permutation: the kept columns in ascending order, then the others.
    position = torch.where(is_kept, is_kept.cumsum(0), num_kept + (~is_kept).cumsum(0)) - 1
    kept = torch.empty(V, dtype=torch.int32, device=G.device).scatter_(0, position, columns.int())
    q = mass.masked_fill_(is_kept, 0.0)
    kept_G = torch.empty(m, most_kept(V), dtype=G.dtype, device=G.device)
    programs = triton.cdiv(V, COMPACT_COLUMNS)
    r, Dq = (torch.empty(programs, m, dtype=torch.float32, device=G.device) for _ in range(2))
    num_kept = num_kept.int()
    compact_kernel[(triton.cdiv(m, COMPACT_BLOCK["BLOCK_N"]), programs)](
        G, G.stride(0),
        position.int(),
        num_kept,
        q,
        kept_G, kept_G.stride(0),
        r, Dq,
        m,
        V=V,
        COLUMNS=COMPACT_COLUMNS,
        HAS_CORRECTION=pruning.correction,
        **COMPACT_BLOCK,
        **COMPACT_REGISTERS,
    )  # fmt: skip
    if not pruning.correction:
        return TritonColumns(G, kept_G, kept, num_kept, None, None)
    return TritonColumns(G, kept_G, kept, num_kept, correction_factor(r.sum(0), Dq.sum(0), q), q)


def product_block(dtype: torch.dtype, V: int, *names: str, num_stages: int) -> dict[str, int]:
    """Sizes of a tile of the result and of what is summed at a time, and how its programs are launched."""
    if dtype == torch.float32:
        return dict(zip(names, (64, 64, 16), strict=True), num_warps=4)
    stages = {} if torch.version.hip else {"num_stages": num_stages}
    at_a_time = 64 if V % 16 == 0 else 32  # G's numbers are read one by one, and each needs an address in a register
    return dict(zip(names, (128, 128, at_a_time), strict=True), num_warps=8, **stages)


def product_precision() -> str:
    """Of fp32 products: what PyTorch's own use."""
    matmul = torch.backends.cuda.matmul
    is_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if is_tf32 and torch.version.hip is None else "ieee"

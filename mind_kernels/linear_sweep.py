"""One sweep over the vocabulary: head, cross-entropy, KL and answer consistency, and their gradients, chunk by chunk.

Every fused operation of this package that takes hidden states is this sweep with other coefficients. For the rows n of
a chunk (S supervised rows in all; V vocabulary; H hidden size):

    z = softcap(logit_scale · (X Wᵀ + b))                                        # (m, H) @ (H, V) -> (m, V)
    G = ∂loss/∂(X Wᵀ + b), written over z                                        # elementwise, in fp32 blocks
    dX = G W                                                                     # (m, V) @ (V, H) -> (m, H)
    dW += Gᵀ X                                                                   # (V, m) @ (m, H) -> (V, H)

Since the loss is linear in the coefficients and they are known beforehand, gradients are made while the logits are at
hand: each row's logits are computed once. Three products of 2·S·H·V FLOP each (two when the head is frozen), plus one
for a TeacherHidden; peak extra memory: the gradients + max_logits_bytes (+ 4·V·H bytes of fp32 sum when a 16-bit
weight gradient is pruned, takes more than MOST_ROUNDINGS chunks, or more than one with logits_dtype=float32).
With gradient_tolerance, dX and dW are made of the columns of G that matter: see pruning.py.

The host waits for the device only to learn how many rows there are, and not at all when it is told (supervised_index,
and answer_index on the host). With gradient_tolerance and backend "torch" it also waits once a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mind_kernels.arguments import current_device, without_autocast
from mind_kernels.autograd import refuse_second_derivative, with_tensors, without_tensors
from mind_kernels.chunking import Chunk, Rows, plan_chunks, row_buffer, teacher_parts
from mind_kernels.plan import RowLosses, SweepOptions, make_plan
from mind_kernels.products import TILE, adds_wide_products, has_wide_products, product, project
from mind_kernels.pruning import ChunkColumns, GradientPruning, choose_columns, most_kept
from mind_kernels.reduction import fp16_head_scale, multiply_, statistics_dtype, weighted_sum
from mind_kernels.teacher_rows import TeacherRows
from mind_kernels.teachers import TeacherHidden
from mind_kernels.torch_rows import TorchRows

# A 16-bit weight gradient is summed in 16 bits over at most so many chunks. Rounding the sum n times adds about √n
# roundings to its error, which is little beside the rounding of the logits: README.md has both for real students.
MOST_ROUNDINGS = 40


class SweepResult(NamedTuple):
    cross_entropy: Tensor  # (R,) per rationale, reduced
    kl: Tensor  # (R,) per rationale, reduced, τ^p included
    jsd: Tensor | None  # (B, K, K) mean over the answer positions
    grad_hidden_states: Tensor | None  # of loss / gradient_scale
    grad_lm_head_weight: Tensor | None  # of loss / head_gradient_scale
    grad_lm_head_bias: Tensor | None  # as the weight's
    gradient_scale: float | Tensor
    head_gradient_scale: float | Tensor


class _WeightGradient:
    """dW += Gᵀ X over the chunks. Within a product sums are fp32; `dtype` is that of the sum over the products.

    A sum of 16 bits is rounded once a chunk, in the product that adds to it: no pass over it and no accumulator beside
    it. One of fp32 is rounded once, at the end.
    """

    def __init__(self, V: int, H: int, compute_dtype: torch.dtype, dtype: torch.dtype, device: torch.device):
        self.shape, self.compute_dtype, self.dtype, self.device = (V, H), compute_dtype, dtype, device
        self.total: Tensor | None = None  # (V, H) once there is something to add
        self.rank_one: list[tuple[Tensor, Tensor]] = []  # (V,), (H,) of each pruned chunk

    def add(self, G: Tensor, X: Tensor) -> None:  # (V, m) @ (m, H) -> (V, H)
        beta = 0.0 if self.total is None else 1.0
        if self.total is None:
            self.total = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.dtype == self.compute_dtype:
            product(G.t(), X, self.total, add=beta != 0.0)
        elif adds_wide_products(self.device):
            torch.addmm(self.total, G.t(), X, out_dtype=self.dtype, beta=beta, out=self.total)
        else:  # without wide products each chunk's partial is rounded once before it is added
            dtype = self.dtype if has_wide_products(self.device) else self.compute_dtype
            tile = torch.empty(min(TILE, self.shape[0]), self.shape[1], dtype=dtype, device=self.device)
            for v in range(0, len(self.total), TILE):
                total = self.total[v : v + TILE]
                partial = product(G[:, v : v + TILE].t(), X, tile[: len(total)])
                total.copy_(partial) if beta == 0.0 else total.add_(partial)

    def add_columns(self, columns: ChunkColumns, X: Tensor) -> None:
        """The same for a pruned G: adds the kept rows, and leaves the rank-1 correction of the others to finish."""
        dtype = statistics_dtype(self.compute_dtype)
        if self.total is None:
            self.total = torch.zeros(self.shape, dtype=dtype, device=self.device)
        columns.add_grad_weight_(self.total, X)
        if columns.row_factor is not None and columns.column_mass is not None:
            self.rank_one.append((columns.column_mass, torch.mv(X.to(dtype).t(), columns.row_factor)))

    def finish(self, dtype: torch.dtype) -> Tensor:
        if self.total is None:
            return torch.zeros(self.shape, dtype=dtype, device=self.device)
        if self.rank_one:  # one pass over dW for all chunks: (V, chunks) @ (chunks, H)
            left, right = (torch.stack(vectors) for vectors in zip(*self.rank_one, strict=True))
            self.total.addmm_(left.t(), right)
        return self.total.to(dtype)


class _Division(NamedTuple):
    chunks: list[Chunk]  # of rows whose logits are held together
    parts: list[list[Chunk]]  # of each chunk, whose logits of a TeacherHidden are held together
    logits_dtype: torch.dtype
    teacher_dtype: torch.dtype  # of a TeacherHidden's logits


def _divide(rows: Rows, V: int, options: SweepOptions, need_gradient: bool) -> _Division:
    """Rows into chunks and their parts, as many at a time as max_logits_bytes allows."""
    compute_dtype = options.compute_dtype
    logits_dtype = options.logits_dtype or compute_dtype
    is_wide = logits_dtype != compute_dtype  # whose gradient, an operand of products, needs a buffer of its own
    bytes_per_row = V * (logits_dtype.itemsize + (compute_dtype.itemsize if is_wide else 0))
    if options.pruning is not None and options.backend == "triton" and need_gradient:
        bytes_per_row += most_kept(V) * compute_dtype.itemsize  # the buffer for G's kept columns
    if not isinstance(options.teacher, TeacherHidden):
        chunks = plan_chunks(rows, bytes_per_row, options.max_logits_bytes)
        return _Division(chunks, [[chunk] for chunk in chunks], logits_dtype, compute_dtype)
    head = options.teacher.lm_head_weight
    teacher_dtype = torch.promote_types(head.dtype, logits_dtype) if is_wide else head.dtype
    chunks = plan_chunks(rows, bytes_per_row, options.max_logits_bytes, len(head) * teacher_dtype.itemsize)
    return _Division(chunks, [teacher_parts(chunk, rows) for chunk in chunks], logits_dtype, teacher_dtype)


def sweep(
    hidden_states: Tensor,  # (N, H)
    lm_head_weight: Tensor,  # (V, H)
    lm_head_bias: Tensor | None,  # (V,)
    rationale_weights: Tensor,  # (R,) or (B, K)
    options: SweepOptions,
    needs_input_grad: Sequence[bool],  # of the four tensors
) -> SweepResult:
    """The losses, and the gradients that needs_input_grad asks for. See the head of this file."""
    need_grad_hidden_states, need_grad_weight, need_grad_bias, need_grad_rationale_weights = needs_input_grad
    need_gradient = need_grad_hidden_states or need_grad_weight or need_grad_bias
    (N, H), V = hidden_states.shape, lm_head_weight.shape[0]
    compute_dtype, device = options.compute_dtype, hidden_states.device
    stats = statistics_dtype(compute_dtype)
    weights = rationale_weights.detach().reshape(-1).to(stats)
    plan = make_plan(N, weights, options, need_gradient, need_grad_rationale_weights)
    rows = plan.rows

    chunks, parts, logits_dtype, teacher_dtype = _divide(rows, V, options, need_gradient)
    is_wide = logits_dtype != compute_dtype
    X_all = hidden_states.detach()
    W = lm_head_weight.detach().to(compute_dtype)
    b = None if lm_head_bias is None else lm_head_bias.detach().to(compute_dtype)
    row_losses = RowLosses(
        torch.zeros_like(plan.terms.cross_entropy),
        torch.zeros_like(plan.terms.cross_entropy),
        None if plan.pair_weights is None else torch.zeros_like(plan.pair_weights),
        torch.zeros(V, dtype=stats, device=device) if need_grad_bias else None,
    )
    grad_hidden_states = torch.zeros_like(X_all) if need_grad_hidden_states else None
    weight_gradient = None
    prunes_weight = options.pruning is not None and options.pruning.prune_weight_gradient
    if need_grad_weight:
        num_products = sum(chunk.needs_gradient for chunk in chunks)
        most_roundings = 1 if is_wide or prunes_weight else MOST_ROUNDINGS
        is_16_bits = lm_head_weight.dtype == compute_dtype and num_products <= most_roundings
        sum_dtype = compute_dtype if is_16_bits else stats
        weight_gradient = _WeightGradient(V, H, compute_dtype, sum_dtype, device)
    head_scale: float | Tensor = 1.0
    if need_grad_weight or need_grad_bias:
        largest = 2 * max(1.0, abs(options.logit_scale)) * max(1.0, options.kl.gradient_scale)
        head_scale = fp16_head_scale(X_all, rows.order[: rows.num_with_gradient], largest, compute_dtype)

    losses_and_gradient_: Callable[[Tensor, Tensor, Chunk, TeacherRows | None], None]
    choose: Callable[[Tensor, Tensor, GradientPruning], ChunkColumns | None]
    if options.backend == "triton":
        from mind_kernels.triton_columns import choose_triton_columns
        from mind_kernels.triton_rows import TritonRows

        losses_and_gradient_, choose = TritonRows(plan, options, row_losses), choose_triton_columns
    else:
        losses_and_gradient_, choose = TorchRows(plan, options, V, logits_dtype, row_losses), choose_columns

    def run_chunks() -> None:
        chunk_rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        logits = row_buffer(chunk_rows, V, logits_dtype, device, options.backend)
        gradient = row_buffer(chunk_rows, V, compute_dtype, device, options.backend) if is_wide else None
        teacher_logits = None
        if isinstance(options.teacher, TeacherHidden):
            part_rows = max((part.stop - part.start for of_chunk in parts for part in of_chunk), default=0)
            teacher_logits = row_buffer(
                part_rows, len(options.teacher.lm_head_weight), teacher_dtype, device, options.backend
            )
        for chunk, parts_of_chunk in zip(chunks, parts, strict=True):
            index = rows.order[chunk.start : chunk.stop]
            X = X_all[index].to(compute_dtype)
            z = project(X, W, b, logits[: len(index)])
            G = z if gradient is None else gradient[: len(index)]
            for part in parts_of_chunk:
                within = slice(part.start - chunk.start, part.stop - chunk.start)
                z_part = z[within]
                G_part = z_part if G is z else G[within]
                teacher_rows = None
                if options.teacher is not None:
                    teacher_rows = TeacherRows(options.teacher, options.kl, index[within], teacher_logits)
                losses_and_gradient_(z_part, G_part, part, teacher_rows)
            if not chunk.needs_gradient:
                continue
            columns = None
            if options.pruning is not None:
                columns = choose(G, plan.terms.labels[chunk.start : chunk.stop], options.pruning)
            if grad_hidden_states is not None:
                dX = product(G, W, torch.empty_like(X)) if columns is None else columns.grad_hidden_states(W)
                grad_hidden_states[index] = dX.to(X_all.dtype)  # (m, V) @ (V, H) -> (m, H)
            if weight_gradient is not None:
                X = X if isinstance(head_scale, float) else X.div_(head_scale)  # of this chunk alone
                if columns is not None and prunes_weight:
                    weight_gradient.add_columns(columns, X)
                else:
                    weight_gradient.add(G, X)

    run_chunks()  # a function, so that its buffers are freed before the weight gradient is downcast

    cross_entropy, kl = torch.zeros_like(weights), torch.zeros_like(weights)
    if plan.reduce is not None:
        # Rows that are only part of an answer position have no loss of their own.
        cross_entropy = plan.reduce(torch.where(rows.is_supervised, row_losses.cross_entropy, 0), rows.order)
        kl = plan.reduce(torch.where(rows.is_supervised, row_losses.kl, 0), rows.order)
    grad_bias = row_losses.grad_bias
    return SweepResult(
        cross_entropy,
        kl,
        row_losses.jsd,
        grad_hidden_states,
        None if weight_gradient is None else weight_gradient.finish(lm_head_weight.dtype),
        None if grad_bias is None or lm_head_bias is None else (grad_bias / head_scale).to(lm_head_bias.dtype),
        plan.gradient_scale,
        plan.gradient_scale * head_scale,
    )


class LinearLosses(NamedTuple):
    loss: Tensor  # () differentiable
    cross_entropy: Tensor  # per rationale, detached
    kl: Tensor  # per rationale, detached, τ^p included
    consistency: Tensor  # () detached, over num_questions


def linear_loss_and_gradients(
    hidden_states: Tensor,  # (N, H)
    lm_head_weight: Tensor,  # (V, H)
    lm_head_bias: Tensor | None,  # (V,)
    rationale_weights: Tensor,  # (R,) or (B, K)
    options: SweepOptions,
    needs: Sequence[bool],  # gradients, of the four tensors
) -> tuple[LinearLosses, SweepResult, Tensor]:  # and ∂loss/∂rationale_weights
    with without_autocast(hidden_states.device), current_device(hidden_states.device):
        tensors = hidden_states, lm_head_weight, lm_head_bias, rationale_weights
        result = sweep(*tensors, options, needs)
        weights = rationale_weights.reshape(-1).to(result.cross_entropy.dtype)
        # ∂loss/∂w_r = (CE_r + kl_weight·KL_r + consistency_weight·Σ_j w_j·JSD_rj) / num_questions
        grad_weights = options.cross_entropy_weight * result.cross_entropy + options.kl_weight * result.kl
        grad_weights = grad_weights / options.num_questions
        loss = weighted_sum(weights, grad_weights)
        consistency = weights.new_zeros(())
        if result.jsd is not None:
            alpha = weights.view(result.jsd.shape[:2])
            neighbours = torch.einsum("bij,bj->bi", result.jsd, alpha) / options.num_questions
            consistency = 0.5 * (alpha * neighbours).sum()
            loss = loss + options.consistency_weight * consistency
            grad_weights = grad_weights + options.consistency_weight * neighbours.reshape(-1)
    shape = rationale_weights.shape
    losses = LinearLosses(loss, result.cross_entropy.view(shape), result.kl.view(shape), consistency)
    return losses, result, grad_weights.view(shape)


class _LinearLoss(torch.autograd.Function):
    """The gradients are made in forward. The first backward hands them over (no copy of a (V, H) tensor); another
    backward through the same graph repeats the sweep, so it is correct and costs a sweep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # (N, H)
        lm_head_weight: Tensor,  # (V, H)
        lm_head_bias: Tensor | None,  # (V,)
        rationale_weights: Tensor,  # (R,) or (B, K)
        options: SweepOptions,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:4]]
        tensors = hidden_states, lm_head_weight, lm_head_bias, rationale_weights
        losses, ctx.result, ctx.grad_weights = linear_loss_and_gradients(*tensors, options, needs)
        ctx.options, option_tensors = without_tensors(options)
        ctx.needs, ctx.weights_dtype = needs, rationale_weights.dtype
        ctx.save_for_backward(*tensors, *option_tensors)
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        result, ctx.result = ctx.result, None
        if result is None:  # saved tensors are read only here: a checkpoint would compute them again
            X, W, b, weights, *option_tensors = ctx.saved_tensors
            options = with_tensors(ctx.options, option_tensors)
            with without_autocast(grad_loss.device), current_device(grad_loss.device):
                result = sweep(X, W, b, weights, options, ctx.needs)
        gradients = [result.grad_hidden_states, result.grad_lm_head_weight, result.grad_lm_head_bias]
        scales = [result.gradient_scale, result.head_gradient_scale, result.head_gradient_scale]
        for gradient, scale in zip(gradients, scales, strict=True):
            if gradient is not None:
                multiply_(gradient, grad_loss * scale, ctx.options.backend)
        grad_weights = (grad_loss * ctx.grad_weights).to(ctx.weights_dtype) if ctx.needs_input_grad[3] else None
        return *gradients, grad_weights, None, None


def linear_loss(
    hidden_states: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    lm_head_bias: Tensor | None,  # (V,)
    rationale_weights: Tensor,  # (R,) or (B, K)
    options: SweepOptions,
) -> LinearLosses:
    """The sweep as one differentiable operation, fp32 (fp64 for fp64) losses."""
    inputs = hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight, lm_head_bias, rationale_weights
    if torch.compiler.is_compiling():
        from mind_kernels.operators import compiled_linear_loss

        return compiled_linear_loss(*inputs, options)
    # In Function.forward grad mode is off, so whether a graph is wanted is asked here.
    return LinearLosses(*_LinearLoss.apply(*inputs, options, torch.is_grad_enabled()))

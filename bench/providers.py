"""Every implementation that is measured, behind one call: inputs in, a differentiable scalar out.

A provider that is not installed, or cannot do a case on a device, raises Unavailable with the reason, which becomes its
row. Peers are called as their documentation says. What a peer's interface cannot express is said in `Call.note`, and
`Call.row_weights` tells which function of the rows it computes instead, so that its error is measured against that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import IGNORE_INDEX, Inputs
from bench.shapes import HEADS, LossCase
from mind_kernels import fused_linear_cross_entropy, fused_linear_kl
from mind_kernels.arguments import choose_backend

QUACK_CHUNK = 4096  # the default of its function
QUACK_ROWS = 8  # it asserts a multiple of them
TRL_VOCABULARY_CHUNK = 32_768  # what its own trainer passes


class Unavailable(Exception):
    """The provider is missing, or cannot do this case on this device; the message says why."""


@dataclass(frozen=True)
class Call:
    """A provider made ready for one case.

    loss: the scalar, differentiable in hidden states and head; under no_grad the forward pass alone.
    note: what it is where the interface cannot express the case, or how it was expressed.
    row_weights: (N,), the loss is Σ_n row_weights[n]·loss_n; None: the case's own.
    """

    loss: Callable[[Inputs], Tensor]
    note: str = ""
    row_weights: Callable[[Inputs], Tensor] | None = None


@dataclass(frozen=True)
class Provider:
    """prepare(case, device, dtype) gives a Call or raises Unavailable. package: whose version is recorded."""

    name: str
    package: str
    prepare: Callable[[LossCase, str, torch.dtype], Call]
    is_ours: bool = False


def version(package: str) -> str | None:
    """The installed version of a distribution, None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def want(package: str) -> None:
    if version(package) is None:
        raise Unavailable(f"{package} is not installed")


def want_loss(case: LossCase, *losses: str) -> None:
    if case.loss not in losses:
        raise Unavailable(f"has no linear {case.loss}")


def want_gpu(device: str) -> None:
    if device == "cpu":
        raise Unavailable("its kernels need a GPU")


# ---------------------------------------------------------------------------------------------------------------------
# What a peer's interface can express of a MIND batch

RowLosses = Callable[[Tensor, Tensor, Tensor], Tensor]  # (X, W, labels) -> (n,)
MeanLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (X, W, labels) -> ()


def from_rows(case: LossCase, rows: RowLosses, mean: MeanLoss | None = None) -> Call:
    """A peer with a loss per row: weighted exactly; deselected rows get a second call without a gradient."""
    if case.batch == "rows":
        return Call(lambda given: (mean or _mean(rows))(*given.leaves, given.labels))

    def loss(given: Inputs) -> Tensor:
        X, W = given.leaves
        active = (given.row_weights != 0).nonzero().squeeze(1)
        passive = ((given.labels != IGNORE_INDEX) & (given.row_weights == 0)).nonzero().squeeze(1)
        with torch.no_grad():
            rows(X[passive], W, given.labels[passive])
        return given.row_weights[active] @ rows(X[active], W, given.labels[active]).float()

    return Call(loss, "losses per row × weights; the deselected rows in a second call without a gradient")


def from_mean(case: LossCase, mean: MeanLoss, multiple: int = 1) -> Call:
    """A peer with a mean over all rows alone: a MIND batch is its token mean over the selected rationales.

    It is given their rows alone, since it would multiply ignored ones by the head too; multiple: of how many rows it
    wants a multiple, made up by ignored ones.
    """
    if case.batch == "rows":
        return Call(lambda given: mean(*given.leaves, given.labels))

    def loss(given: Inputs) -> Tensor:
        X, W = given.leaves
        active = (given.row_weights != 0).nonzero().squeeze(1)
        ignored = (given.labels == IGNORE_INDEX).nonzero().squeeze(1)
        index = torch.cat([active, ignored[: -len(active) % multiple]])
        return mean(X[index], W, given.labels[index])

    def row_weights(given: Inputs) -> Tensor:
        active = given.row_weights != 0
        return active / active.sum()

    return Call(
        loss,
        "token mean over the rows of the selected rationales: it cannot weight them, and the deselected ones' losses "
        "are missing",
        row_weights,
    )


def _mean(rows: RowLosses) -> MeanLoss:
    return lambda X, W, labels: rows(X, W, labels).mean()


# ---------------------------------------------------------------------------------------------------------------------
# This project


def mind(backend: str, max_logits_bytes: int | None = None) -> Callable[[LossCase, str, torch.dtype], Call]:
    def prepare(case: LossCase, device: str, dtype: torch.dtype) -> Call:
        try:
            choose_backend(backend, torch.empty(0, dtype=dtype, device=device))
        except ValueError as error:
            raise Unavailable(str(error)) from error
        options: dict[str, Any] = {"backend": backend, "max_logits_bytes": max_logits_bytes}

        def loss(given: Inputs) -> Tensor:
            X, W = given.leaves
            common = options | {
                "rationale_weights": given.rationale_weights,
                "cu_seqlens": given.cu_seqlens,
                "logit_softcap": given.logit_softcap,
            }
            if given.teacher is None:
                return fused_linear_cross_entropy(X, W, given.labels, **common)[0]
            divergence = {"kl": "forward", "jsd": "jsd"}[given.loss]
            return fused_linear_kl(X, W, given.teacher, given.labels, divergence=divergence, **common)[0]

        return Call(loss)

    return prepare


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def plain_rows(given_softcap: float | None, upcast: bool) -> RowLosses:
    def rows(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(plain_logits(X, W, given_softcap, upcast), labels, reduction="none")

    return rows


def plain_logits(X: Tensor, W: Tensor, softcap: float | None, upcast: bool) -> Tensor:
    z = F.linear(X, W)  # (N, H) @ (H, V) -> (N, V)
    z = z.float() if upcast else z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_mean(softcap: float | None, upcast: bool) -> MeanLoss:
    return lambda X, W, labels: F.cross_entropy(plain_logits(X, W, softcap, upcast), labels)


def plain_divergence(loss: str, X: Tensor, W: Tensor, X_t: Tensor, W_t: Tensor) -> Tensor:
    """KL(t ‖ s), or the JSD at β = ½, mean over rows: log_softmax and F.kl_div."""
    log_s = F.linear(X, W).log_softmax(-1)
    log_t = F.linear(X_t, W_t).log_softmax(-1)
    if loss == "kl":
        return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    return 0.5 * (
        F.kl_div(log_m, log_s, log_target=True, reduction="batchmean")
        + F.kl_div(log_m, log_t, log_target=True, reduction="batchmean")
    )


def pytorch(*, compiled: bool = False, upcast: bool = False) -> Callable[[LossCase, str, torch.dtype], Call]:
    def prepare(case: LossCase, device: str, dtype: torch.dtype) -> Call:
        if upcast and dtype not in (torch.bfloat16, torch.float16):
            raise Unavailable(f"the same as pytorch with {str(dtype).removeprefix('torch.')} inputs")
        softcap = _softcap(case)
        # A graph of its own for each case: none is recompiled with dynamic shapes because of another.
        wrap = (lambda function: torch.compile(function, dynamic=False)) if compiled else (lambda function: function)
        if case.loss == "cross-entropy":
            return from_rows(case, wrap(plain_rows(softcap, upcast)), wrap(plain_mean(softcap, upcast)))
        if upcast:
            raise Unavailable("measured for cross-entropy only")
        divergence = wrap(plain_divergence)
        return Call(lambda given: divergence(given.loss, *given.leaves, *_teacher(given)))

    return prepare


def torch_linear_cross_entropy(policy: str) -> Callable[[LossCase, str, torch.dtype], Call]:
    """torch.nn.functional.linear_cross_entropy; policy is acc_policy of its options, all others as they are by default.

    "auto" accumulates 16-bit inputs in fp32; "accurate" in their own dtype unless told otherwise, and on a CPU told so
    (acc_dtype=torch.float32) it takes as long as "auto".
    """

    def prepare(case: LossCase, device: str, dtype: torch.dtype) -> Call:
        want_loss(case, "cross-entropy")
        _no_softcap(case)
        if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"torch {torch.__version__} has no chunked torch.nn.functional.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)

        def mean(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
            return F.linear_cross_entropy(X, W, labels, options=options)

        def rows(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
            return F.linear_cross_entropy(X, W, labels, reduction="none", options=options)

        return from_rows(case, rows, mean)

    return prepare


def _no_softcap(case: LossCase) -> None:
    if _softcap(case) is not None:
        raise Unavailable("has no softcap")


def _teacher(given: Inputs) -> tuple[Tensor, Tensor]:
    assert given.teacher is not None
    return given.teacher.hidden_states, given.teacher.lm_head_weight


def _softcap(case: LossCase) -> float | None:
    return HEADS[case.head].logit_softcap


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def liger(accumulator: torch.dtype | None) -> Callable[[LossCase, str, torch.dtype], Call]:
    """LigerFusedLinearCrossEntropy and LigerFusedLinearJSD; accumulator: dtype of the weight gradient's sum."""

    def prepare(case: LossCase, device: str, dtype: torch.dtype) -> Call:
        want("liger-kernel")
        want_gpu(device)
        if case.loss == "cross-entropy":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            def loss(reduction: str) -> MeanLoss:
                module = LigerFusedLinearCrossEntropyLoss(
                    reduction=reduction, softcap=_softcap(case), accum_dtype=accumulator
                )
                return lambda X, W, labels: module(W, X, labels)

            return from_rows(case, loss("none"), loss("mean"))
        from liger_kernel.transformers import LigerFusedLinearJSD

        jsd = LigerFusedLinearJSD(jsd_beta=0.0 if case.loss == "kl" else 0.5, accum_dtype=accumulator)
        return Call(lambda given: jsd(*given.leaves, *_teacher(given), given.labels))

    return prepare


def liger_kl_div(case: LossCase, device: str, dtype: torch.dtype) -> Call:
    want("liger-kernel")
    want_gpu(device)
    want_loss(case, "kl")
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss(reduction="batchmean")

    def loss(given: Inputs) -> Tensor:
        X_t, W_t = _teacher(given)
        with torch.no_grad():
            probabilities = F.linear(X_t, W_t).softmax(-1)
        return module(*given.leaves, probabilities)

    return Call(loss, "takes the teacher's (N, V) probabilities: made in full by PyTorch beforehand, within the time")


def liger_chunked(case: LossCase, device: str, dtype: torch.dtype) -> Call:
    want("liger-kernel")
    want_loss(case, "kl", "jsd")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0 if case.loss == "kl" else 0.5,
    )
    return Call(lambda given: module(*given.leaves, *_teacher(given), given.labels))


def cut_cross_entropy(implementation: str, **options: Any) -> Callable[[LossCase, str, torch.dtype], Call]:
    def prepare(case: LossCase, device: str, dtype: torch.dtype) -> Call:
        want("cut-cross-entropy")
        want_loss(case, "cross-entropy")
        if implementation == "cce":
            want_gpu(device)
            if dtype == torch.float32:
                raise Unavailable("its kernels take 16-bit inputs")
        from cut_cross_entropy import linear_cross_entropy

        def loss(reduction: str) -> MeanLoss:
            return lambda X, W, labels: linear_cross_entropy(
                X, W, labels, softcap=_softcap(case), reduction=reduction, impl=implementation, **options
            )

        return from_rows(case, loss("none"), loss("mean"))

    return prepare


def quack(case: LossCase, device: str, dtype: torch.dtype) -> Call:
    want("quack-kernels")
    want_gpu(device)
    want_loss(case, "cross-entropy")
    _no_softcap(case)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def mean(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(X, W, labels, chunk_size=QUACK_CHUNK)

    return from_mean(case, mean, QUACK_ROWS)


def trl(case: LossCase, device: str, dtype: torch.dtype) -> Call:
    want("trl")
    if importlib.util.find_spec("trl.kernels") is None:
        raise Unavailable(f"trl {version('trl')} has no trl.kernels, which came with 1.16")
    if case.loss == "cross-entropy":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def rows(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
            options = (1.0, TRL_VOCABULARY_CHUNK, _softcap(case), 1.0, ())  # temperature, …, scale, no further outputs
            return -ChunkedLogProbFunction.apply(X, W, None, labels, *options)[0]

        return from_rows(case, rows)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def divergence(given: Inputs) -> Tensor:
        X_t, W_t = _teacher(given)
        beta = 0.0 if case.loss == "kl" else 0.5
        return ChunkedDivergenceFunction.apply(*given.leaves, None, X_t, W_t, None, beta)[0].mean()

    return Call(divergence)


def flash_linear_attention(case: LossCase, device: str, dtype: torch.dtype) -> Call:
    want("fla-core")
    want_gpu(device)
    want_loss(case, "cross-entropy", "kl")
    if case.loss == "kl":
        from fla.modules.fused_kl_div import FusedKLDivLoss

        kl = FusedKLDivLoss()

        def loss(given: Inputs) -> Tensor:
            X, W = given.leaves
            X_t, W_t = _teacher(given)
            return kl(X, X_t, W, W_t)

        return Call(loss)
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    module = FusedLinearCrossEntropyLoss(logit_softcapping=_softcap(case))
    return from_mean(case, lambda X, W, labels: module(X, labels, W))


# ---------------------------------------------------------------------------------------------------------------------
# A function of the user's


def own_function(name: str) -> Provider:
    """MODULE:FUNCTION, importable from the present folder, which returns the mean over the rows as a scalar.

    Of a cross-entropy case it is given (hidden_states (N, H), weight (V, H), labels (N,)); of a divergence's
    (hidden_states, weight, teacher_hidden_states (N, H_t), teacher_weight (V, H_t)). Softcap cases are not for it.

    Raises: ValueError when there is no such function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"given {name!r}, wanted MODULE:FUNCTION ({error})") from error

    def prepare(case: LossCase, device: str, dtype: torch.dtype) -> Call:
        if case.loss == "cross-entropy":
            _no_softcap(case)
            return from_mean(case, function)
        return Call(lambda given: function(*given.leaves, *_teacher(given)))

    return Provider(name, module_name.partition(".")[0], prepare)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("mind", "torch", mind("torch"), is_ours=True),
        Provider("mind-triton", "triton", mind("triton"), is_ours=True),
        Provider("pytorch", "torch", pytorch()),
        Provider("pytorch-fp32-logits", "torch", pytorch(upcast=True)),
        Provider("pytorch-compiled", "torch", pytorch(compiled=True)),
        Provider("torch-linear-ce", "torch", torch_linear_cross_entropy("auto")),
        Provider("torch-linear-ce-accurate", "torch", torch_linear_cross_entropy("accurate")),
        Provider("liger", "liger-kernel", liger(None)),
        Provider("liger-fp32-accumulator", "liger-kernel", liger(torch.float32)),
        Provider("liger-kl-div", "liger-kernel", liger_kl_div),
        Provider("liger-chunked", "liger-kernel", liger_chunked),
        Provider("cce", "cut-cross-entropy", cut_cross_entropy("cce")),
        Provider("cce-exact", "cut-cross-entropy", cut_cross_entropy("cce", filter_eps=None)),
        Provider("cce-torch-compile", "cut-cross-entropy", cut_cross_entropy("torch_compile")),
        Provider("quack", "quack-kernels", quack),
        Provider("trl", "trl", trl),
        Provider("fla", "fla-core", flash_linear_attention),
    )
}


def find_provider(name: str) -> Provider:
    """A name in PROVIDERS, one of this project's paths with its budget, as mind@64MiB, or a function, MODULE:FUNCTION.

    Raises: ValueError naming what was given and what there is.
    """
    if ":" in name:
        return own_function(name)
    base, _, budget = name.partition("@")
    match = re.fullmatch(r"(\d+)MiB", budget)
    if base in PROVIDERS and not budget:
        return PROVIDERS[base]
    if base in PROVIDERS and PROVIDERS[base].is_ours and match and int(match[1]) > 0:
        backend = "triton" if base.endswith("triton") else "torch"
        return replace(PROVIDERS[base], name=name, prepare=mind(backend, int(match[1]) * 2**20))
    raise ValueError(
        f"given {name!r}, wanted one of {', '.join(PROVIDERS)}, mind@64MiB for a budget of its logits, or "
        "MODULE:FUNCTION for one of yours"
    )

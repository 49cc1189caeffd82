"""The inputs that every provider gets, and their fp32 or fp64 reference.

python -m bench.inputs        # makes and caches the hidden states of a real student (SmolLM2-135M)
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import DESELECTED, HEADS, RATIONALE_LENGTHS, K, LossCase
from mind_kernels import TeacherHidden
from mind_kernels.cross_entropy.reference import reference_logits
from mind_kernels.linear_kl.reference import reference_linear_kl

IGNORE_INDEX = -100
REAL_QUESTIONS = 2  # 16 rationales, 3,000 rows: with the head 57 MiB in bf16
REFERENCE_BYTES = 2**28  # of a chunk's logits


class InputsError(ValueError):
    """Inputs that cannot be made here."""


@dataclass(frozen=True)
class Inputs:
    """One case's tensors.

    hidden_states (N, H) and lm_head_weight (V, H) are leaves that require a gradient. labels (N,) int64, −100 where
    unsupervised. row_weights (N,) fp32: the loss is Σ_n row_weights[n]·loss_n, 0 on deselected and unsupervised rows.
    teacher: for "kl" and "jsd". cu_seqlens (R + 1,) and rationale_weights (B, K): for a MIND batch.
    """

    hidden_states: Tensor
    lm_head_weight: Tensor
    labels: Tensor
    row_weights: Tensor
    loss: str
    logit_softcap: float | None
    teacher: TeacherHidden | None = None
    cu_seqlens: Tensor | None = None
    rationale_weights: Tensor | None = None

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_states, self.lm_head_weight

    @property
    def gradient_bytes(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)

    @property
    def bytes(self) -> int:
        """Held before the loss is called: hidden states and heads."""
        teacher = 0 if self.teacher is None else 1
        return (1 + teacher) * self.gradient_bytes

    def rows(self, index: Tensor) -> Inputs:
        """Some supervised rows, all of the same weight."""
        teacher = self.teacher and TeacherHidden(self.teacher.hidden_states[index], self.teacher.lm_head_weight)
        weights = torch.full((len(index),), 1 / len(index), device=index.device)
        X = self.hidden_states.detach()[index].requires_grad_()
        return Inputs(X, self.lm_head_weight, self.labels[index], weights, self.loss, self.logit_softcap, teacher)

    def num_rows(self) -> tuple[int, int]:
        """(rows with a gradient, supervised rows without one)."""
        active = int((self.row_weights != 0).sum())
        return active, int((self.labels != IGNORE_INDEX).sum()) - active


def make_inputs(case: LossCase, num_rows: int, dtype: torch.dtype, device: str) -> Inputs:
    """The case with about num_rows rows (whole questions in a MIND batch, at least one), always the same.

    Raises: InputsError when the real student's hidden states are not cached.
    """
    head = HEADS[case.head]
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    if case.hidden == "real":
        cached = read_hidden_states()
        lengths = [(int(p), tuple(map(int, t))) for p, *t in cached["lengths"].tolist()]
        layout = _mind_layout(lengths, num_rows)
        repeats = -(-max(num_rows, layout.labels.numel()) // len(cached["hidden_states"]))
        X = cached["hidden_states"].repeat(repeats, 1)
        labels = cached["labels"].repeat(repeats)
        if case.batch == "rows":
            kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            while len(kept) < num_rows:  # prompts and padding fall away
                kept = torch.cat([kept, kept])
            X, labels = X[kept[:num_rows]], labels[kept[:num_rows]]
        else:
            X, labels = X[: layout.labels.numel()], labels[: layout.labels.numel()]
        X, W = X.to(device, dtype), cached["lm_head_weight"].to(device, dtype)
        labels = labels.to(device)
    else:
        layout = _mind_layout(RATIONALE_LENGTHS, num_rows)
        N = layout.labels.numel() if case.batch == "mind" else num_rows
        X, W = randn(N, head.hidden_size), randn(head.vocab_size, head.hidden_size).mul_(head.hidden_size**-0.5)
        labels = torch.randint(0, head.vocab_size, (N,), generator=generator, device=device)
        if case.batch == "mind":
            labels = labels.where(layout.labels.to(device) != IGNORE_INDEX, IGNORE_INDEX)
    teacher = None
    if case.loss != "cross-entropy":
        teacher = TeacherHidden(randn(*X.shape), randn(*W.shape).mul_(head.hidden_size**-0.5))
    if case.batch == "rows":
        row_weights = torch.full((len(X),), 1 / len(X), device=device)
        cu_seqlens = rationale_weights = None
    else:
        cu_seqlens, rationale_weights = layout.cu_seqlens.to(device), layout.weights.to(device)
        supervised = (labels != IGNORE_INDEX).view(rationale_weights.numel(), -1)
        row_weights = (rationale_weights.view(-1, 1) / supervised.sum(1, keepdim=True) * supervised).flatten()
    return Inputs(
        X.requires_grad_(),
        W.requires_grad_(),
        labels,
        row_weights,
        case.loss,
        head.logit_softcap,
        teacher,
        cu_seqlens,
        rationale_weights,
    )


@dataclass(frozen=True)
class _Layout:
    labels: Tensor  # (N,): 0 where supervised, −100 elsewhere
    cu_seqlens: Tensor  # (B·K + 1,) int32
    weights: Tensor  # (B, K), 0 where deselected, of sum 1


def _mind_layout(lengths: tuple[tuple[int, tuple[int, ...]], ...] | list, num_rows: int) -> _Layout:
    """As mind.collator lays rationales out: padded to the longest, targets supervised from the prompt's last row on."""
    T = max(prompt + max(targets) for prompt, targets in lengths)
    B = max(1, round(num_rows / (K * T)))
    labels = torch.full((B, K, T), IGNORE_INDEX)
    for b in range(B):
        prompt, targets = lengths[b % len(lengths)]
        for k, length in enumerate(targets):
            labels[b, k, prompt - 1 : prompt - 1 + length] = 0
    weights = torch.rand(B, K, generator=torch.Generator().manual_seed(1)) + 0.5
    weights[:, list(DESELECTED)] = 0
    weights /= weights.sum()
    return _Layout(labels.flatten(), torch.arange(B * K + 1, dtype=torch.int32) * T, weights)


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@dataclass(frozen=True)
class LossAndGradients:
    loss: Tensor
    grad_hidden_states: Tensor
    grad_lm_head_weight: Tensor


def reference(given: Inputs, row_weights: Tensor) -> LossAndGradients:
    """Loss and gradients by their formula in fp32 (fp64 for fp32 inputs), over as many rows at a time as fit."""
    X, dtype = given.hidden_states.detach(), reference_dtype(given)
    W = given.lm_head_weight.detach().to(dtype).requires_grad_()
    grad_X = torch.zeros(X.shape, dtype=dtype, device=X.device)
    total = torch.zeros((), dtype=torch.float64, device=X.device)
    for index in _reference_rows(row_weights, W):
        x = X[index].to(dtype).requires_grad_()
        loss = _reference_loss(given, x, W, index, row_weights[index].to(dtype))
        loss.backward()
        total += loss.detach()
        grad_X[index] = x.grad if x.grad is not None else 0
    return LossAndGradients(total, grad_X, W.grad if W.grad is not None else torch.zeros_like(W))


@torch.no_grad()
def reference_loss(given: Inputs) -> Tensor:
    """The loss alone."""
    dtype = reference_dtype(given)
    W = given.lm_head_weight.to(dtype)
    total = torch.zeros((), dtype=torch.float64, device=W.device)
    for index in _reference_rows(given.row_weights, W):
        total += _reference_loss(given, given.hidden_states[index].to(dtype), W, index, given.row_weights[index])
    return total


def reference_dtype(given: Inputs) -> torch.dtype:
    return torch.float64 if given.hidden_states.dtype in (torch.float32, torch.float64) else torch.float32


def _reference_rows(row_weights: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return row_weights.nonzero().squeeze(1).split(max(1, REFERENCE_BYTES // (len(W) * W.element_size())))


def _reference_loss(given: Inputs, x: Tensor, W: Tensor, index: Tensor, row_weights: Tensor) -> Tensor:
    if given.teacher is None:
        z = reference_logits(x, W, logit_softcap=given.logit_softcap)
        return (row_weights * F.cross_entropy(z, given.labels[index], reduction="none")).sum()
    teacher = TeacherHidden(given.teacher.hidden_states[index].to(x.dtype), given.teacher.lm_head_weight.to(x.dtype))
    divergence = {"kl": "forward", "jsd": "jsd"}[given.loss]
    loss, _ = reference_linear_kl(x, W, teacher, given.labels[index], divergence=divergence, reduction="sum")
    return loss * row_weights[0]  # all weigh the same


# ---------------------------------------------------------------------------------------------------------------------
# Hidden states of a real student


def hidden_states_file() -> Path:
    root = Path(os.environ.get("MIND_CACHE") or "~/.cache/mind").expanduser()
    return root / "bench" / "smollm2-135m-hidden-states.safetensors"


def read_hidden_states() -> dict[str, Tensor]:
    """Raises: InputsError when they are not cached."""
    from safetensors.torch import load_file

    path = hidden_states_file()
    if not path.exists():
        raise InputsError(f"{path}: no cached hidden states, wanted them made by `python -m bench.inputs`")
    return load_file(path)


def make_hidden_states() -> Path:
    """SmolLM2-135M on K rationales of generated problems: hidden states before the head, the head, labels, lengths."""
    from safetensors.torch import save_file

    from mind.attach import attach_mind_loss
    from mind.collator import student_inputs
    from mind.data import MindDataset, load_records
    from mind.problems import generate_records
    from mind.students import load_student

    path = hidden_states_file()
    model, tokenizer = load_student("smollm2-135m")
    dataset = MindDataset(load_records(generate_records(REAL_QUESTIONS, seed=0)), tokenizer)
    batch = student_inputs(dataset.questions, torch.ones(REAL_QUESTIONS, K, dtype=torch.bool), 0)
    attachment = attach_mind_loss(model.eval())
    with torch.no_grad():
        output = attachment.base(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    lengths = [[len(q.prompt_ids), *map(len, q.target_ids)] for q in dataset.questions]
    tensors = {
        "hidden_states": output[0].flatten(0, 1).bfloat16(),
        "lm_head_weight": attachment.head.weight.detach().bfloat16().clone(),
        "labels": batch["shift_labels"],
        "lengths": torch.tensor(lengths),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make and cache the hidden states of a real student.")
    parser.parse_args(arguments)
    path = hidden_states_file()
    print(path if path.exists() else make_hidden_states())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""README.md is true: its examples run and its links lead somewhere."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from mind_kernels import TeacherLogits, fused_linear_cross_entropy, fused_linear_kl, mind_loss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 3
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=size, **sizes)) for size in (16, 32))
    names = {
        "model": model,
        "teacher": teacher,
        "input_ids": torch.randint(0, 40, (4, 6)),
        "attention_mask": torch.ones(4, 6, dtype=torch.int64),
        "labels": torch.randint(0, 40, (4, 6)),
    }
    exec(examples[0], names)
    assert names["hidden_states"].grad.isfinite().all() and names["output"].kl > 0 and names["output"].consistency > 0
    names["alpha"] = torch.full((2, 2), 0.5)
    exec(examples[1], names)
    assert names["output"].rationale_losses.shape == (2, 2) and "forward" not in vars(names["model"])

    exec(examples[2], names)
    names["attachment"].detach()
    targets, tau = names["labels"][:, 1:], 2.0
    student_logits, teacher_logits = (m(names["input_ids"]).logits[:, :-1] for m in (model, teacher))
    log_s, log_t = (torch.log_softmax(logits / tau, -1) for logits in (student_logits, teacher_logits))
    cross_entropy = F.cross_entropy(student_logits.flatten(0, 1), targets.flatten())
    kl = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1).mean()
    torch.testing.assert_close(names["output"].loss, cross_entropy + 0.5 * tau**2 * kl)
    assert model.get_output_embeddings().weight.grad.isfinite().all()
    assert teacher.get_output_embeddings().weight.grad is None


def test_what_other_training_code_computes() -> None:
    """The table of that name; sequences of different lengths, so that a mean of means is not the mean."""
    B, T, H, V = 3, 6, 4, 20
    torch.manual_seed(0)
    x = torch.randn(B, T, H, dtype=torch.float64, requires_grad=True)
    w = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    t = torch.randn(B, T, V, dtype=torch.float64)
    labels = torch.randint(0, V, (B, T))
    labels[0, :4] = labels[1, 5:] = -100
    weights = torch.rand(B, T, dtype=torch.float64)
    one, is_label = torch.ones(B, dtype=torch.float64), labels != -100
    logits = x @ w.t()
    log_s, log_t = torch.log_softmax(logits / 2, -1)[is_label], torch.log_softmax(t / 2, -1)[is_label]
    M = torch.logaddexp(log_s + math.log(0.7), log_t + math.log(0.3))
    by_token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(B, T)
    mean, smoothed = (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=e) for e in (0.0, 0.1))

    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()

    def divergence(name: str) -> torch.Tensor:
        options = {"divergence": name, "beta": 0.3, "temperature": 2.0, "temperature_power": 0}
        return fused_linear_kl(x.flatten(0, 1), w, TeacherLogits(t.flatten(0, 1)), labels.flatten(), **options)[0]

    def whole(teacher: TeacherLogits, kl_weight: float) -> torch.Tensor:
        rows = (x.view(1, 1, B * T, H), w, labels.view(1, 1, B * T))
        return mind_loss(*rows, rationale_weights=one[:1, None], teacher=teacher, kl_weight=kl_weight).loss

    by_num_items = {"reduction": "sum", "rationale_weights": one / is_label.sum()}
    single = fused_linear_cross_entropy(x.unsqueeze(-2), w, labels.unsqueeze(-1), rationale_weights=weights)
    torch.testing.assert_close(single[1], by_token.detach())
    uniform = TeacherLogits(torch.zeros(1, dtype=torch.float64).expand(1, 1, B * T, V))
    hot = kl(*(torch.log_softmax(z, -1)[is_label] for z in (t, logits)))
    for given, wanted in (
        (fused_linear_cross_entropy(x.flatten(0, 1), w, labels.flatten())[0], mean),
        (fused_linear_cross_entropy(x, w, labels, **by_num_items)[0], mean),
        (single[0], (weights * by_token).sum()),
        (divergence("forward"), kl(log_t, log_s)),
        (divergence("reverse"), kl(log_s, log_t)),
        (divergence("jsd"), 0.3 * kl(log_t, M) + 0.7 * kl(log_s, M)),
        (0.4 * whole(TeacherLogits(t.view(1, 1, B * T, V)), 0.6 / 0.4), 0.4 * mean + 0.6 * hot),
        (0.9 * whole(uniform, 0.1 / 0.9) + 0.1 * math.log(V), smoothed),
    ):
        torch.testing.assert_close(given, wanted)
        gradients = (torch.autograd.grad(loss, (x, w), retain_graph=True) for loss in (given, wanted))
        torch.testing.assert_close(*gradients)


def test_links_lead_to_files() -> None:
    documents = [ROOT / "README.md", *ROOT.glob("mind_kernels/**/README.md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))]
    assert len(links) > 8
    for path, link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), f"{path}: {link}"

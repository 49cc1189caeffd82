"""README.md is true: its examples run and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

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


def test_links_lead_to_files() -> None:
    documents = [ROOT / "README.md", *ROOT.glob("mind_kernels/**/README.md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))]
    assert len(links) > 8
    for path, link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), f"{path}: {link}"

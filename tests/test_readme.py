"""README.md is true: its examples run and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 2
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    names = {
        "model": LlamaForCausalLM(config),
        "input_ids": torch.randint(0, 40, (4, 6)),
        "attention_mask": torch.ones(4, 6, dtype=torch.int64),
        "labels": torch.randint(0, 40, (4, 6)),
    }
    exec(examples[0], names)
    assert names["hidden_states"].grad.isfinite().all() and names["output"].kl > 0 and names["output"].consistency > 0
    names["alpha"] = torch.full((2, 2), 0.5)
    exec(examples[1], names)
    assert names["output"].rationale_losses.shape == (2, 2) and "forward" not in vars(names["model"])


def test_links_lead_to_files() -> None:
    documents = [ROOT / "README.md", *ROOT.glob("mind_kernels/**/README.md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8"))]
    assert len(links) > 8
    for path, link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), f"{path}: {link}"

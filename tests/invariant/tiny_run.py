"""Everything that `mind train` reads, made tiny: a random student, a random encoder and records, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from mind.cli import main

from ..mind.tiny import raw_records, tiny_student, tiny_tokenizer

# A run of a few seconds. fp32 and SGD-like smoothness are what lets two orders of summation be compared.
SETTINGS: dict[str, Any] = {
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "assistant_hidden_size": 16,
    "assistant_heads": 2,
    "assistant_window": 8,
    "num_heldout": 3,
    "num_measured": 2,
    "max_new_tokens": 8,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def make_inputs(folder: Path) -> None:
    """student/, encoder/, data.jsonl (13 questions) in the folder."""
    tiny_student().save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789", ":", "?", "_"]
    (folder / "encoder").mkdir()
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{word}" for word in words[5:])]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "encoder")
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(folder / "encoder")
    write_jsonl(folder / "data.jsonl", raw_records(13))


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def flags(inputs: Path, output: Path, **changes: Any) -> list[str]:
    """The command line of a tiny run."""
    given = {"student": inputs / "student", "encoder": inputs / "encoder", "data": inputs / "data.jsonl"}
    settings = given | {"output_dir": output} | SETTINGS | changes
    return ["train", *(f"--{name}={value}" for name, value in settings.items())]


def run(inputs: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """Runs `mind train` in this process and returns its log."""
    assert main(flags(inputs, output, **changes)) == 0
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]

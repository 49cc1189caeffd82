"""Memory of one training step: Gemma 3 270M (V = 262,144), one question with K = 8 rationales, with and without a cap.

    python -m bench.step_memory [--cap-gib 5.0] [--results FILE]

Each loss runs in a process of its own, first without a limit, which measures the peak, then under the cap (RLIMIT_DATA,
what the process may allocate), where it finishes or is out of memory. A step is forward + backward + AdamW in bf16
autocast over fp32 weights. The plain loss is Hugging Face's own: the model's logits of every row and F.cross_entropy
over the supervised ones, rationales weighted equally. "mind" reads the same padded batch; "shared" its prompt
once and no padding, as MindTrainer does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from bench.measure import environment, write_json
from mind_kernels.testing import peak_extra_bytes

GiB = 2**30
LOSSES = {
    "plain": "Hugging Face logits + F.cross_entropy",
    "mind": "attach_mind_loss",
    "shared": "attach_mind_loss, shared_prompts",
}


def step(loss: str, student: str) -> dict[str, Any]:
    """One step in this process. Imports are here: the parent needs none of it."""
    from mind.attach import attach_mind_loss
    from mind.collator import shared_prompts, student_inputs
    from mind.data import encode_record, load_records
    from mind.problems import generate_records
    from mind.prompting import PromptFormat
    from mind.students import load_student

    model, tokenizer = load_student(student)
    record = load_records(generate_records(1, seed=0))[0]
    perspectives = [rationale.perspective for rationale in record.rationales]
    question = encode_record(record, tokenizer, perspectives, PromptFormat(), max_length=1024)
    selected = torch.ones(1, len(perspectives), dtype=torch.bool)
    batch: dict[str, Any] = student_inputs([question], selected, 0)
    R, T = batch["input_ids"].shape
    if loss == "shared":
        batch["shared_prompts"] = shared_prompts([question], selected)
    weights = torch.full((1, R), 1 / R)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()
    if loss != "plain":
        attach_mind_loss(model, consistency_weight=0.0)
    losses: list[float] = []

    def train() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if loss != "plain":
                total = model(**batch, rationale_weights=weights).loss
            else:
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                labels = batch["shift_labels"]
                rows = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none").view(R, T)
                total = (rows.sum(-1) / (labels.view(R, T) != -100).sum(-1)).mean()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())

    start = time.perf_counter()
    peak = peak_extra_bytes(train)
    supervised = int((batch["shift_labels"] != -100).sum())
    return {
        "rows": batch["shared_prompts"].input_ids.numel() if loss == "shared" else R * T,
        "supervised_rows": supervised,
        "loss": losses[0],
        "peak_extra_bytes": peak,
        "seconds": time.perf_counter() - start,
    }


def run(loss: str, student: str, cap: int | None) -> dict[str, Any]:
    def limit() -> None:
        if cap is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))

    command = [sys.executable, "-m", "bench.step_memory", "--child", loss, "--student", student]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
    if cap is not None and ("allocate" in done.stderr or "MemoryError" in done.stderr or done.returncode < 0):
        return {"out_of_memory": last}
    raise SystemExit(f"step_memory: {loss} failed: {last}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of one Gemma 3 270M training step with and without a cap.")
    parser.add_argument("--student", default="gemma3-270m")
    parser.add_argument("--cap-gib", type=float, default=7.0, help="allocation limit of a process, in GiB")
    parser.add_argument("--results", type=Path, help="write what was measured as JSON")
    parser.add_argument("--child", choices=LOSSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(step(args.child, args.student)))
        return
    cap = int(args.cap_gib * GiB)
    rows = [
        {"loss": loss, "free": run(loss, args.student, None), "capped": run(loss, args.student, cap)} for loss in LOSSES
    ]
    table = Table(title=f"{args.student}: one step of one question with K = 8", title_justify="left")
    for column in ("loss", "rows (supervised)", "value", "peak above weights", f"under a cap of {args.cap_gib:g} GiB"):
        table.add_column(column)
    for row in rows:
        free = row["free"]
        table.add_row(
            LOSSES[row["loss"]],
            f"{free['rows']} ({free['supervised_rows']})",
            f"{free['loss']:.4f}",
            f"{free['peak_extra_bytes'] / GiB:.2f} GiB",
            "out of memory" if "out_of_memory" in row["capped"] else f"runs, {row['capped']['seconds']:.0f} s",
        )
    Console(width=140).print(table)
    if args.results:
        document = {"environment": environment(), "student": args.student, "cap_bytes": cap, "rows": rows}
        write_json(args.results, document)


if __name__ == "__main__":
    main()

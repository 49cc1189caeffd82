"""Whole training steps of a real student: questions per second and peak memory, MindTrainer beside its alternatives.

    python -m bench.steps [--device cuda] [--students NAME …] [--trainers NAME …] [--questions 1] [--results FILE]

All train the same student on the same questions of K = 8 rationales with the same optimiser (AdamW, bf16 autocast over
fp32 weights) in the same order, so that each step reads the same. To the others a question is 8 examples, and its loss
a mean over tokens. Each runs in a process of its own: one that fails or is out of memory is a row, the others go on.

    mind              MindTrainer, method "mind": the assistant selects; the others' losses are measured forward-only
    mind-no-fusion    MindTrainer, method "no_fusion": all 8 rationales are trained on, as everywhere below
    …-unshared-prompt the same two with share_prompt false: a question's prompt is read 8 times, padded
    transformers      transformers.Trainer
    transformers-liger  the same with Liger's model patches (use_liger_kernel)
    trl               TRL's SFTTrainer, gradient checkpointing off as elsewhere
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.losses import Parser, check_device, chosen, default_device
from bench.measure import FAILED, OK, OOM, UNAVAILABLE, environment, is_out_of_memory, one_line, write_json
from bench.providers import Unavailable, version, want
from bench.shapes import RATIONALE_LENGTHS, K

STUDENTS = {
    "smollm2-135m": "SmolLM2-135M-Instruct, its weights",
    "qwen2.5-1.5b-random": "of Qwen2.5-1.5B's shape, random weights and token ids",
    "tiny-random": "two layers, for dry runs and tests",
}
UNSHARED = "-unshared-prompt"
TRAINERS = (
    "mind",
    f"mind{UNSHARED}",
    "mind-no-fusion",
    f"mind-no-fusion{UNSHARED}",
    "transformers",
    "transformers-liger",
    "trl",
)
PACKAGES = {"transformers-liger": "liger-kernel", "trl": "trl"}
WARMUP_STEPS = {"cpu": 1, "cuda": 3}
STEPS = {"cpu": 2, "cuda": 15}  # measured
QUESTIONS = {"cpu": 1, "cuda": 4}  # in a step
CHILD_SECONDS = 600
MiB = 2**20


# ---------------------------------------------------------------------------------------------------------------------
# In the child: one trainer


def make_student(name: str, device: str) -> tuple[Any, Any]:
    """(model on the device, tokenizer); random students get a byte tokenizer, of which only the pad token is used."""
    if name == "smollm2-135m":
        from mind.students import load_student

        model, tokenizer = load_student(name)
        return model.to(device), tokenizer
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {"<eos>": 0, "<pad>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>")),
        eos_token="<eos>",
        pad_token="<pad>",
    )
    sizes = {
        "qwen2.5-1.5b-random": {
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        "tiny-random": {
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    }[name]
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, tie_word_embeddings=True, eos_token_id=0, pad_token_id=1, bos_token_id=None)
    with torch.device(device):  # 1.5 billion random numbers take a CPU half a minute
        return Qwen2ForCausalLM(config), tokenizer


def make_dataset(student: str, tokenizer: Any, vocab_size: int, num_questions: int) -> Any:
    """A MindDataset of generated problems; for a random student, of random ids in the same lengths."""
    from mind.data import MindDataset, load_records
    from mind.problems import generate_records

    records = load_records(generate_records(num_questions, seed=0))
    features = torch.randn(num_questions, K, 64, generator=torch.Generator().manual_seed(0))
    dataset = MindDataset(records, tokenizer, features=features, max_length=4096)
    if student == "smollm2-135m":
        return dataset
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocab_size, (length,), generator=generator).tolist())

    for i, question in enumerate(dataset.questions):
        prompt, targets = RATIONALE_LENGTHS[i % len(RATIONALE_LENGTHS)]
        suffix = ids(8)
        target_ids = tuple(ids(length - len(suffix)) + suffix for length in targets)
        dataset.questions[i] = replace(question, prompt_ids=ids(prompt), target_ids=target_ids, answer_length=8)
    return dataset


def expanded(dataset: Any) -> list[dict[str, list[int]]]:
    """Every rationale an example; a question's 8 stand together."""
    return [
        {"input_ids": [*q.prompt_ids, *target], "labels": [-100] * len(q.prompt_ids) + list(target)}
        for q in dataset.questions
        for target in q.target_ids
    ]


def pad(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(example["input_ids"]) for example in examples)

    def column(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([example[name] + [filler] * (width - len(example[name])) for example in examples])

    mask = [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


class Memory:
    """Peak bytes above what was held when it was made: of the allocator on a GPU, resident on a CPU."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS:")

    @staticmethod
    def _status(name: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return self._status("VmHWM:") - self.before


def in_order(trainer_class: type) -> type:
    """A Trainer that reads its data set from the first to the last.

    Shuffled, every trainer would be timed on other questions, and the rationales of several in one batch would be
    padded to the longest of them.
    """

    class InOrder(trainer_class):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def train(trainer_name: str, student: str, device: str, questions: int, steps: int, warmup: int) -> dict[str, Any]:
    """Trains warmup + steps steps and returns seconds of each measured step and the peak above the weights.

    Raises: Unavailable where the trainer cannot run here.
    """
    if trainer_name == "transformers-liger" and device == "cpu":
        raise Unavailable("its kernels need a GPU")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, tokenizer = make_student(student, device)
    dataset = make_dataset(student, tokenizer, model.get_output_embeddings().weight.shape[0], questions * 4)
    total = warmup + steps
    moments: list[float] = []
    selected: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "selected_rationales" in logs:
                selected.append(logs["selected_rationales"])

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": total,
            "num_train_epochs": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-5,
            "optim": "adamw_torch",
            "bf16": True,
            "use_cpu": device == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 0,
        }
        if trainer_name.startswith("mind"):
            from mind.config import MindConfig
            from mind.trainer import MindTrainer

            settings = MindConfig(
                method="no_fusion" if trainer_name.startswith("mind-no-fusion") else "mind",
                share_prompt=not trainer_name.endswith(UNSHARED),
                per_device_train_batch_size=questions,
                **common,
            )
            trainer: Any = in_order(MindTrainer)(
                model, settings, dataset, processing_class=tokenizer, callbacks=[Clock()]
            )
        elif trainer_name.startswith("transformers"):
            settings = TrainingArguments(
                per_device_train_batch_size=questions * K,
                remove_unused_columns=False,
                use_liger_kernel=trainer_name.endswith("liger"),
                **common,
            )
            trainer = in_order(Trainer)(
                model, settings, data_collator=pad, train_dataset=expanded(dataset), callbacks=[Clock()]
            )
        else:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            settings = SFTConfig(
                per_device_train_batch_size=questions * K, max_length=4096, gradient_checkpointing=False, **common
            )
            trainer = in_order(SFTTrainer)(
                model,
                settings,
                train_dataset=Dataset.from_list(expanded(dataset)),
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        memory = Memory(device)
        trainer.train()
        peak = memory.peak()
    seconds = [b - a for a, b in zip(moments[warmup - 1 :], moments[warmup:], strict=False)]
    return {
        "step_seconds": seconds,
        "peak_bytes": peak,
        "rationales_per_question": sum(selected) / len(selected) if selected else float(K),
        "parameters": model.num_parameters(),
    }


def child(args: argparse.Namespace, device: str) -> dict[str, Any]:
    try:
        found = train(args.child, args.students[0], device, args.questions, args.steps, args.warmup)
    except Unavailable as error:
        return {"status": UNAVAILABLE, "reason": str(error)}
    except Exception as error:  # whatever a peer raises is its row
        return {"status": OOM if is_out_of_memory(error) else FAILED, "reason": one_line(error)}
    return {"status": OK, "reason": ""} | found


# ---------------------------------------------------------------------------------------------------------------------
# In the parent: a process for each


def run_child(trainer: str, student: str, device: str, questions: int, steps: int, warmup: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.steps", "--child", trainer, "--device", device, "--students", student]
    command += ["--questions", str(questions), "--steps", str(steps), "--warmup", str(warmup)]
    row: dict[str, Any] = {"student": student, "trainer": trainer, "version": version(PACKAGES.get(trainer, "torch"))}
    from mind.students import BUILTIN_STUDENTS

    weights = BUILTIN_STUDENTS[student].packages if student in BUILTIN_STUDENTS else ()
    try:  # before a process is started, which takes longer to import what it needs than to miss it
        for package in (*weights, *([PACKAGES[trainer]] if trainer in PACKAGES else [])):
            want(package)
    except Unavailable as error:
        return row | {"status": UNAVAILABLE, "reason": str(error)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return row | {"status": FAILED, "reason": f"not done after {CHILD_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        # −9: Linux took the process because memory ran out
        return row | {"status": OOM if done.returncode == -9 else FAILED, "reason": last[:200]}
    row |= json.loads(lines[-1])
    if row["status"] == OK:
        row["questions_per_second"] = questions / statistics.median(row["step_seconds"])
    return row


def show(document: dict[str, Any]) -> None:
    table = Table(title=f"training steps, {document['questions_per_step']} questions of K = {K}", title_justify="left")
    for column in (
        "student",
        "trainer",
        "version",
        "questions/s",
        "peak above weights MiB",
        "rationales a question",
        "",
    ):
        table.add_column(column)
    for row in document["rows"]:
        numbers = ["", "", ""]
        if row["status"] == OK:
            numbers = [
                f"{row['questions_per_second']:.3g}",
                f"{row['peak_bytes'] / MiB:,.0f}",
                f"{row['rationales_per_question']:.1f}",
            ]
        status = "" if row["status"] == OK else f"{row['status']}: {row['reason']}"
        table.add_row(row["student"], row["trainer"], row["version"] or "", *numbers, status)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="bench.steps", description="Whole training steps: questions per second and peak memory.")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--students", nargs="+", metavar="NAME", help=f"of {', '.join(STUDENTS)}")
    parser.add_argument("--trainers", nargs="+", metavar="NAME", help=f"of {', '.join(TRAINERS)}")
    parser.add_argument("--questions", type=int, help="in a step (default: 1 on a CPU, 4 on a GPU)")
    parser.add_argument("--steps", type=int, help="measured (default: 2 on a CPU, 15 on a GPU)")
    parser.add_argument("--warmup", type=int, help="steps before those, not measured")
    parser.add_argument("--results", type=Path, help="write what was measured as JSON, for bench/results/")
    parser.add_argument("--child", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    device = check_device(parser, args.device)
    args.students = args.students or (["smollm2-135m"] if device == "cpu" else ["smollm2-135m", "qwen2.5-1.5b-random"])
    chosen(parser, "--students", args.students, list(STUDENTS))
    trainers = chosen(parser, "--trainers", args.trainers, TRAINERS)
    for name, defaults in (("questions", QUESTIONS), ("steps", STEPS), ("warmup", WARMUP_STEPS)):
        if getattr(args, name) is None:
            setattr(args, name, defaults[device])
        if getattr(args, name) < 1:
            parser.error(f"--{name}: given {getattr(args, name)}, wanted a number above 0")
    if args.child:
        print(json.dumps(child(args, device)))
        return 0

    document: dict[str, Any] = {
        "kind": "steps",
        "environment": environment(device),
        "questions_per_step": args.questions,
        "students": {name: STUDENTS[name] for name in args.students},
        "rows": [],
    }
    start = time.perf_counter()
    for student in args.students:
        for trainer in trainers:
            print(f"{time.perf_counter() - start:4.0f} s  {student}: {trainer}", file=sys.stderr, flush=True)
            document["rows"].append(run_child(trainer, student, device, args.questions, args.steps, args.warmup))
            if args.results:
                write_json(args.results, document)
    show(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())

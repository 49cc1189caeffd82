"""What the experiments share: the data sets and their splits, accuracy on questions, and one result file a run."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.measure import environment, write_json
from mind.data import Record, load_records
from mind.evaluation import measure_accuracy
from mind.problems import generate_records
from mind.problems.families import FAMILIES
from mind.problems.families.counting import Outfits
from mind.problems.families.money import Shopping
from mind.problems.families.motion import CatchUp
from mind.problems.families.people import Ages, Averages, Survey
from mind.problems.families.sharing import Mixture
from mind.problems.families.work import JointWork
from mind.problems.problem import Problem
from mind.prompting import PromptFormat

RESULTS = Path("experiments/results")
MAX_CHARACTERS = 480  # of a rationale to train on: what a CPU can afford
MAX_NEW_TOKENS = 128
DATA = ("svamp", "gsm8k", "problems", "four_kinds", "two_digits", "ages")
FOUR_KINDS = (CatchUp, Averages, Ages, Survey)  # trained and, with other numbers, tested
TWO_DIGIT_KINDS = (CatchUp, Ages, Survey, Shopping)  # steps are sums, differences, and small products and quotients
UNSEEN_KINDS = (Shopping, Mixture, JointWork, Outfits)
MAX_DIFFICULTY = 0.4  # of a generated problem to train on
MAX_NUMBER = 100  # in a question and its decomposition, for a student that fails at larger ones
MAX_AGES_NUMBER = 50


class Splits(NamedTuple):
    """train and validation have rationales; validation chooses settings, test and ood are only ever measured."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    ood: list[Record]
    exchangeable: bool  # the rationales are samples, not named perspectives


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What load_splits needs, where to run and where to write."""
    parser.add_argument("--folder", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data", default="svamp", choices=DATA)
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument("--num_train", type=int, default=240, help="training questions")
    parser.add_argument("--num_validation", type=int, default=24, help="questions of the held-out loss")
    parser.add_argument("--num_test", type=int, default=150, help="questions of each accuracy")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")


def load_splits(options: argparse.Namespace) -> Splits:
    """The same questions at every seed, as add_data_arguments describes them.

    data: "svamp" (3 sampled rationales; out of distribution: GSM8K), "gsm8k" (2 written ones; SVAMP), "problems" (8
        perspectives, all generated kinds, tested at all difficulties; SVAMP), "four_kinds" (8 perspectives, four
        generated kinds, tested on other numbers; out of distribution: four other kinds), "two_digits" (8
        perspectives, four generated kinds with whole numbers up to 100, tested on others; SVAMP) or "ages" (8
        perspectives, one generated kind with whole numbers up to 50, tested on others; with numbers from 51 to 100).
    folder: holds svamp_train_k3.jsonl, svamp_test.jsonl, gsm8k_k2.jsonl and gsm8k_eval.jsonl.

    Raises: ValueError for a missing file, or too few questions that fit.
    """
    folder, num_train, num_test = options.folder, options.num_train, options.num_test
    order = random.Random(0)

    def read(file: str, rationales: bool = False) -> list[Record]:
        records = load_records(folder / file, require_rationales=rationales)
        return order.sample(records, len(records))

    def easy(kinds: Sequence[type[Problem]], split: str, num_drawn: int) -> list[Record]:
        rows = generate_records(num_drawn, seed=0, split=split, families=kinds)
        return load_records([row for row in rows if row["difficulty"] <= MAX_DIFFICULTY])

    def numbers(kinds: Sequence[type[Problem]], split: str, num_drawn: int, largest: range) -> list[Record]:
        rows = generate_records(num_drawn, seed=0, split=split, families=kinds)
        return load_records([row for row in rows if _largest_number(row) in largest and row["answer"].isdecimal()])

    if options.data == "problems":
        known, test = easy(FAMILIES, "train", 3200), load_records(generate_records(num_test, seed=0, split="heldout"))
        ood = read("svamp_test.jsonl")
    elif options.data == "four_kinds":
        known, test = easy(FOUR_KINDS, "train", 3200), easy(FOUR_KINDS, "heldout", 800)
        ood = easy(UNSEEN_KINDS, "heldout", 800)
    elif options.data == "two_digits":
        up_to_100 = range(MAX_NUMBER + 1)
        known, test = (numbers(TWO_DIGIT_KINDS, *split, up_to_100) for split in (("train", 3200), ("heldout", 800)))
        ood = read("svamp_test.jsonl")
    elif options.data == "ages":
        up_to_50, beyond = range(MAX_AGES_NUMBER + 1), range(MAX_AGES_NUMBER + 1, MAX_NUMBER + 1)
        known, test = numbers((Ages,), "train", 6000, up_to_50), numbers((Ages,), "heldout", 1500, up_to_50)
        ood = numbers((Ages,), "heldout", 1500, beyond)
    elif options.data == "svamp":
        known, test, ood = read("svamp_train_k3.jsonl", True), read("svamp_test.jsonl"), read("gsm8k_eval.jsonl")
    else:
        known, test, ood = read("gsm8k_k2.jsonl", True), read("gsm8k_eval.jsonl"), read("svamp_test.jsonl")
    asked = {record.question for record in test}
    known = [
        record
        for record in known
        if record.question not in asked and all(len(item.text) <= MAX_CHARACTERS for item in record.rationales)
    ]
    wanted = num_train + options.num_validation
    if len(known) < wanted:
        raise ValueError(f"--num_train: {options.data} has {len(known)} short questions, wanted at least {wanted}")
    return Splits(
        known[:num_train],
        known[num_train:wanted],
        test[:num_test],
        ood[:num_test],
        exchangeable=options.data == "svamp",
    )


def _largest_number(row: dict[str, Any]) -> int:
    """In the question and its decomposition."""
    steps = next(item["text"] for item in row["rationales"] if item["perspective"] == "decomposition")
    return max(int(digits) for digits in re.findall(r"\d+", row["question"] + steps))


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Greedy chain of thought: which answers are right, and the share of outputs that hold one."""
    with torch.autocast(device, torch.bfloat16):
        result = measure_accuracy(
            model,
            tokenizer,
            records,
            prompt_format=PromptFormat(),
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=batch_size,
        )
    answered = sum(answer is not None for answer in result.answers) / len(records)
    return {"accuracy": result.accuracy, "answered": answered, "correct": [int(right) for right in result.correct]}


def run_once(path: Path, settings: Any, run: Callable[[], dict[str, Any]], device: str) -> None:
    """Runs and writes the file, unless it is there with the same settings: a stopped sweep goes on where it was.

    settings: a dataclass, part of the file; a file may be older than a setting that has a default.

    Raises: ValueError when the file is of other settings.
    """
    wanted = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        defaults = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
        given = defaults | json.loads(path.read_text())["settings"]
        if given != wanted:
            other = [key for key in wanted if given.get(key) != wanted[key]]
            raise ValueError(f"{path}: was run with another {', '.join(other)}, wanted another folder or the file gone")
        print(f"{path}: done before", flush=True)
        return
    print(f"{path}: running", flush=True)
    document = {"settings": wanted, "environment": environment(device), **run()}
    write_json(path, document)


def fingerprint(splits: Splits) -> str:
    """Which questions: the first digits of a hash of all ids."""
    ids = (record.id for records in splits[:4] for record in records)
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]

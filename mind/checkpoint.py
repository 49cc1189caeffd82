"""Checkpoints that are whole or not there: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import pickle
import shutil
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "mind_state.pt"  # what MIND adds to Trainer's state, but for the assistant's weights
PARTIAL_PREFIX = "partial-"  # of a checkpoint being written; neither resuming nor rotation takes such a folder for one


def publish(partial: str, output_dir: str, name: str) -> None:
    """Moves the finished checkpoint `partial`/`name` to `output_dir`/`name` and removes `partial`."""
    target = os.path.join(output_dir, name)
    _flush(partial)
    if os.path.isdir(target):  # the run was resumed from an earlier checkpoint
        os.replace(target, os.path.join(partial, "replaced"))
    os.replace(os.path.join(partial, name), target)
    _flush_one(output_dir)
    shutil.rmtree(partial)


def remove_partial(output_dir: str) -> None:
    """Removes what a killed run left unfinished."""
    if os.path.isdir(output_dir):
        for name in os.listdir(output_dir):
            if name.startswith(PARTIAL_PREFIX + PREFIX_CHECKPOINT_DIR):
                shutil.rmtree(os.path.join(output_dir, name))


def read_state(checkpoint: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """MIND's state in a checkpoint, after comparing the run it belongs to with the present one.

    wanted: "method", "lora_r" (None without LoRA), "perspectives", "question_ids" and "answer_suffix" of the present
        run.

    Raises: ValueError when the folder is no checkpoint of MindTrainer, or one of another run.
    """
    path = os.path.join(checkpoint, STATE_FILE)
    if not os.path.isfile(path):
        raise ValueError(
            f"{checkpoint}: holds no {STATE_FILE}, wanted a checkpoint written by MindTrainer without save_only_model"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    given, names = state["perspectives"], wanted["perspectives"]
    if len(given) != len(names):
        raise ValueError(
            f"{checkpoint}: has K = {len(given)} perspectives ({', '.join(given)}), "
            f"wanted the data's {len(names)} ({', '.join(names)})"
        )
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{checkpoint}: perspective {unknown[0]!r} is unknown, the data has {', '.join(names)}")
    if given != names:
        raise ValueError(f"{checkpoint}: orders its perspectives {', '.join(given)}, wanted {', '.join(names)}")
    if state["method"] != wanted["method"]:
        raise ValueError(f"{checkpoint}: was trained with method {state['method']!r}, wanted {wanted['method']!r}")
    if state.get("lora_r") != wanted["lora_r"]:
        given, now = ("no LoRA" if r is None else f"LoRA of rank {r}" for r in (state.get("lora_r"), wanted["lora_r"]))
        raise ValueError(f"{checkpoint}: was trained with {given}, wanted {now} as use_lora and lora_r say")
    if state["question_ids"] != wanted["question_ids"]:
        count = len(state["question_ids"])
        raise ValueError(f"{checkpoint}: was trained on {count} other questions, wanted those of train_dataset")
    suffix = state.get("answer_suffix", wanted["answer_suffix"])  # which early checkpoints lack
    if suffix != wanted["answer_suffix"]:
        raise ValueError(
            f"{checkpoint}: was trained with answer_suffix {suffix!r}, "
            f"wanted train_dataset's {wanted['answer_suffix']!r}"
        )
    return state


def _flush(folder: str) -> None:
    """Waits until the folder's files and entries are on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush_one(os.path.join(parent, name))
        _flush_one(parent)


def _flush_one(path: str) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows opens no folders, and keeps their entries itself
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The prompts: one text file a perspective, whose name is the file's, so an extra perspective is an extra file.

A prompt holds {question} and {answer_line} once each. The answer line is the answer suffix of training with dots for
the answer: what the teacher is told to finish with is what training teaches and evaluation reads.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from mind.generate import GenerateError
from mind.problems import PERSPECTIVES
from mind.prompting import ANSWER, PromptFormat

PROMPTS = Path(__file__).parent / "prompts"  # of the eight perspectives
JUDGE_PROMPT = Path(__file__).parent / "judge.txt"
FIELDS = ("question", "answer_line")


def read_prompts(folder: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Perspective -> prompt, the eight known ones first in their usual order, then others by name.

    folder: holds the *.txt files; default the packaged ones.

    Raises: GenerateError naming the folder or file, and the placeholder that is missing or repeated.
    """
    path = PROMPTS if folder is None else Path(folder)
    if not path.is_dir():
        raise GenerateError(f"prompts: {path} is no folder, wanted one with a .txt file for each perspective")
    prompts = {}
    for file in sorted(path.glob("*.txt")):
        if file.name.startswith("."):  # an editor's or a file manager's
            continue
        try:
            text = file.read_text(encoding="utf-8-sig").strip()  # some editors begin a file with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise GenerateError(f"prompts: {file} cannot be read: {error}") from error
        for field in FIELDS:
            count = text.count(f"{{{field}}}")
            if count != 1:
                raise GenerateError(f"prompts: {file} holds {{{field}}} {count} times, wanted it once")
        prompts[file.stem] = text
    if not prompts:
        raise GenerateError(f"prompts: {path} holds no .txt file, wanted one for each perspective")
    known = [name for name in PERSPECTIVES if name in prompts]
    return {name: prompts[name] for name in (*known, *(name for name in prompts if name not in known))}


def copy_prompts(folder: str | os.PathLike[str]) -> None:
    """Copies the packaged prompts into a new folder, to be edited.

    Raises: GenerateError when the folder is there already or cannot be made.
    """
    if os.path.exists(folder):
        raise GenerateError(f"copy_prompts: {folder} exists already, wanted a new folder")
    try:
        shutil.copytree(PROMPTS, folder)
    except OSError as error:
        raise GenerateError(f"copy_prompts: {folder} cannot be made: {error.strerror or error}") from error


def fill(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt with {name} replaced by its value; what a value holds in braces stays as it is."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], prompt)


def answer_line(prompt_format: PromptFormat) -> str:
    """The line that a teacher is told to finish with."""
    return prompt_format.answer_suffix.replace(ANSWER, "…").strip()

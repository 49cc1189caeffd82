"""`python -m mind.problems --num-questions 500 --seed 0 --split train --output train.jsonl`: records as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mind.problems.generator import SPLITS, generate_records


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def write_jsonl(records: Sequence[dict[str, Any]], output: Path) -> None:
    """Write one JSON object a line; the file appears whole or not at all. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, output)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: Sequence[str] | None = None, prog: str = "python -m mind.problems") -> int:
    """Run the command line; returns the exit status (2 for bad input, with one line on stderr)."""
    parser = _OneLineParser(prog=prog, description="Generate eight-perspective word problems.")
    parser.add_argument("--num-questions", type=int, required=True, help="how many questions, each with 8 rationales")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same questions (default 0)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="they never share parameters (default train)")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to create; it must not exist")
    options = parser.parse_args(arguments)
    try:
        if options.output.exists():
            raise FileExistsError(f"--output: {options.output} exists already and is not overwritten")
        if not options.output.parent.is_dir():
            raise NotADirectoryError(f"--output: {options.output.parent} is no folder, wanted one to write in")
        write_jsonl(generate_records(options.num_questions, seed=options.seed, split=options.split), options.output)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What `mind generate` tells at its end, on the screen and in NAME.report.json.

    {"questions": {"in": 100, "kept": 61, "dropped": {"no right rationale": 9, …}},
     "perspectives": {"decomposition": {"asked": 100, "failed": 0, "right": 71, "kept": 44, "dropped": {…},
                      "yield": 0.71, "mean_words": 83.2, "prompt_tokens": 15120, "completion_tokens": 19400}, …},
     "near_duplicates": 12, "samples": [{"id": …, "question": …, "perspective": …, "text": …, "answer": …}, …],
     "rule": "…", "requests": {"model": 800}, "failed": 0, "topk": {"tokens": 9120, "aligned": 9080}}

Tokens are null where a server does not count them, topk is null without --top_logprobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mind.generate.judge import Verdict
from mind.generate.ledger import Answer

if TYPE_CHECKING:
    from mind.data import Record
    from mind.generate.command import Files

Pair = tuple[str, str]  # (question id, perspective)
SAMPLES = 3
SAMPLE_LENGTH = 600  # characters of a sample on the screen


def count_reasons(reasons: Iterable[str | None]) -> str:
    """ "3 wrong answer, 1 empty"; None counts for nothing."""
    return _counts(Counter(reason for reason in reasons if reason is not None), none="")


def _counts(counts: Mapping[str, int], none: str = "none") -> str:
    items = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {reason}" for reason, count in items if count) or none


def build_report(
    records: Sequence[Record],
    perspectives: Sequence[str],
    answers: Mapping[Pair, Answer],
    verdicts: Mapping[Pair, Verdict],
    difficulties: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The part of the report that follows from what was answered and kept."""
    kept = {row["id"]: {item["perspective"] for item in row["rationales"]} for row in rows}
    right = {pair for pair, verdict in verdicts.items() if verdict.reason is None}
    by_perspective = {}
    for name in perspectives:
        pairs = [(record.id, name) for record in records]
        given = [answers[pair] for pair in pairs if pair in answers]
        good = [verdicts[pair].text for pair in pairs if pair in right]
        by_perspective[name] = {
            "asked": len(pairs),
            "failed": len(pairs) - len(given),
            "right": len(good),
            "kept": sum(name in names for names in kept.values()),
            "dropped": Counter(verdicts[pair].reason for pair in pairs if pair in verdicts and pair not in right),
            "yield": len(good) / len(given) if given else None,
            "mean_words": sum(len(text.split()) for text in good) / len(good) if good else None,
            "prompt_tokens": _total(answer.prompt_tokens for answer in given),
            "completion_tokens": _total(answer.completion_tokens for answer in given),
        }
    answered = {name for name, _ in answers}
    good_questions = {name for name, _ in right if name in difficulties}
    dropped = {
        "not answered": sum(record.id not in answered for record in records),
        "no right rationale": sum(record.id in answered and record.id not in good_questions for record in records),
        "easy, not chosen": len(good_questions) - len(kept),
    }
    return {
        "questions": {"in": len(records), "kept": len(rows), "dropped": {k: n for k, n in dropped.items() if n}},
        "perspectives": by_perspective,
        "near_duplicates": sum("near_duplicate_of" in item for row in rows for item in row["rationales"]),
        "samples": [
            _sample(rows[i * (len(rows) - 1) // max(1, SAMPLES - 1)], i) for i in range(min(SAMPLES, len(rows)))
        ],
    }


def _total(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _sample(row: Mapping[str, Any], i: int) -> dict[str, Any]:
    rationale = row["rationales"][i % len(row["rationales"])]
    return {"id": row["id"], "question": row["question"], **rationale}


def print_report(report: Mapping[str, Any], files: Files) -> None:
    console = Console()
    table = Table(title="rationales", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("perspective", no_wrap=True)
    for column in ("asked", "right", "yield", "kept", "words", "tokens in", "tokens out"):
        table.add_column(column, justify="right", no_wrap=True)
    dropped: Counter[str] = Counter()
    for name, part in report["perspectives"].items():
        share = "" if part["yield"] is None else f"{part['yield']:.0%}"
        words = "" if part["mean_words"] is None else f"{part['mean_words']:.0f}"
        tokens = ("?" if part[kind] is None else f"{part[kind]:,}" for kind in ("prompt_tokens", "completion_tokens"))
        table.add_row(Text(name), str(part["asked"]), str(part["right"]), share, str(part["kept"]), words, *tokens)
        dropped.update(part["dropped"])
        dropped["failed"] += part["failed"]
    console.print(table)
    questions = report["questions"]
    lines = [
        f"rationales dropped: {_counts(dropped)}",
        f"questions: {questions['in']} in, {questions['kept']} kept; dropped: {_counts(questions['dropped'])}",
        report["rule"],
        f"near-duplicate rationales flagged: {report['near_duplicates']}",
        "requests of this run: " + (", ".join(f"{n} to {name}" for name, n in report["requests"].items()) or "none"),
    ]
    if report["topk"] is not None:
        lines.append(f"log-probabilities: of {report['topk']['aligned']} of {report['topk']['tokens']} tokens")
    for sample in report["samples"]:
        text = sample["text"]
        text = text if len(text) <= SAMPLE_LENGTH else text[:SAMPLE_LENGTH] + " …"
        lines += ["", f"{sample['id']} · {sample['perspective']}: {sample['question']}", text]
    lines += ["", *(f"{name:<8}{path}" for name, path in vars(files).items() if path.exists())]
    console.print(Text("\n".join(lines)), soft_wrap=True)

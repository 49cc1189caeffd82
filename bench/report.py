"""RESULTS.md from the JSON of bench.losses and bench.steps: tables, plots, and in plain words who wins and why.

    python -m bench.report [FILE …] [--output bench/RESULTS.md] [--readme README.md]

Without files: all of bench/results that those two wrote. Every sentence is made from the numbers.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.compare import is_ours, read
from bench.losses import DTYPES, Parser
from bench.measure import NOT_RUN, OK, UNAVAILABLE, WRONG
from mind_kernels.chunking import DEFAULT_MAX_LOGITS_BYTES

RESULTS = Path("bench/results")
MiB, GB = 2**20, 10**9
CAPACITIES_GB = (16, 24, 40, 80, 141)
RESERVED_SHARE = 0.05  # of a GPU's memory: the CUDA context and fragmentation
NOISE = 0.05  # two peaks this close are called the same

Document = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; all but the first column are right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def merge(documents: Sequence[Document]) -> dict[str, Document]:
    """Cases of several runs on one device by their id; a provider's row comes from the last document that tried it."""
    cases: dict[str, Document] = {}
    for document in documents:
        for case in document["cases"]:
            known = cases.get(case["id"], {"rows": []})
            rows = {row["provider"]: row for row in known["rows"]}
            for row in case["rows"]:
                if row["status"] not in (NOT_RUN, UNAVAILABLE) or row["provider"] not in rows:
                    rows[row["provider"]] = _own_scale(row, case)
            cases[case["id"]] = known | case | {"rows": list(rows.values())}
    return cases


def _own_scale(row: Document, case: Document) -> Document:
    """A row with the products of its own run beside it, against which its ratio is."""
    return {"roofline_ms": case.get("roofline_ms"), "products": case.get("products")} | row


def ratio(row: Document, case: Document, quantile: str = "p50") -> float:
    """Forward + backward as a multiple of the roofline of the run that measured it."""
    return row["times"]["both"][quantile] / (row.get("roofline_ms") or case["roofline_ms"])["both"]


# ---------------------------------------------------------------------------------------------------------------------
# In words


def paragraph(case: Document) -> str:
    """Who is fastest, who is leanest, by how much, why, and where this project loses."""
    rows = [row for row in case["rows"] if row["status"] == OK and row["times"] and "@" not in row["provider"]]
    ours = min((row for row in rows if is_ours(row["provider"])), key=lambda row: ratio(row, case), default=None)
    peers = sorted((row for row in rows if not is_ours(row["provider"])), key=lambda row: ratio(row, case))
    wrong = [row["provider"] for row in case["rows"] if row["status"] == WRONG]
    sentences = []
    if ours is None or not peers:
        missing = "no provider" if not rows else "no peer" if ours else "none of this project's paths"
        sentences.append(f"Nothing to compare: {missing} was measured.")
    else:
        sentences += _speed(case, ours, peers[0]) + _memory(ours, peers)
    if wrong:
        sentences.append(f"No number for {_listing(wrong)}: wrong beyond 4 × the error of PyTorch in the same dtype.")
    return " ".join(sentences)


def _speed(case: Document, ours: Document, best: Document) -> list[str]:
    mine, theirs = ratio(ours, case), ratio(best, case)
    relation = mine / theirs - 1
    sentence = (
        f"`{best['provider']}` is the fastest peer at {theirs:.2f} × the roofline; `{ours['provider']}` takes "
        f"{mine:.2f} ×"
    )
    if _overlap(case, ours, best):
        sentence += ", the same within this run's noise."
    elif relation < 0:
        sentence += f", {-relation:.0%} less: this project is the fastest here."
    else:
        sentence += f", {relation:.0%} more: this project loses on speed here."
    return [sentence, _why(case, ours), _why(case, best)]


def _overlap(case: Document, a: Document, b: Document) -> bool:
    """Whether the p20 to p80 of two rows overlap, each as a multiple of its own run's roofline."""
    return ratio(a, case, "p20") <= ratio(b, case, "p80") and ratio(b, case, "p20") <= ratio(a, case, "p80")


def _why(case: Document, row: Document) -> str:
    times, products = row["times"], row.get("products") or case["products"]
    share = 1 - 1 / max(ratio(row, case), 1)
    backward = times["backward"]["p50"]
    if backward < 0.1 * times["both"]["p50"]:
        how = "makes its gradients in the forward pass, while a chunk's logits are at hand"
    else:
        multiple = backward / products["backward"]["p50"]
        how = f"spends {multiple:.2f} × the two bare products in its backward"
        if multiple > 1.4:
            how += ", as one that computes logits again or casts them would"
    if share < 0.02:
        return f"`{row['provider']}` {how}; nothing measurable is spent beyond the products."
    return f"`{row['provider']}` {how}; {share:.0%} of its time is not the products."


def _memory(ours: Document, peers: Sequence[Document]) -> list[str]:
    known = [row for row in peers if row["peak_bytes"] is not None]
    if ours["peak_bytes"] is None or not known:
        return []
    leanest = min(known, key=lambda row: row["peak_bytes"])
    mine, theirs = ours["peak_bytes"] / MiB, leanest["peak_bytes"] / MiB
    text = f"`{ours['provider']}` peaks at {mine:,.0f} MiB, the leanest peer `{leanest['provider']}` at {theirs:,.0f}"
    if mine > theirs * (1 + NOISE):
        return [f"{text}: this project loses on memory here."]
    return [f"{text}." if mine < theirs * (1 - NOISE) else f"{text}: the same."]


def _listing(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def case_title(case: Document) -> str:
    what = {"cross-entropy": "cross-entropy", "kl": "forward KL from a teacher", "jsd": "JSD from a teacher"}
    parts = [what[case["loss"]]]
    if case["batch"] == "mind":
        active, passive = case.get("rows_with_gradient"), case.get("rows_without_gradient")
        parts.append(f"a MIND batch ({active:,} rows trained, {passive:,} measured only)" if active else "a MIND batch")
    parts.append("hidden states of a trained student" if case["hidden"] == "real" else "random hidden states")
    if case["logit_softcap"]:
        parts.append(f"softcap {case['logit_softcap']:g}")
    head = f"{case['head']} (H = {case['hidden_size']:,}, V = {case['vocab_size']:,})"
    return f"{head}, N = {case['num_rows']:,}, {case['dtype']}: {', '.join(parts)}"


def case_section(case: Document) -> list[str]:
    lines = [f"### {case_title(case)}", "", paragraph(case), ""]
    shown = [row for row in case["rows"] if budget_of(row["provider"]) is None]  # a budget's are the curve's
    ok = [row for row in shown if row["status"] == OK and row["times"]]
    if ok:
        cells = []
        for row in sorted(ok, key=lambda row: ratio(row, case)):
            times = row["times"]
            name = f"**{row['provider']}**" if is_ours(row["provider"]) else row["provider"]
            cells.append(
                [
                    name if row.get("rounds", case["rounds"]) > 1 else f"{name} (one cold step)",
                    f"{times['forward']['p50']:.1f}" if "forward" in times else "–",
                    f"{times['backward']['p50']:.1f}",
                    *(f"{times['both'][p]:.1f}" for p in ("p20", "p50", "p80")),
                    f"{1 / ratio(row, case):.0%}",
                    "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MiB:,.0f}",
                    *(f"{error:.1e}" for error in row["errors"].values()),
                ]
            )
        header = ["provider", "forward", "backward", "both p20", "p50", "p80", "of the roofline", "peak MiB"]
        lines += table([*header, "error of loss", "of dX", "of dW"], cells)
        floor, allowed = case["roofline_ms"], case["allowed_errors"]
        lines += [
            "",
            f"Milliseconds. Roofline: forward {floor['forward']:.1f}, both {floor['both']:.1f}; device copy "
            f"{case['copy_bytes_per_second'] / 1e9:,.0f} GB/s; {case['rounds']} rounds; gradients are "
            f"{case['gradient_bytes'] / MiB:,.0f} MiB of each peak. Allowed errors: loss {allowed['loss']:.1e}, dX "
            f"{allowed['grad_hidden_states']:.1e}, dW {allowed['grad_lm_head_weight']:.1e}, on "
            f"{case['rows_checked']:,} rows.",
        ]
    notes = _notes(ok)
    lines += ["", *notes] if notes else []
    lines += _without_number([row for row in shown if row not in ok])
    return [*lines, ""]


def _notes(rows: Sequence[Document]) -> list[str]:
    by_note = defaultdict(list)
    for row in rows:
        if row["note"]:
            by_note[row["note"]].append(row["provider"])
    return [f"- {_listing(names)}: {note}" for note, names in by_note.items()]


def _without_number(rows: Sequence[Document]) -> list[str]:
    by_reason = defaultdict(list)
    for row in rows:
        status = "" if row["status"] == UNAVAILABLE else f"{row['status']}: "
        by_reason[status + row["reason"]].append(row["provider"])
    head = ["", "Without a number:", ""] if rows else []
    return head + [f"- {_listing(names)}: {reason}" for reason, names in by_reason.items()]


def step_section(document: Document) -> list[str]:
    lines = []
    for student, what in document["students"].items():
        rows = [row for row in document["rows"] if row["student"] == student]
        base = next((r["questions_per_second"] for r in rows if r["trainer"] == "transformers" and _has(r)), None)
        cells = []
        for row in rows:
            if not _has(row):
                cells.append([row["trainer"], f"{row['status']}: {row['reason']}", "", "", ""])
                continue
            speed = row["questions_per_second"]
            cells.append(
                [
                    row["trainer"],
                    f"{speed:.3g}",
                    "–" if base is None else f"{speed / base:.2f} ×",
                    f"{row['peak_bytes'] / MiB:,.0f}",
                    f"{row['rationales_per_question']:.1f}",
                ]
            )
        lines += [f"### {student}: {what}", "", step_paragraph(rows), ""]
        header = ["trainer", "questions/s", "transformers = 1", "peak above weights, MiB", "rationales trained"]
        lines += [*table(header, cells), ""]
    return lines


def _has(row: Document) -> bool:
    return row["status"] == OK


def step_paragraph(rows: Sequence[Document]) -> str:
    speed = {row["trainer"]: row["questions_per_second"] for row in rows if _has(row)}
    peak = {row["trainer"]: row["peak_bytes"] for row in rows if _has(row)}
    peers = {name: value for name, value in speed.items() if not is_ours(name)}
    if not peers or not any(is_ours(name) for name in speed):
        return "Nothing to compare."
    best = max(peers, key=lambda name: peers[name])
    text = []
    for name in [name for name in speed if is_ours(name)]:
        factor, memory = speed[name] / speed[best], peak[name] / peak[best]
        verdict = "wins" if factor > 1 else "loses"
        text.append(
            f"`{name}` trains {factor:.2f} × the questions per second of `{best}`, the fastest peer, and {verdict}; "
            f"its peak is {memory:.2f} × as high."
        )
    fewer = next((row for row in rows if row["trainer"] == "mind" and _has(row)), None)
    if fewer:
        text.append(
            f"`mind` trained {fewer['rationales_per_question']:.1f} of 8 rationales a question (those that its "
            "untrained assistant selected) and measured the others forward-only; `mind-no-fusion` and the peers "
            "trained all 8."
        )
    return " ".join(text)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def budget_of(provider: str) -> int | None:
    """MiB of mind@64MiB."""
    return int(provider.partition("@")[2].removesuffix("MiB")) if "@" in provider else None


def sweeps(cases: dict[str, Document]) -> dict[tuple[str, str], list[Document]]:
    """Cases measured at two numbers of rows or more: (case, dtype) -> by rising N."""
    found: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for case in cases.values():
        if "roofline_ms" in case:
            found[case["case"], case["dtype"]].append(case)
    return {key: sorted(of, key=lambda case: case["num_rows"]) for key, of in found.items() if len(of) > 1}


def largest_rows(points: Sequence[tuple[int, int]], capacity: int) -> int:
    """The N at which a line through the two largest measured (N, bytes) reaches the capacity."""
    (n0, b0), (n1, b1) = sorted(points)[-2:]
    slope = max((b1 - b0) / (n1 - n0), 1e-9)
    return max(0, math.floor(n1 + (capacity - b1) / slope))


def documented_peak(case: Document, num_rows: int) -> int:
    """Bytes of this project's cross-entropy over more rows than forty chunks hold, inputs included.

    Hidden states, head and their gradients + the budget + the fp32 sum that so many chunks of 16 bits need.
    """
    H, V, itemsize = case["hidden_size"], case["vocab_size"], getattr(torch, case["dtype"]).itemsize
    accumulator = 4 * V * H if itemsize == 2 else 0
    return 2 * (num_rows + V) * H * itemsize + DEFAULT_MAX_LOGITS_BYTES + accumulator


def memory_section(cases: dict[str, Document]) -> list[str]:
    lines: list[str] = []
    for (name, dtype), of in sweeps(cases).items():
        points: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for case in of:
            for row in case["rows"]:
                if row["status"] == OK and row["peak_bytes"] is not None and "@" not in row["provider"]:
                    points[row["provider"]].append((case["num_rows"], row["peak_bytes"] + case["input_bytes"]))
        cells = []
        for provider, measured in points.items():
            if is_ours(provider) and of[0]["loss"] == "cross-entropy":
                # Within its budget the peak grows with N as everybody's: the line would be another.
                measured = [(n, documented_peak(of[0], n)) for n in (10**6, 2 * 10**6)]
            if len(measured) < 2:
                continue
            usable = [int(gb * GB * (1 - RESERVED_SHARE)) for gb in CAPACITIES_GB]
            cells.append([provider, *(f"{largest_rows(measured, capacity):,}" for capacity in usable)])
        if cells:
            lines += [
                f"### {name}, {dtype}",
                "",
                *table(["provider", *(f"{gb} GB" for gb in CAPACITIES_GB)], cells),
                "",
            ]
    if not lines:
        return []
    intro = (
        "Computed, not measured: the largest N of the loss alone (hidden states, head, their gradients and what the "
        "provider needs; no model and no optimiser beside it), 5 % of the memory kept free. A peer's from the line "
        "through its two largest measured peaks; this project's from its documented peak, which the budget bounds. A "
        "peer that was measured at one N alone is not in it, though it may bound its logits, too."
    )
    ran_out = [
        f"- measured: {case['id']}: {_listing(names)} out of memory"
        for case in cases.values()
        if (names := [row["provider"] for row in case["rows"] if row["status"] == "OOM"])
    ]
    return ["## Where memory runs out", "", intro, "", *lines, *ran_out, ""]


def draw_cases(cases: Sequence[Document], path: Path) -> None:
    """Time over memory, one panel a case: lower left is better."""
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4 * rows), squeeze=False)
    for ax in axes.flat[len(cases) :]:
        ax.axis("off")
    for ax, case in zip(axes.flat, cases, strict=False):
        for row in case["rows"]:
            if row["status"] == OK and row["times"] and row["peak_bytes"] and budget_of(row["provider"]) is None:
                x, y = row["peak_bytes"] / MiB, ratio(row, case)
                ax.scatter(x, y, color="tab:red" if is_ours(row["provider"]) else "tab:blue", zorder=3)
                ax.annotate(row["provider"], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.axvline(case["gradient_bytes"] / MiB, color="grey", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", title=case["id"], xlabel="peak MiB (dotted: gradients)", ylabel="× roofline")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        ax.title.set_fontsize(9)
    _save(figure, path)


def draw_budgets(case: Document, path: Path) -> None:
    rows = [row for row in case["rows"] if row["status"] == OK and row["times"] and budget_of(row["provider"])]
    rows.sort(key=lambda row: budget_of(row["provider"]) or 0)
    budgets = [budget_of(row["provider"]) for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.plot(budgets, [ratio(row, case) for row in rows], "o-", color="tab:red")
    left.set(xscale="log", xlabel="max_logits_bytes, MiB", ylabel="forward + backward, × roofline")
    right.plot(budgets, [row["peak_bytes"] / MiB for row in rows], "o-", color="tab:red")
    right.axhline(case["gradient_bytes"] / MiB, color="grey", linestyle=":", label="gradients")
    right.set(xscale="log", xlabel="max_logits_bytes, MiB", ylabel="peak MiB", ylim=(0, None))
    right.legend()
    figure.suptitle(case["id"], fontsize=9)
    _save(figure, path)


def draw_rows(name: str, of: Sequence[Document], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    series: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for case in of:
        for row in case["rows"]:
            if row["status"] == OK and row["times"] and row["peak_bytes"] is not None and "@" not in row["provider"]:
                series[row["provider"]].append((case["num_rows"], ratio(row, case), row["peak_bytes"] / MiB))
    for provider, points in series.items():
        n, times, peaks = zip(*points, strict=True)
        style = {"marker": "o", "linewidth": 2.5 if is_ours(provider) else 1.0, "label": provider}
        left.plot(n, times, **style)
        right.plot(n, peaks, **style)
    left.set(xscale="log", xlabel="N", ylabel="forward + backward, × roofline")
    right.set(xscale="log", yscale="log", xlabel="N", ylabel="peak MiB")
    right.legend(fontsize=7)
    figure.suptitle(name, fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    temporary.replace(path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def device_section(device: str, documents: Sequence[Document], plots: Path, folder: Path) -> list[str]:
    losses = [document for document in documents if document["kind"] == "losses"]
    steps = [document for document in documents if document["kind"] == "steps"]
    versions = documents[-1]["environment"]["versions"]
    known = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    missing = ", ".join(name for name, number in versions.items() if not number)
    lines = [
        f"# {device}",
        "",
        f"Commit {commits_of(documents)}. {known}." + (f" Not there: {missing}." if missing else ""),
    ]
    lines += [""]
    slug = _slug(device)

    def image(name: str, alt: str) -> list[str]:
        return [f"![{alt}]({(plots / f'{slug}-{name}.png').relative_to(folder).as_posix()})", ""]

    cases = merge(losses)
    compared = [case for case in cases.values() if _is_comparison(case)]
    if compared:
        lines += ["## Losses", ""]
        drawn = [case for case in compared if "roofline_ms" in case]
        if drawn:
            draw_cases(drawn, plots / f"{slug}-losses.png")
            lines += image("losses", "time over peak memory of every provider, one panel a case")
        for case in compared:
            lines += case_section(case)
    curves: list[str] = []
    for case in cases.values():
        if sum("@" in row["provider"] and row["status"] == OK for row in case["rows"]) > 1:
            name = f"budget-{_slug(case['id'])}"
            draw_budgets(case, plots / f"{slug}-{name}.png")
            curves += image(name, f"time and peak against max_logits_bytes: {case['id']}")
    for (name, dtype), of in sweeps(cases).items():
        draw_rows(f"{name} {dtype}", of, plots / f"{slug}-rows-{name}-{dtype}.png")
        curves += image(f"rows-{name}-{dtype}", f"time and peak against N: {name}")
    if curves:
        lines += ["## Speed and memory against the budget and N", "", *curves]
    lines += memory_section(cases)
    if steps:
        lines += ["## Whole training steps", ""]
        for document in steps:
            lines += step_section(document)
    return lines


HEADLINE_MARKS = ("<!-- headline: written by bench.report -->", "<!-- end of the headline -->")


def headline(documents: Sequence[Document]) -> list[str]:
    """The comparison in a few numbers, a table a device, with device and commit."""
    lines: list[str] = []
    for device, of in _by_device(documents).items():
        cells = []
        cases = merge([document for document in of if document["kind"] == "losses"]).values()
        for case in sorted(cases, key=lambda case: list(DTYPES).index(case["dtype"])):
            rows = [r for r in case["rows"] if r["status"] == OK and r["times"] and budget_of(r["provider"]) is None]
            ours = min((r for r in rows if is_ours(r["provider"])), key=lambda r: ratio(r, case), default=None)
            peers = [r for r in rows if not is_ours(r["provider"])]
            if ours is None or not peers or not _is_comparison(case):
                continue
            plain = next((r for r in peers if r["provider"] == "pytorch"), None)
            fastest = min(peers, key=lambda r: ratio(r, case))
            leanest = min((r for r in peers if r["peak_bytes"]), key=lambda r: r["peak_bytes"], default=None)
            cells.append(
                [
                    case["id"],
                    f"{ratio(ours, case):.2f} ×, {_mebibytes(ours)}",
                    "–" if plain is None else f"{ratio(plain, case):.2f} ×, {_mebibytes(plain)}",
                    f"{ratio(fastest, case):.2f} ×, `{fastest['provider']}`",
                    "–" if leanest is None else f"{_mebibytes(leanest)}, `{leanest['provider']}`",
                    f"{case['gradient_bytes'] / MiB:,.0f} MiB",
                ]
            )
        if cells:
            lines += [
                f"{device}, commit {commits_of(of)}: forward + backward, × the roofline, and peak memory.",
                "",
            ]
            header = ["case", "this project", "plain PyTorch", "fastest peer", "leanest peer", "gradients alone"]
            lines += [*table(header, cells), ""]
    return lines


def commits_of(documents: Sequence[Document]) -> str:
    """Twelve digits of each, and whether the sources had changes."""
    commits = {str(document["environment"]["commit"]).partition("+") for document in documents}
    return ", ".join(sorted(commit[:12] + plus + changes for commit, plus, changes in commits))


def _mebibytes(row: Document) -> str:
    return "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MiB:,.0f} MiB"


def with_headline(text: str, lines: Sequence[str]) -> str:
    """A text with the headline between its two marks.

    Raises: ValueError when it has no such marks.
    """
    before, first, rest = text.partition(HEADLINE_MARKS[0])
    _, last, after = rest.partition(HEADLINE_MARKS[1])
    if not first or not last:
        raise ValueError(f"has no place for the headline, wanted the lines {HEADLINE_MARKS[0]} and {HEADLINE_MARKS[1]}")
    return before + "\n".join([first, "", *lines, last]) + after


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _is_comparison(case: Document) -> bool:
    """Not a mere point of a curve: several providers without a budget."""
    return sum("@" not in row["provider"] for row in case["rows"]) > 4


def _by_device(documents: Sequence[Document]) -> dict[str, list[Document]]:
    by_device: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_device[document["environment"]["device"]].append(document)
    return by_device


def render(documents: Sequence[Document], output: Path) -> str:
    lines = [
        "<!-- Written by `python -m bench.report`. -->",
        "",
        "Forward: without a gradient. Backward and both: of a training step. Roofline: the bare products of the same "
        "run, or a device copy of what must be moved if that takes longer. Errors: relative, against fp32 (fp64 for "
        "fp32). Peak: above the inputs, gradients included. A provider further from the reference than 4 × PyTorch in "
        "the same dtype gets no number.",
        "",
    ]
    lines += headline(documents)
    for device, of in _by_device(documents).items():
        lines += device_section(device, of, output.parent / RESULTS.name / "plots", output.parent)
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="bench.report", description="RESULTS.md from the JSON of bench.losses and bench.steps.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: those in bench/results")
    parser.add_argument("--output", type=Path, default=Path("bench/RESULTS.md"))
    parser.add_argument("--readme", type=Path, help="also put the headline table between the marks in this file")
    args = parser.parse_args(arguments)
    documents = []
    for path in args.files or sorted(RESULTS.glob("*.json")):
        try:
            documents.append(read(path))
        except ValueError as error:
            if args.files:  # other programs' files in bench/results are none of ours
                parser.error(str(error))
    # The last run last; those that do not tell their time come first, by name.
    documents.sort(key=lambda document: document["environment"].get("time", ""))
    if not documents:
        parser.error(f"{RESULTS}: holds no JSON of bench.losses or bench.steps, wanted some")
    try:
        if args.readme:
            _write(args.readme, with_headline(args.readme.read_text(), headline(documents)))
    except (OSError, ValueError) as error:
        parser.error(f"--readme: {args.readme}: {error}")
    _write(args.output, render(documents, args.output))
    print(args.output)
    return 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())

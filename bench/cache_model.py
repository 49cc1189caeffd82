"""How much of a row's second reading does the second-level cache still hold? A model, for want of a GPU.

    python -m bench.cache_model

The row kernels read a row of logits twice. Programs in flight advance by one block of their row at a time, in a random
order; a program that is done starts the next row. The cache holds whole blocks and gives up those marked `evict_first`
before all others, then those used least recently. `python -m bench.tune` is what measures the same on a GPU.
"""

from __future__ import annotations

import random
from collections import OrderedDict

from rich.console import Console
from rich.table import Table

BLOCK_BYTES = 2 * 4096  # what one program reads at a time
MB = 10**6
CACHES = (50 * MB, 30 * MB)  # an H100's, and as much of it as might be left
ROWS_A_PROGRAM = 12
WARM_UP = 1 / 3  # of the steps: not counted
# (programs in flight, the second reading goes from the end and marks what it reads and writes)
CROSS_ENTROPY = ((660, False), (660, True), (264, True))
WITH_TEACHER = ((396, False), (396, True), (132, True))


def share_found(row_bytes: int, programs: int, cache_bytes: int, turns: bool, rows_at_once: int = 1) -> float:
    """Share of the second reading's blocks that the cache holds, in [0, 1].

    turns: the second reading goes from the row's end to its beginning, and marks its blocks to be given up first.
    rows_at_once: 2 for a student's row beside a teacher's.
    """
    generator = random.Random(0)
    blocks, room = -(-row_bytes // BLOCK_BYTES), cache_bytes // BLOCK_BYTES
    kept: OrderedDict[tuple[int, int, int], None] = OrderedDict()
    marked: OrderedDict[tuple[int, int, int], None] = OrderedDict()
    place = [(row, generator.randrange(2 * blocks)) for row in range(programs)]  # of each program: row, steps done
    steps = programs * 2 * blocks * ROWS_A_PROGRAM
    looked = found = 0
    for step in range(steps):
        program = generator.randrange(programs)
        row, done = place[program]
        second, block = divmod(done, blocks)
        if turns and second:
            block = blocks - 1 - block
        for part in range(rows_at_once):
            key = (row, part, block)
            if second and step > WARM_UP * steps:
                looked += 1
                found += key in kept or key in marked
            kept.pop(key, None)
            marked.pop(key, None)
            (marked if turns and second else kept)[key] = None
            if len(kept) + len(marked) > room:
                (marked or kept).popitem(last=False)
        place[program] = (row, done + 1) if done + 1 < 2 * blocks else (row + programs, 0)
    return found / looked


def main() -> None:
    table = Table(title="Share of the second reading found in 50 MB (30 MB)")
    for heading in ("V, bf16", "before", "turns and marks alone", "and fewer rows in flight"):
        table.add_column(heading)
    cases = [(V, 1, CROSS_ENTROPY) for V in (128_256, 151_936, 262_144)] + [(151_936, 2, WITH_TEACHER)]
    for V, rows_at_once, launches in cases:
        cells = []
        for programs, turns in launches:
            large, small = (share_found(2 * V, programs, cache, turns, rows_at_once) for cache in CACHES)
            cells.append(f"{large:.0%} ({small:.0%})")
        table.add_row(f"{V:,}" + ("" if rows_at_once == 1 else ", with a teacher"), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()

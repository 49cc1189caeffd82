"""What a run leaves for its reader and what `mind report` makes of it.

files       metrics.json and log.jsonl
pictures    one figure each; perspectives.png of every run
page        `mind report`: the HTML page and its PNGs
"""

from mind.report.files import (
    LOG_FILE,
    METRICS_FILE,
    read_log,
    read_metrics,
    write_log,
    write_metrics,
    write_whole,
)
from mind.report.pictures import PICTURE_FILE, draw
from mind.report.table import table

__all__ = [
    "LOG_FILE",
    "METRICS_FILE",
    "PICTURE_FILE",
    "draw",
    "read_log",
    "read_metrics",
    "table",
    "write_log",
    "write_metrics",
    "write_whole",
]

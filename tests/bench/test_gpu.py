"""The command for one GPU, taken through its code at a tiny shape: on a CPU in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gpu, tune
from bench.shapes import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_one_head(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu, "QUESTIONS", 2)
    result = gpu.measure_head(Case("dry-run", 16, 32, 600, 1.0, 1.0), gpu.Bench(DEVICE, 1), {"default": None})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    pruning = result["pruning"]
    kept = {what: [chunk["kept_share"] for chunk in chunks] for what, chunks in pruning["chunks"].items()}
    assert kept.pop("cross-entropy, tolerance, all dense, default") == [1.0]
    assert len(kept) == 5 and all(0 < share < 0.5 for shares in kept.values() for share in shares)
    assert result["step_waits_for_nothing"] and pruning["step_waits_for_nothing"]
    for errors in (result["errors"], pruning["errors"]):
        for part in ("grad_hidden_states", "grad_lm_head_weight"):
            assert errors["triton, tolerance"][part] < 2 * errors["plain bf16"][part] + 2**-8
    gpu.show([result])
    printed = capsys.readouterr().out
    assert "peaked, frozen head, tolerance" in printed and "all dense" in printed


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench.gpu"])
    with pytest.raises(SystemExit, match=r"^bench.gpu: no GPU is available, wanted one \(or --dry-run\)$"):
        gpu.main()


def test_launches_are_timed_only_when_they_are_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tune.linear_kl, "dense_kl_", lambda *args, **kwargs: None)
    tune.main(["--dry-run", "--results", str(tmp_path / "tune.json")])
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    alone, joint = ([row for row in rows if ("KL" in row["kernel"]) == with_kl] for with_kl in (False, True))
    assert len(alone) == 3 and all(row["status"] == "ok" and row["ms"] > 0 for row in alone)
    assert [row["shipped"] for row in alone] == [True, False, False]
    assert joint and all(row["status"] == "wrong: error inf" and row["ms"] is None for row in joint)
    assert "shipped" in capsys.readouterr().out

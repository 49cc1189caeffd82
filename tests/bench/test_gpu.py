"""The command for one GPU, taken through its code at a tiny shape: on a CPU in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bench import gpu, measure, tune
from bench.shapes import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_one_head(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu, "QUESTIONS", 2)
    saved: list[int] = []
    case, bench = Case("dry-run", 16, 32, 600, 1.0, 1.0), gpu.Bench(DEVICE, 1)
    result = gpu.measure_head(case, bench, {"default": None}, lambda rows: saved.append(len(rows)))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert saved == list(range(1, len(result["rows"]) + 1))
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


def test_the_host_has_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each call, and of a training step: the GPU has something to do when the clock starts."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("mark")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, stop: Event) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    clock = measure.Clock("cuda")
    assert clock(lambda: done.append("call")) == 1.0
    assert done == ["sleep", "mark", "call", "mark", "wait"]
    done.clear()
    x = torch.ones(2, requires_grad=True)
    call, given = SimpleNamespace(loss=lambda given: x.sum()), SimpleNamespace(leaves=[x])
    with patch.object(measure, "LossAndGradients", lambda *parts: done.append("step")):
        measure.training_step(call, given, clock)
    assert done == ["sleep", "mark", "mark", "mark", "wait", "wait", "step"]


def test_products_are_timed_in_turns_with_what_is_compared_to_them() -> None:
    called: list[str] = []
    timings = gpu.Bench(DEVICE, 3).in_turns(lambda: called.append("loss"), lambda: called.append("products"))
    assert len(timings) == 2 and called[-6:] == ["loss", "products"] * 3


def test_what_fails_is_told_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """There may be one try at a GPU: a kernel that does not fit it takes no other row with it, nor the file."""
    mind_loss = gpu.mind_loss

    def refused(*args: Any, **options: Any) -> Any:
        if options["backend"] == "torch":
            raise RuntimeError("out of resource: shared memory")
        return mind_loss(*args, **options)

    def waits(*args: Any, **options: Any) -> bool:
        raise RuntimeError("called a synchronizing CUDA operation")

    results = tmp_path / "new" / "gpu.json"
    monkeypatch.setattr(gpu, "QUESTIONS", 2)
    monkeypatch.setattr(gpu, "mind_loss", refused)
    monkeypatch.setattr(gpu, "check_no_wait", waits)
    monkeypatch.setattr(gpu, "check_kernels", lambda dry_run: [])
    monkeypatch.setattr(gpu, "PRUNED_HEADS", ())
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--dry-run", "--results", str(results)])
    with pytest.raises(SystemExit, match="not everything could be measured"):
        gpu.main()
    (result,) = json.loads(results.read_text())["results"]
    failed = [row for row in result["rows"] if "failed" in row]
    assert len(failed) == 1 < len(result["rows"]) and "shared memory" in failed[0]["failed"]
    assert not result["step_waits_for_nothing"] and "synchronizing" in result["waiting"]["failed"]
    monkeypatch.setattr(gpu, "make_inputs", waits)
    with pytest.raises(SystemExit, match="not everything could be measured"):
        gpu.main()
    assert "synchronizing" in json.loads(results.read_text())["results"][0]["failed"]
    printed = capsys.readouterr()
    assert "failed" in printed.out and "out of resource" in printed.err


def test_a_run_that_is_cut_off_leaves_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cut_off(*_: Any) -> Any:
        raise KeyboardInterrupt

    results = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "QUESTIONS", 2)
    monkeypatch.setattr(gpu, "check_kernels", lambda dry_run: [])
    monkeypatch.setattr(gpu, "answer_index", cut_off)  # after the rows of the budgets and of the divergences
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--dry-run", "--results", str(results)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    (result,) = json.loads(results.read_text())["results"]
    assert result["failed"] == "cut off before its end"
    assert [row["what"] for row in result["rows"]] == [
        "cross-entropy",
        "cross-entropy",
        "cross-entropy + forward KL",
        "cross-entropy + JSD",
    ]
    assert all(row["p50"] > 0 for row in result["rows"])


def test_tests_are_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pytest.ini").write_text("[pytest]\n")
    code = "import os, pathlib, pytest\n@pytest.mark.parametrize('i', [0, 1, 'a b', 3, 4])\ndef test_one(i):\n"
    for name, last in (("right", "True"), ("wrong", "i != 'a b'")):
        body = f"    pathlib.Path(f'{name}-{{i}}').write_text(str(os.getpid()))\n    assert {last}\n"
        Path(f"test_{name}.py").write_text(code + body)
    assert gpu.run_tests(["test_right.py"], 2) == []
    ran = [path.read_text() for path in tmp_path.glob("right-*")]
    assert len(ran) == 5 and len(set(ran)) == 2
    assert gpu.run_tests(["test_wrong.py"], 3) == ["test_wrong.py::test_one[a b]"]
    assert len(list(tmp_path.glob("wrong-*"))) == 5  # one that fails hides no other
    Path("test_name.py").write_text("def test_a():\n    pass\ndef test_ab():\n    assert False\n")
    assert gpu.run_tests(["test_name.py"], 1) == ["test_name.py::test_ab"]
    Path("test_dead.py").write_text("import os\ndef test_one():\n    os._exit(7)\n")
    assert gpu.run_tests(["test_dead.py"], 2) == ["exit status 7 of a pytest"]
    with pytest.raises(SystemExit, match="the kernels' tests cannot be collected, exit status 4"):
        gpu.run_tests(["test_missing.py"], 2)


def test_numbers_beside_a_test_that_fails_are_no_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "check_kernels", lambda dry_run: ["test_triton.py::test_one"])
    monkeypatch.setattr(gpu, "measure_head", lambda *_: {"rows": []})
    monkeypatch.setattr(gpu, "show", lambda results: None)
    monkeypatch.setattr("sys.argv", ["bench.gpu", "--dry-run", "--results", str(results)])
    with pytest.raises(SystemExit, match=r"1 tests failed, the numbers are no claim: \['test_triton.py::test_one'\]"):
        gpu.main()
    assert json.loads(results.read_text())["failed_tests"] == ["test_triton.py::test_one"]


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


def test_launches_are_timed_several_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes longer to launch a kernel than the device takes for some of the parts that are timed."""
    called: list[str] = []

    class Bench:
        def in_turns(self, *functions: Any) -> list[gpu.Timing]:
            called.clear()
            for function in functions:
                function()
            return [gpu.Timing(0.0, 6.0, 0.0, 0) for _ in functions]

    monkeypatch.setattr(tune, "DEFAULT_MAX_LOGITS_BYTES", 2 * 600 * 2)
    monkeypatch.setattr(tune.Rows, "error", lambda *_: 0.0)
    monkeypatch.setattr(tune.cross_entropy, "cross_entropy_", lambda *_, **__: called.append("cross-entropy"))
    monkeypatch.setattr(tune.linear_kl, "dense_kl_", lambda *_, **__: called.append("both"))
    rows = tune.measure(600, DEVICE, Bench(), (), 3)
    assert [(row["ms"], row["copy_ms"]) for row in rows] == [(2.0, 2.0)] * 2 and called == ["both"] * 3

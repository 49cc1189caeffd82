"""`mind report`: what the page shows is what the runs logged; the latent analysis finds what is there. 25 seconds."""

from __future__ import annotations

import base64
import json
import os
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

from mind.bootstrap import bootstrap_means, interval
from mind.cli import main
from mind.data import load_records
from mind.latent import analyse, answer_states, cluster
from mind.prompting import PromptFormat, end_of_turn_id
from mind.report import pictures
from mind.report.files import read_log, read_metrics, read_runs, write_log, write_metrics, write_whole
from mind.report.page import SECTIONS, summary
from mind.report.table import table as terminal_table

from ..invariant.tiny_run import flags, make_inputs
from .tiny import PERSPECTIVES, raw_records, tiny_student, tiny_tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mind/ with a teaching assistant, single/ that learns from "planning" alone."""
    folder = tmp_path_factory.mktemp("runs")
    make_inputs(folder)
    shared = {"max_steps": 6, "logging_steps": 1}
    assert main(flags(folder, folder / "mind", **shared, beta=0.3, tau_student=1.0)) == 0
    assert main(flags(folder, folder / "single", **shared, method="single_path", golden_perspective="planning")) == 0
    return folder


class Page(HTMLParser):
    """Every attribute that could load something, the images, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.images: list[bytes] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attrs:
            if name in ("src", "href", "srcset") and value is not None:
                self.sources.append(value)
                self.images.append(base64.b64decode(value.removeprefix("data:image/png;base64,"), validate=True))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_everything_itself(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "report"
    assert main(["report", str(runs / "mind"), str(runs / "single"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"report: {output / 'report.html'}\n"
    page = Page(output / "report.html")
    assert len(page.images) == len(SECTIONS)
    assert {path.name for path in output.iterdir()} == {"report.html", *(f"{name}.png" for name, *_ in SECTIONS)}
    assert page.images == [(output / f"{name}.png").read_bytes() for name, *_ in SECTIONS]
    for image in page.images:
        picture = Image.open(BytesIO(image)).convert("L")
        assert min(picture.size) > 200 and np.asarray(picture).std() > 5  # not blank
    raw = (output / "report.html").read_text()
    for image in page.images:  # whose base64 may spell anything
        raw = raw.replace(base64.b64encode(image).decode(), "")
    assert len(raw) < 50_000
    assert "http" not in raw and "@import" not in raw and "url(" not in raw
    for text in ("mind", "single", "single_path", "training questions", "10", "peak memory"):
        assert text in page.text


def test_default_output_and_again(runs: Path) -> None:
    for _ in range(2):
        assert main(["report", str(runs / "single")]) == 0
    page = Page(runs / "single" / "report" / "report.html")
    # Without an assistant there is neither a score nor its calibration.
    assert len(page.images) == len(SECTIONS) - 2 and "teaching assistant thinks" not in page.text
    assert "The run\n" in page.text


def test_what_was_selected_is_logged(runs: Path) -> None:
    single, mind = (read_log(runs / name) for name in ("single", "mind"))
    steps = [entry for entry in single if "loss" in entry]
    assert len(steps) == 6
    for entry in steps:
        shares = {name: entry[f"perspective_selected/{name}"] for name in PERSPECTIVES}
        assert shares == {name: float(name == "planning") for name in PERSPECTIVES}
    for entry in (entry for entry in mind if "loss" in entry):
        shares = [entry[f"perspective_selected/{name}"] for name in PERSPECTIVES]
        # Every question but one has all four, so the shares add up to |I| or a little more.
        assert entry["selected_rationales"] - 1e-6 <= sum(shares) <= entry["selected_rationales"] + 0.34


def test_the_heat_map_shows_the_log(runs: Path) -> None:
    (run,) = read_runs([str(runs / "mind")])
    assert run.name == "mind" and run.perspectives == PERSPECTIVES
    table, edges = pictures.heat_table(run, "perspective_score", PERSPECTIVES)
    assert table.shape == (4, 7) and edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    for k, name in enumerate(PERSPECTIVES):
        warmed_up = [
            e[f"assistant_warmup/perspective_score/{name}"] for e in run.history if e["step"] == 0 and len(e) > 6
        ]
        logged = [entry[f"perspective_score/{name}"] for entry in run.history if f"perspective_score/{name}" in entry]
        assert table[k].tolist() == [*warmed_up, *logged]


def test_a_long_run_shares_columns(tmp_path: Path) -> None:
    history = [{"step": step, "perspective_loss/a": float(step % 2)} for step in range(10, 1210, 10)]
    history.append({"step": 1200, "perspective_loss/b": 3.0})
    write_run(tmp_path / "run", history=history)
    (run,) = read_runs([str(tmp_path / "run")])
    assert run.perspectives == ("a", "b")
    table, edges = pictures.heat_table(run, "perspective_loss", run.perspectives)
    assert table.shape == (2, pictures.MAX_COLUMNS) and (table[0] == 0).all()
    assert np.isnan(table[1, :-1]).all() and table[1, -1] == 3.0
    assert (np.diff(edges) == 20).all() and (edges[0], edges[-1]) == (0.5, 1200.5)


def test_a_column_spans_the_steps_that_its_log_tells_of(tmp_path: Path) -> None:
    history = [{"step": 0, "assistant_warmup/perspective_loss/a": 4.0}]
    history += [{"step": step, "perspective_loss/a": float(step)} for step in (5, 10, 13)]
    (run,) = read_runs([write_run(tmp_path / "run", history=history)])
    table, edges = pictures.heat_table(run, "perspective_loss", ["a"])
    assert table.tolist() == [[4, 5, 10, 13]] and edges.tolist() == [-4.5, 0.5, 5.5, 10.5, 13.5]
    figure = pictures.loss_map([run])
    assert figure is not None
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "0" in labels and not any(label.startswith(("-", "−")) for label in labels)


def measurement(correct: list[int] | None = None, **losses: float) -> dict[str, Any]:
    answers = [
        {"id": f"q{i}", "wanted": "1", "given": None, "correct": bool(value)} for i, value in enumerate(correct or [])
    ]
    accuracy = sum(correct) / len(correct) if correct else None
    return {"accuracy": accuracy, "answers": answers or None, "perspective_loss": losses, "perspective_score": None}


def test_what_guessing_cannot_hit_is_told_apart() -> None:
    wanted = ["3", "brown", "12 km", "yes"]

    def measured(correct: list[int]) -> dict[str, Any]:
        found = measurement(correct)
        for item, answer in zip(found["answers"], wanted, strict=True):
            item["wanted"] = answer
        return found

    metrics: dict[str, Any] = {"student": "s", "method": "mind", "measured_on": "2 questions"}
    metrics |= {"before": measured([0, 1, 0, 0]), "after": measured([0, 1, 1, 1])}
    cells = [list(column.cells) for column in terminal_table(metrics).columns]
    assert cells[0][:2] == ["accuracy on 4 held-out questions", "  on the 2 whose answer is a number"]
    assert [column[:2] for column in cells[1:]] == [["25.0 %", "0.0 %"], ["75.0 %", "50.0 %"], ["+50.0 %", "+50.0 %"]]
    wanted = ["3", "5", "12 km", "7"]  # nothing to tell apart
    metrics |= {"before": measured([0, 1, 0, 0]), "after": measured([0, 1, 1, 1])}
    assert "number" not in "".join(str(cell) for cell in terminal_table(metrics).columns[0].cells)


def write_run(folder: Path, history: Any = ({"step": 1, "loss": 1.0},), **metrics: Any) -> str:
    folder.mkdir()
    given = {"student": "s", "method": "mind", "questions": 2, "measured_on": "2 questions", "before": measurement()}
    write_metrics(folder, given | metrics)
    write_log(folder, history)
    return str(folder)


def test_summary_is_paired(tmp_path: Path) -> None:
    before, after = [1] * 10 + [0] * 30, [0] * 2 + [1] * 20 + [0] * 18
    history = [{"step": 1, "peak_memory_bytes": 2**31, "supervised_tokens_per_second": 10.0, "loss": float("nan")}]
    history.append({"step": 2, "peak_memory_bytes": 2**30, "supervised_tokens_per_second": 30.0, "loss": 1.0})
    name = write_run(
        tmp_path / "run", history, before=measurement(before), after=measurement(after), seconds={"a": 90.0}
    )
    (run,) = read_runs([name])
    assert np.isnan(run.history[0]["loss"]) and pictures.curve(run.history, "loss") == ([2], [1.0])
    shown = summary(run, "red")
    low, high = interval(bootstrap_means([-1] * 2 + [0] * 8 + [1] * 12 + [0] * 18, "change"))
    assert shown["change"] == f"+25.0 [{100 * low:+.1f}, {100 * high:+.1f}]" and 0 < low < 0.25 < high
    assert shown["before"].startswith("25.0 [") and shown["after"].startswith("50.0 [")
    assert (shown["gained_count"], shown["lost_count"], len(shown["gained"])) == (12, 2, 8)
    assert (shown["memory"], shown["speed"], shown["steps"], shown["minutes"]) == ("2.0 GiB", "20", 2, "2 min")


def test_a_stopped_run_and_names_that_are_no_html(tmp_path: Path) -> None:
    stopped = write_run(tmp_path / "<b>&x", before=measurement([1, 0]))
    (tmp_path / "a").mkdir()
    other = write_run(tmp_path / "a" / "run", history=[])
    assert [run.name for run in read_runs([stopped, other])] == ["<b>&x", "a/run"]
    assert main(["report", stopped, other, "--output", str(tmp_path / "report")]) == 0
    raw = (tmp_path / "report" / "report.html").read_text()
    assert "&lt;b&gt;&amp;x" in raw and "<b>" not in raw
    assert len(Page(tmp_path / "report" / "report.html").images) == 1  # the accuracy before


def test_metrics_without_what_only_explains(tmp_path: Path) -> None:
    history = [{"step": 1, "rank_correlation": -0.5}]
    run = write_run(tmp_path / "run", history)
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"before": measurement(a=1.0)}))
    assert main(["report", run]) == 0


def test_runs_are_told_apart(tmp_path: Path) -> None:
    """As many runs as there are methods, of which one has an assistant."""
    history = [{"step": step, "cross_entropy": 1.0, "rank_correlation": -0.5} for step in (1, 2)]
    after = measurement(a=1.0) | {"perspective_score": {"a": 0.5}}
    folders = [write_run(tmp_path / "scored", history, before=after, after=after)]
    folders += [write_run(tmp_path / f"run{i}", [{"step": 1, "cross_entropy": 1.0}]) for i in range(7)]
    runs = read_runs(folders)
    lines, correlation = pictures.loss_parts(runs), pictures.correlation(runs)
    assert lines is not None and correlation is not None
    looks = {(line.get_color(), line.get_linestyle()) for line in lines.legends[0].get_lines()}
    assert len(looks) == 8
    assert [text.get_text() for text in correlation.legends[0].get_texts()] == ["scored"]


def test_no_picture_of_an_earlier_page_stays(tmp_path: Path) -> None:
    some = write_run(tmp_path / "some", [{"step": 1, "cross_entropy": 1.0}], before=measurement([1, 0]))
    other = write_run(tmp_path / "other", [{"step": 1, "cross_entropy": 1.0}])
    output = tmp_path / "report"
    for run, left in ((some, {"accuracy.png", "loss_parts.png"}), (other, {"loss_parts.png"})):
        assert main(["report", run, "--output", str(output)]) == 0
        assert {path.name for path in output.iterdir()} == {"report.html", *left}
        (output / "latent.png").write_bytes(b"")


def test_pictures_can_be_read(tmp_path: Path) -> None:
    """However many runs, and of a run that was stopped before its score against its loss was measured."""
    history = [{"step": step, "perspective_loss/a": 1.0, "rank_correlation": -0.5} for step in (1, 2)]
    folders = [write_run(tmp_path / f"run{i}", history, before=measurement([1, 1], a=1.0)) for i in range(8)]
    runs = read_runs(folders)
    maps, correlation, accuracy = pictures.loss_map(runs), pictures.correlation(runs), pictures.accuracy(runs)
    assert maps is not None and correlation is not None and accuracy is not None
    assert maps.get_figwidth() < 15 and sum(axis.get_visible() for axis in maps.axes) == 8 + 1  # the colours' scale
    assert [axis.get_visible() for axis in correlation.axes] == [True, False]
    assert 50 <= max(accuracy.axes[0].get_xticks()) <= 100


def test_a_perspective_that_was_only_scored_is_shown(tmp_path: Path) -> None:
    history = [{"step": 1, "perspective_score/b": 0.5, "perspective_selected/b": 0.0, "perspective_loss/a": 1.0}]
    (run,) = read_runs([write_run(tmp_path / "run", history, before=measurement(a=1.0))])
    assert run.perspectives == ("a", "b")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff")
    run = write_run(folder, before=measurement([1, 0]))
    assert main(["report", run, "--output", str(tmp_path / "report")]) == 0
    assert "run\ufffd" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    name = "$\\frac$"
    measured = measurement([1, 0], **{name: 1.0}) | {"perspective_score": {name: 0.5}}
    history = [
        {"step": step, "cross_entropy": 1.0, "rank_correlation": -0.5}
        | {f"perspective_{kind}/{name}": 0.5 for kind in ("loss", "score", "selected")}
        for step in (1, 2)
    ]
    runs = [write_run(tmp_path / other, history, before=measured, after=measured) for other in (name, "b")]
    for some in (runs, runs[:1]):
        assert main(["report", *some, "--output", str(tmp_path / "report")]) == 0
    pictures.draw(tmp_path, history, [name])
    assert (tmp_path / pictures.PICTURE_FILE).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mind: error: ")
    return line


def changed(**parts: dict[str, Any]) -> str:
    """metrics.json with a measurement of which some parts are wrong."""
    return json.dumps({"before": measurement(), **{when: measurement() | part for when, part in parts.items()}})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "run: no such folder, wanted the output_dir of a run of mind train"),
        ("metrics.json", None, "metrics.json: no such file, wanted the output_dir"),
        ("metrics.json", '{"before": ', "metrics.json: is not JSON: "),
        ("metrics.json", "[1]", "metrics.json: has no 'before'"),
        ("metrics.json", '{"version": 2, "before": {}}', "metrics.json: is of version 2, wanted 1"),
        ("metrics.json", '{"before": {}}', "metrics.json: 'before' is no measurement that mind train wrote"),
        ("metrics.json", changed(before={"answers": [{"id": "q"}]}), "metrics.json: 'before' is no measurement"),
        (
            "metrics.json",
            changed(before={"answers": [{"id": "q", "wanted": "1", "given": "1", "correct": "maybe"}]}),
            "metrics.json: 'before' is no measurement",
        ),
        ("metrics.json", changed(before={"answers": 3}), "metrics.json: 'before' is no measurement"),
        ("metrics.json", changed(before={"perspective_loss": {"a": "x"}}), "metrics.json: 'before' is no measurement"),
        ("metrics.json", changed(after={"perspective_score": {"a": 1.0}}), "metrics.json: 'after' is no measurement"),
        ("metrics.json", changed(after=measurement([1])), "metrics.json: 'after' is no measurement"),
        ("metrics.json", json.dumps({"before": measurement(), "seconds": 3}), "metrics.json: 'seconds' is not what"),
        ("log.jsonl", '{"step": 1, "loss": ' + "9" * 400 + "}", "log.jsonl:1: holds what is no number"),
        ("log.jsonl", None, "log.jsonl: cannot be read: No such file or directory; wanted a run of mind train"),
        ("log.jsonl", '{"step": 1}\n{"ste', "log.jsonl:2: is not JSON: "),
        ("log.jsonl", '{"loss": 1}', "log.jsonl:1: has no step"),
        ("log.jsonl", '{"step": 1, "loss": [2]}', "log.jsonl:1: holds what is no number"),
        ("log.jsonl", b"\xff\n", "log.jsonl: is not UTF-8"),
    ],
)
def test_a_run_that_cannot_be_read(
    file: str | None, content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_run(tmp_path / "good")
    run = tmp_path / "run"
    if file is not None:
        write_run(run)
        (run / file).unlink()
        if content is not None:
            (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    assert message in refused([good, str(run)], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_arguments_that_cannot_be_used(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, student, data = (str(runs / name) for name in ("single", "student", "data.jsonl"))
    latent = ["--output", str(tmp_path / "report"), "--latent", f"a={student}", "--data", data]
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    for arguments, message in (
        ([], "no run is given"),
        (["--latent", f"a={student}"], "--latent and --data: wanted both"),
        ([run, "--data", data], "--latent and --data: wanted both"),
        ([run, "--limit", "5"], "--limit: settings of --latent, which is not given"),
        ([run, "--max-new-tokens=8", "--batch-size=1", "--seed=1"], "--max-new-tokens, --batch-size, --seed: settings"),
        ([run, "--answer-suffix", "So {answer}"], "--answer-suffix: settings of --latent"),
        ([run, "--output", ""], "--output: given '', wanted a folder"),
        ([run, "--output", str(tmp_path / "file")], "file is a file, wanted a folder"),
        ([run, "--output", str(tmp_path / "file" / "a")], "file/a cannot be made: Not a directory"),
        ([run, "--output", str(tmp_path / "taken")], "taken cannot be made: Is a directory"),
        ([*latent, "--output", str(tmp_path / "file")], "file is a file, wanted a folder"),
        ([*latent, "--output", str(tmp_path / "file" / "a")], "file/a cannot be made: Not a directory"),
        (latent, "latent: given 1 student, wanted at least two"),
        ([*latent, "--latent", student, "b=x"], "wanted NAME=STUDENT"),
        ([*latent, "--latent", "a=x", "a=y"], "the name a is given twice"),
        ([*latent, "--limit", "0"], "--limit: given 0, wanted at least 1"),
        ([*latent, "--latent", f"a={student}", f"b={student}", "--limit", "3"], "wanted at least 8 answers"),
        ([*latent, "--latent", f"a={student}", "b=no/such", "--seed", "-1"], "argument --seed: given -1, wanted 0 to"),
        ([*latent, "--latent", f"a={student}", "b=no/such"], "student 'no/such' cannot be loaded"),
        ([*latent, "--latent", f"a={student}", f"b={student}", "--max-new-tokens", "500"], "exceed the model's"),
    ):
        assert message in refused(arguments, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_a_file_that_cannot_be_written_leaves_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_metrics_have_a_version_and_those_of_the_first_runs_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.json"
    content = json.loads(path.read_text())
    assert content.pop("version") == 1
    path.write_text(json.dumps(content))
    metrics = read_metrics(tmp_path / "run")
    assert metrics is not None and metrics["version"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Latent analysis


def test_answer_states_are_means_over_the_answer() -> None:
    model, tokenizer, prompt_format = tiny_student(), tiny_tokenizer(), PromptFormat()
    questions, answers = ["How many?", "And then, what?"], ["It is 7, so.", ""]
    prompts = [prompt_format.prompt_ids(tokenizer, question) for question in questions]
    states = answer_states(model, tokenizer, prompts, answers)
    for prompt, answer, state in zip(prompts, answers, states, strict=True):
        target = [*tokenizer(answer, add_special_tokens=False).input_ids, end_of_turn_id(tokenizer)]
        with torch.no_grad():
            hidden_states = model.model(torch.tensor([prompt + target])).last_hidden_state[0]
        torch.testing.assert_close(state, hidden_states[len(prompt) :].mean(0), rtol=1e-4, atol=1e-5)
    alone = answer_states(model, tokenizer, prompts, answers, batch_size=1)
    torch.testing.assert_close(alone, states, rtol=1e-4, atol=1e-5)


def test_an_answer_that_fills_the_positions_has_its_states() -> None:
    tokenizer, prompt_format = tiny_tokenizer(), PromptFormat()
    prompt = prompt_format.prompt_ids(tokenizer, "How many?")
    sizes = {"n_positions": len(prompt) + 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes)).eval()
    (state,) = answer_states(model, tokenizer, [prompt], ["It is 7."])  # 8 tokens, and no room for the end
    target = tokenizer("It is 7.", add_special_tokens=False).input_ids
    with torch.no_grad():
        hidden_states = model.transformer(torch.tensor([prompt + target])).last_hidden_state[0]
    torch.testing.assert_close(state, hidden_states[len(prompt) :].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_states_that_tell_nothing_are_refused(value: float) -> None:
    states = np.full((8, 4), value)
    with pytest.raises(ValueError, match="latent: the answers' states are all the same, or NaN or Inf"):
        cluster(states, np.repeat([0, 1], 4), ("a", "b"))


def test_clusters_are_found_where_there_are_some() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    noise = generator.normal(size=(120, 30))
    apart = cluster(noise + 8 * generator.normal(size=(3, 30))[labels], labels, ("a", "b", "c"))
    assert apart.num_clusters == 3 and apart.num_answers == 120
    assert apart.mutual_information == pytest.approx(1) and apart.rand_index == pytest.approx(1)
    assert apart.points.shape == (120, 2) and len(apart.draw().axes) == 2
    same = cluster(noise, labels, ("a", "b", "c"))
    assert abs(same.mutual_information) < 0.1 and abs(same.rand_index) < 0.1


def test_latent_page(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_student(5).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    students = {"a": str(runs / "student"), "b": str(tmp_path / "other")}
    records = load_records(raw_records(13))
    settings: dict[str, Any] = {"prompt_format": PromptFormat(), "max_new_tokens": 8}
    assert analyse(students, records, **settings).mutual_information > 0.5
    assert analyse(students | {"b": students["a"]}, records, **settings).mutual_information < 0.1
    arguments = ["--latent", *(f"{name}={path}" for name, path in students.items()), "--data", str(runs / "data.jsonl")]
    output = tmp_path / "report"
    assert main(["report", *arguments, "--limit=10", "--max-new-tokens=8", "--output", str(output)]) == 0
    page = Page(output / "report.html")
    assert len(page.images) == 1 and "20 answers by 2 students" in page.text
    assert "adjusted mutual information" in page.text
    shutil.rmtree(tmp_path / "other")
    tiny_student(5, hidden_size=64).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    monkeypatch.setattr("mind.latent.measure_accuracy", None)  # refused before any student answers
    with pytest.raises(ValueError, match="the student of b has the hidden size 64, the first one's is 32"):
        analyse(students, records, **settings)
    with pytest.raises(ValueError, match="student 'no/such' cannot be loaded"):
        analyse({"a": students["a"], "b": "no/such"}, records, **settings)

"""`mind evaluate`: the harness asks as training taught, its files, the paired comparison. Half a minute."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from mind.bootstrap import bootstrap_means, interval
from mind.cli import main
from mind.data import load_records
from mind.evaluate import rows
from mind.evaluate.harness import TASKS, TASKS_FOLDER, evaluate, read_task_file
from mind.evaluate.results import compare, read_evaluation
from mind.evaluation import measure_accuracy
from mind.problems import generate_records
from mind.prompting import PromptFormat
from mind.students import load_student

from .tiny import raw_records, tiny_student, tiny_tokenizer

# What this random byte model writes holds a "U" somewhere, so that answers are found, and it often ends its turn.
SEED, SUFFIX = 6, "U{answer}"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<pad>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


STUDENTS = (
    ("student", None, "$A"),
    ("chat", CHAT_TEMPLATE, "$A"),
    ("bos", None, "<bos> $A"),
    ("bos_chat", CHAT_TEMPLATE, "<bos> $A"),
    ("eos", None, "<bos> $A <eos>"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.jsonl and students without and with a chat template, which ends a turn with another token than EOS.

    The tokenizers of bos/ and bos_chat/ put a BOS token before a text, that of eos/ an EOS token behind it as well.
    """
    folder = tmp_path_factory.mktemp("inputs")
    for name, template, text in STUDENTS:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        if text != "$A":
            tokenizer.add_special_tokens({"bos_token": "<bos>"})
            special = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=text, special_tokens=special)
        tiny_student(SEED, max_position_embeddings=1024).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompt_format = PromptFormat(SUFFIX)
    model, tokenizer = load_student(folder / "student")
    records = raw_records(9)
    given = measure_accuracy(
        model, tokenizer, load_records(records), prompt_format=prompt_format, max_new_tokens=40
    ).answers
    assert sum(answer is not None for answer in given) >= 4
    for i, (record, answer) in enumerate(zip(records, given, strict=True)):
        del record["rationales"]
        if i % 2 and answer is not None:
            record["answer"] = answer  # so this one is right
    write(folder / "data.jsonl", records)
    return folder


def write(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def flags(inputs: Path, result: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {"student": inputs / "student", "data": inputs / "data.jsonl", "output": result}
    given |= {"answer-suffix": SUFFIX, "max-new-tokens": 40, "batch-size": 4, "device": "cpu"} | changes
    return ["evaluate", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


# ---------------------------------------------------------------------------------------------------------------------
# Through the harness


@pytest.mark.parametrize("student", ["student", "chat", "bos", "bos_chat"])
def test_the_harness_asks_and_stops_as_training_taught(student: str, inputs: Path) -> None:
    prompt_format = PromptFormat(SUFFIX)
    model, tokenizer = load_student(inputs / student)
    records = load_records(inputs / "data.jsonl", require_rationales=False)
    wanted = measure_accuracy(model, tokenizer, records, prompt_format=prompt_format, max_new_tokens=40)
    result = evaluate(
        str(inputs / student),
        data=[str(inputs / "data.jsonl")],
        prompt_format=prompt_format,
        max_new_tokens=40,
        batch_size=4,
        device="cpu",
    )
    task = result["tasks"]["data"]
    assert [answer["output"] for answer in task["answers"]] == wanted.outputs
    assert [answer["given"] for answer in task["answers"]] == wanted.answers
    assert [answer["correct"] for answer in task["answers"]] == wanted.correct
    assert task["accuracy"] == wanted.accuracy and task["questions"] == 9 and result["out"] is None
    if student == "student":
        assert 2 / 9 <= task["accuracy"] < 1
        assert task["interval"][0] < task["accuracy"] < task["interval"][1]


def test_command_result_and_comparison(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, difference = (tmp_path / f"{name}.json" for name in ("before", "after", "difference"))
    assert main([*flags(inputs, before), f"--ood-data={inputs / 'data.jsonl'}"]) == 2
    assert "task data is given twice" in capsys.readouterr().err
    ood = write(tmp_path / "ood.jsonl", [{"id": "a", "question": "Is it?", "answer": "yes"}])
    changes = {"limit": 5, "ood-data": ood}
    assert main(flags(inputs, before, **changes, student=inputs / "chat")) == 0
    assert main(flags(inputs, after, **changes, instruction="Say U.")) == 0
    assert "every answer" in capsys.readouterr().out
    first, second = read_evaluation(before), read_evaluation(after)
    assert first["tasks"]["data"]["questions"] == 5 and second["instruction"] == "Say U."
    assert [first["tasks"][name]["distribution"] for name in ("data", "ood")] == ["in", "out"]
    assert first["out"]["accuracy"] == first["tasks"]["ood"]["accuracy"]

    assert main(["evaluate", "--compare", str(before), str(after), f"--output={difference}"]) == 0
    assert "made differently: instruction: A '', B 'Say U.'" in capsys.readouterr().out
    comparison = json.loads(difference.read_text())
    change = second["tasks"]["data"]["accuracy"] - first["tasks"]["data"]["accuracy"]
    assert comparison["in"]["difference"] == pytest.approx(change)
    assert comparison["forgetting"] == comparison["tasks"]["ood"]["difference"]


def test_a_real_student_answers_generated_questions(tmp_path: Path) -> None:
    records = [{**record, "rationales": None} for record in generate_records(4, seed=5, split="heldout")]
    data = write(tmp_path / "generated.jsonl", records)
    output = tmp_path / "result.json"
    arguments = [
        "--student=smollm2-135m",
        f"--data={data}",
        f"--output={output}",
        "--max-new-tokens=24",
        "--device=cpu",
    ]
    assert main(["evaluate", *arguments, "--instruction=Say only: The answer is"]) == 0
    answers = read_evaluation(output)["tasks"]["generated"]["answers"]
    assert [answer["id"] for answer in answers] == [record["id"] for record in records]
    assert any(answer["given"] is not None for answer in answers)  # an instructed model does say it
    assert all("<|im_" not in answer["output"] for answer in answers)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "One and one?", "answer": "1 + 1 = 2\n#### 1,002"},
    "svamp": {"ID": "c-1", "Body": "There are 3 cats. ", "Question": "How many?", "Answer": "3.0"},
    "math500": {"problem": "Half of $x$?", "solution": "…", "answer": "\\frac{x}{2}", "unique_id": "a.json"},
    "csqa": {"question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "zoo"]}, "answerKey": "B"},
    "strategyqa": {"qid": "s", "question": "Is it so?", "answer": False},
    "gpqa_diamond": {
        "Question": "Which?",
        "Correct Answer": " right\n",
        **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    },
}
RIGHT = {
    "gsm8k": ["1002", "$1,002"],
    "svamp": ["3", "3 cats"],
    "math500": ["x/2"],
    "csqa": ["B", "(B)", "B) zoo", "zoo"],
    "strategyqa": ["no", "No, never"],
    "gpqa_diamond": ["right"],
}
WRONG = {
    "gsm8k": ["2"],
    "svamp": ["4"],
    "math500": ["2x"],
    "csqa": ["A", "bank"],
    "strategyqa": ["yes"],
    "gpqa_diamond": ["wrong 1"],
}


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_every_task(name: str) -> None:
    assert set(ROWS) == set(TASKS)
    doc = getattr(rows, name)(datasets.Dataset.from_list([ROWS[name]]))[0]
    for answers, wanted in ((RIGHT, 1.0), (WRONG, 0.0)):
        for answer in answers[name]:
            assert rows.exact_match(doc, [f"So.\nThe answer is {answer}."]) == {"exact_match": wanted}, answer
    assert rows.exact_match(doc, [RIGHT[name][0]]) == {"exact_match": 0.0}  # not where training puts it


@pytest.mark.parametrize(
    ("text", "answer", "wanted"),
    [
        ("C. elegans", "A", 1.0),
        ("C. elegans", "(A) C. elegans", 1.0),
        ("C. elegans", "the C. elegans", 1.0),
        ("C. elegans", "C", 0.0),  # another option
        ("C. elegans", "Option C", 0.0),
        ("C. elegans", "(C) D", 0.0),  # what is read of "(C) D. melanogaster"
        ("y", "y", 1.0),
    ],
)
def test_a_letter_is_an_option_and_no_initial(text: str, answer: str, wanted: float) -> None:
    question, answers = rows.multiple_choice("Which?", [text, "B. subtilis", "D. melanogaster"], 0)
    doc = {"question": question, "answers": answers}
    prompt_format = PromptFormat("\n#### {answer}")
    assert rows.exact_match(doc, [f"So.\n#### {answer}"], prompt_format) == {"exact_match": wanted}


def test_options_of_a_question_are_shuffled_by_the_question_alone() -> None:
    letters = set()
    for i in range(20):
        row = ROWS["gpqa_diamond"] | {"Question": f"Question {i}?"}
        first, second = (rows.gpqa_diamond(datasets.Dataset.from_list([row] * 2))[k] for k in (0, 1))
        assert first["question"] == second["question"] and first["answers"] == second["answers"]
        letters.add(first["answers"][0])
        assert f"({first['answers'][0]}) right" in first["question"]
    assert letters == {"A", "B", "C", "D"}


def test_the_harness_reads_our_task_files_itself() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    assert sorted(manager.all_tasks) == sorted(TASKS)
    distributions = {name: read_task_file(TASKS_FOLDER / f"{name}.yaml")["metadata"]["distribution"] for name in TASKS}
    assert [distributions[name] for name in TASKS] == ["in"] * 3 + ["out"] * 3


def test_tasks_from_local_files(inputs: Path, tmp_path: Path) -> None:
    specs = [f"{name}={write(tmp_path / f'{name}.jsonl', [row, row])}" for name, row in ROWS.items()]
    (tmp_path / "csqa.jsonl").write_text(json.dumps([ROWS["csqa"]] * 3))  # plain JSON is read too
    result = evaluate(
        str(inputs / "student"),
        tasks=specs,
        prompt_format=PromptFormat(),
        max_new_tokens=2,
        batch_size=16,
        device="cpu",
    )
    assert list(result["tasks"]) == list(ROWS)
    assert {name: task["questions"] for name, task in result["tasks"].items()} == dict.fromkeys(ROWS, 2) | {"csqa": 3}
    assert result["in"]["accuracy"] == result["out"]["accuracy"] == 0.0
    assert result["tasks"]["csqa"]["answers"][2]["id"] == "csqa-2"


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_bootstrap_draws_as_resampling_does() -> None:
    values = [1.0] * 30 + [0.0] * 60 + [-1.0] * 10
    generator = np.random.default_rng(1)
    resampled = generator.choice(values, size=(20_000, len(values))).mean(1)
    drawn = bootstrap_means(values, "x")
    assert drawn.mean() == pytest.approx(0.2, abs=0.003) and drawn.std() == pytest.approx(resampled.std(), rel=0.03)
    assert interval(drawn) == pytest.approx(interval(resampled), abs=0.011)  # steps of 0.01
    assert (bootstrap_means(values, "x") == drawn).all() and not (bootstrap_means(values, "y") == drawn).all()
    assert not (bootstrap_means(values, "x", seed=1) == drawn).all()
    assert interval(bootstrap_means([1.0], "x")) == [1.0, 1.0]


def evaluation(path: Path, scores: dict[str, tuple[str, list[int]]], **changes: Any) -> str:
    """A result file with these (distribution, right or wrong) tasks."""
    content: dict[str, Any] = {"format": "mind evaluation", "version": 1, "student": "s", "tasks": {}}
    for name, (distribution, correct) in scores.items():
        answers = [
            {"id": f"q{i}", "question": f"Q{i}?", "wanted": "1", "given": "1", "correct": bool(value), "output": "1"}
            for i, value in enumerate(correct)
        ]
        share = sum(correct) / len(correct)
        content["tasks"][name] = {"distribution": distribution, "accuracy": share, "answers": answers}
    path.write_text(json.dumps(content | changes))
    return str(path)


def test_compare_is_paired(tmp_path: Path) -> None:
    """The same gain has a narrow interval where B keeps all of A's right answers, a wide one where it swaps them."""
    before = [1] * 50 + [0] * 50
    kept = [1] * 60 + [0] * 40
    swapped = [0] * 40 + [1] * 60
    a = evaluation(tmp_path / "a.json", {"x": ("in", before), "y": ("out", before), "only": ("in", [1])})
    b = evaluation(tmp_path / "b.json", {"y": ("out", swapped), "x": ("in", kept)})
    result = compare(a, b)
    x, y = result["tasks"]["x"], result["tasks"]["y"]
    assert (x["gained"], x["lost"], y["gained"], y["lost"]) == (10, 0, 50, 40)
    assert x["difference"] == y["difference"] == pytest.approx(0.1)
    for task, variance in ((x, 0.1 - 0.01), (y, 0.9 - 0.01)):
        half_width = 1.96 * math.sqrt(variance / 100)
        assert task["interval"] == pytest.approx([0.1 - half_width, 0.1 + half_width], abs=0.02)
    assert result["forgetting"] == result["out"]["difference"] == pytest.approx(0.1)
    assert result["only_in_a"] == ["only"] and result["only_in_b"] == []
    backwards = compare(b, a)
    assert backwards["tasks"]["x"]["difference"] == pytest.approx(-0.1)
    assert compare(a, a)["tasks"]["x"]["interval"] == [0.0, 0.0]


def test_the_mean_of_tasks_weighs_tasks_alike(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a.json", {"x": ("in", [0] * 100), "y": ("in", [0] * 2)})
    b = evaluation(tmp_path / "b.json", {"x": ("in", [0] * 100), "y": ("in", [1, 0])})
    result = compare(a, b)
    assert result["in"]["difference"] == pytest.approx(0.25) and result["in"]["interval"] == [0.0, 0.5]
    assert result["out"] is None and result["forgetting"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command leaves with."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert line.startswith("mind: error: ") and error.count("mind: error") == 1
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": None}, "--student is missing"),
        ({"output": None}, "--output is missing"),
        ({"output": "no/such/folder.json"}, "--output: no/such/folder.json: there is no such folder"),
        ({"output": "/proc/result.json"}, "--output: /proc/result.json: "),  # a folder that nobody can write to
        ({"data": "no.jsonl"}, "no.jsonl: no such file or folder"),
        ({"data": None, "tasks": "gsm9k"}, "task 'gsm9k' is unknown, wanted gsm8k, svamp, math500, csqa"),
        ({"data": None, "tasks": "gsm8k=no.jsonl"}, "task gsm8k: no such file: no.jsonl"),
        ({"data": None, "tasks": "gsm8k="}, "task gsm8k: no file behind the ="),
        ({"data": None, "tasks": "gsm8k"}, "task gsm8k: openai/gsm8k cannot be read: "),  # offline
        ({"student": "eos"}, "is tokenised by lm-eval in another way than training does"),
        ({"student": "no/such/student"}, "student 'no/such/student' cannot be loaded"),
        ({"max-new-tokens": 0}, "max_new_tokens: given 0, wanted at least 1"),
        ({"max-new-tokens": 1010}, "exceed the student's 1024 positions"),
        ({"batch-size": 0}, "batch_size: given 0, wanted at least 1"),
        ({"limit": 0}, "limit: given 0, wanted at least 1"),
        ({"device": "tpu9"}, "device: given 'tpu9', wanted cpu, cuda or cuda:0"),
        ({"device": "meta"}, "device: given 'meta', wanted cpu, cuda or cuda:0 where there is one"),
        ({"backend": "vllm", "device": None}, "--backend vllm: vLLM is not installed"),
        ({"backend": "vllm"}, "device: given 'cpu' with backend vllm, which chooses its own, wanted none"),
        ({"seed": -1}, "argument --seed: given -1, wanted 0 to 4294967295"),
        ({"backend": "tgi"}, "argument --backend: invalid choice: 'tgi'"),
        ({"answer-suffix": "{answer}"}, "answer_suffix must have text before"),
    ],
)
def test_bad_input(
    changes: dict[str, Any],
    message: str,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # not installed, wherever this runs
    monkeypatch.chdir(inputs)
    assert message in refused(flags(inputs, tmp_path / "result.json", **changes), capsys)
    assert list(tmp_path.iterdir()) == []


def test_vllm_that_cannot_be_imported_is_not_said_to_be_absent(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("import a_package_that_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    message = refused(flags(inputs, tmp_path / "result.json", backend="vllm", device=None), capsys)
    assert "--backend vllm: vLLM cannot be imported: No module named 'a_package_that_it_needs'" in message


def test_bad_files(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("")
    write(other, [{"text": "no question"}])
    output = tmp_path / "result.json"
    assert "empty.jsonl: no records" in refused(flags(inputs, output, data=empty), capsys)
    assert "other.jsonl:1: id: the field is missing" in refused(flags(inputs, output, data=other), capsys)
    lines = write(tmp_path / "lines.jsonl", [{"id": "s", "question": "Which?", "answer": "two\nlines"}])
    assert "question 's': answer 'two\\nlines' is read back as " in refused(flags(inputs, output, data=lines), capsys)
    line = refused(flags(inputs, output, data=None, tasks=f"gsm8k={other}"), capsys)
    assert "task gsm8k: row 0 is not a row of this data set" in line and "it has the columns text" in line
    write(other, [{"question": "One and one?", "answer": "It is 2"}])
    line = refused(flags(inputs, output, data=None, tasks=f"gsm8k={other}"), capsys)
    assert "given 'It is 2', wanted a solution and its answer behind ####" in line
    assert "task svamp: " in refused(flags(inputs, output, data=None, tasks=f"svamp={empty}"), capsys)
    output.write_text("{}")
    assert "result.json exists already, wanted a new file" in refused(flags(inputs, output), capsys)
    assert output.read_text() == "{}"


def test_results_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = evaluation(tmp_path / "good.json", {"x": ("in", [1, 0])})
    cases: dict[str, str] = {
        "no.json": "cannot be read: No such file or directory",
        evaluation(tmp_path / "version.json", {"x": ("in", [1])}, version=2): "is an evaluation of version 2, wanted 1",
        evaluation(tmp_path / "format.json", {"x": ("in", [1])}, format=None): "is no evaluation",
        evaluation(
            tmp_path / "tasks.json", {}, tasks={"x": {"distribution": "in", "answers": [1]}}
        ): "its tasks are not what",
        evaluation(tmp_path / "fewer.json", {"x": ("in", [1])}): "task x lacks the question 'q1' of the other",
        evaluation(tmp_path / "more.json", {"x": ("in", [1, 0, 1])}): "task x lacks the question 'q2' of the other",
        evaluation(tmp_path / "others.json", {"z": ("in", [1, 0])}): "wanted one of both",
        evaluation(tmp_path / "out.json", {"x": ("out", [1, 0])}): f"task x: {good} has it in distribution and ",
        str(tmp_path / "correct.json"): "correct.json: its tasks are not what mind evaluate writes",
        str(tmp_path / "id.json"): "id.json: its tasks are not what mind evaluate writes",
        str(tmp_path / "broken.json"): "is not JSON: ",
        str(tmp_path / "latin.json"): "is not JSON: ",
    }
    for name, value in (("correct", "yes"), ("id", ["q0"])):
        changed = json.loads(Path(good).read_text())
        changed["tasks"]["x"]["answers"][0][name] = value
        (tmp_path / f"{name}.json").write_text(json.dumps(changed))
    (tmp_path / "broken.json").write_text('{"format": ')
    (tmp_path / "latin.json").write_bytes(b'{"format": "\xe9"}')
    output = tmp_path / "difference.json"
    for path, message in cases.items():
        assert message in refused(["evaluate", "--compare", good, path, f"--output={output}"], capsys)
    line = refused(["evaluate", "--compare", good, good, "--student", "smollm2-135m"], capsys)
    assert "--compare: takes two result files alone" in line
    line = refused(["evaluate", "--compare", good, good, "--limit=1", "--max-new-tokens=9"], capsys)
    assert line.endswith("wanted only --output or --seed beside it, not --max-new-tokens, --limit")
    assert "--output is missing" in refused(["evaluate", "--student", "smollm2-135m", "--output", ""], capsys)
    assert not output.exists()

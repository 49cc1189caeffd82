"""Reading, validation and tokenisation of records, and the layout of batches. A few seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from mind.collator import IGNORE_INDEX, collate, student_inputs
from mind.data import DataError, MindDataset, encode_record, load_records, perspectives_of
from mind.prompting import PromptFormat

from .tiny import PERSPECTIVES, raw_records, tiny_dataset, tiny_tokenizer


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("source", ["jsonl", "folder", "folder of splits", "dataset", "dicts"])
def test_all_sources_give_the_same_records(source: str, tmp_path: Path) -> None:
    rows = raw_records(3)
    rows[0] |= {"difficulty": 0.5, "source": "made"}
    rows[1] |= {"difficulty": None, "source": None}
    given: Any = rows
    if source == "jsonl":
        given = write_jsonl(tmp_path / "data.jsonl", rows)
    elif source != "dicts":
        given = datasets.Dataset.from_list(rows)
        if source == "folder of splits":
            given = datasets.DatasetDict(train=given)
        if source != "dataset":
            given.save_to_disk(tmp_path / "data")
            given = str(tmp_path / "data")
    records = load_records(given)
    assert [record.id for record in records] == ["q0", "q1", "q2"]
    assert records[0].difficulty == 0.5 and records[0].source == "made"
    assert records[1].difficulty is None and records[1].source is None
    assert [rationale.perspective for rationale in records[1].rationales] == [PERSPECTIVES[i] for i in (0, 1, 3)]
    assert records[2].rationales[0].answer == "4"


def test_a_byte_order_mark_at_the_beginning_is_none_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(raw_records(1)[0]).encode() + b"\r\n")
    assert load_records(path) == load_records(raw_records(1))


def test_blank_lines_and_further_fields_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(raw_records(1)[0] | {"url": "…"}) + "\n\n", encoding="utf-8")
    assert len(load_records(path)) == 1


def test_questions_without_rationales_only_when_allowed() -> None:
    row = {"id": "h", "question": "?", "answer": "1"}
    assert load_records([row], require_rationales=False)[0].rationales == ()
    with pytest.raises(DataError, match=r"records\[0\]: rationales: the field is missing"):
        load_records([row])


def test_perspectives_are_ordered_as_specified_then_by_appearance() -> None:
    rows = raw_records(1, ("zebra", "counterfactual", "intuitive", "ant"))
    assert perspectives_of(load_records(rows)) == ("intuitive", "counterfactual", "zebra", "ant")


def changed(change: dict[str, Any] | None = None, **in_first_rationale: Any) -> dict[str, Any]:
    row = raw_records(1)[0] | (change or {})
    if in_first_rationale:
        row["rationales"] = [row["rationales"][0] | in_first_rationale, *row["rationales"][1:]]
    return {name: value for name, value in row.items() if value != "REMOVE"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed({"question": "REMOVE"}), "question: the field is missing, wanted a string"),
        (changed({"id": None}), "id: the field is missing, wanted a string"),
        (changed({"id": 17}), "id: wanted a string, got int"),
        (changed({"question": " \n"}), "question: is empty, wanted text"),
        (changed({"answer": 42}), "answer: wanted a string, got int"),
        (changed({"question": "\ud800"}), "question: character 0 is a lone surrogate, wanted valid Unicode"),
        (changed({"rationales": "REMOVE"}), "rationales: the field is missing, wanted a list"),
        (changed({"rationales": {}}), "rationales: wanted a list, got object"),
        (changed({"rationales": []}), "rationales: question 'q0' has no rationale, wanted at least one"),
        (
            changed({"rationales": ["so"]}),
            "rationales[0]: wanted an object with perspective, text and answer, got string",
        ),
        (changed(text=""), "rationales[0].text: is empty, wanted text"),
        (changed(text=None), "rationales[0].text: the field is missing, wanted a string"),
        (changed(perspective=3), "rationales[0].perspective: wanted a string, got int"),
        (
            changed(perspective="intuitive"),
            "rationales[1].perspective: 'intuitive' occurs twice in question 'q0', wanted once",
        ),
        (changed(answer="17"), "rationales[0].answer: '17' is not the question's answer '0'"),
        (changed({"difficulty": "hard"}), "difficulty: wanted a number, got string"),
        (changed({"difficulty": True}), "difficulty: wanted a number, got bool"),
        (changed({"difficulty": float("nan")}), "difficulty: wanted a finite number, got nan"),
        (changed({"source": 5}), "source: wanted a string, got int"),
        ([1, 2], "wanted an object with the fields of a record, got list"),
    ],
)
def test_a_fault_is_named_with_file_line_and_field(row: Any, message: str, tmp_path: Path) -> None:
    good = raw_records(2)[1]
    path = write_jsonl(tmp_path / "data.jsonl", [good, row])
    with pytest.raises(DataError) as error:
        load_records(path)
    assert str(error.value) == f"{path}:2: {message}"


def test_an_equal_answer_may_be_written_otherwise() -> None:
    assert load_records([changed({"answer": "1/2", "rationales": "REMOVE"})], require_rationales=False)
    row = changed({"answer": "1/2"})
    row["rationales"] = [rationale | {"answer": "0.5"} for rationale in row["rationales"]]
    assert load_records([row])[0].rationales[0].answer == "0.5"


def test_a_difficulty_beyond_any_float() -> None:
    assert load_records([changed({"difficulty": 10**400})])[0].difficulty == 10**400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a"\n', "data.jsonl:1: malformed JSON at column"),
        (b"\xff\xfe{}\n", "data.jsonl:1: byte 0 is not UTF-8, wanted a UTF-8 file"),
        (b'{"id": "a", "id": "b"}\n', "data.jsonl:1: id: the field occurs twice in one object"),
        (b'{"id": ' + b"9" * 5000 + b"}\n", "data.jsonl:1: malformed JSON: ValueError: "),
        (b"[" * 100_000 + b"\n", "data.jsonl:1: malformed JSON: RecursionError: "),
        (b"", "data.jsonl: no records, wanted at least one"),
        (b"\n \n", "data.jsonl: no records, wanted at least one"),
    ],
)
def test_a_file_that_is_not_records(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_records(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_repeated_id_names_both_places(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", raw_records(2) + raw_records(1))
    with pytest.raises(DataError) as error:
        load_records(path)
    assert str(error.value) == f"{path}:3: id: 'q0' is already used at {path}:1, wanted unique ids"


@pytest.mark.parametrize("name", ["missing.jsonl", "missing", "./missing/folder", "owner/missing.json"])
def test_a_source_that_does_not_exist(name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_records(name)


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a folder written by save_to_disk"):
        load_records(tmp_path)


def test_splits_without_train(tmp_path: Path) -> None:
    datasets.DatasetDict(test=datasets.Dataset.from_list(raw_records(1))).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match='has the splits test, wanted one called "train"'):
        load_records(tmp_path / "data")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising


def test_targets_end_in_the_same_suffix() -> None:
    tokenizer, prompt_format = tiny_tokenizer(), PromptFormat()
    record = load_records(raw_records(2))[1]
    question = encode_record(record, tokenizer, PERSPECTIVES, prompt_format, 512)
    suffix = tuple(prompt_format.suffix_ids(tokenizer, "2"))
    assert question.answer_length == len(suffix) and suffix[-1] == tokenizer.eos_token_id
    assert question.mask == [True, True, False, True] and question.target_ids[2] == ()
    for k, rationale in zip((0, 1, 3), record.rationales, strict=True):
        text = tuple(prompt_format.rationale_ids(tokenizer, rationale.text))
        assert question.target_ids[k] == text + suffix
        assert question.lengths[k] == len(question.prompt_ids) + len(text) + len(suffix)
    assert question.lengths[2] == 0


def test_a_rationale_that_is_too_long_is_an_error_not_cut() -> None:
    record = load_records(raw_records(1))[0]
    lengths = encode_record(record, tiny_tokenizer(), PERSPECTIVES, PromptFormat(), 512).lengths
    longest = max(lengths)
    assert encode_record(record, tiny_tokenizer(), PERSPECTIVES, PromptFormat(), longest).lengths == lengths
    with pytest.raises(DataError) as error:
        encode_record(record, tiny_tokenizer(), PERSPECTIVES, PromptFormat(), longest - 1)
    name = PERSPECTIVES[lengths.index(longest)]
    assert f"question 'q0': perspective '{name}' takes {longest} tokens" in str(error.value)
    assert f"max_length = {longest - 1}" in str(error.value)


@pytest.mark.parametrize(
    ("answer", "read"),
    [("St. Ives", "'St'"), ("two\nlines", "'two'"), ("1. e4 e5", "'1'"), (".", "None")],
)
def test_an_answer_that_is_not_read_back_is_refused(answer: str, read: str) -> None:
    """A student that has learnt to write it would be judged wrong for it."""
    row = raw_records(1)[0]
    row |= {"answer": answer, "rationales": [item | {"answer": answer} for item in row["rationales"]]}
    record = load_records([row])[0]
    with pytest.raises(DataError) as error:
        MindDataset([record], tiny_tokenizer())
    written = f"question 'q0': answer {answer!r} is read back as {read} from '\\nThe answer is {{answer}}.', wanted "
    assert str(error.value) == written + "it on one line, and another answer_suffix where it holds what ends this one"


@pytest.mark.parametrize("answer", ["St. Ives", "1. e4 e5", "Washington D.C.", "x = 3, y = 5", ".5", "5!", "J. Doe"])
def test_an_answer_that_is_read_back_is_taken(answer: str) -> None:
    row = raw_records(1)[0]
    row |= {"answer": answer, "rationales": [item | {"answer": answer} for item in row["rationales"]]}
    prompt_format = PromptFormat("\nThe answer is {answer}")
    assert len(MindDataset(load_records([row]), tiny_tokenizer(), prompt_format=prompt_format)) == 1


def test_a_dataset_refuses_what_does_not_fit() -> None:
    records = load_records(raw_records(2))
    with pytest.raises(ValueError, match=r"features: given shape \(2, 3, 5\), wanted \(2, 4, D\)"):
        MindDataset(records, tiny_tokenizer(), features=torch.zeros(2, 3, 5))
    with pytest.raises(DataError, match="perspective 'planning' is unknown"):
        MindDataset(records, tiny_tokenizer(), perspectives=PERSPECTIVES[:3])
    held_out = load_records([{"id": "h", "question": "?", "answer": "1"}], require_rationales=False)
    with pytest.raises(DataError, match="question 'h' has no rationale"):
        MindDataset(held_out, tiny_tokenizer(), perspectives=PERSPECTIVES)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_student_inputs_hold_the_selected_rationales_and_nothing_else() -> None:
    dataset = tiny_dataset(3)
    questions = [dataset[0], dataset[1], dataset[2]]
    selected = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]).bool()
    batch = student_inputs(questions, selected, pad_token_id=257)
    chosen = [(0, 0), (0, 3), (1, 1), (2, 2), (2, 3)]
    rows, width = batch["input_ids"].shape
    assert rows == len(chosen) and width == max(questions[b].lengths[k] for b, k in chosen)
    labels = batch["shift_labels"].view(rows, width)
    for row, (b, k) in enumerate(chosen):
        question = questions[b]
        ids = [*question.prompt_ids, *question.target_ids[k]]
        padding = width - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [257] * padding
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * padding
        expected = [IGNORE_INDEX] * (len(question.prompt_ids) - 1) + list(question.target_ids[k])
        assert labels[row].tolist() == expected + [IGNORE_INDEX] * (width - len(expected))
        # What predicts the answer suffix, by flat row.
        index = batch["answer_index"][b, k]
        index = index[index >= 0]
        assert batch["shift_labels"][index].tolist() == list(question.target_ids[k][-question.answer_length :])
        assert set((index // width).tolist()) == {row}
    assert (batch["answer_index"][~selected] == -1).all()
    assert torch.equal(batch["supervised_index"], (batch["shift_labels"] != -100).nonzero()[:, 0])
    segments = batch["cu_seqlens"]
    assert segments.dtype == torch.int32 and segments.tolist()[-1] == rows * width
    assert (segments.diff().view(3, 4) == selected * width).all()


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        (torch.zeros(2, 4).bool(), "nothing is selected"),
        (torch.ones(2, 4).bool(), "question 'q1' has no rationale at perspective 2"),
        (torch.ones(2, 4), r"given torch.float32 \(2, 4\), wanted torch.bool \(2, 4\)"),
        (torch.ones(2, 3).bool(), r"wanted torch.bool \(2, 4\)"),
    ],
)
def test_a_selection_that_does_not_fit(selected: torch.Tensor, message: str) -> None:
    dataset = tiny_dataset(2)
    with pytest.raises(ValueError, match=message):
        student_inputs([dataset[0], dataset[1]], selected, pad_token_id=0)


def test_a_collated_batch() -> None:
    dataset = tiny_dataset(3)
    batch = collate([dataset[2], dataset[1]])
    assert len(batch) == 2 and batch.ids == ["q2", "q1"] and batch.indices.tolist() == [2, 1]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, True]]
    assert batch.features is not None and torch.equal(batch.features[0], dataset[2].features)
    selected = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert batch.tokens(selected) == dataset[2].lengths[0] + dataset[1].lengths[3]
    assert batch.target_tokens(selected) == len(dataset[2].target_ids[0]) + len(dataset[1].target_ids[3])
    records = load_records(raw_records(1))
    assert collate([MindDataset(records, tiny_tokenizer())[0]]).features is None

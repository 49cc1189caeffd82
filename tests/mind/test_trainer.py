"""MindTrainer: selection before the forward pass, normalisation, methods, checkpoints, errors. About a minute."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback
from transformers.integrations.flash_attention import get_target_dtype

import mind.trainer
from mind.assistant import load_assistant
from mind.attach import MindAttachment
from mind.calibration import Calibrator
from mind.cli import parse_train
from mind.collator import QuestionBatch
from mind.config import MindConfig
from mind.data import EncodedQuestion, MindDataset, load_records
from mind.run import _save_student
from mind.trainer import MindTrainer

from .test_attach import varlen_attention
from .tiny import FEATURE_DIM, PERSPECTIVES, raw_records, tiny_dataset, tiny_student, tiny_tokenizer


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Such small products gain nothing from a second thread; and the number of threads is part of what is bitwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


METHODS = ("mind", "no_fusion", "instant_loss", "instant_meta", "no_attention", "no_cons", "single_path", "mcc_kd")
WITH_ASSISTANT = ("mind", "instant_meta", "no_attention", "no_cons")
LAMBDA = 0.5


def config(folder: Path, **changes: Any) -> MindConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "consistency_weight": LAMBDA,
        "assistant_hidden_size": 8,
        "assistant_heads": 2,
        "assistant_window": 4,
        "assistant_warmup_epochs": 1,
        "save_strategy": "no",
        "share_prompt": False,  # a sequence of the student's is then a rationale with its prompt
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return MindConfig(**settings | changes)


def make_trainer(
    folder: Path, student: nn.Module | None = None, dataset: MindDataset | None = None, **changes: Any
) -> MindTrainer:
    keywords = {name: changes.pop(name) for name in ("teacher", "callbacks", "assistant") if name in changes}
    return MindTrainer(
        tiny_student() if student is None else student,  # type: ignore[arg-type]
        config(folder, **changes),
        tiny_dataset() if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
        **keywords,
    )


def fix_scores(trainer: MindTrainer, scores: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The assistant scores every question's perspectives the same."""

    def fixed(batch: QuestionBatch) -> Tensor:
        return torch.tensor(scores).expand(batch.mask.shape).masked_fill(~batch.mask, 0.0)

    monkeypatch.setattr(trainer.calibrator, "scores", fixed)


class Spy:
    """Records what reaches the student's base model once the warm-up is over, and the weights of every micro-batch."""

    def __init__(self, trainer: MindTrainer) -> None:
        self.trained: list[Tensor] = []  # input_ids of each forward pass with a graph
        self.measured: list[Tensor] = []  # and of each forward-only one
        self.modes: list[bool] = []  # whether dropout was off in the forward-only ones
        self.batches: list[QuestionBatch] = []
        self.weights: list[Tensor] = []
        begin, weigh = trainer._begin, trainer._weigh

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                assert module.training
                self.trained.append(kwargs["input_ids"])
            else:
                self.measured.append(kwargs["input_ids"])
                self.modes.append(module.training)

        def begin_then_watch() -> None:
            begin()
            trainer.model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)

        def weigh_and_record(inputs: QuestionBatch) -> Any:
            result = weigh(inputs)
            self.batches.append(inputs)
            self.weights.append(result[1])
            return result

        trainer._begin = begin_then_watch  # type: ignore[method-assign]
        trainer._weigh = weigh_and_record  # type: ignore[method-assign]


def rows(input_ids: Tensor) -> list[tuple[int, ...]]:
    """Sequences without their padding."""
    return [tuple(t for t in row if t != 257) for row in input_ids.tolist()]


def sequence(question: EncodedQuestion, k: int) -> tuple[int, ...]:
    return (*question.prompt_ids, *question.target_ids[k])


# What the objective is, from Hugging Face's own logits of each sequence alone.


def log_probs(student: LlamaForCausalLM, question: EncodedQuestion, k: int) -> Tensor:
    """(targets, V): what the student predicts for the target tokens of one rationale."""
    ids = torch.tensor([sequence(question, k)])
    return student(ids).logits[0, len(question.prompt_ids) - 1 : -1].float().log_softmax(-1)


def cross_entropy(student: LlamaForCausalLM, question: EncodedQuestion, k: int) -> Tensor:
    return nn.functional.nll_loss(log_probs(student, question, k), torch.tensor(question.target_ids[k]))


def objective(
    student: LlamaForCausalLM,
    questions: list[EncodedQuestion],
    weights: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """mean_b [ Σ_k α_k·CE_k + λ·Σ_{i<j} (α_i α_j)·D(P_i, P_j) ], D of answer log-probabilities (A, V)."""
    total = torch.zeros(())
    for question, row in zip(questions, weights, strict=True):
        chosen = [k for k, weight in enumerate(row.tolist()) if weight > 0]
        total = total + sum(row[k] * cross_entropy(student, question, k) for k in chosen)
        if divergence is not None:
            answers = {k: log_probs(student, question, k)[-question.answer_length :] for k in chosen}
            for i, j in combinations(chosen, 2):
                total = total + LAMBDA * divergence(answers[i], answers[j]) * row[i] * row[j]
    return total / len(questions)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    mixture = (0.5 * (p.exp() + q.exp())).log()
    return 0.5 * ((p.exp() * (p - mixture)) + (q.exp() * (q - mixture))).sum(-1).mean()


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    # ½·[KL(p ‖ q) + KL(q ‖ p)], not weighted by the α_i α_j = ¼ that `objective` multiplies with
    return 4 * 0.5 * ((p.exp() * (p - q)) + (q.exp() * (q - p))).sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Selection comes first


def test_only_selected_rationales_reach_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    fix_scores(trainer, [0.9, 0.5, 0.85, 0.1], monkeypatch)  # 0.8·0.9 = 0.72: the first and third
    spy = Spy(trainer)
    trainer.train()
    assert len(spy.trained) == len(spy.measured) == len(spy.batches) == 4
    assert not any(spy.modes)
    for batch, trained, measured, weights in zip(spy.batches, spy.trained, spy.measured, spy.weights, strict=True):
        chosen = [(question, k) for question in batch.questions for k in (0, 2) if question.mask[k]]
        others = [(question, k) for question in batch.questions for k in (1, 3)]
        assert rows(trained) == [sequence(*pair) for pair in chosen]
        assert rows(measured) == [sequence(*pair) for pair in others]
        assert trained.shape[1] == max(map(len, rows(trained)))  # no width for what is not there
        assert ((weights > 0).sum(), weights[~batch.mask].sum()) == (len(chosen), 0)
        assert torch.allclose(weights.sum(-1), torch.ones(len(batch)))


@pytest.mark.parametrize("method", METHODS)
def test_the_forward_only_pass_happens_only_for_those_who_need_it(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method=method, beta=0.999)
    spy = Spy(trainer)
    trainer.train()
    trained = sum(len(ids) for ids in spy.trained)
    measured = sum(len(ids) for ids in spy.measured)
    valid = int(sum(batch.mask.sum() for batch in spy.batches))
    assert trained == sum(int((weights > 0).sum()) for weights in spy.weights)
    if method in WITH_ASSISTANT:
        assert trained < valid and measured == valid - trained
    else:
        assert measured == (valid if method == "instant_loss" else 0)
    for batch, weights in zip(spy.batches, spy.weights, strict=True):
        assert (weights[~batch.mask] == 0).all()
        assert torch.allclose(weights.sum(-1), torch.ones(len(batch)))


def test_the_warm_up_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e-30)
    student = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assistant = {name: tensor.clone() for name, tensor in trainer.assistant.state_dict().items()}  # type: ignore[union-attr]
    with trainer._fused_loss():
        trainer._begin()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, student[name]), name
    changed = trainer.assistant.state_dict()  # type: ignore[union-attr]
    assert any(not torch.equal(tensor, assistant[name]) for name, tensor in changed.items())
    table = trainer.calibrator.loss_table  # type: ignore[union-attr]
    for question in trainer.train_dataset.questions:
        for k, exists in enumerate(question.mask):
            if exists:
                expected = cross_entropy(trainer.model.eval(), question, k)  # type: ignore[arg-type]
                assert table[question.index, k].item() == pytest.approx(expected.item(), rel=1e-5)
            else:
                assert math.isnan(table[question.index, k])


@pytest.mark.parametrize(("method", "steps"), [("mind", [2, 4]), ("instant_meta", [1, 2, 3, 4])])
def test_the_assistant_steps_when_its_window_is_full(
    method: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two questions an optimiser step, a window of four; instant_meta steps as often as the student."""
    trainer = make_trainer(tmp_path, method=method, max_steps=4)
    calls: list[tuple[int, int, float]] = []
    step = Calibrator._step

    def record(self: Calibrator, indices: Tensor, lr: float) -> Any:
        calls.append((trainer.state.global_step + 1, len(indices), lr))
        return step(self, indices, lr)

    monkeypatch.setattr(Calibrator, "_step", record)
    trainer.train()
    warm_up = [call for call in calls if call[2] == trainer.args.assistant_warmup_lr]
    assert [count for _, count, _ in warm_up] == [4, 4]
    beside = [call for call in calls if call[2] == trainer.args.assistant_learning_rate]
    assert [call[:2] for call in beside] == [(number, 4 if method == "mind" else 2) for number in steps]


def test_the_loss_table_is_a_moving_average(tmp_path: Path) -> None:
    dataset = tiny_dataset(2)
    calibrator = make_trainer(tmp_path, dataset=dataset, loss_ema=0.75, assistant_window=2).calibrator
    assert calibrator is not None
    indices = torch.tensor([1, 0])
    calibrator.observe(indices, torch.tensor([[1.0, 2.0, 99.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    calibrator.step_if_due()
    first = torch.tensor([[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, math.nan, 4.0]])
    assert torch.equal(calibrator.loss_table.nan_to_num(-1), first.nan_to_num(-1))
    calibrator.observe(indices, torch.zeros(2, 4))
    calibrator.step_if_due()
    assert torch.allclose(calibrator.loss_table, 0.75 * first, equal_nan=True)

    table, weights = calibrator.loss_table.clone(), calibrator.assistant.state_dict()["head_out_bias"].clone()
    unmeasured = torch.tensor([[1.0, math.nan, math.nan, 1.0], [math.nan, 1.0, 1.0, 1.0]])
    calibrator.observe(indices, unmeasured)
    calibrator.step_if_due()
    assert not calibrator._losses  # a full window of which nothing is learned
    assert torch.equal(calibrator.loss_table.nan_to_num(-1), table.nan_to_num(-1))
    assert torch.equal(calibrator.assistant.state_dict()["head_out_bias"], weights)
    calibrator.observe(indices, torch.tensor([[1.0, 1.0, math.nan, 1.0], [math.nan, 1.0, 1.0, 1.0]]))
    calibrator.step_if_due()
    table[1] = 0.75 * table[1] + 0.25  # its third rationale does not exist
    assert torch.allclose(calibrator.loss_table, table, equal_nan=True)
    assert not torch.equal(calibrator.assistant.state_dict()["head_out_bias"], weights)


def test_a_share_of_the_questions_gives_feedback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All their rationales are known to the assistant; of the others no more is read than the student learns from."""
    trainer = make_trainer(tmp_path, feedback_share=0.4, max_steps=12, assistant_learning_rate=1e-2)
    fix_scores(trainer, [0.9, 0.5, 0.85, 0.1], monkeypatch)
    calls: list[tuple[list[int], float]] = []
    step = Calibrator._step

    def record(self: Calibrator, indices: Tensor, lr: float) -> Any:
        assert not (self.loss_table[indices].isnan() & torch.tensor([self.dataset[i].mask for i in indices])).any()
        calls.append((indices.tolist(), lr))
        return step(self, indices, lr)

    monkeypatch.setattr(Calibrator, "_step", record)
    spy = Spy(trainer)
    trainer.train()
    warm_up = [indices for indices, lr in calls if lr == trainer.args.assistant_warmup_lr]
    assert [len(indices) for indices in warm_up] == [4]  # ⌈0.4 · 8⌉, in one window
    measured = {row for ids in spy.measured for row in rows(ids)}
    read_whole = [
        question
        for batch in spy.batches
        for question in batch.questions
        if {sequence(question, k) for k in (1, 3)} <= measured
    ]
    assert 0 < len(measured) < sum(2 * len(batch) for batch in spy.batches)
    learned = {index for indices, lr in calls if lr == trainer.args.assistant_learning_rate for index in indices}
    assert learned and learned <= {question.index for question in read_whole}
    entries = [entry for entry in trainer.state.log_history if "cross_entropy" in entry]
    assert {"meta_loss" in entry for entry in entries} == {True, False}  # a step may have drawn no question


def test_all_questions_give_feedback_without_a_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    state = torch.get_rng_state()
    assert trainer._drawn(3).tolist() == [True] * 3
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# The objective and its normalisation


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_the_objective(method: str, share_prompt: bool, tmp_path: Path) -> None:
    """One SGD step of rate 1: what the weights moved by is the gradient of the objective from plain logits."""
    changes = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = make_trainer(
        tmp_path,
        method=method,
        share_prompt=share_prompt,
        max_steps=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        weight_decay=0.0,
        **changes,
    )
    spy = Spy(trainer)
    reference = tiny_student().eval()
    trainer.train()
    questions = [question for batch in spy.batches for question in batch.questions]
    weights = torch.cat(spy.weights)
    divergence = {"no_cons": None, "single_path": None, "mcc_kd": symmetric_kl}.get(method, jensen_shannon)
    expected = objective(reference, questions, weights, divergence)
    expected.backward()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert ("consistency" in entry) == (method != "no_cons")  # no zero for what was not measured
    before = dict(tiny_student().named_parameters())
    for name, parameter in trainer.model.named_parameters():
        gradient = dict(reference.named_parameters())[name].grad
        moved = before[name] - parameter
        assert torch.allclose(moved, gradient, rtol=1e-3, atol=2e-6), name  # type: ignore[arg-type]


def test_a_shared_prompt_is_read_once_a_question(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="no_fusion", share_prompt=True, max_steps=1)
    spy = Spy(trainer)
    trainer.train()
    (batch,) = spy.batches
    read = batch.tokens(batch.mask, share_prompt=True)
    assert [tuple(ids.shape) for ids in spy.trained] == [(1, read)]
    assert read < batch.tokens(batch.mask)


def test_prompts_are_shared_where_student_and_teacher_can(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def read(student: nn.Module, **changes: Any) -> int:
        trainer = make_trainer(tmp_path, student, method="no_fusion", max_steps=1, **{"share_prompt": None} | changes)
        spy = Spy(trainer)
        trainer.train()
        return len(spy.trained[0])

    assert MindConfig(output_dir=str(tmp_path), use_cpu=True).share_prompt is None
    assert read(tiny_student()) == 1 and not recwarn.list
    other = tiny_student()
    other.model._supports_attention_backend = False
    with pytest.raises(ValueError, match="shared_prompts: tokens of LlamaModel see others by more than an attention"):
        read(other, share_prompt=True)
    with pytest.warns(UserWarning, match="share_prompt: each rationale's prompt is read again"):
        assert read(other) > 1
    with pytest.warns(UserWarning, match="share_prompt: each rationale's prompt is read again"):
        assert read(tiny_student(), kl_weight=0.5, teacher=other) > 1
    # NEFTune divides its noise by the root of the row's length: of one rationale's, not of the whole micro-batch's.
    with pytest.raises(ValueError, match=r"^neftune_noise_alpha: its noise depends on a row's length"):
        read(tiny_student(), share_prompt=True, neftune_noise_alpha=5.0)
    with pytest.warns(UserWarning, match="share_prompt: each rationale's prompt is read again .neftune_noise_alpha"):
        assert read(tiny_student(), neftune_noise_alpha=5.0) > 1


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and as FlashAttention and transformers around it without fp32."""

    def check(query: Tensor) -> None:
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        dtype = get_target_dtype(query, module) or query.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        check(query)
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        seen = seen if mask is None else (seen & mask[:, None, None].bool()) | torch.eye(len(seen), dtype=torch.bool)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    def attend_varlen(query: Tensor, *tensors: Any, **settings: Any) -> Tensor:
        check(query)
        return varlen_attention(query, *tensors, **settings)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = attend_varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)


@pytest.mark.usefixtures("flash_attention")
def test_flash_attention_with_weights_in_fp32(tmp_path: Path) -> None:
    """Student and teacher, which are checked where no autocast is on."""

    def flash(seed: int = 0) -> LlamaForCausalLM:
        student = tiny_student(seed)
        student.config._attn_implementation = "flash_attention_2"
        return student

    changes = {"method": "no_fusion", "max_steps": 1, "bf16": True}
    for share_prompt in (False, True):
        make_trainer(tmp_path, flash(), teacher=flash(5), kl_weight=0.5, share_prompt=share_prompt, **changes).train()
    with pytest.raises(ValueError, match=r"^bf16: given False with a student in fp32 and attn_implementation flash"):
        make_trainer(tmp_path, flash())


def test_weights_of_the_methods(tmp_path: Path) -> None:
    def weights(method: str, **changes: Any) -> tuple[QuestionBatch, Tensor]:
        trainer = make_trainer(tmp_path, method=method, per_device_train_batch_size=8, max_steps=1, **changes)
        spy = Spy(trainer)
        trainer.train()
        return spy.batches[0], spy.weights[0]

    batch, alpha = weights("no_fusion")
    assert torch.allclose(alpha, batch.mask / batch.mask.sum(-1, keepdim=True))
    batch, alpha = weights("instant_loss", tau=0.3)
    student = tiny_student().eval()
    for question, row in zip(batch.questions, alpha, strict=True):
        kept = [k for k in range(4) if question.mask[k]]
        losses = torch.stack([cross_entropy(student, question, k) for k in kept])
        assert torch.allclose(row[kept], (-losses / 0.3).softmax(-1), rtol=1e-3)
    batch, alpha = weights("single_path")
    assert alpha.tolist() == [[1, 0, 0, 0]] * 8
    batch, alpha = weights("single_path", golden_perspective="planning")
    assert alpha.tolist() == [[0, 0, 0, 1]] * 8
    batch, alpha = weights("mcc_kd")
    assert ((alpha == 0.5).sum(-1) == 2).all() and (alpha[~batch.mask] == 0).all()
    assert len({tuple(row.nonzero().flatten().tolist()) for row in alpha}) > 1  # random


def test_mcc_kd_with_a_single_rationale_is_cross_entropy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dataset=tiny_dataset(4, PERSPECTIVES[:1]), method="mcc_kd", max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["selected_rationales"] == 1 and entry["consistency"] == 0
    assert entry["loss"] == pytest.approx(entry["cross_entropy"])


def train_on_four(folder: Path, batch_size: int, accumulation: int, **changes: Any) -> MindTrainer:
    trainer = make_trainer(
        folder,
        dataset=tiny_dataset(6),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=4,  # with 6 questions, every second step has only 2
        assistant_learning_rate=1e-2,
        **changes,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["mind", "no_fusion"])
def test_four_at_once_are_one_at_a_time_accumulated(method: str, tmp_path: Path) -> None:
    together = train_on_four(tmp_path, 4, 1, method=method)
    apart = train_on_four(tmp_path, 1, 4, method=method)
    keys = ["loss", "grad_norm", "cross_entropy", "consistency", "selected_rationales", "weight_entropy"]
    keys += ["meta_loss", "rank_correlation"] if method == "mind" else []
    steps = [[entry for entry in each.state.log_history if "loss" in entry] for each in (together, apart)]
    for one, other in zip(*steps, strict=True):
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=2e-4), (one["step"], key)
    for (name, one), other in zip(together.model.named_parameters(), apart.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-5), name


TWO_RANKS = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.mind.test_trainer import tiny_dataset, make_trainer
from pathlib import Path
trainer = make_trainer(Path(sys.argv[1]), dataset=tiny_dataset(8), per_device_train_batch_size=1,
    gradient_accumulation_steps=2, max_steps=3, ddp_backend="gloo", assistant_dropout=0.0,
    train_sampling_strategy="sequential", assistant_learning_rate=1e-2)
trainer.train()
if trainer.is_world_process_zero():
    state = (trainer.model.state_dict(), trainer.assistant.state_dict(), trainer.state.log_history)
    torch.save(state, sys.argv[1] + "/state.pt")
os._exit(0)  # the group's destructor, run by the reducer under the interpreter's lock, can wait for itself
"""


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Two ranks × two micro-batches × one question against one rank and a batch of four."""
    root = str(Path(__file__).parents[2])
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(root=root), encoding="utf-8")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    student, assistant, history = torch.load(tmp_path / "state.pt", weights_only=True)
    one = make_trainer(
        tmp_path,
        dataset=tiny_dataset(8),
        per_device_train_batch_size=4,
        max_steps=3,
        assistant_dropout=0.0,
        train_sampling_strategy="sequential",
        assistant_learning_rate=1e-2,
    )
    one.train()
    for name, tensor in one.model.state_dict().items():
        assert torch.allclose(tensor, student[name], atol=2e-5), name
    # Scores, not weights: the keys' bias has no gradient but rounding's, which Adam makes large.
    scores = one.score()
    one.assistant.load_state_dict(assistant)  # type: ignore[union-attr]
    assert torch.allclose(one.score(), scores, atol=1e-4)
    for mine, theirs in zip(one.state.log_history, history, strict=True):
        for key in ("loss", "cross_entropy", "consistency", "meta_loss", "perspective_loss/planning", "grad_norm"):
            if "loss" in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=2e-4), (mine["step"], key)


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize(("vocab_size", "num_shared"), [(300, 300), (280, 258), (320, 258)])
def test_a_white_box_teacher(vocab_size: int, num_shared: int, share_prompt: bool, tmp_path: Path) -> None:
    """loss = cross-entropy + γ·KL(teacher ‖ student), both parts against plain logits.

    Over the tokenizer's 258 tokens where the two heads are padded to different sizes.
    """
    student, teacher = tiny_student(), tiny_student(5, vocab_size=vocab_size, hidden_size=16, num_attention_heads=2)
    changes = {"method": "single_path", "kl_weight": 0.7, "share_prompt": share_prompt}
    told = f"teacher: has a head of {vocab_size} tokens, the student one of 300: the KL is over the first 258"
    with nullcontext() if vocab_size == 300 else pytest.warns(UserWarning, match=told):
        trainer = make_trainer(tmp_path, student, max_steps=1, teacher=teacher, **changes)
    spy = Spy(trainer)
    reference = tiny_student().eval()
    trainer.train()
    total = 0.0
    for question in spy.batches[0].questions:
        both = log_probs(teacher.eval(), question, 0), log_probs(reference, question, 0)
        p, q = (log_p[:, :num_shared].log_softmax(-1) for log_p in both)
        total += (p.exp() * (p - q)).sum(-1).mean().item() / 2
    entry = trainer.state.log_history[0]
    assert entry["kl"] == pytest.approx(total, rel=1e-4)
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.7 * entry["kl"], rel=1e-5)
    assert "forward" not in vars(teacher)


def test_a_teacher_that_reads_otherwise_behind_a_shared_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = MindAttachment.read

    def wrong(attachment: MindAttachment, inputs: Any, shared_prompts: Any = None) -> Tensor:
        return read(attachment, inputs, shared_prompts) * (1.0 if shared_prompts is None else 1.01)

    monkeypatch.setattr(MindAttachment, "read", wrong)
    with pytest.raises(ValueError, match="shared_prompts: what LlamaModel makes of rationales behind one prompt d"):
        make_trainer(tmp_path, kl_weight=0.7, teacher=tiny_student(seed=5), share_prompt=True)


def test_rounding_that_a_trained_student_multiplies_is_no_other_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 after 229 steps: 1e-4 of the largest entry in fp32. And whether prompts are read once is asked once."""
    read, check, checks = MindAttachment.read, MindAttachment.check_shared_prompts, []

    def rounded(attachment: MindAttachment, inputs: Any, shared_prompts: Any = None) -> Tensor:
        return read(attachment, inputs, shared_prompts) * (1.0 if shared_prompts is None else 1.001)

    def counted(attachment: MindAttachment) -> None:
        checks.append(attachment)
        check(attachment)

    monkeypatch.setattr(MindAttachment, "read", rounded)
    monkeypatch.setattr(MindAttachment, "check_shared_prompts", counted)
    trainer = make_trainer(tmp_path, method="no_fusion", share_prompt=True, max_steps=1)
    trainer.train()
    trainer.measure_losses()
    assert len(checks) == 1


def test_lora_trains_the_adapters_alone(tmp_path: Path) -> None:
    student = tiny_student()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = make_trainer(tmp_path, student, use_lora=True, lora_r=4, learning_rate=None)
    assert trainer.args.learning_rate == 1e-4
    trainer.train()
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    after = trainer.model.get_base_model().state_dict()  # type: ignore[operator]
    for name, tensor in before.items():
        plain = name.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(after[plain if plain in after else name], tensor), name
    assert any(parameter.abs().sum() > 0 for name, parameter in trainer.model.named_parameters() if "lora_B" in name)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Copies(TorchDispatchMode):
    """The most bytes that a model's weights take at a time in another dtype."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.data_ptr() for parameter in model.parameters()}
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            storage = output.untyped_storage()
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self.free, storage.nbytes())
        return output

    def free(self, size: int) -> None:
        self.bytes -= size


@pytest.mark.parametrize("method", ["mind", "no_fusion"])  # with a forward-only pass and without
def test_copies_of_weights_in_bf16_are_freed(method: str, tmp_path: Path) -> None:
    """A forward-only pass and a checkpointed one hold those of a layer, not of all."""
    student = tiny_student(num_hidden_layers=8)
    trainer = make_trainer(tmp_path, student, method=method, bf16=True, gradient_checkpointing=True)
    with Copies(student) as copies:
        trainer.train()
    layer = 2 * sum(parameter.numel() for parameter in student.get_decoder().layers[0].parameters())
    head = 2 * student.lm_head.weight.numel()
    assert 0 < copies.most <= head + 2 * layer < 8 * layer


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_adapters_keep_no_copies_of_what_they_read(
    gradient_checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read what their layer reads, in bf16, to the same losses as from copies in fp32."""
    losses, read = [], []
    for copies in (True, False):
        if copies:
            monkeypatch.setattr(mind.trainer, "disable_input_dtype_casting", lambda *args, **keywords: nullcontext())
        student = tiny_student().to(torch.bfloat16)
        changes = {"use_lora": True, "bf16": True, "gradient_checkpointing": gradient_checkpointing}
        trainer = make_trainer(tmp_path, student, max_steps=4, learning_rate=1e-2, **changes)
        dtypes: set[torch.dtype] = set()

        def hook(module: nn.Module, args: Any, dtypes: set[torch.dtype] = dtypes) -> None:
            if torch.is_autocast_enabled("cpu"):  # not in the check of what the loss is attached to
                dtypes.add(args[0].dtype)

        for name, module in trainer.model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(hook)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        read.append(dtypes)
        trainer.model(torch.tensor([[1, 2]]))  # without autocast, where the cast is needed
        monkeypatch.undo()
    assert losses[0] == losses[1] and len(losses[1]) == 4
    assert read == [{torch.float32}, {torch.bfloat16}]


# ---------------------------------------------------------------------------------------------------------------------
# Logging, saving


def test_what_is_logged(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, assistant_warmup_epochs=2, report_to="tensorboard")
    trainer.train()
    history = trainer.state.log_history
    assert [entry["assistant_warmup_epoch"] for entry in history[:2]] == [1, 2]
    assert {f"assistant_warmup/perspective_score/{name}" for name in PERSPECTIVES} <= set(history[2])
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for entry in steps:
        wanted = {f"perspective_{kind}/{name}" for kind in ("loss", "score") for name in PERSPECTIVES}
        wanted |= {"cross_entropy", "consistency", "selected_rationales", "weight_entropy", "meta_loss"}
        wanted |= {"rank_correlation", "supervised_tokens_per_second", "peak_memory_bytes", "grad_norm", "loss"}
        assert wanted <= set(entry) and "kl" not in entry
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + LAMBDA * entry["consistency"], rel=1e-5)
        assert 1 <= entry["selected_rationales"] <= 4 and 0 <= entry["weight_entropy"] <= math.log(4) + 1e-6
        assert -1 <= entry["rank_correlation"] <= 1 and entry["meta_loss"] >= 0
        assert entry["peak_memory_bytes"] > 10**7 and entry["supervised_tokens_per_second"] > 0
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_what_is_logged_of_several_steps_is_their_mean(tmp_path: Path) -> None:
    entries = []
    for logging_steps in (1, 4):
        trainer = make_trainer(tmp_path, max_steps=4, logging_steps=logging_steps)
        trainer.train()
        entries.append([entry for entry in trainer.state.log_history if "cross_entropy" in entry])
    each, (mean,) = entries
    for name in ("cross_entropy", "consistency", "selected_rationales", "weight_entropy", "meta_loss"):
        assert mean[name] == pytest.approx(sum(entry[name] for entry in each) / 4, rel=1e-5), name


@pytest.mark.parametrize("changes", [{"logging_strategy": "no"}, {"logging_steps": 1000}])
def test_a_run_that_does_not_log_keeps_no_batches(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=8, **changes)
    batches: list[weakref.ref[QuestionBatch]] = []
    weigh = trainer._weigh

    def weigh_and_watch(inputs: QuestionBatch) -> Any:
        batches.append(weakref.ref(inputs))
        return weigh(inputs)

    trainer._weigh = weigh_and_watch  # type: ignore[method-assign]
    trainer.train()
    gc.collect()
    assert len(batches) == 8 and not any(batch() for batch in batches)


def test_a_pruned_backward_pass_is_logged(tmp_path: Path) -> None:
    entries = []
    for tolerance in (0.0, 0.3):
        trainer = make_trainer(tmp_path / str(tolerance), max_steps=3, gradient_tolerance=tolerance)
        trainer.train()
        entries.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for dense, pruned in zip(*entries, strict=True):
        assert not {"kept_share", "certificate", "dense_share"} & set(dense)
        assert 0 < pruned["kept_share"] <= 0.5 and 0 < pruned["certificate"] <= 0.3 and pruned["dense_share"] == 0
    # The loss is exact, the gradient is not: from the first step with a learning rate on, the losses differ.
    assert [dense["loss"] == pruned["loss"] for dense, pruned in zip(*entries, strict=True)] == [True, True, False]


def test_the_saved_folder_is_a_model_and_an_assistant(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert "forward" not in vars(trainer.model)
    trainer.train()
    assert "forward" not in vars(trainer.model)  # its own again
    trainer.save_model()
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([trainer.train_dataset[0].prompt_ids])
    assert torch.equal(student(ids).logits, trainer.model.eval()(ids).logits)
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    assistant, names = load_assistant(tmp_path)
    assert names == PERSPECTIVES
    for name, tensor in trainer.assistant.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(assistant.state_dict()[name], tensor), name


def student_that_ends_its_turn(end: int) -> LlamaForCausalLM:
    """Every token's hidden state is the same, and the head's most probable token is `end`."""
    student = tiny_student(tie_word_embeddings=False)
    student.get_input_embeddings().weight.data.fill_(1.0)
    for layer in student.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    student.lm_head.weight.data.zero_()[end] = 1.0
    return student


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_saved_student_stops_where_it_was_taught_to(use_lora: bool, tmp_path: Path) -> None:
    """A base model's tokenizer has a template whose end of turn is not the EOS that its generation settings name."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    student = student_that_ends_its_turn(end)
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id != end  # type: ignore[union-attr]
    ids = torch.tensor([[1, 2, 3]])
    assert student.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == 8  # type: ignore[operator]
    dataset = MindDataset(load_records(raw_records(2)), tokenizer, perspectives=PERSPECTIVES)
    args = config(tmp_path, method="no_fusion", use_lora=use_lora)
    trainer = MindTrainer(student, args, dataset, processing_class=tokenizer)
    trainer.save_model()
    assert trainer.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).shape[1] == 4  # type: ignore[operator]
    _save_student(trainer)  # which merges adapters
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert saved.generate(ids, max_new_tokens=5, do_sample=False).tolist() == [[1, 2, 3, end]]
    assert set(saved.generation_config.eos_token_id) == {end, tokenizer.eos_token_id}


def test_bf16_autocast_trains_and_restores_the_forward(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    assert "forward" not in vars(trainer.model) and trainer.model.dtype == torch.float32
    plain = make_trainer(tmp_path)
    plain.train()
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_measured_before_and_after_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=8, learning_rate=1e-2)
    before, scores = trainer.measure_losses(), trainer.score()
    trainer.train()
    after = trainer.measure_losses()
    assert (before.isnan() == after.isnan()).all() and before.isnan().sum() == 1
    assert after.nanmean() < before.nanmean() - 0.1
    assert scores.shape == (8, 4) and scores[1, 2] == 0
    held_out = tiny_dataset(3)
    assert trainer.measure_losses(held_out).shape == (3, 4)


class Averaging(torch.optim.SGD):
    """As the schedule-free optimisers: `eval` puts the average of the steps in place, `train` takes it away again."""

    def train(self) -> None:
        self.shift(1.0)

    def eval(self) -> None:
        self.shift(2.0)

    def shift(self, scale: float) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data *= scale / self.state[parameter].get("scale", 1.0)
            self.state[parameter]["scale"] = scale


def test_the_average_of_a_schedule_free_optimizer_is_the_trained_student(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method="no_fusion")
    trainer.optimizer = Averaging(trainer.model.parameters(), lr=1e-30)
    trainer.train()
    head = tiny_student().lm_head.weight
    assert torch.equal(trainer.model.get_output_embeddings().weight, 2 * head)
    trainer.train()
    assert torch.equal(trainer.model.get_output_embeddings().weight, 2 * head)


def test_hyperparameter_search_names_ours(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^MindTrainer: given hyperparameters to search, wanted a trainer for each t"):
        make_trainer(tmp_path).hyperparameter_search()


@pytest.mark.parametrize("method", ["evaluate", "predict", "evaluation_loop", "prediction_step"])
def test_trainers_own_evaluation_names_ours(method: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"wanted measure_losses\(dataset\) for .* mind\.evaluation\.measure_accuracy"):
        getattr(make_trainer(tmp_path), method)(tiny_dataset())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

RESUME = {
    "save_strategy": "steps",
    "save_steps": 3,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
    "assistant_window": 8,  # at step 3 there are 6 questions in the window
    "assistant_learning_rate": 1e-2,
    "loss_ema": 0.5,
    "lr_scheduler_type": "cosine",
    "save_total_limit": None,
}


def student_with_dropout() -> LlamaForCausalLM:
    return tiny_student(attention_dropout=0.2)


def final_state(trainer: MindTrainer) -> dict[str, Any]:
    calibrator = trainer.calibrator
    assert calibrator is not None
    optimizer = trainer.optimizer.state_dict()["state"]  # type: ignore[union-attr]
    return {
        **{f"student {name}": tensor for name, tensor in trainer.model.state_dict().items()},
        **{f"assistant {name}": tensor for name, tensor in calibrator.assistant.state_dict().items()},
        **{f"{i} {name}": tensor for i, state in optimizer.items() for name, tensor in state.items()},
        "loss table": calibrator.loss_table.nan_to_num(-1),
        "window": torch.cat([*calibrator._losses, torch.zeros(0, 4)]).nan_to_num(-1),
        "random": torch.get_rng_state(),
    }


def logged(trainer: MindTrainer) -> list[dict[str, float]]:
    changing = ("per_second", "memory", "runtime", "train_loss", "total_flos")  # over a whole run, or time
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in changing)}
        for entry in trainer.state.log_history
    ]


def assert_same(one: MindTrainer, other: MindTrainer) -> None:
    states = final_state(one), final_state(other)
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    assert logged(one) == logged(other)


@pytest.mark.parametrize(("method", "feedback_share"), [("mind", 1.0), ("mind", 0.5), ("mcc_kd", 1.0)])
@pytest.mark.parametrize("first", [3, 6])
def test_resuming_is_bitwise_the_whole_run(method: str, feedback_share: float, first: int, tmp_path: Path) -> None:
    """7 questions, 4 steps an epoch: step 3 lies within the first, 6 within the second."""
    settings = RESUME | {"max_steps": 9, "method": method, "feedback_share": feedback_share}
    whole = make_trainer(tmp_path / "whole", student_with_dropout(), tiny_dataset(7), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", student_with_dropout(), tiny_dataset(7), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{first}"))
    if method == "mind":
        assert_same(whole, resumed)
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import mind.trainer
from tests.mind.test_trainer import RESUME, make_trainer, student_with_dropout, tiny_dataset
from pathlib import Path
publish = mind.trainer.publish
def killed(partial, output_dir, name):
    if name == "checkpoint-6":
        os.kill(os.getpid(), signal.SIGKILL)
    publish(partial, output_dir, name)
mind.trainer.publish = killed
make_trainer(Path(sys.argv[1]), student_with_dropout(), tiny_dataset(7), **RESUME, max_steps=9).train()
"""


def test_a_run_killed_while_saving_resumes_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(root=root), str(folder)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "partial-checkpoint-6"]
    resumed = make_trainer(folder, student_with_dropout(), tiny_dataset(7), **RESUME, max_steps=9)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", student_with_dropout(), tiny_dataset(7), **RESUME, max_steps=9)
    whole.train()
    assert_same(whole, resumed)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


@pytest.mark.parametrize("stage", ["model.safetensors", "optimizer.pt", "mind_state.pt"])
def test_an_error_while_saving_leaves_no_checkpoint(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    save, save_pretrained = torch.save, type(trainer.model).save_pretrained

    def failing_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 2 and str(path).endswith(stage):
            raise OSError("No space left on device")
        save(content, path, *args, **kwargs)

    def failing_save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 2 and stage == "model.safetensors":
            raise OSError("No space left on device")
        save_pretrained(self, *args, **kwargs)

    monkeypatch.setattr(torch, "save", failing_save)
    monkeypatch.setattr(type(trainer.model), "save_pretrained", failing_save_pretrained)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert "forward" not in vars(trainer.model)
    assert not (tmp_path / "checkpoint-2").exists() and (tmp_path / "checkpoint-1" / "mind_state.pt").is_file()


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    publish = mind.trainer.publish

    def watch(partial: str, output_dir: str, name: str) -> None:
        publish(partial, output_dir, name)
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    monkeypatch.setattr(mind.trainer, "publish", watch)
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": PERSPECTIVES[:3]}, "has K = 4 perspectives (formal_symbolic, intuitive, decomposition, planning)"),
        ({"dataset": (*PERSPECTIVES[:3], "socratic")}, "perspective 'planning' is unknown"),
        ({"dataset": tuple(reversed(PERSPECTIVES))}, "orders its perspectives formal_symbolic, intuitive"),
        ({"method": "no_fusion"}, "was trained with method 'mind', wanted 'no_fusion'"),
        ({"questions": 7}, "was trained on 8 other questions"),
        (
            {"answer_suffix": "\nAnswer: {answer}"},
            "was trained with answer_suffix '\\nThe answer is {answer}.', wanted train_dataset's '\\nAnswer: {answer}'",
        ),
        ({"assistant_hidden_size": 16}, "its teaching assistant has hidden_size = 8, wanted 16"),
    ],
)
def test_a_checkpoint_of_another_run(changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path) -> None:
    suffix = changes.get("answer_suffix", MindConfig.answer_suffix)
    dataset = tiny_dataset(changes.pop("questions", 8), changes.pop("dataset", PERSPECTIVES), suffix)
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, dataset=dataset, **changes).train(resume_from_checkpoint=str(checkpoint))
    assert message in str(error.value) and str(checkpoint) in str(error.value) and "\n" not in str(error.value)


def test_not_a_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds no mind_state\.pt, wanted .* by MindTrainer without save_only_model$"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    state = (checkpoint / "mind_state.pt").read_bytes()
    (tmp_path / "mind_state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(ValueError, match=r"mind_state.pt: cannot be read") as error:
        trainer.train(resume_from_checkpoint=str(tmp_path))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# What stops a run


class Poison(TrainerCallback):
    """Makes a parameter not a number before the given step."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            model.get_output_embeddings().weight.data[0, 0] = self.value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(method: str, value: float, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method=method, max_steps=3, callbacks=[Poison(2, value)])
    spy = Spy(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("step 2: the student's loss is ") and "\n" not in message
    for question_id in spy.batches[-1].ids if method != "instant_loss" else ():
        assert repr(question_id) in message
    assert trainer.state.global_step == 1 and "forward" not in vars(trainer.model)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, gradient_accumulation_steps=2, max_grad_norm=0.0)
    weight = trainer.model.get_output_embeddings().weight
    weight.register_hook(lambda grad: grad * (math.inf if trainer.state.global_step == 1 else 1.0))
    spy = Spy(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("step 2: the gradient norm is ")
    for question_id in [*spy.batches[-2].ids, *spy.batches[-1].ids]:
        assert repr(question_id) in message


def test_a_loss_scaler_may_overflow_whoever_asked_for_it(tmp_path: Path) -> None:
    """accelerate's launcher sets up fp16 without a word in the arguments."""
    trainer = make_trainer(tmp_path, method="no_fusion", warmup_steps=0, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weight = trainer.model.get_output_embeddings().weight
    weight.register_hook(lambda grad: grad * (math.inf if trainer.accelerator.scaler.get_scale() == 2 else 1.0))
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1  # the first step was skipped
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [math.isfinite(norm) for norm in norms] == [False, True]


def test_a_student_that_is_not_finite_from_the_start(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    (three,) = set(trainer.train_dataset[3].prompt_ids) - set(trainer.train_dataset[2].prompt_ids)
    trainer.model.get_input_embeddings().weight.data[three] = math.nan
    with pytest.raises(
        ValueError, match=r"^step 1: the student's loss is nan, wanted a finite number; questions 'q3'$"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta", 1.5, "beta: given 1.5, wanted a number in [0, 1]"),
        ("beta", math.nan, "beta: given nan, wanted a number in [0, 1]"),
        ("tau", 0.0, "tau: given 0.0, wanted a positive number"),
        ("tau_student", -1.0, "tau_student: given -1.0, wanted a positive number"),
        ("consistency_weight", -0.1, "consistency_weight: given -0.1, wanted a number that is not negative"),
        ("kl_weight", -0.1, "kl_weight: given -0.1, wanted a number that is not negative"),
        ("kl_beta", 1.0, "kl_beta: given 1.0, wanted a number in (0, 1)"),
        ("kl_divergence", "js", "kl_divergence: given 'js', wanted one of forward, reverse, jsd"),
        ("kl_temperature_power", 1, "kl_temperature_power: given 1, wanted one of 0, 2"),
        ("method", "magic", "method: given 'magic', wanted one of mind, "),
        (
            "assistant_hidden_size",
            9,
            "assistant_hidden_size: given 9, wanted a multiple of 2 and of assistant_heads = 2",
        ),
        ("assistant_dropout", 1.0, "assistant_dropout: given 1.0, wanted a number in [0, 1)"),
        ("assistant_window", 0, "assistant_window: given 0, wanted a positive number"),
        ("assistant_warmup_epochs", -1, "assistant_warmup_epochs: given -1, wanted a number that is not negative"),
        ("loss_ema", 1.0, "loss_ema: given 1.0, wanted a number in [0, 1)"),
        ("answer_suffix", "The end.", 'answer_suffix must contain "{answer}" exactly once'),
        ("max_length", 0, "max_length: given 0, wanted a positive number"),
        ("num_train_epochs", -1, "num_train_epochs: given -1, wanted a positive number, or max_steps"),
        ("num_train_epochs", math.nan, "num_train_epochs: given nan, wanted a positive number, or max_steps"),
        ("max_logits_bytes", 0, "max_logits_bytes: given 0, wanted a positive number"),
        ("lora_r", 0, "lora_r: given 0, wanted a positive number"),
        ("eval_strategy", "steps", "eval_strategy: given 'steps', wanted 'no': held-out accuracy is measured"),
        ("eval_on_start", True, "eval_on_start: given True, wanted False: held-out accuracy is measured"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor: given 0.1, wanted 0.0: the fused loss"),
        ("remove_unused_columns", True, "remove_unused_columns: given True, wanted False"),
        (
            "dataloader_num_workers",
            2,
            "dataloader_num_workers: given 2, wanted 0: questions are tokenised and in memory",
        ),
        (
            "fsdp",
            "full_shard",
            "fsdp: given 'full_shard', wanted None: a rank measures rationales that others have not",
        ),
        ("deepspeed", "zero3.json", "deepspeed: given 'zero3.json', wanted None: a rank measures rationales"),
        ("dataloader_persistent_workers", True, "dataloader_persistent_workers: given True, wanted False: questions"),
        ("dataloader_multiprocessing_context", "fork", "dataloader_multiprocessing_context: given 'fork', wanted None"),
        ("dataloader_prefetch_factor", 2, "dataloader_prefetch_factor: given 2, wanted None: questions are tokenised"),
        ("bf16_full_eval", True, "bf16_full_eval: given True, wanted False: losses and answers are measured in the"),
        ("fp16_full_eval", True, "fp16_full_eval: given True, wanted False: losses and answers are measured in the"),
        ("enable_jit_checkpoint", True, "enable_jit_checkpoint: given True, wanted False: it saves within a step"),
        ("per_device_eval_batch_size", 0, "per_device_eval_batch_size: given 0, wanted a positive number"),
        ("average_tokens_across_devices", False, "average_tokens_across_devices: given False, wanted True: a step is"),
        ("weight_decay", -0.1, "weight_decay: given -0.1, wanted a number that is not negative"),
        ("neftune_noise_alpha", -5.0, "neftune_noise_alpha: given -5.0, wanted a number that is not negative"),
        ("lr_scheduler_type", "greedy", "lr_scheduler_type: given 'greedy', wanted one that follows no evaluation"),
        ("fp16", True, "fp16: given True, wanted False on a CPU, where it would train in float32, or bf16"),
        ("ddp_backend", "gloo", "ddp_backend: given 'gloo' in a process by itself, wanted None, or torchrun"),
        ("use_liger_kernel", True, "use_liger_kernel: given True, wanted False on a CPU, for which Liger has no"),
        (
            "accelerator_config",
            {"use_seedable_sampler": False},
            "accelerator_config: given use_seedable_sampler = False, wanted True: a resumed run would read some",
        ),
    ],
)
def test_settings_out_of_range(field: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        config(tmp_path, **{"max_steps": -1, field: value})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_liger_leaves_the_loss_to_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MindConfig, "device", torch.device("cuda"))
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--use_liger_kernel", "true"]
    unfused = {"fused_linear_cross_entropy": False}
    assert parse_train(flags)[1].liger_kernel_config == unfused
    run = tmp_path / "run.yaml"
    run.write_text("liger_kernel_config: {rope: false}\n")
    assert parse_train([*flags, "--config", str(run)])[1].liger_kernel_config == unfused | {"rope": False}
    for given in ({"fused_linear_cross_entropy": True}, "rope"):
        with pytest.raises(ValueError, match=r"^liger_kernel_config: given .*, wanted JSON with .* the loss is fused$"):
            config(tmp_path, use_liger_kernel=True, liger_kernel_config=given)


def test_defaults() -> None:
    settings = MindConfig(output_dir="runs/x", use_cpu=True)
    assert (settings.beta, settings.tau, settings.tau_student, settings.consistency_weight) == (0.8, 0.2, 0.1, 0.1)
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 8
    assert (settings.learning_rate, settings.lr_scheduler_type, settings.warmup_steps) == (1e-5, "cosine", 0.03)
    assert (settings.num_train_epochs, settings.max_grad_norm, settings.assistant_window) == (3, 1.0, 32)
    assert MindConfig(output_dir="runs/x", use_cpu=True, use_lora=True).learning_rate == 1e-4


def test_without_an_accelerator_the_cpu_need_not_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("mind.config.computes_bf16", lambda use_cpu: use_cpu)
    args = MindConfig(output_dir=str(tmp_path), bf16=True)
    assert (args.bf16, args.use_cpu, args.device.type) == (True, True, "cpu")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bf16_where_the_device_has_instructions_for_it(
    has_instructions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config(tmp_path, bf16=None).bf16 in (True, False)  # asks this CPU
    monkeypatch.setattr("mind.config.computes_bf16", lambda use_cpu: has_instructions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config(tmp_path, bf16=None).bf16 is has_instructions
        assert config(tmp_path).bf16 is False
    run = tmp_path / "run.yaml"
    run.write_text("use_cpu: true\nbf16: null\n")
    assert parse_train(["--config", str(run)])[1].bf16 is has_instructions
    with nullcontext() if has_instructions else pytest.warns(UserWarning, match="bf16: given True on a device without"):
        assert config(tmp_path, bf16=True).bf16 is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"golden_perspective": "poetry"}, "golden_perspective: given 'poetry', wanted one of formal_symbolic"),
        (
            {"golden_perspective": "decomposition", "method": "single_path"},
            "golden_perspective: question 'q1' has no 'decomposition'",
        ),
        ({"kl_weight": 0.1}, "teacher: given none with kl_weight = 0.1"),
        ({"teacher": "small"}, "teacher: given one with kl_weight = 0.0"),
        (
            {"teacher": "small", "kl_weight": 1.0},
            "teacher: has 200 tokens in its vocabulary, wanted at least the 258 of",
        ),
        ({"teacher": "short", "kl_weight": 1.0}, "tokens, wanted at most the teacher's 64 positions: shorten it"),
        ({"student": "small"}, "wanted tokens below the student's vocabulary of 200: is this its tokenizer?"),
        ({"student": "short"}, "tokens, wanted at most the student's 64 positions: shorten it"),
        ({"student": "frozen"}, "model: no parameter requires a gradient, wanted some, or use_lora"),
        ({"student": "adapted", "use_lora": True}, "use_lora: given True for a model with adapters of its own"),
        ({"dataset": "no features"}, "train_dataset: has no features"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    sizes = {
        "small": {"vocab_size": 200, "eos_token_id": None, "pad_token_id": None},
        "short": {"max_position_embeddings": 64},
    }
    for role in {"teacher", "student"} & changes.keys():
        kind = changes[role]
        changes[role] = tiny_student(**sizes.get(kind, {})).requires_grad_(kind != "frozen")
        if kind == "adapted":
            changes[role] = get_peft_model(changes[role], LoraConfig(task_type="CAUSAL_LM"))
    if "dataset" in changes:
        changes["dataset"] = MindDataset(load_records(raw_records(2)), tiny_tokenizer())
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, **changes)
    assert message in str(error.value)


def test_measured_questions_are_not_longer_than_the_students_positions(tmp_path: Path) -> None:
    """Learned positions end there: an index error on a CPU, on a GPU one that ends the process."""
    trainer = make_trainer(tmp_path)
    record = raw_records(1)[0] | {"question": "Why? " * 100}
    longer = MindDataset(load_records([record]), tiny_tokenizer(), perspectives=PERSPECTIVES)
    with pytest.raises(
        ValueError, match=r"^question 'q0' takes \d+ tokens, wanted at most the student's 512 positions"
    ):
        trainer.measure_losses(longer)


def test_types_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args: given dict, wanted MindConfig"):
        MindTrainer(tiny_student(), {}, tiny_dataset(), processing_class=tiny_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="train_dataset: given list, wanted MindDataset"):
        MindTrainer(tiny_student(), config(tmp_path), [], processing_class=tiny_tokenizer())  # type: ignore[arg-type]
    for model in ("gpt2", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"model: given {type(model).__name__}, wanted PreTrainedModel"):
            make_trainer(tmp_path, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: LlamaModel has no output embeddings, wanted a causal language model"):
        make_trainer(tmp_path, tiny_student().model)
    with pytest.raises(TypeError, match="teacher: given str, wanted PreTrainedModel or TopKTeacher"):
        make_trainer(tmp_path, teacher="gpt2", kl_weight=0.5)
    assert tiny_dataset().feature_dim == FEATURE_DIM

"""MindTrainer: transformers.Trainer with the teaching assistant's selection before the student's forward pass.

One micro-batch of B questions:

    scores s (B, K)  ->  weights α (B, K)  ->  the student reads the rationales with α > 0 and nothing else;
    the losses of the others are measured forward-only, and only when the assistant learns from them: in
    `feedback_share` of the questions.

Every loss is divided by the questions of the whole optimiser step: all its micro-batches on all ranks.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import AutocastKwargs
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints

from mind.assistant import TeachingAssistant, load_assistant, select_rationales
from mind.attach import MindAttachment, attach_mind_loss
from mind.calibration import Calibrator
from mind.checkpoint import PARTIAL_PREFIX, STATE_FILE, publish, read_state, remove_partial
from mind.collator import QuestionBatch, SharedPrompts, collate, shared_prompts, student_inputs
from mind.config import SHARDING, MindConfig
from mind.data import EncodedQuestion, MindDataset
from mind.evaluation import generation_stop_ids
from mind.feedback import Feedback, peak_memory_bytes, summarise
from mind.generate.topk import TopKTeacher
from mind.prompt_attention import needs_autocast, readable
from mind.students import is_quantised
from mind_kernels import TeacherHidden, TeacherTopK, fused_linear_cross_entropy, record_pruning
from mind_kernels.chunking import to_device

ON_DEVICE = ("input_ids", "attention_mask", "shift_labels", "cu_seqlens")  # of student_inputs


class MindTrainer(Trainer):
    """Distils a student from several rationales a question, as `args.method` says.

    model: the student, a causal LM. Its forward takes the fused loss while it trains and is its own again afterwards.
    train_dataset: questions with features (without, for a method that has no teaching assistant).
    processing_class: the student's tokenizer; saved with the student.
    assistant: a teaching assistant to start from; default a new one as configured.
    teacher: a causal LM with the student's tokenizer, or its stored distributions, given exactly when
        `args.kl_weight` > 0. Where their heads are padded to different sizes, the KL is over the tokenizer's tokens.

    Raises: TypeError or ValueError naming the argument or field that does not fit the others, or cannot be used.
    """

    # compute_loss has divided by the questions of the whole optimiser step: training_step must not divide again.
    loss_is_scaled_for_ga = True
    args: MindConfig
    model: PreTrainedModel
    train_dataset: MindDataset

    def __init__(
        self,
        model: PreTrainedModel,
        args: MindConfig,
        train_dataset: MindDataset,
        *,
        processing_class: PreTrainedTokenizerBase,
        assistant: TeachingAssistant | None = None,
        teacher: PreTrainedModel | TopKTeacher | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise TypeError(f"model: given {type(model).__name__}, wanted PreTrainedModel, as load_student gives")
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: {type(model).__name__} has no output embeddings, wanted a causal language model")
        if not isinstance(args, MindConfig):
            raise TypeError(f"args: given {type(args).__name__}, wanted MindConfig")
        if not isinstance(train_dataset, MindDataset):
            raise TypeError(f"train_dataset: given {type(train_dataset).__name__}, wanted MindDataset")
        if args.use_lora and isinstance(model, PeftModel):
            raise ValueError("use_lora: given True for a model with adapters of its own, wanted False")
        if not args.use_lora and not isinstance(model, PeftModel) and is_quantised(model):
            raise ValueError("use_lora: given False for a quantised model, wanted True: its weights do not learn")
        for module in model.modules():
            # On a CPU with these instructions bitsandbytes would reorder 4-bit weights when they are evaluated, and
            # then pass no gradient through them.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if not args.use_lora and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model: no parameter requires a gradient, wanted some, or use_lora")
        if args.n_gpu > 1:
            raise ValueError(f"given {args.n_gpu} GPUs in one process, wanted one process a GPU: launch with torchrun")
        _check_dataset(train_dataset, args, model)
        if not (args.bf16 or args.fp16) and needs_autocast(model.get_decoder()):
            raise ValueError(
                "bf16: given False with a student in fp32 and attn_implementation flash_attention_2, "
                "wanted bf16 or fp16: FlashAttention has no fp32"
            )
        super().__init__(
            model=_with_lora(model, args) if args.use_lora else model,
            args=args,
            data_collator=collate,  # type: ignore[arg-type]  # batches of questions, not of columns
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # asked for by accelerate's launcher
            given = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(f"given {given}, wanted one whole student a rank, as torchrun gives: {SHARDING}")
        self.model_accepts_loss_kwargs = True  # the same, for a Trainer that does not know loss_is_scaled_for_ga
        self.add_callback(_StepCallback(self))
        self.perspectives = train_dataset.perspectives
        self.calibrator = self._make_calibrator(assistant) if args.uses_assistant else None
        self._student: MindAttachment | None = None  # while the fused loss is attached
        self._shares_prompts: bool | None = None  # decided when it is, the first time
        self._shared_vocab_size: int | None = None  # where the teacher's head is not of the student's size
        self._teacher = self._make_teacher(teacher, processing_class)
        self._pad_token_id = processing_class.pad_token_id or 0  # masked everywhere: any token will do
        self._partial_dir: str | None = None  # while a checkpoint is being written
        self._since_step: list[Feedback] = []  # the micro-batches of the current optimiser step
        self._since_log: dict[str, Tensor] = {}  # what summarise makes of the steps, added up
        self._log_start = time.perf_counter()
        self._resumed = False
        self._check_optimizer()

    @property
    def assistant(self) -> TeachingAssistant | None:
        return None if self.calibrator is None else self.calibrator.assistant

    def _make_calibrator(self, assistant: TeachingAssistant | None) -> Calibrator:
        feature_dim, args = self.train_dataset.feature_dim, self.args
        if feature_dim is None:
            raise ValueError(f"train_dataset: has no features, wanted RationaleEncoder's for method {args.method!r}")
        if assistant is None:
            assistant = TeachingAssistant(
                feature_dim,
                len(self.perspectives),
                hidden_size=args.assistant_hidden_size,
                num_heads=args.assistant_heads,
                dropout=args.assistant_dropout,
                attention=args.method != "no_attention",
                shared_head=args.shared_head,
            )
        return Calibrator(assistant, self.train_dataset, args, self._average_gradients)

    def _make_teacher(
        self, teacher: PreTrainedModel | TopKTeacher | None, tokenizer: PreTrainedTokenizerBase
    ) -> MindAttachment | TopKTeacher | None:
        """The teacher's base model, head, scale and cap; its forward stays as it is. Stored ones are as given."""
        given, weight = ("none" if teacher is None else "one"), self.args.kl_weight
        if (teacher is not None) != (weight > 0):
            raise ValueError(f"teacher: given {given} with kl_weight = {weight}, wanted one exactly when it is above 0")
        if teacher is None or isinstance(teacher, TopKTeacher):
            return teacher
        if not isinstance(teacher, PreTrainedModel | PeftModel):
            raise TypeError(f"teacher: given {type(teacher).__name__}, wanted PreTrainedModel or TopKTeacher")
        attachment = attach_mind_loss(nn.Module.to(teacher, self.args.device).eval())
        attachment.detach()
        if self.args.share_prompt:
            attachment.check_shared_prompts()
        _check_lengths(self.train_dataset, teacher, "teacher")
        given_size, own_size = len(attachment.head.weight), len(self.model.get_output_embeddings().weight)
        if given_size != own_size:
            num_tokens = min(own_size, max(tokenizer.get_vocab().values()) + 1)
            if given_size < num_tokens:
                raise ValueError(
                    f"teacher: has {given_size} tokens in its vocabulary, wanted at least the {num_tokens} of the "
                    "student's tokenizer"
                )
            warnings.warn(
                f"teacher: has a head of {given_size} tokens, the student one of {own_size}: the KL is over the first "
                f"{num_tokens}, which are the tokenizer's",
                stacklevel=3,
            )
            self._shared_vocab_size = num_tokens
        return attachment

    def _check_optimizer(self) -> None:
        """Makes the optimiser, and a schedule on trial, now and not when the student was measured.

        Raises: ValueError naming the settings that they cannot be made of.
        """
        args = self.args
        assert args.learning_rate is not None  # MindConfig has set it
        name, value, further = "optim", args.optim, "optim_args"
        try:
            self.create_optimizer()  # Trainer goes on with the one that is there
            name, value, further = "lr_scheduler_type", args.lr_scheduler_type, "lr_scheduler_kwargs"
            if self.lr_scheduler is None:
                trial = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
                steps = args.max_steps if args.max_steps > 0 else max(1, math.ceil(args.warmup_steps)) + 1
                scheduler = self.create_scheduler(num_training_steps=steps, optimizer=trial)
                for factor in getattr(scheduler, "lr_lambdas", ()):  # beyond the warm-up, too
                    factor(steps)
                self.lr_scheduler = None
        except (ImportError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise ValueError(
                f"{name}: given {getattr(value, 'value', value)!r} with {further} {getattr(args, further)!r}, which "
                f"cannot be used: {type(error).__name__}: {error}"
            ) from error

    # -----------------------------------------------------------------------------------------------------------------
    # One micro-batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[QuestionBatch], num_batches: int, device: torch.device
    ) -> tuple[list[QuestionBatch], Tensor | int]:
        """The micro-batches of one optimiser step, and how many questions they hold on all ranks together."""
        if self.state.global_step >= self.state.max_steps:  # a finished run, resumed: Trainer would take one step more
            self.control.should_training_stop = True
            return [], 0
        batches = list(islice(epoch_iterator, num_batches))
        num_questions = sum(map(len, batches))
        if self.accelerator.num_processes == 1:
            return batches, num_questions
        return batches, self.accelerator.gather(torch.tensor([num_questions], device=device)).sum()

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: QuestionBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The student's objective on the selected rationales, divided by `num_items_in_batch` questions."""
        num_questions = len(inputs) if num_items_in_batch is None else num_items_in_batch
        scores, weights, losses = self._weigh(inputs)
        selected = weights > 0
        measured = selected if losses is None else inputs.mask
        if self.calibrator is not None:
            measured = selected | (inputs.mask & self._drawn(len(inputs)).unsqueeze(-1))
            losses = self._measure(inputs.questions, measured & ~selected)
        batch = self._student_inputs(inputs.questions, selected)
        teacher = {} if self._teacher is None else {"teacher": self._teacher_rows(inputs.questions, selected, batch)}
        with record_pruning() as pruned:
            output = model(
                **batch,
                **teacher,
                rationale_weights=to_device(weights, self.args.device),
                num_questions=num_questions,
                return_hidden_states=self.args.method == "mcc_kd",
            )
        loss, consistency = output.loss, output.consistency
        if self.args.method == "mcc_kd":
            answer_index = batch["answer_index"][selected.any(-1)]
            consistency = self._symmetric_kl(output.last_hidden_state.flatten(0, 1), answer_index) / num_questions
            loss = loss + self.args.consistency_weight * consistency
        own_losses = output.rationale_losses.float()
        if losses is not None:
            losses = own_losses.where(to_device(selected, own_losses.device), losses)
        self._since_step.append(
            Feedback(
                batch=inputs,
                scores=scores,
                weights=weights,
                losses=own_losses if losses is None else losses,
                measured=measured,
                parts=torch.stack([output.cross_entropy, consistency.detach(), output.kl]).float(),
                pruned=pruned,
            )
        )
        # The ranks' gradients are averaged, but this loss is already a share of the sum over all ranks.
        loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _weigh(self, inputs: QuestionBatch) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(scores, α, losses), (B, K) each: scores of a teaching assistant, losses where α comes from them."""
        mask, args = inputs.mask, self.args
        if self.calibrator is not None:
            scores = self.calibrator.scores(inputs)
            return scores, select_rationales(scores, mask, beta=args.beta, tau_student=args.tau_student), None
        if args.method == "instant_loss":
            losses = self._measure(inputs.questions, mask)
            self._check_finite(inputs, losses.cpu(), mask)
            return None, (-losses.cpu() / args.tau).masked_fill(~mask, -torch.inf).softmax(-1), losses
        chosen = mask  # no_fusion
        if args.method == "single_path":
            golden = args.golden_perspective
            first = mask.int().argmax(-1)  # the first perspective that each question has
            index = first if golden is None else torch.full_like(first, self.perspectives.index(golden))
            chosen = F.one_hot(index, mask.shape[1]).bool()
        if args.method == "mcc_kd":  # two at random, or the only one
            order = torch.rand(mask.shape).masked_fill(~mask, -1.0).argsort(dim=-1, descending=True)
            chosen = mask & (order.argsort(dim=-1) < 2)
        return None, chosen / chosen.sum(-1, keepdim=True), None

    def _drawn(self, num_questions: int) -> Tensor:
        """(num_questions,) bool: those whose unselected rationales are measured."""
        share = self.args.feedback_share
        return torch.rand(num_questions) < share if share < 1 else torch.ones(num_questions, dtype=torch.bool)

    def _student_inputs(self, questions: Sequence[EncodedQuestion], selected: Tensor) -> dict[str, Any]:
        """student_inputs on the device, but for the indices: the host needs them, and would have to wait for them."""
        batch = student_inputs(questions, selected, self._pad_token_id)
        device: dict[str, Any] = {name: to_device(batch.pop(name), self.args.device) for name in ON_DEVICE}
        if self._shares_prompts:
            prompts = shared_prompts(questions, selected)
            device["shared_prompts"] = SharedPrompts(*(to_device(tensor, self.args.device) for tensor in prompts))
        if self.accelerator.num_processes > 1:  # DistributedDataParallel moves every tensor to the device
            del batch["supervised_index"]
        return device | batch

    @torch.no_grad()
    def _measure(self, questions: Sequence[EncodedQuestion], wanted: Tensor) -> Tensor:
        """The student's loss on the wanted rationales (B, K), fp32 nats per token, 0 elsewhere; forward-only.

        The student is in eval mode, so no dropout disturbs these losses, as it does those of a training pass: where the
        student has some, the assistant sees selected rationales a little harder than the others.
        """
        if not bool(wanted.any()):
            return torch.zeros(wanted.shape, device=self.args.device)
        student = self._attached()
        batch = self._student_inputs(questions, wanted)
        training = student.model.training
        student.model.eval()
        with self.accelerator.autocast():
            hidden_states = _read(student, batch)
            _, losses = fused_linear_cross_entropy(
                hidden_states,
                student.head.weight,
                batch["shift_labels"],
                rationale_weights=to_device(wanted.float(), self.args.device),
                cu_seqlens=batch["cu_seqlens"],
                supervised_index=batch.get("supervised_index"),
                lm_head_bias=student.head.bias,
                logit_scale=student.loss.logit_scale,
                logit_softcap=student.loss.logit_softcap,
                max_logits_bytes=student.loss.max_logits_bytes,
            )
        student.model.train(training)
        return losses.float()

    @torch.no_grad()
    def _teacher_rows(
        self, questions: Sequence[EncodedQuestion], selected: Tensor, batch: dict[str, Any]
    ) -> TeacherHidden | TeacherTopK:
        """The teacher on the same tokens: what is stored of it, or a white-box one in its own dtype where it can be."""
        if isinstance(self._teacher, TopKTeacher):
            return self._teacher.rows(questions, selected, batch["input_ids"].shape[1], self.args.device)
        assert self._teacher is not None
        head, loss = self._teacher.head, self._teacher.loss
        with torch.autocast(self.args.device.type, enabled=False), readable(self._teacher.base):
            hidden_states = _read(self._teacher, batch)
        return TeacherHidden(
            hidden_states, head.weight, head.bias, loss.logit_scale, loss.logit_softcap, self._shared_vocab_size
        )

    def _symmetric_kl(self, hidden_states: Tensor, answer_index: Tensor) -> Tensor:
        """Σ_b ½·[KL(P_i ‖ P_j) + KL(P_j ‖ P_i)], the mean over the answer tokens; nats, fp32, gradient into both sides.

        hidden_states: (N, H). answer_index: (B, K, A), −1 = absent; two rationales of a question, or one: then it is 0.
        """
        student = self._attached()
        total = hidden_states.sum() * 0.0
        for rows in answer_index:  # (K, A)
            rows = rows[(rows >= 0).any(-1)]
            rows = rows[:, (rows >= 0).all(0)]
            if len(rows) < 2:
                continue
            rows = to_device(rows, hidden_states.device)
            with self.accelerator.autocast():
                logits = student.logits(hidden_states[rows], torch.float32)  # (2, A, V)
            log_p, log_q = logits.log_softmax(-1)
            # KL(p ‖ q) + KL(q ‖ p) = Σ (p − q)·(log p − log q)
            total = total + 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
        return total

    # -----------------------------------------------------------------------------------------------------------------
    # One optimiser step

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, and the one place of a step that waits for the device: a NaN or Inf stops the run here.

        Raises: ValueError with the number of the step and the questions.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # fp16's loss scaler expects gradients that overflow: it skips the step and lowers its scale.
        norm = 0.0 if self.accelerator.scaler is not None else float(grad_norm)
        total = sum(feedback.losses.sum() + feedback.parts.sum() for feedback in self._since_step)
        if not math.isfinite(total + norm):
            for feedback in self._since_step:
                self._check_finite(feedback.batch, feedback.losses.cpu(), feedback.measured)
            ids = ", ".join(repr(name) for feedback in self._since_step for name in feedback.batch.ids)
            step = self.state.global_step + 1
            raise ValueError(f"step {step}: the gradient norm is {norm}, wanted a finite number; questions {ids}")
        return grad_norm

    def _check_finite(self, batch: QuestionBatch, losses: Tensor, measured: Tensor) -> None:
        """Raises: ValueError naming the step and each question whose losses (B, K) are not finite where measured."""
        wrong = measured & ~losses.isfinite()
        if bool(wrong.any()):
            ids = ", ".join(repr(name) for name, row in zip(batch.ids, wrong, strict=True) if bool(row.any()))
            step, value = self.state.global_step + 1, losses[wrong][0].item()
            raise ValueError(f"step {step}: the student's loss is {value}, wanted a finite number; questions {ids}")

    def _learn_from_feedback(self) -> None:
        """Just before the student's optimiser steps: the assistant gets this step's losses of all ranks."""
        if self.calibrator is not None:
            indices = torch.cat([feedback.batch.indices for feedback in self._since_step])
            losses = torch.cat([feedback.losses_or_nan() for feedback in self._since_step])
            if self.accelerator.num_processes > 1:
                indices, losses = self.accelerator.gather((indices.to(losses.device), losses))
            self.calibrator.observe(indices, losses)
            self.calibrator.step_if_due()
        # Sums, not the batches: what a run keeps must not grow until it logs. The device has been waited for already.
        steps = 1 / self.accelerator.num_processes
        for name, pair in summarise(self._since_step, self.args, self.perspectives, steps=steps).items():
            self._since_log[name] = pair + self._since_log.get(name, 0)
        self._since_step = []

    def _average_gradients(self, assistant: TeachingAssistant) -> None:
        """Ranks hold the same assistant and the same feedback; only their dropout differs."""
        if self.accelerator.num_processes > 1:
            gradients = [parameter.grad for parameter in assistant.parameters() if parameter.grad is not None]
            flat = nn.utils.parameters_to_vector(gradients).to(self.args.device)
            nn.utils.vector_to_parameters(self.accelerator.reduce(flat, reduction="mean").cpu(), gradients)

    # -----------------------------------------------------------------------------------------------------------------
    # The whole run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As Trainer.train. A fresh run starts with the assistant's warm-up; a resumed one goes on where it stopped.

        Raises: ValueError when the checkpoint is not one of this method, these perspectives and these questions, or
            when a loss or gradient is NaN or Inf.
        """
        if self.args.should_save:
            remove_partial(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = None
        if resume_from_checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: {self.args.output_dir} holds no whole checkpoint, wanted one"
                )
        elif resume_from_checkpoint:
            checkpoint = os.fspath(resume_from_checkpoint)
        self._resumed = checkpoint is not None
        if checkpoint is not None:
            self._load_state(checkpoint)
        with self._fused_loss():
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        evaluate = getattr(self.optimizer, "eval", None)  # of a schedule-free one: its average is what was learned
        if callable(evaluate):
            evaluate()
        return output

    @contextmanager
    def _fused_loss(self) -> Iterator[None]:
        """The student with the fused loss attached; its own forward afterwards, whatever happens."""
        args = self.args
        self._student = attach_mind_loss(
            self.model,
            consistency_weight=args.fused_consistency_weight,
            kl_weight=args.kl_weight,
            divergence=args.kl_divergence,
            beta=args.kl_beta,
            temperature=args.kl_temperature,
            temperature_power=args.kl_temperature_power,
            max_logits_bytes=args.max_logits_bytes,
            gradient_tolerance=args.gradient_tolerance,
        )
        handler = self.accelerator.autocast_handler
        # A pass multiplies by each weight once: a cache would only keep all weights' 16-bit copies until its end.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        try:
            if self._shares_prompts is None:
                self._shares_prompts = self._can_share_prompts()
            # Autocast casts what an adapter reads. Cast to its fp32 before, each would keep a copy of its own.
            autocasts = args.use_lora and self.accelerator.native_amp
            with disable_input_dtype_casting(self.model, active=autocasts):
                yield
        finally:
            self.accelerator.autocast_handler = handler
            # Accelerate has wrapped the attached forward for mixed precision: take that off first.
            self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            self._student.detach()
            self._student = None

    def _can_share_prompts(self) -> bool:
        """Whether each prompt is read once: as configured, or where student and teacher can.

        Raises: ValueError when they cannot and are configured to.
        """
        if self.args.share_prompt is False:
            return False
        try:
            if self.args.neftune_noise_alpha:
                raise ValueError("neftune_noise_alpha: its noise depends on a row's length: read the prompts unshared")
            self._attached().check_shared_prompts()
            if isinstance(self._teacher, MindAttachment):
                self._teacher.check_shared_prompts()
        except ValueError as error:
            if self.args.share_prompt:
                raise
            warnings.warn(f"share_prompt: each rationale's prompt is read again ({error})", stacklevel=2)
            return False
        return True

    def _attached(self) -> MindAttachment:
        if self._student is None:
            raise RuntimeError("the fused loss is not attached: use train() or measure_losses()")
        return self._student

    def measure_losses(self, dataset: MindDataset | None = None, indices: Tensor | None = None) -> Tensor:
        """The student's loss on every rationale (num_questions, K), fp32 nats per token, NaN where there is none.

        dataset: default the training data. Forward-only, shared among the ranks.
        indices: (n,) int64, the questions to measure, NaN for the others; default all.
        Raises: ValueError naming the questions whose loss is not finite, or one that is longer than the student's
            positions.
        """
        if self._student is None:
            with self._fused_loss():
                return self.measure_losses(dataset, indices)
        dataset = self.train_dataset if dataset is None else dataset
        _check_lengths(dataset, self.model)
        indices = torch.arange(len(dataset)) if indices is None else indices
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        batches = indices.split(self.args.per_device_train_batch_size)[rank::ranks]
        losses = torch.zeros(len(dataset), len(dataset.perspectives), device=self.args.device)
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        for some in tqdm(batches, desc="measuring the student", unit="batch", disable=quiet):
            batch = collate([dataset[i] for i in some.tolist()])
            losses[to_device(some, losses.device)] = self._measure(batch.questions, batch.mask)
        losses = self.accelerator.reduce(losses, reduction="sum").cpu()
        is_measured = torch.zeros(len(dataset), 1, dtype=torch.bool).index_fill(0, indices, True)
        mask = torch.tensor([question.mask for question in dataset.questions]) & is_measured
        self._check_finite(QuestionBatch(dataset.questions, mask, None), losses, mask)
        return losses.masked_fill(~mask, torch.nan)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: TypeError: Trainer's loop reads columns, and batches are questions."""
        raise TypeError(
            f"{type(self).__name__}: given a data set to evaluate or predict, wanted measure_losses(dataset) for the "
            "losses on its rationales, or mind.evaluation.measure_accuracy for what the student answers"
        )

    predict = evaluation_loop = prediction_step = evaluate

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: TypeError: a trial would go on with the student and the assistant of the last."""
        raise TypeError(f"{type(self).__name__}: given hyperparameters to search, wanted a trainer for each trial")

    def score(self, dataset: MindDataset | None = None) -> Tensor:
        """The assistant's scores (num_questions, K) of a dataset with features, 0 where there is no rationale."""
        if self.calibrator is None:
            raise ValueError(f"method {self.args.method!r} has no teaching assistant, wanted one of those that do")
        dataset = self.train_dataset if dataset is None else dataset
        batches = (collate(dataset.questions[i : i + 256]) for i in range(0, len(dataset), 256))
        return torch.cat([self.calibrator.scores(batch) for batch in batches])

    def _begin(self) -> None:
        """Before the first step, the student prepared: the assistant's warm-up, unless the run is resumed."""
        self._since_step, self._since_log = [], {}
        if self.calibrator is not None and not self._resumed:
            # Its own generator: every rank draws the same questions.
            generator = torch.Generator().manual_seed(self.args.seed)
            order = torch.randperm(len(self.train_dataset), generator=generator)
            drawn = order[: math.ceil(self.args.feedback_share * len(order))]
            losses = self.measure_losses(indices=drawn.sort().values)
            for epoch, metrics in enumerate(self.calibrator.warm_up(losses), start=1):
                self.log({"assistant_warmup_epoch": epoch, **{f"assistant_warmup/{k}": v for k, v in metrics.items()}})
            scores = self.score().masked_fill(losses.isnan(), torch.nan)
            self.log(
                {
                    f"assistant_warmup/perspective_{kind}/{name}": value
                    for kind, values in (("loss", losses.nanmean(0)), ("score", scores.nanmean(0)))
                    for name, value in zip(self.perspectives, values.tolist(), strict=True)
                }
            )
        self._log_start = time.perf_counter()

    # -----------------------------------------------------------------------------------------------------------------
    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the means of what was `summarise`d since the last time, of all ranks, beside the loss."""
        if "loss" in logs and self._since_log:
            totals, self._since_log = dict(sorted(self._since_log.items())), {}  # in the same order on every rank
            now, ranks = time.perf_counter(), self.accelerator.num_processes
            totals["supervised_tokens_per_second"][1] = (now - self._log_start) / ranks
            self._log_start = now
            table = torch.stack(list(totals.values())).float().to(self.args.device)  # (metrics, 2)
            sums, counts = self.accelerator.reduce(table, reduction="sum").cpu().unbind(-1)
            means = dict(zip(totals, (sums / counts).tolist(), strict=True))
            logs |= {name: mean for name, mean in means.items() if not math.isnan(mean)}  # NaN: there was nothing
            peak = peak_memory_bytes(self.args.device)
            logs |= {} if peak is None else {"peak_memory_bytes": peak}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: QuestionBatch) -> int:  # type: ignore[override]
        """6 operations a parameter and trained token, 2 for a token that is only measured."""
        feedback = self._since_step[-1]
        selected = feedback.weights > 0
        share = bool(self._shares_prompts)
        trained, measured = inputs.tokens(selected, share), inputs.tokens(feedback.measured & ~selected, share)
        return (6 * trained + 2 * measured) * self.model.num_parameters(exclude_embeddings=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and resuming

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, with the assistant beside the student, whose generation stops where it was taught to stop."""
        # The end of the turn need not be the EOS that its settings name. Under adapters those of the base are read.
        student = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if student.generation_config is not None:
            assert isinstance(self.processing_class, PreTrainedTokenizerBase)
            student.generation_config.eos_token_id = generation_stop_ids(student, self.processing_class)
        super().save_model(output_dir, _internal_call)
        if self.calibrator is not None and self.args.should_save:
            self.calibrator.assistant.save(output_dir or self.args.output_dir, self.perspectives)

    def _get_output_dir(self, trial: Any) -> str:
        return self._partial_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint with MIND's state, under another name until the last byte is on the disk.

        A run killed at any moment leaves whole checkpoints and at most one folder that is not taken for one.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = os.path.join(self.args.output_dir, PARTIAL_PREFIX + name)
        self._partial_dir = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial_dir = None
        self.accelerator.wait_for_everyone()  # each rank has written its own random state
        if self.args.should_save:
            if not self.args.save_only_model:
                calibrator = None if self.calibrator is None else self.calibrator.state_dict()
                torch.save(self._identity() | {"calibrator": calibrator}, os.path.join(partial, name, STATE_FILE))
            publish(partial, self.args.output_dir, name)
            rotate_checkpoints(self.args.output_dir, save_total_limit=self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common."""
        return {
            "method": self.args.method,
            "lora_r": self.args.lora_r if self.args.use_lora else None,
            "perspectives": list(self.perspectives),
            "question_ids": [question.id for question in self.train_dataset.questions],
            "answer_suffix": self.train_dataset.prompt_format.answer_suffix,
        }

    def _load_state(self, checkpoint: str) -> None:
        state = read_state(checkpoint, self._identity())
        if self.calibrator is None:
            return
        assistant, _ = load_assistant(checkpoint)
        for name, wanted in self.calibrator.assistant.options.items():
            if assistant.options[name] != wanted:
                given = assistant.options[name]
                raise ValueError(f"{checkpoint}: its teaching assistant has {name} = {given}, wanted {wanted}")
        self.calibrator.assistant.load_state_dict(assistant.state_dict())
        self.calibrator.load_state_dict(state["calibrator"])


class _StepCallback(TrainerCallback):
    """The two moments at which Trainer calls back what MindTrainer has to do."""

    def __init__(self, trainer: MindTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._learn_from_feedback()


def _read(attachment: MindAttachment, batch: dict[str, Any]) -> Tensor:
    """(R·T, H), what enters the head."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return attachment.read(inputs, batch.get("shared_prompts")).flatten(0, 1)


def _check_dataset(dataset: MindDataset, args: MindConfig, model: PreTrainedModel) -> None:
    if len(dataset) == 0:
        raise ValueError("train_dataset: has no questions, wanted at least one")
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(dataset) < batch:
        raise ValueError(
            f"dataloader_drop_last: given {len(dataset)} questions and batches of {batch}, which leaves no batch, "
            "wanted a smaller per_device_train_batch_size"
        )
    golden = args.golden_perspective
    if golden is not None:
        if golden not in dataset.perspectives:
            raise ValueError(f"golden_perspective: given {golden!r}, wanted one of {', '.join(dataset.perspectives)}")
        k = dataset.perspectives.index(golden)
        missing = [question.id for question in dataset.questions if not question.mask[k]]
        if missing and args.method == "single_path":
            raise ValueError(f"golden_perspective: question {missing[0]!r} has no {golden!r}, wanted one in each")
    vocab_size = model.get_output_embeddings().weight.shape[0]
    for question in dataset.questions:
        largest = max(max(ids) for ids in (question.prompt_ids, *question.target_ids) if ids)
        if largest >= vocab_size:
            raise ValueError(
                f"train_dataset: token {largest} in question {question.id!r}, wanted tokens below the student's "
                f"vocabulary of {vocab_size}: is this its tokenizer?"
            )
    _check_lengths(dataset, model)


def _check_lengths(dataset: MindDataset, model: PreTrainedModel | PeftModel, role: str = "student") -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for question in dataset.questions:
        if positions is not None and max(question.lengths) > positions:
            raise ValueError(
                f"question {question.id!r} takes {max(question.lengths)} tokens, wanted at most the {role}'s "
                f"{positions} positions: shorten it"
            )


def _with_lora(model: PreTrainedModel, args: MindConfig) -> Any:
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear",  # but the head
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)

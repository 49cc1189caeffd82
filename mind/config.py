"""MindConfig: every setting of a training run. Each field is also a flag of the command line."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from accelerate.utils import DynamoBackend
from torch.compiler import list_backends
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_torch_bf16_available_on_device

from mind.prompting import PromptFormat

NO_WORKERS = "questions are tokenised and in memory, which a process of its own would only copy"
ONE_PRECISION = "losses and answers are measured in the precision of training"
SHARDING = "a rank measures rationales that others have not, and sharded ranks must read together"
# Settings of TrainingArguments that the trainer does not do: (name, the only value, why). Their help says so too.
REFUSED = (
    ("eval_strategy", "no", "held-out accuracy is measured by mind.evaluation"),
    ("eval_on_start", False, "held-out accuracy is measured by mind.evaluation"),
    ("load_best_model_at_end", False, "held-out accuracy is measured by mind.evaluation"),
    ("label_smoothing_factor", 0.0, "the fused loss has no label smoothing"),
    ("auto_find_batch_size", False, "it starts training again after the assistant has moved"),
    ("include_num_input_tokens_seen", "no", "supervised tokens per second are logged instead"),
    ("remove_unused_columns", False, "batches are questions, not columns"),
    ("push_to_hub", False, "what is uploaded is renamed meanwhile; upload output_dir/student after the run"),
    ("enable_jit_checkpoint", False, "it saves within a step; a run that was ended goes on from its last checkpoint"),
    ("bf16_full_eval", False, ONE_PRECISION),
    ("fp16_full_eval", False, ONE_PRECISION),
    ("dataloader_num_workers", 0, NO_WORKERS),
    ("dataloader_persistent_workers", False, NO_WORKERS),
    ("dataloader_prefetch_factor", None, NO_WORKERS),
    ("dataloader_multiprocessing_context", None, NO_WORKERS),
    ("fsdp", None, SHARDING),
    ("deepspeed", None, SHARDING),
    ("parallelism_config", None, SHARDING),
)
Method = Literal[
    "mind", "no_fusion", "instant_loss", "instant_meta", "no_attention", "no_cons", "single_path", "mcc_kd"
]
Divergence = Literal["forward", "reverse", "jsd"]
TemperaturePower = Literal[0, 2]
Direction = Literal["prediction_first", "target_first"]
ASSISTANT_METHODS = ("mind", "instant_meta", "no_attention", "no_cons")  # those whose weights a teaching assistant sets


def computes_bf16(use_cpu: bool) -> bool:
    """Whether the device that is trained on has instructions for bfloat16 products, not an emulation of them."""
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if accelerator.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_available_on_device(accelerator.type)


@dataclass
class MindConfig(TrainingArguments):
    """`transformers.TrainingArguments` with MIND's settings and defaults.

    Defaults that differ from TrainingArguments': 8 questions an optimiser step (one at a time, accumulated: a question
    is up to K sequences), learning rate 1e-5 (1e-4 with LoRA), cosine schedule with 3 % warm-up, every step logged, two
    checkpoints kept. Keep the student's weights in fp32 and set `bf16` for autocast: at 1e-5 an update is smaller than
    the spacing of bf16 numbers, so pure bf16 weights would round it away. `bf16=None` sets it where the device computes
    in bf16.

    Raises: ValueError naming the field whose value is out of range or cannot be met.
    """

    # What the student learns from
    method: Method = field(
        default="mind",
        metadata={
            "help": "mind: the whole method. no_fusion: all rationales weigh the same. instant_loss: weights from the "
            "student's current losses, no teaching assistant. instant_meta: the assistant steps as often as the "
            "student. no_attention: it scores each rationale alone. no_cons: no consistency loss. single_path: one "
            "golden rationale. mcc_kd: two random rationales and symmetric KL between their answers."
        },
    )
    beta: float = field(
        default=0.8,
        metadata={
            "help": "A rationale is selected when its score is at least beta times the best, in [0, 1]. Fitting scores "
            "differ as the losses do: with a best score near 1, that is within 1 - beta nats of the easiest."
        },
    )
    tau: float = field(default=0.2, metadata={"help": "Temperature of the calibration loss and of instant_loss."})
    tau_student: float = field(
        default=0.1, metadata={"help": "Temperature of the selected rationales' weights, in units of the score."}
    )
    consistency_weight: float = field(
        default=0.1, metadata={"help": "λ: weight of the divergence between the answers after different rationales."}
    )
    golden_perspective: str | None = field(
        default=None,
        metadata={"help": "single_path's rationale. Default: the first perspective that the question has."},
    )

    # A white-box teacher's distributions
    kl_weight: float = field(default=0.0, metadata={"help": "γ: weight of the KL to the teacher; needs a teacher."})
    kl_divergence: Divergence = field(
        default="forward",
        metadata={"help": "forward: KL(teacher‖student). reverse: KL(student‖teacher). jsd: generalised by kl_beta."},
    )
    kl_beta: float = field(default=0.5, metadata={"help": "β of the generalised Jensen-Shannon divergence, in (0, 1)."})
    kl_temperature: float = field(default=1.0, metadata={"help": "Temperature of teacher and student in the KL."})
    kl_temperature_power: TemperaturePower = field(
        default=2, metadata={"help": "The KL is multiplied by the temperature to this power."}
    )

    # The teaching assistant
    assistant_hidden_size: int = field(default=256, metadata={"help": "Width d of the teaching assistant."})
    assistant_heads: int = field(default=4, metadata={"help": "Attention heads of the teaching assistant."})
    assistant_dropout: float = field(default=0.1, metadata={"help": "Dropout of the teaching assistant."})
    shared_head: bool = field(
        default=False,
        metadata={"help": "One scoring head for all perspectives: for samples that have no names of their own."},
    )
    assistant_warmup_epochs: int = field(
        default=2, metadata={"help": "Epochs in which the assistant is trained alone, the student frozen."}
    )
    assistant_warmup_lr: float = field(default=1e-3, metadata={"help": "Its learning rate in these epochs."})
    assistant_learning_rate: float = field(default=1e-4, metadata={"help": "Its learning rate beside the student."})
    assistant_window: int = field(
        default=32, metadata={"help": "Questions between two of its steps: filters the noise of single batches."}
    )
    feedback_share: float = field(
        default=1.0,
        metadata={
            "help": "Share of the questions, in (0, 1], drawn at random, whose unselected rationales the student reads "
            "forward-only so that the assistant learns from them, in its warm-up and beside the student. 1: all."
        },
    )
    calibration_direction: Direction = field(
        default="prediction_first",
        metadata={"help": "prediction_first: KL(score‖loss). target_first: KL(loss‖score), the classic order."},
    )
    loss_ema: float = field(
        default=0.0,
        metadata={"help": "Decay, in [0, 1), of the moving average of the losses that the assistant sees. 0: off."},
    )

    # Tokens and memory
    answer_suffix: str = field(
        default=PromptFormat.answer_suffix,
        metadata={
            "help": 'What follows every rationale; holds "{answer}" once. An answer that is not read back from it is '
            "an error: one with a line break; with this suffix one like St. Ives, which wants one without a period."
        },
    )
    max_length: int = field(
        default=1024, metadata={"help": "Tokens of a prompt, rationale and suffix; a longer one is an error."}
    )
    share_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "Read each question's prompt once, not once for each of its rationales, and no padding; the same "
            "to rounding. Default: where student and teacher have nothing between tokens but attention, which is "
            "eager, sdpa or flash_attention_2, and no neftune_noise_alpha, whose noise depends on a row's length."
        },
    )
    max_logits_bytes: int | None = field(
        default=None, metadata={"help": "Memory budget of the loss for logits, in bytes. Default: the kernels' own."}
    )
    gradient_tolerance: float = field(
        default=0.0,
        metadata={
            "help": "Share, in [0, 1), of the logit gradient's norm that the loss's backward pass may leave out; 0: "
            "none, the exact gradient. 0.001 nearly halves the cost of the loss for a trained student in fp32."
        },
    )

    # LoRA
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters on all linear layers only."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters: alpha / r."})
    lora_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout of the adapters. As any dropout of the student, it disturbs the losses of selected "
            "rationales that the assistant learns from, not those of the others."
        },
    )

    # TrainingArguments with other defaults
    output_dir: str = field(default="runs/mind", metadata={"help": "Folder of checkpoints, logs and the final model."})
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Questions in one forward pass; each brings its selected rationales."}
    )
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Forward passes in one optimiser step: times the batch size, 8 questions."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Of the student. Default: 1e-5, with LoRA 1e-4."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule of the student."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up steps of the student's schedule; below 1, a share of all steps."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every this many optimiser steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave off: a NaN or Inf loss stops the run, it is not filtered from the log."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints are kept."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave off: batches are questions, not columns."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: go on from the last checkpoint in output_dir. A folder: from that checkpoint."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=False,
        metadata={
            "help": "Autocast to bfloat16. From Python also None, in a file null: where the device has instructions "
            "for it; a CPU without them takes several times as long."
        },
    )

    liger_kernel_config: dict[str, Any] | str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "With use_liger_kernel: JSON of which kernels to use; not the loss, which is fused already."},
    )
    # Those given as JSON
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "liger_kernel_config"]  # noqa: RUF012

    def __post_init__(self) -> None:
        positive = (
            "tau",
            "tau_student",
            "kl_temperature",
            "assistant_hidden_size",
            "assistant_heads",
            "assistant_warmup_lr",
            "assistant_learning_rate",
            "assistant_window",
            "max_length",
            "lora_r",
            "lora_alpha",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        )
        for name in positive:
            self._want(name, getattr(self, name) > 0, "a positive number")
        for name in ("consistency_weight", "kl_weight", "assistant_warmup_epochs", "weight_decay"):
            self._want(name, getattr(self, name) >= 0, "a number that is not negative")
        for name in ("assistant_dropout", "lora_dropout", "loss_ema", "gradient_tolerance"):
            self._want(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._want("seed", 0 <= self.seed < 2**32, f"0 to {2**32 - 1}")
        self._want("beta", 0 <= self.beta <= 1, "a number in [0, 1]")
        self._want("feedback_share", 0 < self.feedback_share <= 1, "a number in (0, 1]")
        self._want("kl_beta", 0 < self.kl_beta < 1, "a number in (0, 1)")
        ends = self.max_steps > 0 or 0 < self.num_train_epochs < math.inf
        self._want("num_train_epochs", ends, "a positive number, or max_steps")
        self._want("max_logits_bytes", self.max_logits_bytes is None or self.max_logits_bytes > 0, "a positive number")
        heads = self.assistant_heads
        fits = self.assistant_hidden_size % heads == 0 and self.assistant_hidden_size % 2 == 0
        self._want("assistant_hidden_size", fits, f"a multiple of 2 and of assistant_heads = {heads}")
        choices = {
            "method": Method,
            "kl_divergence": Divergence,
            "kl_temperature_power": TemperaturePower,
            "calibration_direction": Direction,
        }
        for name, kind in choices.items():
            values = get_args(kind)
            self._want(name, getattr(self, name) in values, "one of " + ", ".join(map(str, values)))
        PromptFormat(self.answer_suffix)
        # What the trainer does not do is refused, not ignored.
        for name, value, reason in REFUSED:
            given = getattr(self, name, None)  # not each is in the oldest
            self._want(name, given == value or not given, f"{value!r}: {reason}")
        self._want("save_strategy", self.save_strategy != "best", "no, steps or epoch: nothing is evaluated in between")
        by_itself = getattr(self, "train_sampling_strategy", "random") in ("random", "sequential")  # not in the oldest
        self._want("train_sampling_strategy", by_itself, "random or sequential: a batch is made of questions")
        averages = getattr(self, "average_tokens_across_devices", True)
        self._want("average_tokens_across_devices", averages, "True: a step is the mean over all ranks' questions")
        given = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        blind = given not in ("reduce_lr_on_plateau", "greedy")
        self._want("lr_scheduler_type", blind, "one that follows no evaluation: nothing is evaluated in between")
        noise = self.neftune_noise_alpha
        self._want("neftune_noise_alpha", noise is None or noise >= 0, "a number that is not negative")
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.use_lora else 1e-5
        self._want("learning_rate", self.learning_rate >= 0, "a number that is not negative")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # there is nothing else, and transformers wants bf16 on a CPU to be asked for so
        if self.bf16 is None:
            self.bf16 = not self.fp16 and computes_bf16(self.use_cpu)
        elif self.bf16 and not computes_bf16(self.use_cpu):
            warnings.warn(
                "bf16: given True on a device without bfloat16 instructions, where it is slower than float32",
                stacklevel=3,
            )
        try:
            super().__post_init__()
        except ValueError as error:
            if self.ddp_backend is None or "process group has not been initialized" not in str(error):
                raise
            raise ValueError(
                f"ddp_backend: given {self.ddp_backend!r} in a process by itself, wanted None, or torchrun to launch it"
            ) from error
        on_cpu = self.device.type == "cpu"
        self._want("fp16", not (self.fp16 and on_cpu), "False on a CPU, where it would train in float32, or bf16")
        if self.use_liger_kernel:
            self._want("use_liger_kernel", not on_cpu, "False on a CPU, for which Liger has no kernels")
            chosen = self.liger_kernel_config or {}
            plain = isinstance(chosen, dict) and not chosen.get("fused_linear_cross_entropy", False)
            self._want("liger_kernel_config", plain, 'JSON with "fused_linear_cross_entropy": false: the loss is fused')
            self.liger_kernel_config = {"fused_linear_cross_entropy": False, **chosen}  # type: ignore[dict-item]
        for name, value, reason in (
            ("split_batches", False, "per_device_train_batch_size says how many questions a rank reads at a time"),
            ("dispatch_batches", None, "each rank reads its own questions"),
            ("use_seedable_sampler", True, "a resumed run would read some questions twice and others not at all"),
            ("even_batches", True, "a rank with fewer batches than another would leave it waiting"),
        ):
            option = getattr(self.accelerator_config, name)
            if bool(option) != bool(value):
                raise ValueError(f"accelerator_config: given {name} = {option!r}, wanted {value!r}: {reason}")
        # transformers uses Flyte and Azure where they are named, but does not tell whether they are installed.
        loggers = [*get_available_reporting_integrations(), "azure_ml", "flyte"]
        for name in self.report_to or ():
            if name not in loggers:
                wanted = ", ".join(loggers[:-2]) or "nothing"
                raise ValueError(f"report_to: given {name!r}, wanted none, all or what is installed: {wanted}")
        if self.torch_compile:
            assert self.torch_compile_backend is not None  # TrainingArguments has set it
            backends = {item.value.lower() for item in DynamoBackend} & {"no", *list_backends(exclude_tags=())}
            known = self.torch_compile_backend.lower() in backends
            self._want("torch_compile_backend", known, f"one of {', '.join(sorted(backends))}")
            from torch._inductor import list_mode_options  # here because it imports the compiler

            modes = list_mode_options()
            known = self.torch_compile_mode is None or self.torch_compile_mode in modes
            self._want("torch_compile_mode", known, f"one of {', '.join(modes)}")

    def _want(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{name}: given {getattr(self, name)!r}, wanted {wanted}")

    @property
    def uses_assistant(self) -> bool:
        """Whether a teaching assistant sets the weights, and so needs the student's losses."""
        return self.method in ASSISTANT_METHODS

    @property
    def fused_consistency_weight(self) -> float:
        """λ within the fused loss: 0 without a consistency loss, and in mcc_kd, whose KL is made beside it."""
        return 0.0 if self.method in ("no_cons", "mcc_kd") else self.consistency_weight

    @property
    def prompt_format(self) -> PromptFormat:
        return PromptFormat(self.answer_suffix)

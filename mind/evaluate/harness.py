"""The student and the tasks through lm-evaluation-harness.

What the harness is told, so that a student is asked as it was trained: the question is one user turn of the chat
template (PLAIN_TEMPLATE where there is none), no BOS token beside the template's, greedy whatever the model's own
settings, until the end of the turn that training teaches. That the token ids come out the same is checked, not assumed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig

from mind.data import check_answer, load_records
from mind.evaluate.results import FORMAT, VERSION, EvaluationError, averages, task_result
from mind.evaluate.rows import exact_match, to_dataset
from mind.evaluation import generation_stop_ids
from mind.prompting import PLAIN_TEMPLATE, PromptFormat, end_of_turn_id
from mind.students import load_student, student_source

TASKS_FOLDER = Path(__file__).parent / "tasks"
TASKS = ("gsm8k", "svamp", "math500", "csqa", "strategyqa", "gpqa_diamond")


def evaluate(
    student: str,
    *,
    tasks: Sequence[str] = (),
    data: Sequence[str] = (),
    ood_data: Sequence[str] = (),
    prompt_format: PromptFormat,
    instruction: str = "",
    max_new_tokens: int = 512,
    batch_size: int = 16,
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    backend: str = "hf",
    seed: int = 0,
) -> dict[str, Any]:
    """The evaluation of a student, as `mind.evaluate.results` describes it.

    student: a built-in name, a folder or a hub id.
    tasks: names of TASKS, read from the hub, or "name=FILE": a local JSON or JSONL copy with the hub's columns.
    data, ood_data: JSONL files of records (rationales are not needed), told as in or out of distribution; the task's
        name is the file's without its ending.
    instruction: a last line of every question. A student that was not trained yet does not know the answer suffix and
        is told here, or none of its answers is found.
    limit: the first so many questions of each task. dtype: "float32", "bfloat16", "float16". device: default the GPU
    where there is one. backend: "hf", or "vllm", which chooses its device itself. seed: of the bootstrap.

    Raises: ValueError naming the task, file, student or argument that cannot be used.
    """
    lm_eval = _import_harness()
    start = time.perf_counter()
    limit = _at_least_one("limit", limit) if limit is not None else None
    loaded = _load_tasks(tasks, data, ood_data, _at_least_one("max_new_tokens", max_new_tokens), prompt_format)
    _at_least_one("batch_size", batch_size)
    if backend == "vllm":
        if device is not None:
            raise EvaluationError(f"device: given {device!r} with backend vllm, which chooses its own, wanted none")
        model = _vllm_model(student, dtype)
    else:
        model = _hugging_face_model(student, dtype, device, batch_size)
    has_chat_template = bool(model.tokenizer.chat_template)
    for task in loaded.values():
        doc_to_text = functools.partial(_text, instruction=instruction, plain=not has_chat_template)
        task.set_config("doc_to_text", doc_to_text)
        if backend == "vllm":
            stops = {"stop_token_ids": [end_of_turn_id(model.tokenizer)]}
            task.set_config("generation_kwargs", stops, update=True)
        docs = task.eval_docs
        docs = docs if limit is None else docs.select(range(min(limit, len(docs))))
        _check_prompts(task.config.task, docs, doc_to_text, model, prompt_format, max_new_tokens, instruction)
    output = lm_eval.simple_evaluate(
        model=model,
        tasks=list(loaded.values()),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False),
        apply_chat_template=has_chat_template,
        limit=limit,
        bootstrap_iters=0,  # the intervals are ours: the harness's need no question to be kept
    )
    results = {
        name: task_result(
            [_answer(sample, prompt_format) for sample in sorted(output["samples"][name], key=lambda s: s["doc_id"])],
            name=name,
            distribution=task.config.metadata["distribution"],
            source=task.config.metadata["source"],
            seed=seed,
        )
        for name, task in loaded.items()
    }
    packages = ["lm-eval", "transformers", "torch", *(["vllm"] if backend == "vllm" else [])]
    return {
        "format": FORMAT,
        "version": VERSION,
        "student": student,
        "backend": backend,
        "dtype": dtype,
        "answer_suffix": prompt_format.answer_suffix,
        "instruction": instruction,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "seconds": round(time.perf_counter() - start, 1),
        "tasks": results,
        **averages(results, seed),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def read_task_file(path: Path) -> dict[str, Any]:
    """A task file as the harness reads it: `include` is merged beneath it, `!function` imports."""
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    included = config.pop("include", None)
    return config if included is None else read_task_file(path.parent / included) | config


class _TaskLoader(yaml.SafeLoader):
    pass


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, _, name = str(loader.construct_scalar(node)).rpartition(".")
    return getattr(importlib.import_module(module), name)


_TaskLoader.add_constructor("!function", _function)


def _load_tasks(
    tasks: Sequence[str],
    data: Sequence[str],
    ood_data: Sequence[str],
    max_new_tokens: int,
    prompt_format: PromptFormat,
) -> dict[str, Any]:
    """{name: lm-eval task} with their questions read."""
    configs: dict[str, dict[str, Any]] = {}

    def add(config: dict[str, Any], source: str) -> None:
        name = config["task"]
        if name in configs:
            raise EvaluationError(f"task {name} is given twice, wanted it once (a data file is named by its file name)")
        config["process_results"] = functools.partial(exact_match, prompt_format=prompt_format)
        config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": max_new_tokens}
        config["metadata"] = config["metadata"] | {"source": source}
        configs[name] = config

    for spec in tasks:
        name, equals, file = spec.partition("=")
        if name not in TASKS:
            raise EvaluationError(f"task {name!r} is unknown, wanted {', '.join(TASKS)}, or --data with a file")
        config = read_task_file(TASKS_FOLDER / f"{name}.yaml")
        if equals and not file:
            raise EvaluationError(f"task {name}: no file behind the =, wanted {name}=FILE, or {name} from the hub")
        if file:
            if not os.path.isfile(file):
                raise EvaluationError(f"task {name}: no such file: {file}")
            files = {config["test_split"]: file}
            config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        add(config, file or config["dataset_path"])
    for distribution, paths in (("in", data), ("out", ood_data)):
        for path in paths:
            config = read_task_file(TASKS_FOLDER / "common.yaml") | {"task": Path(path).stem, "test_split": "test"}
            records = load_records(path, require_rationales=False)
            for record in records:
                check_answer(record, prompt_format)
            docs = [{"id": record.id, "question": record.question, "answers": [record.answer]} for record in records]
            config["custom_dataset"] = functools.partial(_given, docs)
            config["metadata"] = {"version": VERSION, "distribution": distribution}
            add(config, path)
    if not configs:
        raise EvaluationError("no task and no data are given, wanted at least one of --tasks, --data and --ood-data")
    return {name: _open_task(config) for name, config in configs.items()}


def _given(docs: Sequence[Mapping[str, Any]], **metadata: Any) -> dict[str, Any]:
    """The harness's `custom_dataset`: it passes the task's metadata."""
    return {"test": to_dataset(docs)}


def _open_task(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    try:
        return ConfigurableTask(config=config)
    except Exception as error:  # datasets raises many kinds: connection, hub, gate, parsing
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = config["metadata"]["source"]
        raise EvaluationError(f"task {config['task']}: {where} cannot be read: {reason[:400]}") from error


def _text(doc: Mapping[str, Any], *, instruction: str, plain: bool) -> str:
    question = _question(doc, instruction)
    return PLAIN_TEMPLATE.replace("{question}", question) if plain else question


def _question(doc: Mapping[str, Any], instruction: str) -> str:
    return f"{doc['question']}\n{instruction}" if instruction else doc["question"]


def _answer(sample: Mapping[str, Any], prompt_format: PromptFormat) -> dict[str, Any]:
    """One of the harness's samples as it stands in the result file."""
    doc, output = sample["doc"], sample["resps"][0][0]
    return {
        "id": doc["id"],
        "question": doc["question"],
        "wanted": doc["answers"][0],
        "given": prompt_format.extract_answer(output),
        "correct": bool(sample["exact_match"]),
        "output": output,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _import_harness() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("mind evaluate needs lm-eval, which is not installed: pip install lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is done here on purpose
    import lm_eval
    import lm_eval.tasks

    return lm_eval


def _hugging_face_model(student: str, dtype: str, device: str | None, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    place = _device(device)
    model, tokenizer = load_student(student, dtype=getattr(torch, dtype))
    model.to(place)  # type: ignore[arg-type]
    stops = generation_stop_ids(model, tokenizer)
    # Greedy whatever the model's own settings; each row of a batch stops at the end of its own turn.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, add_bos_token=_bos(tokenizer)
    )


def _vllm_model(student: str, dtype: str) -> Any:
    try:
        import vllm  # noqa: F401 -- the harness takes one that cannot be imported for one that is not there
    except ImportError as error:
        reason = "is not installed: pip install vllm" if error.name == "vllm" else f"cannot be imported: {error}"
        raise EvaluationError(f"--backend vllm: vLLM {reason}") from error
    from lm_eval.models.vllm_causallms import VLLM
    from transformers import AutoTokenizer

    source = student_source(student)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(f"student {student!r} has no tokenizer that can be loaded: {reason}") from error
    try:
        return VLLM(pretrained=source, dtype=dtype, batch_size="auto", add_bos_token=_bos(tokenizer))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(f"student {student!r} cannot be loaded by vLLM: {reason}") from error


def _bos(tokenizer: Any) -> bool | None:
    """The harness's add_bos_token: False where the chat template writes it itself, else what the tokenizer does."""
    return False if tokenizer.chat_template else None


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise EvaluationError(f"device: given {name!r}, but this machine or this build of PyTorch has no CUDA")
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, NotImplementedError) as error:  # no such device, no such one here, or one without numbers
        raise EvaluationError(f"device: given {name!r}, wanted cpu, cuda or cuda:0 where there is one") from error
    return device


def _check_prompts(
    name: str,
    docs: Any,
    doc_to_text: Any,
    model: Any,
    prompt_format: PromptFormat,
    max_new_tokens: int,
    instruction: str,
) -> None:
    """Raises: EvaluationError for a prompt that is not training's or leaves no room for the answer."""
    for doc in docs:
        text = doc_to_text(doc)
        if model.tokenizer.chat_template:
            text = model.apply_chat_template([{"role": "user", "content": text}])
        ids = model.tok_encode(text)
        if ids != prompt_format.prompt_ids(model.tokenizer, _question(doc, instruction)):
            raise EvaluationError(
                f"task {name}: question {doc['id']!r} is tokenised by lm-eval in another way than training does, "
                "wanted a tokenizer that adds nothing but a BOS token to a text"
            )
        # The harness itself would cut the prompt's beginning off.
        if len(ids) + max_new_tokens > model.max_length:
            raise EvaluationError(
                f"task {name}: question {doc['id']!r}: its prompt of {len(ids)} tokens and max_new_tokens = "
                f"{max_new_tokens} exceed the student's {model.max_length} positions"
            )


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise EvaluationError(f"{name}: given {value}, wanted at least 1")
    return value

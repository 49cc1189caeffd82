"""`mind generate`: asks, judges, selects, writes and reports."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from tqdm.auto import tqdm
from transformers import AutoTokenizer

from mind.cli import dataclass_parser, parse_settings
from mind.data import Record, check_answer, load_records
from mind.generate import GenerateError
from mind.generate.judge import (
    UNDECIDED,
    WRONG,
    Verdict,
    choose_questions,
    difficulty,
    is_free_text,
    judge,
    near_duplicates,
    says_yes,
)
from mind.generate.ledger import Answer, Ledger, Request, request_key
from mind.generate.prompts import JUDGE_PROMPT, answer_line, copy_prompts, fill, read_prompts
from mind.generate.report import Pair, build_report, count_reasons, print_report
from mind.generate.teachers import LocalTeacher, Sampling, ServerTeacher, Teacher, VLLMTeacher, read_key
from mind.generate.topk import StudentTokens, TopK, write_topk
from mind.problems.__main__ import write_jsonl
from mind.prompting import PromptFormat
from mind.students import student_source

JUDGE_TOKENS = 256  # longest reply of a model judge


@dataclass
class GenerateConfig:
    """Settings of `mind generate`.

    Raises: GenerateError naming the setting.
    """

    data: str = field(
        metadata={
            "help": "Questions with answers: JSONL file, folder saved by datasets, or hub id. Rationales are unused."
        }
    )
    output: str = field(
        metadata={
            "help": "JSONL file of records for mind train. Beside it stand NAME.ledger.jsonl, all answers, by which a "
            "killed run goes on and a changed one asks only what is new; NAME.report.json; NAME.topk.parquet."
        }
    )
    teacher: str = field(
        metadata={"help": "The server's name of a model; without base_url a built-in student, a folder or a hub id."}
    )
    engine: Literal["server", "transformers", "vllm"] | None = field(
        default=None,
        metadata={"help": "What runs the teacher. Default: server with base_url, otherwise transformers."},
    )
    base_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint, as in http://localhost:8000/v1."}
    )
    api_key_env: str | None = field(
        default=None,
        metadata={"help": "Environment variable that holds the key. Default: OPENAI_API_KEY, which may be unset."},
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Folder of prompts, PERSPECTIVE.txt each; see --copy_prompts. Default: the eight built in."},
    )
    answer_suffix: str = field(
        default=PromptFormat.answer_suffix,
        metadata={"help": 'The line to finish with, as mind train has it; holds "{answer}" once.'},
    )
    concurrency: int = field(
        default=16,
        metadata={
            "help": "Requests in flight at a server; prompts in a batch of a local model. vLLM is given all at once."
        },
    )
    max_tokens: int = field(default=1024, metadata={"help": "Longest answer; one that is cut there is dropped."})
    temperature: float = field(default=0.0, metadata={"help": "Of the teacher's sampling. 0: greedy."})
    extra_body: str | None = field(
        default=None,
        metadata={
            "help": 'JSON object of further fields of a request, as in {"max_tokens": null, "max_completion_tokens": '
            "4096}; null takes a field out."
        },
    )
    timeout: float = field(default=600.0, metadata={"help": "Seconds that one answer of a server may take."})
    max_tries: int = field(default=8, metadata={"help": "How often a request is tried; 3 times at most the first one."})
    retry_wait: float = field(
        default=1.0,
        metadata={"help": "Seconds, about, before the second try, doubling up to 60; Retry-After is obeyed."},
    )

    top_logprobs: int = field(
        default=0, metadata={"help": "Store the k most probable tokens at each of the teacher's, for the top-k KL."}
    )
    student: str | None = field(
        default=None, metadata={"help": "With top_logprobs: the student whose tokens they are aligned to."}
    )

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Model that compares free-text answers which differ in words; tried before the teacher is asked. "
            "Default: none, they are wrong."
        },
    )
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Its endpoint. Default: base_url, or this machine without one."}
    )
    judge_api_key_env: str | None = field(
        default=None,
        metadata={"help": "Its key's variable. Default: the teacher's key, if the endpoint is the teacher's."},
    )
    difficulty_student: str | None = field(
        default=None,
        metadata={
            "help": "Local model whose failures at the same prompts tell a question's difficulty; tried before the "
            "teacher is asked. Default: the teacher."
        },
    )
    easy_difficulty: float = field(
        default=0.0, metadata={"help": "A question is easy when at most this share of the answers fails."}
    )
    easy_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the easy questions to keep, at random, at least one unless 0; all hard ones are kept."
        },
    )
    target_size: int | None = field(
        default=None,
        metadata={"help": "Questions to keep: all hard ones and as many easy ones as fit. Instead of easy_share."},
    )
    seed: int = field(default=0, metadata={"help": "Of the choice of easy questions and of a local model's sampling."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress."})

    def __post_init__(self) -> None:
        at_least_1 = ("concurrency", "max_tokens", "max_tries")
        for name in at_least_1:
            self._want(name, getattr(self, name) >= 1, "at least 1")
        for name in ("timeout", "retry_wait"):
            self._want(name, getattr(self, name) > 0, "a positive number of seconds")
        self._want("temperature", 0 <= self.temperature < math.inf, "a number that is not negative")
        self._want("top_logprobs", self.top_logprobs >= 0, "a number that is not negative")
        for name in ("easy_difficulty", "easy_share"):
            self._want(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        self._want("target_size", self.target_size is None or self.target_size >= 1, "at least 1")
        if self.engine is None:
            self.engine = "transformers" if self.base_url is None else "server"
        if (self.engine == "server") != (self.base_url is not None):
            raise GenerateError(
                f"base_url: given {self.base_url!r} with engine {self.engine}, wanted one with server only"
            )
        if self.top_logprobs and self.student is None:
            raise GenerateError("student: not given, wanted the one whose tokens top_logprobs are aligned to")
        judged_by_server = self.judge_base_url is not None or self.base_url is not None
        for name, used, needs in (
            ("student", self.top_logprobs, "top_logprobs"),
            ("extra_body", self.base_url, "base_url"),
            ("api_key_env", self.base_url, "base_url"),
            ("judge_base_url", self.judge, "judge"),
            ("judge_api_key_env", self.judge, "judge"),
            ("judge_api_key_env", judged_by_server, "judge_base_url or base_url"),
        ):
            if getattr(self, name) is not None and not used:  # its value may hold a key
                raise GenerateError(f"{name}: given without {needs}, where it has no effect")
        PromptFormat(self.answer_suffix)
        self._want("seed", 0 <= self.seed < 2**32, f"0 to {2**32 - 1}")
        self._want("extra_body", isinstance(self.fields_of_request, dict), "a JSON object")

    def _want(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise GenerateError(f"{name}: given {getattr(self, name)!r}, wanted {wanted}")

    @property
    def fields_of_request(self) -> dict[str, Any]:
        try:
            fields = json.loads(self.extra_body or "{}")
            json.dumps(fields, allow_nan=False)  # NaN, which Python reads, is in no request
            return fields
        except ValueError as error:
            raise GenerateError(f"extra_body: given {self.extra_body!r}, wanted a JSON object: {error}") from error

    @property
    def prompt_format(self) -> PromptFormat:
        return PromptFormat(self.answer_suffix)


def main(arguments: Sequence[str]) -> None:
    """`mind generate`. Raises: ValueError or TypeError about bad input."""
    generate(parse(arguments))


def parse(arguments: Sequence[str]) -> GenerateConfig:
    """Raises: UsageError naming the flag, or the file, line and key; GenerateError naming the setting; SystemExit(0)
    after --help and --copy_prompts.
    """

    class CopyPrompts(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
            copy_prompts(values)
            raise SystemExit(0)

    parser = dataclass_parser(
        GenerateConfig,
        prog="mind generate",
        usage="mind generate --data FILE --output FILE --teacher MODEL [--config FILE] [--SETTING VALUE ...]",
        description="Have a teacher answer every question in several perspectives, keep what is right, and report.",
    )
    parser.add_argument(
        "--copy_prompts",
        metavar="FOLDER",
        action=CopyPrompts,
        help="Copy the built-in prompts there, to edit, and stop.",
    )
    values = vars(parse_settings(parser, arguments))
    del values["copy_prompts"]
    return GenerateConfig(**values)


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Runs everything and returns the report, as mind.generate.report describes it.

    Raises: ValueError or TypeError naming the file, field or setting that cannot be used, or when no rationale is
        right; then nothing but the ledger has changed. GenerateError after everything is written, when requests failed
        in spite of all tries.
    """
    records = load_records(config.data, require_rationales=False)
    for record in records:
        check_answer(record, config.prompt_format)
    prompts = read_prompts(config.prompts)
    files = Files.of(config)
    teacher, judge_model, student = _models(config)
    with Ledger(files.ledger) as ledger:
        work = _Work(config, records, prompts, ledger, judge_model)
        work.try_models(teacher, student)
        verdicts = work.verdicts(teacher)
        by_whom = verdicts if student is None else work.verdicts(student)
        difficulties = {
            record.id: difficulty(answered)
            for record in records
            if (answered := [by_whom[record.id, name] for name in prompts if (record.id, name) in by_whom])
        }
        rows = _select(config, records, prompts, verdicts, difficulties)
        if not rows:
            right = sum(verdict.reason is None for verdict in verdicts.values())
            told = count_reasons(verdict.reason for verdict in verdicts.values()) or "none is answered"
            if right:
                told = f"{right} are right, and the rule keeps none of their questions, which are easy: {_rule(config)}"
            raise GenerateError(
                f"{files.output}: not written: of {len(records) * len(prompts)} rationales none is right and kept "
                f"({told}); what the model wrote is in {files.ledger}"
            )
        answers = work.answers(teacher)
        stored = _store_topk(config, files, work.requests(teacher), ledger, rows)
        write_jsonl(rows, files.output)
        report = build_report(records, list(prompts), answers, verdicts, difficulties, rows)
        report |= {
            "rule": _rule(config),
            "requests": dict(work.requested),
            "failed": len(work.failures),
            "topk": stored,
        }
        write_jsonl([report], files.report)
    print_report(report, files)
    if work.failures:
        told = ", ".join(f"{n} × {reason}" for reason, n in Counter(work.failures.values()).most_common(3))
        raise GenerateError(f"{len(work.failures)} requests failed ({told}): run the same command again to ask them")
    return report


@dataclass(frozen=True)
class Files:
    """What a run writes."""

    output: Path
    ledger: Path
    report: Path
    topk: Path

    @classmethod
    def of(cls, config: GenerateConfig) -> Files:
        """Raises: GenerateError when the output cannot be, or is a file that another program wrote."""
        output = Path(config.output)
        if not output.name:
            raise GenerateError(f"output: given {config.output!r}, wanted a file")
        name = output.name.removesuffix(".jsonl")
        files = cls(
            output, *(output.with_name(f"{name}.{kind}") for kind in ("ledger.jsonl", "report.json", "topk.parquet"))
        )
        if not output.parent.is_dir():
            raise GenerateError(f"output: {output.parent} is no folder, wanted one to write {output.name} in")
        for path in (*vars(files).values(), files.ledger.with_name(f"{files.ledger.name}.lock")):
            if path.is_dir():  # now, not when everything is answered
                raise GenerateError(f"output: {path} is a folder, wanted a file or nothing there")
        if output.exists() and not files.ledger.exists():
            raise GenerateError(f"output: {output} exists already without {files.ledger.name}, wanted a new file")
        try:  # a lock that cannot be made would look like another's
            tempfile.TemporaryFile(dir=output.parent).close()
        except OSError as error:
            raise GenerateError(f"output: {output.parent} cannot be written to: {error.strerror}") from error
        return files


def _models(config: GenerateConfig) -> tuple[Teacher, Teacher | None, LocalTeacher | None]:
    """(teacher, model judge, difficulty student); none is loaded or reached yet.

    Raises: ValueError naming the setting; of the two that answer after the teacher, when they are local, also when
        there is no such model.
    """
    tokens = None
    if config.top_logprobs:
        assert config.student is not None
        tokens = StudentTokens(config.student, _load_tokenizer("student", config.student))
    sampling = Sampling(config.max_tokens, config.temperature, config.top_logprobs, tokens)
    local: dict[str, Any] = {"batch_size": config.concurrency, "seed": config.seed}
    key = None
    served = {name: getattr(config, name) for name in ("concurrency", "timeout", "max_tries", "retry_wait")}
    if config.base_url is not None:
        key = read_key("api_key_env", config.api_key_env or "OPENAI_API_KEY", required=config.api_key_env is not None)
        teacher: Teacher = ServerTeacher(
            config.teacher, config.base_url, key, sampling, config.fields_of_request, **served
        )
    else:
        teacher = (VLLMTeacher if config.engine == "vllm" else LocalTeacher)(config.teacher, sampling, **local)
    judge_model: Teacher | None = None
    judge_url, brief = config.judge_base_url or config.base_url, Sampling(JUDGE_TOKENS)
    if config.judge is not None and judge_url is not None:
        if config.judge_api_key_env is not None:
            key = read_key("judge_api_key_env", config.judge_api_key_env, required=True)
        elif judge_url != config.base_url:  # nobody is shown another one's key
            key = None
        judge_model = ServerTeacher(config.judge, judge_url, key, brief, **served, role="judge")
    elif config.judge is not None:
        judge_model = LocalTeacher(config.judge, brief, **local, role="judge")
    student = None
    if config.difficulty_student is not None:
        plain = Sampling(config.max_tokens, config.temperature)
        student = LocalTeacher(config.difficulty_student, plain, **local, role="difficulty_student")
    for setting, local_model in (("judge", judge_model), ("difficulty_student", student)):
        # Now, not when the teacher has answered everything.
        if isinstance(local_model, LocalTeacher) and not _load_tokenizer(setting, local_model.model).chat_template:
            raise GenerateError(f"{setting}: {local_model.model!r} has no chat template, wanted an instruct model")
    return teacher, judge_model, student


def _load_tokenizer(setting: str, model: str) -> Any:
    source = student_source(model, role=setting)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GenerateError(f"{setting}: the tokenizer of {model!r} cannot be loaded ({reason})") from error


class _Work:
    """Requests, answers and verdicts of all models over the same questions and prompts.

    requested: model -> requests sent in this run. failures: key -> reason, of requests that are still open.
    """

    def __init__(
        self,
        config: GenerateConfig,
        records: Sequence[Record],
        prompts: Mapping[str, str],
        ledger: Ledger,
        judge_model: Teacher | None,
    ) -> None:
        self.config, self.records, self.prompts, self.ledger = config, records, prompts, ledger
        self.judge_model, self._judge_answers = judge_model, False
        self.requested: Counter[str] = Counter()
        self.failures: dict[str, str] = {}

    def requests(self, model: Teacher) -> dict[Pair, Request]:
        identity, line = model.identity, answer_line(self.config.prompt_format)
        requests = {}
        for record in self.records:
            for name, prompt in self.prompts.items():
                text = fill(prompt, {"question": record.question, "answer_line": line})
                requests[record.id, name] = Request(request_key(identity, text), record.id, name, text)
        return requests

    def answers(self, model: Teacher) -> dict[Pair, Answer]:
        """Those that are in the ledger."""
        known = self.ledger.answers
        return {pair: known[request.key] for pair, request in self.requests(model).items() if request.key in known}

    def verdicts(self, model: Teacher) -> dict[Pair, Verdict]:
        """Asks what is not in the ledger yet; then of every answer."""
        self._ask(model, self.requests(model).values(), "answer")
        by_id = {record.id: record for record in self.records}
        verdicts = {
            pair: judge(answer, by_id[pair[0]].answer, self.config.prompt_format)
            for pair, answer in self.answers(model).items()
        }
        return verdicts if self.judge_model is None else verdicts | self._judge_free_text(self.judge_model, verdicts)

    def try_models(self, teacher: Teacher, student: LocalTeacher | None) -> None:
        """Tries the models that answer after others while these have still to answer and be paid for.

        A local one is loaded and shown prompts that it will be given: the difficulty student all of them, the judge
        one. A served judge compares one right answer with itself. Where no answer is free text there is nothing for a
        judge to do.

        Raises: ValueError when a local one cannot be loaded or used; GenerateError when there is no such server or
            model, or it does not take the key or the settings.
        """
        open_to_teacher, _ = self._open(self.requests(teacher).values())
        open_to_student: list[Request] = []
        if student is not None:
            open_to_student, done = self._open(self.requests(student).values())
            if open_to_teacher and open_to_student:
                student.try_loading(open_to_student, proven=done > 0)
        record = next((record for record in self.records if is_free_text(record.answer)), None)
        if record is None or self.judge_model is None:
            return
        trial = self._judge_request(self.judge_model, record, record.answer, "judge")
        waiting = bool(open_to_teacher or open_to_student)
        if waiting and isinstance(self.judge_model, LocalTeacher):
            self.judge_model.try_loading([trial], proven=False)
        elif waiting:
            self._ask(self.judge_model, [trial], "verdict")
        self._judge_answers = isinstance(self.judge_model, LocalTeacher) or trial.key in self.ledger.answers

    def _judge_request(self, model: Teacher, record: Record, given: str, perspective: str) -> Request:
        prompt = JUDGE_PROMPT.read_text(encoding="utf-8").strip()
        text = fill(prompt, {"question": record.question, "answer": record.answer, "given": given})
        return Request(request_key(model.identity, text), record.id, perspective, text)

    def _judge_free_text(self, model: Teacher, verdicts: Mapping[Pair, Verdict]) -> dict[Pair, Verdict]:
        """Second opinions, of the model judge, on free-text answers in other words."""
        by_id = {record.id: record for record in self.records}
        requests = {}
        for pair, verdict in verdicts.items():
            record = by_id[pair[0]]
            if verdict.reason == WRONG and verdict.given and is_free_text(record.answer):
                requests[pair] = self._judge_request(model, record, verdict.given, f"judge of {pair[1]}")
        self._ask(model, requests.values(), "verdict", proven=self._judge_answers)
        opinions = {}
        for pair, request in requests.items():
            reply = self.ledger.answers.get(request.key)
            says = None if reply is None else says_yes(reply.text)
            opinions[pair] = replace(verdicts[pair], reason={True: None, False: WRONG, None: UNDECIDED}[says])
        return opinions

    def _open(self, requests: Iterable[Request]) -> tuple[list[Request], int]:
        """(those that are not answered yet, how many are)."""
        wanted = {request.key: request for request in requests}  # the same prompt twice is one request
        pending = [request for key, request in wanted.items() if key not in self.ledger.answers]
        return pending, len(wanted) - len(pending)

    def _ask(self, model: Teacher, requests: Iterable[Request], unit: str, proven: bool = False) -> None:
        pending, done = self._open(requests)
        if not pending:
            return
        with tqdm(
            total=done + len(pending),
            initial=done,
            desc=f"asking {model.model}",
            unit=unit,
            disable=self.config.disable_tqdm,
        ) as bar:
            model.answer_all(pending, _Desk(self, model.model, bar), proven=proven or done > 0)


class _Desk:
    """Where the answers arrive: into the ledger first, then onto the progress bar."""

    def __init__(self, work: _Work, model: str, bar: Any) -> None:
        self.work, self.model, self.bar = work, model, bar
        self.failed_requests = self.tokens = 0
        self.start = time.perf_counter()

    def answered(self, request: Request, answer: Answer) -> None:
        self.work.ledger.append(request, self.model, answer)
        self.work.requested[self.model] += 1
        self.tokens += answer.completion_tokens or 0
        self.bar.update()
        self._show()

    def failed(self, request: Request, reason: str) -> None:
        self.work.failures[request.key] = reason
        self.work.requested[self.model] += 1
        self.failed_requests += 1
        self._show()

    def _show(self) -> None:
        rate = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix(failed=self.failed_requests, tokens=self.tokens, tokens_per_s=f"{rate:.0f}", refresh=False)


def _select(
    config: GenerateConfig,
    records: Sequence[Record],
    prompts: Mapping[str, str],
    verdicts: Mapping[Pair, Verdict],
    difficulties: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The records of the output."""
    right: dict[str, dict[str, str]] = {}
    for record in records:
        found = {name: verdicts[record.id, name] for name in prompts if (record.id, name) in verdicts}
        texts = {name: verdict.text for name, verdict in found.items() if verdict.reason is None}
        if texts and record.id in difficulties:
            right[record.id] = texts
    chosen = choose_questions(
        {name: difficulties[name] for name in right},
        easy_difficulty=config.easy_difficulty,
        easy_share=config.easy_share,
        target_size=config.target_size,
        seed=config.seed,
    )
    rows = []
    for record in records:
        if record.id not in chosen:
            continue
        duplicates = near_duplicates(right[record.id])
        rationales = [
            {"perspective": name, "text": text, "answer": record.answer}
            | ({"near_duplicate_of": duplicates[name]} if name in duplicates else {})
            for name, text in right[record.id].items()
        ]
        row: dict[str, Any] = {"id": record.id, "question": record.question, "answer": record.answer}
        row |= {"rationales": rationales, "difficulty": round(difficulties[record.id], 4)}
        rows.append(row if record.source is None else row | {"source": record.source})
    return rows


def _store_topk(
    config: GenerateConfig,
    files: Files,
    requests: Mapping[Pair, Request],
    ledger: Ledger,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, int] | None:
    """Writes the log-probabilities of the rationales kept; returns how many tokens they cover, None without any.

    Raises: GenerateError when the teacher's tokens are not the student's.
    """
    if not config.top_logprobs:
        return None
    assert config.student is not None
    student = StudentTokens(config.student, _load_tokenizer("student", config.student))
    kept: dict[str, list[tuple[Pair, str]]] = {}
    for row in rows:
        for rationale in row["rationales"]:
            pair = row["id"], rationale["perspective"]
            kept.setdefault(requests[pair].key, []).append((pair, rationale["text"]))
    covered = {"tokens": 0, "aligned": 0}

    def aligned() -> Iterator[tuple[str, str, list[int], TopK, Any]]:
        for key, topk in ledger.read_topk():
            for pair, text in kept.get(key, ()):
                token_ids, index = student.align(topk, text)
                covered["tokens"] += len(token_ids)
                covered["aligned"] += int((index >= 0).sum())
                yield *pair, token_ids, topk, index
        student.check_share(config.teacher, covered["aligned"], covered["tokens"])

    write_topk(files.topk, aligned(), config.top_logprobs)
    return covered


def _rule(config: GenerateConfig) -> str:
    """How questions are selected, in words."""
    whose = "the teacher" if config.difficulty_student is None else config.difficulty_student
    part = f"{config.easy_share:.0%}" if config.target_size is None else f"as many as fit {config.target_size}"
    return (
        f"difficulty: the share of its answers that {whose} gets wrong; easy: at most {config.easy_difficulty:g}; "
        f"all hard questions are kept, of the easy ones {part}, chosen by seed {config.seed}"
    )

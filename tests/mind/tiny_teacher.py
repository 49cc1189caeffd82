"""A tiny Llama with a chat template that has learnt one sentence: the answer to every question is 5."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import decoders

from .tiny import tiny_student, tiny_tokenizer

SENTENCE = "Two and three are five.\nThe answer is 5."
TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}"
    "{% if turn['role'] == 'assistant' %}<eos>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = {"aloud": "Say aloud. {question} {answer_line}", "steps": "Go in steps: {question} {answer_line}"}


def tiny_teacher(root: Path) -> Path:
    """Its folder below `root`. Trained (some seconds) and saved at the first call."""
    folder = root / "tiny_teacher"
    if folder.exists():
        return folder
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    model = tiny_student(max_position_embeddings=1024, initializer_range=0.05)
    rows = []
    for i in range(16):  # questions of the tests' kind
        prompt = PROMPTS["aloud" if i % 2 else "steps"].replace("{question}", f"What is {i} + {7 * i % 10}?")
        turns = [{"role": "user", "content": prompt.replace("{answer_line}", "The answer is ….")}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        rows.append(tokenizer(f"{text}{SENTENCE}<eos>").input_ids)
    width, answer = max(map(len, rows)), len(tokenizer(SENTENCE).input_ids) + 1
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = torch.full_like(input_ids, -100)
    for row, ids in enumerate(rows):
        labels[row, len(ids) - answer : len(ids)] = input_ids[row, len(ids) - answer : len(ids)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        loss = model(input_ids, labels=labels).loss
        if loss < 0.003:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01, f"the tiny teacher has not learnt its sentence: loss {loss:.3f}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(folder: Path) -> Path:
    folder.mkdir()
    for name, text in PROMPTS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder

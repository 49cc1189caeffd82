"""On-policy distillation: the student writes, and learns from what the teacher thinks of every token it wrote.

    python examples/on_policy_distillation.py [--steps 20] [--teacher NAME] [--layers 20]

A step samples continuations from the student and lowers the reverse KL(student ‖ teacher), or GKD's JSD_β, of their
tokens: mode-seeking, and without exposure bias. fused_linear_kl takes both models' hidden states, so neither's
(tokens, V) logits exist, and nothing is stored for the backward pass but the gradients. The teacher is the built-in
SmolLM2-135M, the student its first layers: from 1.9 to 2.8 nats a token in the first steps to 0.9 in the last, in two
minutes on two cores. Source of the objective: Agarwal et al. 2024 (arXiv 2306.13649).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from mind.problems import generate_records
from mind.students import load_student, student_source
from mind_kernels import TeacherHidden, fused_linear_kl


def divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T)
    prompt_length: int,
    eos_token_id: int,
    name: str = "reverse",
) -> Tensor:
    """The mean over the written tokens of the divergence between the two models' next-token distributions."""
    written = input_ids[:, prompt_length:]
    # Everything up to the first end of text, and that: what generate pads with behind it was not written.
    ends = (written == eos_token_id).cumsum(-1) - (written == eos_token_id).long()
    shift_labels = torch.full_like(input_ids, -100)
    shift_labels[:, prompt_length - 1 : -1] = written.masked_fill(ends > 0, -100)
    inputs = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp_min(0)}
    with torch.no_grad():
        teacher_states = teacher.get_decoder()(input_ids, **inputs)[0]  # (B, T, H_t)
    hidden_states = student.get_decoder()(input_ids, **inputs)[0]  # (B, T, H)
    student_head, teacher_head = student.get_output_embeddings(), teacher.get_output_embeddings()
    # Models with a soft cap or a logit scale want logit_softcap= and logit_scale= in both places.
    loss, _ = fused_linear_kl(
        hidden_states.flatten(0, 1),
        student_head.weight,
        TeacherHidden(teacher_states.flatten(0, 1), teacher_head.weight, teacher_head.bias),
        shift_labels.flatten(),
        lm_head_bias=student_head.bias,
        divergence=name,
    )
    return loss


def main(arguments: list[str] | None = None) -> list[float]:
    """The divergence of each step's samples."""
    parser = argparse.ArgumentParser(description="On-policy distillation.")
    parser.add_argument("--teacher", default="smollm2-135m", help="a built-in name, folder or hub id")
    parser.add_argument("--layers", type=int, default=20, help="of the teacher, which the student begins with")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4, help="prompts a step")
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--divergence", choices=["reverse", "jsd", "forward"], default="reverse")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    logging.set_verbosity_error()  # which layers of the teacher the student leaves out
    teacher, tokenizer = load_student(args.teacher, role="teacher")
    teacher.eval()
    student = AutoModelForCausalLM.from_pretrained(
        student_source(args.teacher), num_hidden_layers=args.layers, dtype=torch.float32
    )
    tokenizer.padding_side = "left"  # generation goes on at the right
    questions = [record["question"] + "\n" for record in generate_records(args.steps * args.samples, seed=0)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    losses = []
    for step in range(args.steps):
        batch = tokenizer(questions[step * args.samples :][: args.samples], padding=True, return_tensors="pt")
        prompts, mask = batch["input_ids"], batch["attention_mask"]
        student.eval()
        sequences = student.generate(
            prompts, attention_mask=mask, do_sample=True, max_new_tokens=args.new_tokens, min_new_tokens=1,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        student.train()
        mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - prompts.shape[1])], dim=1)
        loss = divergence(student, teacher, sequences, mask, prompts.shape[1], tokenizer.eos_token_id, args.divergence)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: {args.divergence} {losses[-1]:.3f} nats a token", flush=True)
    return losses


if __name__ == "__main__":
    main()

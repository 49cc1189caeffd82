from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mind.data import Record
from mind.evaluation import measure_accuracy
from mind.prompting import PromptFormat

PROMPT_FORMAT = PromptFormat()
RECORDS = [
    Record("a", "1+1?", "2", ()),
    Record("b", "What is six times seven, please?", "42", ()),
    Record("c", "Is 9 odd?", "yes", ()),
    Record("d", "Half of nine pounds, in pounds and with a point?", "4.5", ()),
    Record("e", "Tom or Ann?", "Ann", ()),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three special tokens; turns end with one that is not EOS."""
    vocab = {
        token: i for i, token in enumerate(["<eos>", "<user>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<eos>", "<user>", "<end>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
    return tokenizer


def random_model(architecture: str = "llama", **overrides: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": 0,
    }
    sizes |= {"initializer_range": 0.3, "tie_word_embeddings": False, **overrides}
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    if architecture == "gemma3":  # sliding windows shorter than the longest prompt
        return Gemma3ForCausalLM(
            Gemma3TextConfig(
                **sizes, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
            )
        )
    return GPT2LMHeadModel(  # absolute positions
        GPT2Config(
            vocab_size=259, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=0, bos_token_id=0
        )
    )


@pytest.fixture(scope="module")
def trained(tokenizer) -> PreTrainedModel:
    """A model that has learnt RECORDS by heart, from the ids training uses; its dropout must be off to show it."""
    model = random_model(attention_dropout=0.3, initializer_range=0.05)
    sequences = []
    for record in RECORDS:
        prompt = PROMPT_FORMAT.prompt_ids(tokenizer, record.question)
        target = PROMPT_FORMAT.rationale_ids(tokenizer, "I see.") + PROMPT_FORMAT.suffix_ids(tokenizer, record.answer)
        sequences.append((prompt + target, [-100] * len(prompt) + target))
    width = max(len(ids) for ids, _ in sequences)
    input_ids, labels, mask = (
        torch.tensor([row + [fill] * (width - len(row)) for row in rows])
        for rows, fill in (
            ([ids for ids, _ in sequences], 0),
            ([labels for _, labels in sequences], -100),
            ([[1] * len(ids) for ids, _ in sequences], 0),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for _ in range(150):
        model(input_ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_reads_what_training_taught(trained, tokenizer):
    records = [*RECORDS[:4], Record("e", "Tom or Ann?", "Tom", ())]  # the last one wants another answer than was learnt
    result = measure_accuracy(trained, tokenizer, records, prompt_format=PROMPT_FORMAT, max_new_tokens=40, batch_size=2)
    assert result.answers == ["2", "42", "yes", "4.5", "Ann"]
    assert result.outputs == [f"I see.\nThe answer is {answer}." for answer in result.answers]  # no end-of-turn token
    assert result.correct == [True, True, True, True, False]
    assert result.accuracy == 0.8


def test_without_an_answer(trained, tokenizer):
    result = measure_accuracy(trained, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=8)
    assert result.answers == [None] * 5 and result.accuracy == 0.0
    assert [len(output) for output in result.outputs] == [8] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(trained, tokenizer, dtype):
    """Half-precision weights, and float32 weights under autocast."""
    options = {"prompt_format": PROMPT_FORMAT, "max_new_tokens": 40}
    with torch.autocast("cpu", dtype=dtype):
        assert measure_accuracy(trained, tokenizer, RECORDS, **options).accuracy == 1.0
    copy = random_model()
    copy.load_state_dict(trained.state_dict())
    assert measure_accuracy(copy.to(dtype), tokenizer, RECORDS, **options).accuracy == 1.0
    assert copy.dtype == dtype


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_batches_change_nothing_in_fp32(architecture, tokenizer):
    model = random_model(architecture)
    outputs = [
        measure_accuracy(
            model, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=24, batch_size=size
        ).outputs
        for size in (1, 2, 4, 16)
    ]
    assert len(set(outputs[0])) == len(RECORDS)  # every question is answered differently
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]


def test_equals_plain_greedy_decoding(tokenizer):
    model = random_model().eval()
    result = measure_accuracy(model, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=24)
    for record, output in zip(RECORDS, result.outputs, strict=True):
        ids = PROMPT_FORMAT.prompt_ids(tokenizer, record.question)
        start = len(ids)
        while len(ids) < start + 24:
            with torch.no_grad():
                token_id = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token_id in (0, 2):  # <eos> of the model, <end> of the chat template
                break
            ids.append(token_id)
        assert output == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_whatever_the_model_prefers(trained, tokenizer):
    settings = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=3, min_new_tokens=2, eos_token_id=[0]
    )
    before, trained.generation_config = trained.generation_config, settings
    try:
        result = measure_accuracy(trained, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=40)
        assert trained.generation_config is settings
    finally:
        trained.generation_config = before
    assert result.accuracy == 1.0


def test_leaves_everything_as_it_was(trained, tokenizer, monkeypatch):
    trained.train()
    trained.model.layers[0].eval()
    modes = [module.training for module in trained.modules()]
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    padding = (tokenizer.padding_side, tokenizer.pad_token)
    settings = trained.generation_config
    measure_accuracy(trained, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=2)
    with monkeypatch.context() as patch:  # and after a failure
        patch.setattr(trained, "generate", lambda **inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure_accuracy(trained, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=2)
    assert [module.training for module in trained.modules()] == modes
    assert trained.generation_config is settings
    assert (tokenizer.padding_side, tokenizer.pad_token) == padding
    assert all(torch.equal(value, weights[name]) for name, value in trained.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_adapters_generate_as_long_and_leave_the_settings_inside(tokenizer, task_type):
    student = random_model()
    plain = measure_accuracy(student, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=40)
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", task_type=task_type))
    inside = student.generation_config
    result = measure_accuracy(adapted, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=40)
    assert result.outputs == plain.outputs  # fresh adapters change nothing
    assert student.generation_config is inside


def test_progress_bar(tokenizer, capsys):
    options = {"prompt_format": PROMPT_FORMAT, "max_new_tokens": 1}
    measure_accuracy(random_model(), tokenizer, RECORDS, **options)
    assert capsys.readouterr().err == ""
    measure_accuracy(random_model(), tokenizer, RECORDS, **options, progress=True)
    assert "measuring accuracy: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "records is empty, wanted at least one question to measure accuracy on"),
        (RECORDS, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (RECORDS, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            RECORDS,
            {"max_new_tokens": 80},
            "record 'd': its prompt of 50 tokens and max_new_tokens=80 exceed the model's 128 positions",
        ),
        (
            [*RECORDS, Record("s", "Where?", "St. Ives", ())],
            {},
            "question 's': answer 'St. Ives' is read back as 'St' from '\\nThe answer is {answer}.', wanted it on one "
            "line, and another answer_suffix where it holds what ends this one",
        ),
    ],
)
def test_bad_input(tokenizer, records, options, message):
    model = random_model(max_position_embeddings=128)
    with pytest.raises(ValueError) as caught:
        measure_accuracy(model, tokenizer, records, prompt_format=PROMPT_FORMAT, **options)
    assert str(caught.value) == message


def test_positions_of_a_model_that_sees_pictures(tokenizer):
    """Its limit stands in the configuration of its text model alone."""
    text = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match="exceed the model's 128 positions"):
        measure_accuracy(model, tokenizer, RECORDS, prompt_format=PROMPT_FORMAT, max_new_tokens=80)

"""The command lines: flags, YAML files, errors. A few seconds."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from mind.cli import RunArguments, UsageError, main, parse_settings, parse_train, train_parser
from mind.config import MindConfig
from mind.data import Record
from mind.evaluate.command import _parser as evaluate_parser
from mind.generate.command import GenerateConfig
from mind.generate.command import parse as parse_generate
from mind.run import distil

from .tiny import FEATURE_DIM, tiny_student, tiny_tokenizer

CPU = ["--use_cpu"]


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_every_field_is_a_flag() -> None:
    options = {option for action in train_parser()._actions for option in action.option_strings}
    for field in (*fields(RunArguments), *fields(MindConfig)):
        if field.init:
            assert f"--{field.name}" in options and f"--{field.name.replace('_', '-')}" in options, field.name


def test_every_own_field_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    order = ["student, data and measuring:", "\nMIND:", "--beta", "\ntransformers.TrainingArguments:", "--weight_decay"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    own = set(MindConfig.__annotations__) | set(RunArguments.__annotations__)
    helps = {action.dest: action.help for action in train_parser()._actions}
    assert [name for name in own if name in helps and not helps[name]] == []


def test_help_says_what_is_refused() -> None:
    """And not what Transformers' trainer would do."""
    helps = {action.dest: action.help for action in train_parser()._actions}
    for name, value in [("fsdp", None), ("deepspeed", None), ("label_smoothing_factor", 0.0), ("eval_strategy", "no")]:
        assert helps[name].startswith(f"Only {value}: "), name
    assert helps["resume_from_checkpoint"].startswith("true: ")


def test_defaults() -> None:
    run, config = parse_train(CPU)
    assert run == RunArguments()
    assert config.beta == 0.8 and config.learning_rate == 1e-5 and config.output_dir == "runs/mind"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("use_lora", [False, True])
def test_how_student_and_teacher_are_loaded(
    use_lora: bool, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one attention; what is only read, the teacher and a student with LoRA, in the dtype of the products."""
    asked: dict[str, tuple[str, torch.dtype]] = {}

    def load(
        name: str, attn_implementation: str, dtype: torch.dtype = torch.float32, role: str = "student", **rest: bool
    ) -> tuple[None, None]:
        asked[name] = attn_implementation, dtype
        assert not rest.get("load_in_4bit")
        if role == "teacher":
            raise ValueError("seen enough")
        return None, None

    monkeypatch.setattr("mind.run.load_student", load)
    monkeypatch.setattr("mind.config.computes_bf16", lambda use_cpu: True)
    flags = ["--student", "s", "--teacher", "t", "--kl_weight", "0.5", "--attn_implementation", "eager"]
    flags += ["--bf16", str(bf16), "--use_lora", str(use_lora), "--num_questions", "4", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="seen enough"):
        distil(*parse_train([*CPU, *flags]))
    assert asked["t"] == ("eager", torch.bfloat16 if bf16 else torch.float32)
    assert asked["s"] == ("eager", torch.bfloat16 if bf16 and use_lora else torch.float32)


def test_the_encoder_is_gone_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders: list[weakref.ref[Encoder]] = []

    class Encoder:
        def __init__(self, name: str, device: torch.device) -> None:
            encoders.append(weakref.ref(self))

        def encode(self, records: list[Record], perspectives: tuple[str, ...], progress: bool) -> torch.Tensor:
            return torch.zeros(len(records), len(perspectives), FEATURE_DIM)

    def trainer(*args: object, **keywords: object) -> None:
        gc.collect()
        raise ValueError(f"{sum(encoder() is not None for encoder in encoders)} of {len(encoders)} encoders")

    monkeypatch.setattr("mind.run.load_student", lambda *args, **keywords: (tiny_student(), tiny_tokenizer()))
    monkeypatch.setattr("mind.run.RationaleEncoder", Encoder)
    monkeypatch.setattr("mind.run.MindTrainer", trainer)
    flags = ["--num_questions", "2", "--num_heldout", "0", "--max_length", "4096", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="0 of 1 encoders"):
        distil(*parse_train([*CPU, *flags]))


def test_values_of_the_file_are_typed_as_flags_are(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        # YAML takes 1e-4 for text and no for false; a flag does not
        learning_rate: 1e-4
        save_strategy: no
        report_to: none
        use_cpu: true
        logging_first_step: no
        dataloader_pin_memory: no
        max_steps: 7
        save_total_limit: null
        golden_perspective: ~
        lr_scheduler_kwargs: {num_cycles: 0.4, min_lr: 1e-6, last: -1.5E5, name: 1e5x}
        include_for_metrics: [inputs, loss]
        answer_suffix: "\\nSo it is {answer}!"
        num_heldout: 12
        student: -x
        """,
    )
    run, config = parse_train(["--config", path])
    assert config.learning_rate == 1e-4 and config.save_strategy == "no" and config.report_to == []
    assert config.use_cpu is True and config.logging_first_step is False and config.max_steps == 7
    assert config.dataloader_pin_memory is False
    assert config.save_total_limit is None and config.golden_perspective is None
    assert config.lr_scheduler_kwargs == {"num_cycles": 0.4, "min_lr": 1e-6, "last": -1.5e5, "name": "1e5x"}
    assert config.include_for_metrics == ["inputs", "loss"]
    assert config.answer_suffix == "\nSo it is {answer}!"
    assert (run.num_heldout, run.student) == (12, "-x")


@pytest.mark.parametrize("first", [True, False])
def test_flags_win_over_the_file(first: bool, tmp_path: Path) -> None:
    file = ["--config", write(tmp_path, "beta: 0.3\ntau: 0.7\nnum_questions: 5\nuse_lora: true\n")]
    given = ["--beta", "0.6", "--num-questions=9", "--use_lora=false", *CPU]
    run, config = parse_train(given + file if first else file + given)
    assert (config.beta, config.tau, config.use_lora, run.num_questions) == (0.6, 0.7, False, 9)
    # and also where the flag says what the default is
    assert parse_train([*file, "--beta", "0.8", *CPU])[1].beta == 0.8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tau: 1\nbetta: 1", ":2: 'betta' is not a setting, did you mean 'beta'?"),
        ("xyzzy: 1", ":1: 'xyzzy' is not a setting, see mind train --help"),
        ("config: a.yaml", ":1: 'config' is not a setting"),
        ("help: true", ":1: 'help' is not a setting"),
        ("beta: 1\n\nbeta: 0.5", ":3: 'beta' stands twice in this file, wanted it once"),
        ("beta: much", ":1: argument --beta: invalid float value: 'much'"),
        ("max_steps: 1.5", ":1: argument --max_steps/--max-steps: invalid int value: '1.5'"),
        ("method: magic", ":1: argument --method: invalid choice: 'magic'"),
        ("beta: null", ":1: beta: given null, wanted a value"),
        ("beta: [0.1, 0.2]", ":1: beta: given a list, wanted one value"),
        ("lr_scheduler_kwargs: {a: 2026-11-23}", ":1: lr_scheduler_kwargs: cannot be read: Object of type date is not"),
        ("lr_scheduler_kwargs: &a {b: *a}", ":1: lr_scheduler_kwargs: cannot be read: Circular reference"),
        (
            "include_for_metrics: [!mine 1]",
            ":1: include_for_metrics: cannot be read: could not determine a constructor",
        ),
        ("- beta", "holds no mapping, wanted lines of the form setting: value"),
        ("beta: {", "is not YAML: "),
    ],
)
def test_a_file_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        parse_train(["--config", path, *CPU])
    assert path in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
        (["--bet", "0.5"], "unrecognized arguments: --bet 0.5"),
        (["--beta"], "argument --beta: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--config", "no/such.yaml"], "--config: no/such.yaml cannot be read: "),
        (["--num-questions", "0"], "num_questions: given 0, wanted at least 1"),
        (
            ["--attn_implementation", "mind_sdpa"],  # a name of this project's own
            "attn_implementation: given 'mind_sdpa', wanted eager, sdpa, flash_attention_2 or another of transformers'",
        ),
        (["--beta", "2"], "beta: given 2.0, wanted a number in [0, 1]"),
        (["--lr_scheduler_kwargs", "{min_lr: 1}"], "given '{min_lr: 1}', wanted JSON: Expecting property name"),
    ],
)
def test_flags_that_cannot_be_used(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments, *CPU]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mind: error: {message}") and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The files of mind generate and mind evaluate


def test_generate_reads_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        data: questions.jsonl
        output: out.jsonl
        teacher: model
        base_url: http://localhost:8000/v1
        api_key_env: KEY_OF_MINE
        extra_body: {top_p: 0.9, max_tokens: null}
        temperature: 7e-1
        target_size: ~
        disable_tqdm: yes
        """,
    )
    config = parse_generate(["--config", path, "--teacher", "other"])
    assert config == GenerateConfig(
        "questions.jsonl",
        "out.jsonl",
        "other",
        base_url="http://localhost:8000/v1",
        api_key_env="KEY_OF_MINE",
        extra_body='{"top_p": 0.9, "max_tokens": null}',
        temperature=0.7,
        disable_tqdm=True,
    )
    # What is required may stand in the file, on the command line, or partly in each; what is missing is named.
    with pytest.raises(UsageError, match=r"^the following arguments are required: --output, --teacher$"):
        parse_generate(["--config", write(tmp_path, "data: questions.jsonl")])


def test_every_setting_of_generate_is_a_key(tmp_path: Path) -> None:
    values = {
        "engine": "server",
        "base_url": "http://localhost/v1",
        "extra_body": "'{}'",
        "answer_suffix": "is {answer}",
    }
    values |= {"easy_difficulty": 1, "easy_share": 1, "temperature": 1, "disable_tqdm": True}
    text = "".join(f"{item.name}: {values.get(item.name, 7)}\n" for item in fields(GenerateConfig))
    config = parse_generate(["--config", write(tmp_path, text)])
    unread = [item.name for item in fields(GenerateConfig) if getattr(config, item.name) == item.default]
    assert unread == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tutor: m", ":1: 'tutor' is not a setting, see mind generate --help"),
        ("seed: 0\nteachr: m", ":2: 'teachr' is not a setting, did you mean 'teacher'?"),
        ("timeout: long", ":1: argument --timeout: invalid float value: 'long'"),
        ("seed: null", ":1: seed: given null, wanted a value"),
        ("copy_prompts: folder", ":1: 'copy_prompts' is not a setting"),
        ("data: {", "is not YAML: "),
        (
            "api_key: sk-123",
            ":1: 'api_key': a key does not belong in a file, wanted it in the environment variable that",
        ),
        ("OPENAI_API_KEY: sk-123", ":1: 'OPENAI_API_KEY': a key does not belong in a file"),
        ("judge_key: sk-123", ":1: 'judge_key': a key does not belong in a file"),
        (
            "api_key_env: sk-123",
            "api_key_env: wanted the name of an environment variable that holds the key",
        ),
    ],
)
def test_a_file_that_generate_cannot_use(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"id": "1", "question": "1 + 1?", "answer": "2"}\n')
    required = ["--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--teacher", "m"]
    url = ["--base_url", "http://127.0.0.1:9/v1"]
    assert main(["generate", "--config", write(tmp_path, text), *required, *url]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mind: error: ") and message in error and error.count("\n") == 1
    assert "sk-123" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "run.yaml"]


def test_evaluate_reads_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "student: a\ndata: [x.jsonl, y.jsonl]\nood_data: z.jsonl\nmax_new_tokens: 9\nlimit: null\n")
    options = parse_settings(evaluate_parser(), ["--max-new-tokens", "5", "--config", path])
    assert (options.student, options.data, options.ood_data) == ("a", ["x.jsonl", "y.jsonl"], ["z.jsonl"])
    assert (options.max_new_tokens, options.limit, options.batch_size) == (5, None, 16)
    assert main(["evaluate", "--config", write(tmp_path, "ood-data: z.jsonl")]) == 2
    assert "run.yaml:1: 'ood-data' is not a setting, did you mean 'ood_data'?" in capsys.readouterr().err
    assert main(["evaluate", "--config", write(tmp_path, "dtype: float8")]) == 2
    assert "run.yaml:1: argument --dtype: invalid choice: 'float8'" in capsys.readouterr().err


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["--help"]) == 0
    assert "mind train" in capsys.readouterr().out
    assert main(["fly"]) == 2
    assert (
        capsys.readouterr().err
        == "mind: error: given command 'fly', wanted train, problems, generate, evaluate or report\n"
    )
    output = tmp_path / "problems.jsonl"
    assert main(["problems", "--num-questions", "3", "--output", str(output)]) == 0
    assert len(output.read_text().splitlines()) == 3
    assert main(["problems", "--num-questions", "3", "--output", str(tmp_path / "no" / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error == f"mind problems: error: --output: {tmp_path}/no is no folder, wanted one to write in\n"


def test_help_and_problems_do_not_import_torch() -> None:
    code = "import sys; from mind.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_ctrl_c_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mind.cli.train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "\nmind: interrupted\n"

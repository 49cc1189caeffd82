"""The console script `mind` and its commands.

Every field of `RunArguments` and `MindConfig` is a flag of `mind train` and a key of its YAML file; so are the flags of
`mind generate` and `mind evaluate`. A value in the file is read as the same flag would read it, so it may be written as
on the command line; the flags win.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, get_args, get_type_hints

import yaml

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; the second is the shells' own of Ctrl-C
USAGE = """usage: mind <command> [--help] …

  mind generate   have a teacher write rationales for questions, and keep what is right
  mind problems   write generated word problems, eight rationales each, to a JSONL file
  mind train      distil a student from rationales of several perspectives
  mind evaluate   measure a student on benchmarks or your questions, or compare two measurements
  mind report     show runs side by side on one HTML page
"""


class UsageError(ValueError):
    """The command line or its YAML file cannot be used. One line."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are a UsageError, one line without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@dataclass
class RunArguments:
    """What a run of `mind train` reads and measures, beside how it trains."""

    _argument_group_name = "student, data and measuring"

    student: str = field(
        default="smollm2-135m",
        metadata={"help": "smollm2-135m, gemma3-270m (built in), a Hugging Face folder or a hub id."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "White-box teacher with the student's tokenizer, given as a student is; with kl_weight."},
    )
    teacher_topk: str | None = field(
        default=None,
        metadata={"help": "Instead: NAME.topk.parquet, what mind generate stored of the teacher; with kl_weight."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: the student's linear layers but the head in 4 bits (NF4) of bitsandbytes; with use_lora. A "
            "student that was saved so needs no flag. The run saves it in fp32, merged, as with any use_lora."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of student and teacher: eager, sdpa or flash_attention_2, which needs a GPU, bf16 or "
            "fp16, and flash-attn. Default: what transformers chooses for the model."
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Training records: JSONL file, folder saved by datasets, or hub id. Default: num_questions word "
            "problems, generated from data_seed (from seed, if that is not given)."
        },
    )
    heldout: str | None = field(
        default=None,
        metadata={
            "help": "Held-out records, of the same kinds; rationales are optional. Default: num_heldout questions that "
            "are generated, or split off data by the same seed."
        },
    )
    num_questions: int = field(default=256, metadata={"help": "Generated training questions; unused with data."})
    max_difficulty: float = field(
        default=1.0,
        metadata={"help": "Generated questions are at most this difficult, in (0, 1]; unused with data and heldout."},
    )
    num_heldout: int = field(
        default=100, metadata={"help": "Held-out questions; unused with heldout. 0: no accuracy is measured."}
    )
    num_measured: int = field(
        default=32,
        metadata={
            "help": "Held-out questions on whose rationales the student's loss and the assistant's score are measured "
            "before and after (training questions, where the held-out ones have no rationales)."
        },
    )
    encoder: str = field(
        default="all-minilm-l6-v2",
        metadata={"help": "The assistant's sentence encoder: all-minilm-l6-v2 (built in), a folder or hub id."},
    )
    max_new_tokens: int = field(
        default=192,
        metadata={"help": "Tokens an answer may take when accuracy is measured, per_device_eval_batch_size at a time."},
    )

    def __post_init__(self) -> None:
        for name, least in (("num_questions", 1), ("num_heldout", 0), ("num_measured", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: given {getattr(self, name)}, wanted at least {least}")
        if not 0 < self.max_difficulty <= 1:
            raise ValueError(f"max_difficulty: given {self.max_difficulty}, wanted a number in (0, 1]")
        if self.teacher is not None and self.teacher_topk is not None:
            raise ValueError("teacher_topk: given beside teacher, wanted one of the two")
        if self.attn_implementation is not None and self.attn_implementation.startswith("mind_"):
            # What mind.prompt_attention calls its own, of which it chooses.
            raise ValueError(
                f"attn_implementation: given {self.attn_implementation!r}, wanted eager, sdpa, flash_attention_2 or "
                "another of transformers'"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or after one line on stderr 2 of bad input, 130 of Ctrl-C.

    An error that no module of this project raised is a bug or a broken machine: it passes with its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else BAD_INPUT
    command, *rest = arguments
    # peft imports bitsandbytes where it is installed, which on some CPUs tells of a kernel that could be downloaded.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        if command == "train":
            train(rest)
        elif command == "problems":
            from mind.problems.__main__ import main as problems

            return problems(rest, prog="mind problems")
        elif command == "generate":
            from mind.generate.command import main as generate

            generate(rest)
        elif command == "evaluate":
            from mind.evaluate.command import main as evaluate

            evaluate(rest)
        elif command == "report":
            from mind.report.command import main as report

            report(rest)
        else:
            raise UsageError(f"given command {command!r}, wanted train, problems, generate, evaluate or report")
    except (ValueError, TypeError) as error:
        if not _is_ours(error):
            raise
        print(f"mind: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nmind: interrupted", file=sys.stderr)  # behind a progress bar
        return INTERRUPTED
    return 0


def train(arguments: Sequence[str]) -> None:
    """`mind train`. Raises: ValueError or TypeError about bad input."""
    run, config = parse_train(arguments)
    from mind.run import distil  # not before the arguments are known to be right: it imports everything

    distil(run, config)


def parse_train(arguments: Sequence[str]) -> tuple[RunArguments, Any]:
    """(RunArguments, MindConfig) of the flags and the YAML file they name.

    Raises: UsageError naming the flag, or the file, line and key; SystemExit(0) after --help.
    """
    parser = train_parser()
    values = vars(parse_settings(parser, arguments))
    try:
        run, config = parser.parse_dict(values)
    except json.JSONDecodeError as error:  # of a mapping, which TrainingArguments reads
        raise UsageError(f"given {error.doc!r}, wanted JSON: {error}") from error
    except (ValueError, TypeError, ImportError, OSError) as error:  # of MindConfig and TrainingArguments beneath it
        raise UsageError(str(error)) from error
    return run, config


def train_parser() -> Any:
    """The HfArgumentParser of `mind train`, MIND's own settings ahead of TrainingArguments'."""
    # Here, because importing transformers takes seconds that `mind problems` does not need.
    from transformers import TrainingArguments

    from mind.config import REFUSED, MindConfig

    parser = dataclass_parser(
        RunArguments,
        MindConfig,
        prog="mind train",
        usage="mind train [--config FILE] [--SETTING VALUE ...]",
        description="Distil a student from rationales of several perspectives under a teaching assistant's guidance.",
    )
    inherited = {item.name for item in fields(TrainingArguments)}
    own = parser.add_argument_group("MIND")
    rest = parser.add_argument_group("transformers.TrainingArguments")
    refused = {name: f"Only {value}: {reason}." for name, value, reason in REFUSED}
    for action in list(parser._optionals._group_actions):
        if action.dest not in ("help", "config"):
            action.help = refused.get(action.dest, action.help)
            parser._optionals._group_actions.remove(action)
            (rest if action.dest in inherited else own)._group_actions.append(action)
    return parser


def dataclass_parser(*types: Any, **texts: str) -> Any:
    """An HfArgumentParser of the dataclasses' fields and --config, whose errors are a UsageError."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    parser = Parser(types, allow_abbrev=False, **texts)
    add_config_flag(parser)
    return parser


def seed(text: str) -> int:
    """The type of a --seed: what every random generator takes."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"given {value}, wanted 0 to {2**32 - 1}")
    return value


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings by name; the flags win over it.")


def parse_settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The settings, without `config`: the flags', else those of the YAML file that --config names, else the defaults.

    Raises: UsageError naming the flag, or the file, line and key; SystemExit(0) after --help.
    """
    required = [action for action in parser._actions if action.required]
    for action in required:  # which the file may hold
        action.required = False
    namespace = argparse.Namespace()
    path = parser.parse_args(arguments).config
    if path is not None:
        _read_yaml(parser, path, namespace)
    values = parser.parse_args(arguments, namespace)
    missing = [action.option_strings[0] for action in required if getattr(values, action.dest) is None]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")
    del values.config
    return values


class _Loader(yaml.SafeLoader):
    """Takes 1e-4, which YAML 1.1 has for text, for a number within a mapping, too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)e[-+]?\d+$", re.IGNORECASE), list("-+.0123456789")
)


def _read_yaml(parser: argparse.ArgumentParser, path: str, namespace: argparse.Namespace) -> None:
    """Sets what the file says on the namespace.

    Raises: UsageError naming the file, line and key.
    """
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {path} is not YAML: {error}") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config: {path} holds no mapping, wanted lines of the form setting: value")
    settings = (action for action in parser._actions if isinstance(action, argparse._StoreAction))
    actions = {action.dest: action for action in settings if action.dest != "config"}
    seen: set[str] = set()
    for key, value in root.value:
        name, place = str(key.value), f"{path}:{key.start_mark.line + 1}"
        if name not in actions:
            if "api_key_env" in actions and "key" in name.lower():
                raise UsageError(
                    f"{place}: {name!r}: a key does not belong in a file, wanted it in the environment variable that "
                    "api_key_env names"
                )
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f", see {parser.prog} --help"
            raise UsageError(f"{place}: {name!r} is not a setting{hint}")
        if name in seen:
            raise UsageError(f"{place}: {name!r} stands twice in this file, wanted it once")
        seen.add(name)
        if value.tag == "tag:yaml.org,2002:null":
            if not _may_be_none(parser, actions[name]):
                raise UsageError(f"{place}: {name}: given null, wanted a value")
            setattr(namespace, name, None)
            continue
        if isinstance(value, yaml.SequenceNode) and actions[name].nargs in (None, "?"):
            raise UsageError(f"{place}: {name}: given a list, wanted one value")
        try:
            parsed = parser.parse_args(_as_flag(actions[name].option_strings[0], value))
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error
        except (yaml.YAMLError, TypeError, ValueError) as error:  # a tag that is none of YAML's own; no JSON value
            raise UsageError(f"{place}: {name}: cannot be read: {error}") from error
        setattr(namespace, name, getattr(parsed, name))


def _as_flag(flag: str, value: yaml.Node) -> list[str]:
    """A YAML value as on the command line: the text of a scalar as it is written, a mapping as JSON."""
    if isinstance(value, yaml.MappingNode):
        return [f"{flag}={json.dumps(_construct(value))}"]
    if isinstance(value, yaml.SequenceNode):
        return [flag, *(str(_construct(item)) for item in value.value)]
    return [f"{flag}={value.value}"]


def _construct(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)


def _may_be_none(parser: argparse.ArgumentParser, action: argparse.Action) -> bool:
    for type_ in getattr(parser, "dataclass_types", ()):
        hints = get_type_hints(type_)
        if action.dest in hints:
            return type(None) in get_args(hints[action.dest])
    return action.default is None


def _is_ours(error: BaseException) -> bool:
    """Whether a module of this project raised the error, so that its message is meant for the user."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in ("mind", "mind_kernels")

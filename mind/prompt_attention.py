"""Attention in which every rationale of a question sees one copy of its prompt, and no other rationale.

All tokens that a step reads stand in one row, (1, N): each question's prompt and behind it the selected rationales,
without padding. Projections, feed-forward layers and norms see that row; only attention looks at the S sequences within
it, a prompt alone or a rationale behind its prompt,

    output_n = softmax_m(q_n·k_m / √d) v_m   over the tokens m of n's own prompt and rationale up to n

by one of

- the attention that the model was loaded with, its own `eager` function or PyTorch's `sdpa`, of keys and values that
  are gathered and filled up to the length of the longest sequence;
- for `sdpa` on a CPU products and a softmax, one sequence after the other, up to LONGEST_WRITTEN_OUT keys: PyTorch's
  kernel takes several times as long there for the backward pass of short sequences;
- `flash_attention_2`: FlashAttention's kernel for sequences of different lengths, without padding.

A model takes such a function from transformers' AttentionInterface, by the name in its config. `prompt_attention` gives
one model a name that is registered here; whatever it reads without `shared_prompts`, generation included, is
still its own attention's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from mind.collator import SharedPrompts

# Keys; beyond it the scores, which are kept for the backward pass, outgrow the rest of a layer
LONGEST_WRITTEN_OUT = 512
OWN = ("eager", "sdpa", "flash_attention_2")
_PREFIX = "mind_"


@contextmanager
def prompt_attention(base: Any) -> Iterator[None]:
    """Have the base model take `shared_prompts` for its attention.

    Where gradients are recorded and nothing is raised it stays so until `use_own_attention`: a checkpointed layer
    attends once more in the backward pass.

    Raises: ValueError when attention is not all through which a token of the base model sees others, or when its
        attention is not one of OWN.
    """
    name, own = type(base).__name__, _own_attention(base)
    layers = set(getattr(getattr(base, "config", None), "layer_types", None) or ())
    layers -= {"full_attention", "sliding_attention"}
    chosen = isinstance(base, PreTrainedModel) and base._supports_attention_backend and not base._is_stateful
    if not chosen or layers:
        what = f" in its layers of {', '.join(sorted(layers))}" if layers else ""
        raise ValueError(
            f"shared_prompts: tokens of {name} see others by more than an attention that can be chosen{what}, wanted "
            "that alone: read the prompts unshared"
        )
    if own not in OWN:
        raise ValueError(
            f"shared_prompts: {name} was loaded with attn_implementation={own!r}, wanted {', '.join(OWN[:-1])} or "
            f"{OWN[-1]}"
        )
    before = base.config._attn_implementation
    base.config._attn_implementation = _PREFIX + own
    stays = False
    try:
        yield
        stays = torch.is_grad_enabled()
    finally:
        if not stays:
            base.config._attn_implementation = before


def use_own_attention(base: Any) -> None:
    """What prompt_attention left behind, undone."""
    own = _own_attention(base)
    if own is not None:
        base.config._attn_implementation = own


def needs_autocast(base: Any) -> bool:
    """Whether nothing can be read without: FlashAttention has no fp32, and the weights are."""
    return _own_attention(base) == "flash_attention_2" and next(base.parameters()).dtype == torch.float32


def readable(base: Any) -> AbstractContextManager[Any]:
    """bf16 autocast where nothing can be read without and none is on, as in checks before a training under autocast."""
    device = next(base.parameters()).device.type
    if needs_autocast(base) and not torch.is_autocast_enabled(device):
        return torch.autocast(device, torch.bfloat16)
    return nullcontext()


def attention_mask(prompts: SharedPrompts) -> Tensor:
    """(S, 1, T_q, T_k) bool: which key each query sees. One that fills up sees what it repeats: nothing is NaN."""
    positions = prompts.position_ids[0]
    queries, keys = positions[prompts.query_index], positions[prompts.key_index]
    lengths = prompts.cu_seqlens_k.diff()
    present = torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]
    # Positions rise along a sequence's keys, so they tell what is before a query.
    return ((keys[:, None, :] <= queries[:, :, None]) & present[:, None, :])[:, None]


def _own_attention(base: Any) -> str | None:
    """None for a base that is a plain module, or names no attention."""
    name = getattr(getattr(base, "config", None), "_attn_implementation", None)
    return None if name is None else str(name).removeprefix(_PREFIX)


def _attend(
    own: str,
    module: nn.Module,
    query: Tensor,  # (1, heads, N, d)
    key: Tensor,  # (1, key heads, N, d)
    value: Tensor,
    attention_mask: Tensor | None,  # with shared_prompts: as attention_mask() makes it
    *,
    shared_prompts: SharedPrompts | None = None,
    **settings: Any,  # scaling, dropout, sliding_window, softcap …, as the module gives them
) -> tuple[Tensor, Any]:
    """(1, N, heads, d) and what else the model's own attention returns."""
    if own == "eager":
        attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if attend is None:
            raise ValueError(
                f"shared_prompts: the module of {type(module).__name__}, {type(module).__module__}, has no "
                "eager_attention_forward, wanted one or an attention other than eager: read the prompts unshared"
            )
    else:
        attend = AttentionInterface()[own]
    flash = own == "flash_attention_2"
    if shared_prompts is not None and "sliding_window" not in settings:
        # A model that gives its window to its own mask alone, which is not made here.
        window = getattr(getattr(module, "config", None), "sliding_window", None)
        if window:  # Qwen 2 MoE has 0 for none
            raise ValueError(
                f"shared_prompts: {type(module).__name__} is not given the sliding window of {window} tokens that its "
                "config names, wanted no window or one that attention is given: read the prompts unshared"
            )
    if shared_prompts is None and flash:  # transformers' function reads its own name again
        config: Any = module.config
        config._attn_implementation = own
        try:
            return attend(module, query, key, value, attention_mask, **settings)
        finally:
            config._attn_implementation = _PREFIX + own
    if shared_prompts is None:
        return attend(module, query, key, value, attention_mask, **settings)
    if flash:
        return _flash_attention(module, query, key, value, shared_prompts, **settings), None
    if own == "sdpa" and query.device.type == "cpu" and not torch.compiler.is_compiling():
        return _one_by_one(query, key, value, shared_prompts, **settings), None
    prompts = shared_prompts
    assert attention_mask is not None
    window = settings.get("sliding_window")
    if window is not None:
        positions = prompts.position_ids[0]
        distance = positions[prompts.query_index][:, :, None] - positions[prompts.key_index][:, None, :]
        attention_mask = attention_mask & (distance < window)[:, None]
    if own == "eager":  # adds its mask
        attention_mask = torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    padded = [
        states[0].transpose(0, 1)[index].transpose(1, 2)  # (S, heads, T, d)
        for states, index in ((query, prompts.query_index), (key, prompts.key_index), (value, prompts.key_index))
    ]
    output, weights = attend(module, *padded, attention_mask, **settings)  # (S, T_q, heads, d)
    return output.flatten(0, 1)[prompts.output_index][None], weights


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: SharedPrompts,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """(1, N, heads, d), of tensors on the CPU."""
    starts = prompts.cu_seqlens_q.tolist()
    lengths = prompts.cu_seqlens_q.diff().tolist()
    # The sequence that starts with the same token as the keys of each: a rationale's prompt, else itself.
    first_keys = prompts.key_rows[prompts.cu_seqlens_k[:-1]].tolist()
    # Split: the gradient of many slices would be as many tensors of the size of the whole.
    queries, keys, values = (states.split(lengths, dim=1) for states in _in_autocast_dtype(query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    with torch.autocast("cpu", enabled=False):
        for s, q in enumerate(queries):  # (heads, n, d), keys and values (key heads, m, d)
            prompt = starts.index(first_keys[s])
            k, v = (
                parts[s] if prompt == s else torch.cat([parts[prompt], parts[s]], dim=1) for parts in (keys, values)
            )
            n, m = q.shape[1], k.shape[1]
            seen = torch.ones(n, m, dtype=torch.bool).tril_(m - n)
            if sliding_window is not None:
                seen.triu_(m - n - sliding_window + 1)
            if m > LONGEST_WRITTEN_OUT:
                output = F.scaled_dot_product_attention(
                    q[None], k[None], v[None], attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=True
                )[0]
            else:
                # The heads of one key head are one product: (key heads, heads / key heads · n, d) by (key heads, d, m).
                scores = (q * scaling).reshape(len(k), -1, q.shape[-1]) @ k.mT
                hidden = torch.zeros(n, m, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
                weights = (scores.view(-1, n, m) + hidden).softmax(-1)
                weights = F.dropout(weights, dropout) if dropout else weights
                output = (weights.view(len(k), -1, m) @ v).view(-1, n, v.shape[-1])
            outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)[None]  # contiguous: some models view it


def _in_autocast_dtype(*states: Tensor) -> list[Tensor]:
    """Each (heads, N, d) of (1, heads, N, d); rotated queries and keys are fp32 within autocast, and values are not."""
    device, dtype = states[0].device.type, states[0].dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return [tensor[0].to(dtype) for tensor in states]


def _flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: SharedPrompts,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """(1, N, heads, d). The last query of a sequence sees its last key, as FlashAttention aligns its causal mask."""
    from flash_attn import flash_attn_varlen_func  # here because only this attention needs flash-attn

    if s_aux is not None:
        name = type(module).__name__
        raise ValueError(f"shared_prompts: {name} has attention sinks, which flash_attention_2 has not")
    query, key, value = (states.transpose(0, 1) for states in _in_autocast_dtype(query, key, value))  # (N, heads, d)
    output: Tensor = flash_attn_varlen_func(
        query,
        key[prompts.key_rows],
        value[prompts.key_rows],
        prompts.cu_seqlens_q,
        prompts.cu_seqlens_k,
        prompts.query_index.shape[1],
        prompts.key_index.shape[1],
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return output[None]


for _own in OWN:
    AttentionInterface.register(_PREFIX + _own, partial(_attend, _own))
    AttentionMaskInterface.register(_PREFIX + _own, AttentionMaskInterface()[_own])

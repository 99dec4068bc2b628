"""Linear layers whose weight is all that their call uses, and calls of those that are others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mrl_fast.shared.checks import check_matrix
from mrl_fast.shared.dispatch import exporting

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# What undoes a change of a layer, by the module that the layer's class or its hook comes from.
REMEDIES = {
    "peft.": "merge_and_unload() of the PEFT model first; its base_model.model is the head that "
    "may be called",
    "torch.nn.utils.weight_norm": "torch.nn.utils.remove_weight_norm(layer) first",
    "torch.nn.utils.spectral_norm": "torch.nn.utils.remove_spectral_norm(layer) first",
    "torch.nn.utils.parametriz": 'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight'
    '") first',
    "torch.nn.utils.prune": 'torch.nn.utils.prune.remove(layer, "weight") first',
    "torch.ao.": "take the head as it was before quantization",
}
ANY_REMEDY = "first merge or remove what was added to it"


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module is ``kind.forward`` on ordinary parameters, and nothing else.

    Parametrizations are plain: reading the parameter runs them. A wrapper that lends its inner
    layer's weight (PEFT), a hook (pruning, FSDP), a forward that was replaced (accelerate) and
    sharded or quantized parameters are not. (An export has stand-ins for parameters.)
    """
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not any(getattr(module, hooks) for hooks in HOOKS)
        and (exporting() or all(type(p) in (Tensor, nn.Parameter) for p in module.parameters()))
    )


def all_plain(heads: Any) -> bool:
    return all(is_plain(head, nn.Linear) for head in heads)


def check_unhooked(module: nn.Module, name: str) -> None:
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise TypeError(f"{name}: expected a module without hooks, got {described(module)}")


def plain_linears(heads: Iterable[nn.Module], name: str) -> list[nn.Linear]:
    """The heads, as linear layers whose weight and bias may be read instead of a call."""
    for i, head in enumerate(heads):
        if not is_plain(head, nn.Linear):
            raise TypeError(
                f"{name}[{i}]: expected an nn.Linear without hooks, whose weight is all that its "
                f"call uses, got {described(head)}"
            )
    return cast(list[nn.Linear], list(heads))


def check_stored(heads: Iterable[nn.Module], name: str) -> None:
    """Raises where the state of a layer is more than the weight and bias of an ``nn.Linear``."""
    for i, head in enumerate(plain_linears(heads, name)):
        if extra := head.state_dict().keys() - {"weight", "bias"}:
            raise TypeError(
                f"{name}[{i}]: expected an nn.Linear with a state of weight and bias, got "
                f"{sorted(extra)[0]} in that of {described(head)}"
            )


def described(module: nn.Module) -> str:
    """The class of a module, its hooks or its own forward, and what undoes them."""
    found = [full_name(type(module))]
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    found += [full_name(hook if hasattr(hook, "__qualname__") else type(hook)) for hook in hooks]
    kinds = dict.fromkeys(type(p) for p in module.parameters())
    found += [full_name(kind) for kind in kinds if kind not in (Tensor, nn.Parameter)]
    remedies = [
        remedy for start, remedy in REMEDIES.items() if any(n.startswith(start) for n in found)
    ]
    parts = [found[0]]
    if "forward" in module.__dict__:
        parts.append("a forward of its own")
    if hooks:
        parts.append(f"the hook {found[1]}")
    if len(found) > 1 + len(hooks):
        parts.append(f"parameters that are {found[-1]}")
    return f"{' with '.join(parts)}; {remedies[0] if remedies else ANY_REMEDY}"


def full_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def check_width(x: Any, dims: Sequence[int]) -> None:
    """x is a matrix with columns for all of the dims."""
    if check_matrix(x, "x").shape[1] < dims[-1]:
        raise ValueError(f"x: expected width >= {dims[-1]}, got {x.shape[1]}")


def call_heads(heads: Iterable[nn.Module], x: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Logits ``[B, V]`` of each prefix by the heads' own calls: one a prefix, or a tied one, which
    is given each prefix padded by zeros to ``dims[-1]``."""
    heads = list(heads)
    if not exporting():
        check_width(x, dims)
    for i, head in enumerate(heads):
        if any(is_sharded(p) for p in head.parameters()) and not any(
            getattr(head, hooks) for hooks in HOOKS
        ):
            raise TypeError(f"heads[{i}]: {SHARDED}")
    if len(heads) == len(dims):
        return [head(x[:, :d]) for head, d in zip(heads, dims, strict=True)]
    (head,) = heads
    return [head(F.pad(x[:, :d], (0, dims[-1] - d))) for d in dims]


SHARDED = (
    "expected parameters that are whole, got a DTensor's shard; call the module that was given to "
    "fully_shard, whose hooks gather them"
)


def is_sharded(x: Tensor) -> bool:
    return hasattr(x, "device_mesh")  # only a DTensor has one, and its module is slow to import

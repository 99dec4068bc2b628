"""Custom ops that are differentiated once, backwards.

``torch.compile`` sees one opaque call with a registered backward. Elsewhere the op is wrapped in an
``autograd.Function``, which the transforms of ``torch.func`` understand: ``grad`` and ``vjp`` work,
``vmap`` runs the op once a sample, and forward mode is refused, which would find zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

REFUSAL = (
    "mrl_fast: a fused loss can be differentiated once, backwards; for {} pass impl='reference'"
)
FORWARD_MODE = "forward-mode derivatives (jvp, jacfwd)"


def differentiable(
    op: Any, save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What to call in place of ``op``, a custom op; ``save`` and ``backward`` are the
    ``setup_context`` and ``backward`` of an ``autograd.Function``."""
    op.register_autograd(backward, setup_context=save)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return op(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(REFUSAL.format(FORWARD_MODE))

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            def at(i: int, argument: Any, dim: Any) -> Any:
                return argument.select(dim, i) if isinstance(dim, int) else argument

            def sample(i: int) -> Any:
                return Once.apply(*(at(i, *pair) for pair in zip(arguments, in_dims, strict=True)))

            samples = [sample(i) for i in range(info.batch_size)]
            return tree_map(lambda *parts: torch.stack(parts), *samples), 0

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            return Once.apply(*arguments)
        if forward_ad._current_level >= 0:  # the compiler takes no autograd.Function with a jvp
            raise RuntimeError(REFUSAL.format(FORWARD_MODE))
        return op(*arguments)

    return call


def differentiated(op: Any) -> Callable[..., Any]:
    """What to call in place of an ``op`` that is a backward: second derivatives raise, rather than
    being silently zero."""

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(REFUSAL.format("second derivatives"))

    return differentiable(op, lambda ctx, inputs, output: None, refuse)


def save_spec(ctx: Any, spec: Any, *more: Tensor) -> None:
    """Keeps a NamedTuple's tensors, and more of them, for the backward as autograd wants it."""
    ctx.tensors = [name for name, value in spec._asdict().items() if isinstance(value, Tensor)]
    ctx.options = spec._replace(**dict.fromkeys(ctx.tensors))
    ctx.save_for_backward(*(getattr(spec, name) for name in ctx.tensors), *more)


def saved_spec(ctx: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The NamedTuple that ``save_spec`` kept, and what came with it."""
    saved = ctx.saved_tensors  # to be read once: checkpointing computes them again
    fields = dict(zip(ctx.tensors, saved, strict=False))
    return ctx.options._replace(**fields), saved[len(fields) :]

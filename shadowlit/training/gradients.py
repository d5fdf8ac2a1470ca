"""Gradients of a model's weights, handed over one parameter at a time, so that only one of them exists at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from shadowlit.distributed import local
from shadowlit.training.head import evaluating

Take = Callable[[str, Tensor], None]


@contextmanager
def gradients_of(model: nn.Module, parameters: Mapping[str, Tensor], take: Take) -> Iterator[None]:
    """Hand over the gradient of each parameter when a backward pass within the context has added it up.

    ``take(name, gradient)`` is called once per parameter and backward pass, without gradients, and the gradient is
    freed afterwards, so that the memory is that of one gradient (of one layer's under FSDP2). Of a parameter that FSDP2
    shards it is this rank's part of the mean over the ranks; under DDP it is this rank's own gradient, since the
    model's forward pass is called directly.

    Within the context the model is deterministic (no dropout, activation checkpointing as in training), and only
    ``parameters`` have gradients, whether they are trained or not. Afterwards, an exception included, modes,
    ``requires_grad`` and gradients are those before, and the hooks are removed. Example::

        with gradients_of(model, host_parameters(model), lambda name, gradient: norms.update({name: gradient.norm()})):
            for batch in batches:
                loss_of(batch).backward()

    Args:
        model: Model that the parameters belong to, sharded by FSDP2 or not.
        parameters: Floating-point parameters by name.
        take: Function that receives a parameter's name and gradient, of the parameter's local shape and dtype.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in parameters.values()}
    hooks = []

    def hand_over(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        with torch.no_grad():
            take(name, local(gradient))

    with deterministic(model):
        try:
            for each, _, _ in before:
                each.grad = None
                _require_grad(each, id(each) in wanted)
            for name, parameter in parameters.items():
                hooks.append(parameter.register_post_accumulate_grad_hook(partial(hand_over, name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for each, requires_grad, gradient in before:
                _require_grad(each, requires_grad)
                each.grad = gradient


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context, except for layers that recompute their activations, which only do so in
    training mode; then every module's own mode again. Layers with dropout of their own (OPT, Falcon) store them.
    """
    with evaluating(model):
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = not _reads_mode(module)  # of this module alone, not of its parts
        yield


def _reads_mode(layer: nn.Module) -> bool:
    """Whether a layer's own forward pass depends on its mode, and not only those of its parts."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def _require_grad(parameter: Tensor, value: bool) -> None:
    if parameter.requires_grad != value:
        parameter.requires_grad_(value)

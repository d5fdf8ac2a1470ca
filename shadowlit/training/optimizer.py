"""The optimizer of the trained parameters: AdamW in float32, AdamW with moments of 8 bits, or any class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.names import is_token_tensor, saved_name
from shadowlit.distributed import local, place
from shadowlit.errors import CheckpointError, ShadowlitError, first_line
from shadowlit.plugins import WITHOUT_SUPER
from shadowlit.training.groups import group_parameters

# Without lr among its options a class is called with the module's; the parser tells the two apart.
OptimizerFactory = Callable[[Iterable, float], Optimizer] | Callable[[Iterable], Optimizer]
OptimizerChoice = Literal["adamw", "adamw_8bit"] | OptimizerFactory


def make_optimizer(
    choice: OptimizerChoice,
    named: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    offload: bool = False,
    **grouping: Any,
) -> Optimizer:
    """Return an optimizer of float32 parameters by name; weight decay on matrices only.

    ``adamw`` is torch's AdamW (arXiv 1711.05101), as one kernel over all elements where there is one (CPU and CUDA).
    ``adamw_8bit`` keeps both moments in blocks of 8 bits (arXiv 2110.02861): 2 bytes per trained parameter instead of
    8. It is torchao's, which also shards, or else that of bitsandbytes. A class or function gets parameter groups and
    ``lr``. Options as of :class:`shadowlit.training.module.ShadowModule`; ``grouping`` as of :func:`group_parameters`.

    Raises:
        ShadowlitError: A class can't take the parameters, a setting is AdamW's alone, neither library of 8-bit moments
            is installed, or bitsandbytes alone and the parameters are sharded.
    """
    named = list(named)
    rate = getattr(choice, "keywords", {}).get("lr", lr)
    decay = weight_decay if isinstance(choice, str) else None  # a class has its own
    groups = group_parameters(named, lr=rate, weight_decay=decay, **grouping)
    trained = [p for group in groups for p in group["params"]]
    if not isinstance(choice, str):
        if offload or weight_decay:
            raise ShadowlitError(
                f"model.optimizer is a class, but model.offload_optimizer={offload} and model.weight_decay="
                f"{weight_decay} belong to adamw. Unset them, and give the class its options in "
                "model.optimizer.init_args, e.g. weight_decay."
            )
        if _class_of(choice) is Muon:
            by_adamw = {id(p) for name, p in named if p.dim() != 2 or is_token_tensor(saved_name(name))}
            choice = partial(_muon, choice, by_adamw, {"betas": tuple(betas), "eps": eps}, rate)
        return _of_class(choice, groups, lr)
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps}
    if choice == "adamw_8bit":
        if offload:
            raise ShadowlitError(
                "model.offload_optimizer is true, but model.optimizer is 'adamw_8bit', whose moments can't be moved. "
                "Set one of the two: adamw with offload_optimizer, or adamw_8bit without."
            )
        return _eight_bits(trained)(groups, **options)
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    optimizer = (OffloadedAdamW if offload else AdamW)(groups, fused=fused, **options)
    return _clippable(optimizer)


def _class_of(factory: Any) -> Any:
    """The class that a factory makes: itself, or that of a functools.partial, in which the parser wraps it twice."""
    parts = getattr(factory, "func", factory), *getattr(factory, "args", ())
    return next((part for part in parts if isinstance(part, type)), factory)


def _of_class(factory: Any, groups: list[dict[str, Any]], lr: float) -> Optimizer:
    # The options of the configuration are bound in a functools.partial.
    bound = getattr(factory, "keywords", {})
    rate = {} if "lr" in bound else {"lr": lr}
    try:
        optimizer = _clippable(factory(groups, **rate))
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(WITHOUT_SUPER)
        if hasattr(optimizer, "eval"):
            optimizer.register_step_post_hook(lambda averaging, *_: averaging.eval())
        return optimizer
    except Exception as error:  # a class from outside the package may raise anything
        hint = "Correct its options."
        if any(p.dim() != 2 for group in groups for p in group["params"]):
            hint = "Some of them, norms and biases, are not matrices; correct its options, or train an adapter."
        raise ShadowlitError(
            f"model.optimizer can't take the trained parameters ({first_line(error)}). {hint}"
        ) from error


def _muon(
    factory: Any, by_adamw: set[int], adamw: dict[str, Any], rate: float, groups: list[dict[str, Any]], lr: float
) -> Optimizer:
    """Muon of matrices in layers; AdamW, with Muon's rate and decay, of the parameters with the ids ``by_adamw``."""
    bound = {"lr": lr, **getattr(factory, "keywords", {})}
    parts: tuple[list[dict[str, Any]], ...] = ([], [])
    for group in groups:
        for other, part in enumerate(parts):
            if chosen := [p for p in group["params"] if (id(p) in by_adamw) == other]:
                part.append({**group, "params": chosen})
    if not parts[0]:
        raise ValueError("Muon trains matrices of layers, and none is trained; use adamw")
    sharded = any(isinstance(p, DTensor) for group in parts[0] for p in group["params"])
    muon = (ShardedMuon if sharded else Muon)(parts[0], **bound)
    if not parts[1]:
        return muon
    decay = muon.defaults["weight_decay"]
    return MuonAndAdamW(muon, AdamW(parts[1], lr=rate, weight_decay=decay, fused=True, **adamw))


def begin_step(optimizers: Iterable[Any]) -> None:
    """Load the weights that gradients are taken at, where an optimizer holds averages in their place between steps.

    Schedule-free ones do (arXiv 2405.15682). After its step each loads the averages again, which are what is validated,
    grafted and saved.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.train()


def _clippable(optimizer: Optimizer) -> Optimizer:
    # Lightning takes a fused optimizer for one that a scaler of gradients works in, and refuses to clip; bfloat16
    # needs no scaler.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _loss_of(closure: Any) -> Any:
    """What the closure of a step returns, which computes the gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class _OneByOne:
    """An optimizer's step, taken for one parameter after the other."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; parameters without a gradient are left out."""
        loss = _loss_of(closure)
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.step_alone(parameter, group)
        finally:
            self.param_groups = groups
        return loss

    def step_alone(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter of a group; may replace :attr:`param_groups` meanwhile."""
        raise NotImplementedError


class ShardedMuon(_OneByOne, Muon):
    """Muon of sharded matrices: each rank gathers one matrix after the other and keeps its part of the update.

    The products of shards would be rounded to bfloat16 before they are added, which changes an update by percents. The
    results are those of one device bit for bit. State and parameters stay sharded.
    """

    def step_alone(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The step of one matrix; a collective."""
        whole = parameter.full_tensor().requires_grad_()  # type: ignore[attr-defined]
        whole.grad = parameter.grad.full_tensor()  # type: ignore[union-attr]
        state, self.param_groups = self.state[parameter], [{**group, "params": [whole]}]
        self.state[whole] = {name: moment.full_tensor() for name, moment in state.items()}
        Muon.step(self)
        state.update({name: place(moment, parameter) for name, moment in self.state.pop(whole).items()})
        local(parameter).copy_(local(place(whole.detach(), parameter)))


class MuonAndAdamW(Optimizer):
    """Two optimizers as one: Muon of the layers' matrices, AdamW of norms, biases, embedding and output head."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts, self._num_groups = (muon, adamw), len(muon.param_groups)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.defaults = muon.defaults  # which schedules look at

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Return one step of both."""
        loss = _loss_of(closure)
        groups = self.param_groups[: self._num_groups], self.param_groups[self._num_groups :]
        for part, own in zip(self.parts, groups, strict=True):
            part.param_groups, part.state = own, self.state  # a checkpoint replaces both
            part.step()
        return loss


class OffloadedAdamW(_OneByOne, AdamW):
    """AdamW whose moments are kept in the CPU's memory and moved to the device for one parameter at a time.

    Saves 8 bytes per trained parameter on the device, and moves 16 in every step. The results are the same bit for bit.
    Sharded parameters have sharded moments. While a checkpoint is loaded, all moments are on the device.
    """

    def step_alone(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The step of one parameter, with its moments on its device."""
        self.param_groups = [{**group, "params": [parameter]}]
        state = self.state[parameter]
        at_home = {name: state[name] for name in _MOMENTS if name in state}
        for name, moment in at_home.items():
            state[name] = moment.to(parameter.device, non_blocking=True)
        AdamW.step(self)
        for name in _MOMENTS:
            state[name] = _to_cpu(state[name], at_home.get(name))

    def state_dict(self) -> dict[str, Any]:
        """As AdamW's, when what is on its way to the CPU has arrived."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return super().state_dict()


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _to_cpu(moment: Tensor, home: Tensor | None) -> Tensor:
    """Copy a moment into ``home``, where it was before the step, or into new memory of the CPU."""
    part = moment.to_local() if isinstance(moment, DTensor) else moment
    if home is None or home.device.type != "cpu":
        room = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
    else:
        room = home.to_local() if isinstance(home, DTensor) else home
    if room is not part:
        room.copy_(part, non_blocking=True)
    # Made as FSDP2 makes its own offloaded parameters: from_local would move it to the mesh's device.
    return DTensor(room, moment._spec, requires_grad=False) if isinstance(moment, DTensor) else room


def keep_names(optimizer: Optimizer, named: Iterable[tuple[str, Tensor]]) -> None:
    """Let the optimizer's state name its parameters, and be loaded by these names.

    Of states without names, of earlier checkpoints, the order counts. A state that is whole is loaded into sharded
    parameters too: each rank takes its part.

    Args:
        optimizer: The optimizer.
        named: The model's parameters by name.
    """
    names = {id(parameter): name for name, parameter in named}

    def own() -> list[list[tuple[str, Tensor]]]:
        return [[(names[id(p)], p) for p in group["params"]] for group in optimizer.param_groups]

    def add(_: Optimizer, state: dict[str, Any]) -> None:
        for group, parameters in zip(state["param_groups"], own(), strict=True):
            group["param_names"] = [name for name, _ in parameters]

    def find(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return _in_order_of(own(), state)

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(find)


def by_name(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer that keeps names, with names instead of numbers."""
    numbers = {i: n for g in state["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True)}
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
    return {
        "state": {numbers[number]: values for number, values in state["state"].items()},
        "param_groups": [{**g, "params": [numbers[number] for number in g["params"]]} for g in groups],
    }


def _in_order_of(own: list[list[tuple[str, Tensor]]], state: dict[str, Any]) -> dict[str, Any]:
    """A saved state with the numbers and groups of an optimizer's ``own`` parameters, placed as these are."""
    groups = state["param_groups"]
    saved = [key for group in groups for key in group["params"]]
    keys: dict[str, Any] = {key: key for key in saved if isinstance(key, str)}
    for group in groups:
        keys |= dict(zip(group.get("param_names", ()), group["params"], strict=False))
    wanted = [name for parameters in own for name, _ in parameters]
    if not keys and len(saved) == len(wanted):
        keys = dict(zip(wanted, saved, strict=True))
    if keys.keys() != set(wanted):
        apart = sorted(keys.keys() ^ set(wanted))
        found = f": only one of the two has {some_of(apart, 3)}" if keys else f" ({len(saved)} and {len(wanted)})"
        raise CheckpointError(
            f"the checkpoint holds optimizer states for other parameters than those trained now{found}. Resume with "
            "the model.adapter and model.train_towers of its run, or start a new run (no ckpt_path, another run.name)."
        )
    group_of = {key: group for group in groups for key in group["params"]}
    numbers = iter(range(len(wanted)))
    found_states, found_groups = {}, []
    for parameters in own:
        settings = group_of[keys[parameters[0][0]]]
        ordered = []
        for name, parameter in parameters:
            ordered.append(number := next(numbers))
            if (values := state.get("state", {}).get(keys[name])) is not None:
                found_states[number] = {
                    key: place(value, parameter) if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }
        found_groups.append({k: v for k, v in settings.items() if k != "param_names"} | {"params": ordered})
    return {**state, "state": found_states, "param_groups": found_groups}


def plain_tensors(state: Any) -> Any:
    """Return an optimizer's state with torchao's quantised tensors taken apart, for ``torch.load`` can't move them."""
    if isinstance(state, dict):
        return {key: plain_tensors(value) for key, value in state.items()}
    if not _is_quantised(state):
        return state
    names, context = state.__tensor_flatten__()
    return {_QUANTISED: list(context), **{name: getattr(state, name) for name in names}}


def whole_tensors(state: Any) -> Any:
    """Return the inverse of :func:`plain_tensors`."""
    if not isinstance(state, dict):
        return state
    if _QUANTISED not in state:
        return {key: whole_tensors(value) for key, value in state.items()}
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.__tensor_unflatten__(state, state[_QUANTISED])


_QUANTISED = "torchao 8-bit state"  # marks a quantised tensor that was taken apart


def _is_quantised(value: Any) -> bool:
    return isinstance(value, Tensor) and type(value).__name__ == "OptimState8bit"


def _eight_bits(trained: list[Tensor]) -> Any:
    sharded = any(isinstance(p, DTensor) for p in trained)
    if find_spec("torchao") is not None:
        from torchao.optim import AdamW8bit

        return AdamW8bit
    if find_spec("bitsandbytes") is not None and not sharded:
        from bitsandbytes.optim import AdamW8bit as OfBitsandbytes

        return OfBitsandbytes
    packages = "torchao (bitsandbytes can't hold sharded moments)" if sharded else "torchao or bitsandbytes"
    raise ShadowlitError(
        f"model.optimizer is 'adamw_8bit', which needs the package {packages}. Install it, e.g. pip install torchao, "
        "or set model.optimizer to adamw."
    )

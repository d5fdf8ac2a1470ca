"""What a module that trains has learned: its parameters next to the pair's, their updates, and the graft they make."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowlit.checkpoint.folder import is_finite
from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import in_layout_of_module
from shadowlit.checkpoint.names import (
    canonical_key,
    component_of,
    in_totals,
    is_adapter_name,
    is_linear_factor,
    layer_label,
)
from shadowlit.checkpoint.reader import TensorReader, described, fingerprint_of, rows_of
from shadowlit.distributed import local, local_slices, reshard_all, whole
from shadowlit.errors import CheckpointError, GraftError
from shadowlit.grafting.adapter import AdaptedLayer, adapted_layers, leaves_residual, require_untied
from shadowlit.grafting.arithmetic import accumulation_dtype, add_delta, delta, graft
from shadowlit.grafting.factors import Factors
from shadowlit.grafting.pairing import HostParameter, aliases_of, parts_of, require_pairing, select_parameters
from shadowlit.grafting.parameters import host_parameters, linear_names
from shadowlit.grafting.quantised import quantised_layers
from shadowlit.grafting.selection import coverage
from shadowlit.grafting.subject import TUNED, Subject
from shadowlit.grafting.swap import Swap, windows
from shadowlit.grafting.transformed import GradientRows, ParameterTransforms, Transforms, laid_out
from shadowlit.grafting.update import Part, dense_part, factor_parts

Squares = dict[str, Tensor]  # by name: sums of squares of an update and of its rounding error, float64 [2]


class ModuleGraft:
    """The graft that the parameters of a module make, and frozen shards of the pair to compute it with.

    Arguments and errors are those of :class:`shadowlit.grafting.live.LiveGraft`, which swaps it in and out.
    """

    def __init__(
        self,
        model: nn.Module,
        base: TensorReader,
        instruct: TensorReader,
        *,
        select: str | list[str] = "linear",
        dtype: torch.dtype | None = None,
        offload: bool = False,
        transforms: Transforms | None = None,
        variants: Mapping[str, Transforms] | None = None,
        on_tuned: bool = False,
    ) -> None:
        self.model, self.dtype, self.offload, self._on_tuned = model, dtype, offload, on_tuned
        self.subject: Subject = TUNED  # whose weights are loaded
        self.fitted: Mapping[str, float] = {}  # scales of parameters that replace those of every graft, once they exist
        self._instruct_reader = instruct
        require_untied(model)
        reshard_all(model)
        parameters = host_parameters(model)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        base, by_module = in_layout_of_module(base, shapes), in_layout_of_module(instruct, shapes)
        require_pairing(parameters, base, by_module)
        # For each tensor of the Instruct's files that is not a parameter by itself, its parts of parameters.
        self._parts = {} if by_module is instruct else parts_of(shapes, instruct)
        self._infos = {name: by_module.info(name) for name in shapes}
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        self.selected = select_parameters(select, list(parameters), self._parts, linear_names(model), model_type)
        self.signs: dict[GradientRows, dict[str, Tensor]] = {}  # of gradients at the Instruct, for transforms
        self._transforms: dict[str | None, ParameterTransforms] = {  # by variant; none where the update stays as it is
            name: ParameterTransforms(chosen, parameters, instruct, self._parts, self.signs)
            for name, chosen in {"": transforms, **(variants or {})}.items()
            if chosen
        }
        layers = self._layers = adapted_layers(model)
        self._quantised = quantised_layers(model)
        self._hosts = [
            self._host(name, parameter, layers.get(name), base, by_module) for name, parameter in parameters.items()
        ]
        self._by_name = {host.name: host for host in self._hosts}
        self._by_parameter = {id(host.parameter): host for host in self._hosts}
        trained = frozenset(host.name for host in self._hosts if host.trained)
        if not self.selected & trained:
            raise GraftError(
                f"graft.select={select!r} chooses nothing that is trained: it chooses "
                f"{some_of(sorted(self.selected))}, whereas {some_of(sorted(trained))} are trained. Change one of the "
                "two."
            )
        sizes = {host.name: host.parameter.numel() for host in self._hosts}
        self.coverage = coverage(self.selected & trained, trained, sizes)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of frozen shards that this rank holds between validations."""
        held = [t for host in self._hosts for t in (host.instruct, host.base) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def num_local_parameters(self) -> int:
        """Elements of the host's parameters on this rank."""
        return sum(local(host.parameter).numel() for host in self._hosts)

    def serves_adapter(self, scale: float) -> bool:
        """Return whether the adapter on the untouched Instruct computes the graft at this scale, except for
        rounding.
        """
        adapted = [host.adapted for host in self._hosts if host.adapted is not None]
        means_the_same = all(layer.additive and (scale == 1 or layer.scaling is not None) for layer in adapted)
        plain = "" not in self._transforms and all(host.base is None for host in self._hosts)
        return bool(adapted) and means_the_same and plain

    @property
    def grafted_parameters(self) -> dict[str, Tensor]:
        """The parameters that get an update, by name; a GraftError if one is in 4 bits, which has no gradient."""
        grafted = {host.name: host for host in self._hosts if host.selected and host.trained}
        if any(host.quantised for host in grafted.values()):
            raise GraftError(
                "graft.fit_scales and transforms such as gradfix need gradients of the weights, which the layers of "
                "model.quantization don't have. Train without quantization, or without these."
            )
        return {name: host.parameter for name, host in grafted.items()}

    @torch.no_grad()
    def update_of(self, name: str, variant: str = "") -> Tensor:
        """Return this rank's part of a parameter's update, transformed and not scaled, whichever weights are loaded."""
        return self._update(self._by_name[name], variant)

    def in_files(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return numbers of parameters, such as ``fitted``, by the names of the tensors in the Instruct's files.

        Raises:
            GraftError: A tensor of the files is made of parameters with different numbers.
        """
        found: dict[str, float] = {}
        for name, host in self._named_in_files():
            parts = [part.name for part in self._parts[name]] if name in self._parts else [host] if host else []
            numbers = {values[part] for part in parts if part in values}
            if len(numbers) > 1:
                raise GraftError(
                    f"graft.fit_scales: {name} of the Instruct's files holds parameters of several groups, so it can't "
                    "have one scale. Set groups=layer."
                )
            found |= {name: numbers.pop()} if numbers else {}
        return found

    @property
    def holds_float32(self) -> bool:
        """Whether every parameter that is grafted can hold the graft before it is rounded to the export's dtype."""
        grafted = (host for host in self._hosts if host.selected and host.trained)
        return all(local(host.parameter).dtype == torch.float32 for host in grafted)

    @property
    def on_base(self) -> bool:
        """Whether every trained parameter on this rank still has the Base's value."""
        reshard_all(self.model)
        residual = leaves_residual(self.model)  # with the factors it is the Base, up to rounding
        hosts = (host for host in self._hosts if not (residual and host.adapted))
        return all(host.base is None or torch.equal(host.tuned(), host.base.to(host.tuned())) for host in hosts)

    @torch.no_grad()
    def statistics(self, scale: float = 1.0, squares: Squares | None = None, variant: str = "") -> dict[str, float]:
        """Norms of the update, and the fraction that survives rounding to the exported dtype; a collective if sharded.

        ``squares`` is what :meth:`apply` collected for this scale and variant, if the weights have not changed since.

        Returns:
            Of the selected tensors that are trained: ``delta_norm`` (Frobenius) and ``delta_norm/<layer>``;
            ``relative_delta``, the update's norm divided by that of the Instruct's weights, and ``survival`` (1: all of
            the update survives rounding, 0: nothing useful does; absent if it is zero), both over
            :func:`~shadowlit.checkpoint.names.in_totals`, the matrices; and the two by component,
            ``relative_delta/norms``. With transforms, all describe the transformed update.
        """
        assert self.subject == TUNED
        reshard_all(self.model)
        known = squares or {}
        grafted = [host for host in self._hosts if host.selected and host.trained]
        rows = []
        for host in grafted:
            found = known[host.name] if host.name in known else self._squares(host, self._scale(host, scale), variant)
            if host.instruct_square is None:
                parts = (host.instruct.view(-1)[part].to(found.device).float() for part in windows(host.instruct))
                host.instruct_square = torch.stack([torch.dot(x, x).to(found.dtype) for x in parts]).sum()
            rows.append(torch.stack([*found, host.instruct_square]))
        table = torch.stack(rows)
        sharded = next((h.parameter for h in self._hosts if isinstance(h.parameter, DTensor)), None)
        if sharded is not None:
            dist.all_reduce(table, group=sharded.device_mesh.get_group())
        shapes = {host.name: self._infos[host.name].shape for host in grafted}
        total = in_totals(shapes)
        scales = [[self._scale(host, scale)] for host in grafted]
        every = dict(zip(shapes, map(operator.add, table.tolist(), scales), strict=True))
        layers: dict[str, list[list[float]]] = {}
        components: dict[str, list[list[float]]] = {}
        for name, row in every.items():
            layers.setdefault(layer_label(name), []).append(row)
            components.setdefault(component_of(name, shapes[name]), []).append(row)
        by_component = {part: _relative(rows) for part, rows in components.items()}
        return {
            "delta_norm": _norm(every.values()),
            **_relative([row for name, row in every.items() if name in total]),
            **{f"delta_norm/{label}": _norm(rows) for label, rows in layers.items()},
            **{f"{key}/{part}": value for part, found in by_component.items() for key, value in found.items()},
        }

    @torch.no_grad()
    def grafted_tensors(self, scale: float = 1.0, variant: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the Instruct's checkpoint with the update grafted on, under its name there.

        ``variant`` names the transforms of the update. One whole tensor at a time, on the CPU, computed in float32 and
        rounded once; of experts that the files hold one by one those of one layer. Every rank must iterate to the end;
        all ranks get the tensors. What the module has no parameter for keeps the Instruct's values.
        """
        assert self.subject == TUNED
        reshard_all(self.model)

        def grafted(name: str, dtype: torch.dtype) -> Tensor:
            host = self._by_name[name]
            part = self._grafted(host, self._scale(host, scale), variant).to(dtype)
            return whole(part.to(host.parameter.device), host.parameter).cpu()

        infos = {name: info.converted(self.dtype) for name, info in self._infos.items()}
        files = self._instruct_reader
        in_files = laid_out(infos, files, lambda n: grafted(n, infos[n].dtype)) if self._parts else files
        for name, host in self._named_in_files():
            dtype = files.tensors[name].converted(self.dtype).dtype
            if name in self._parts:
                yield name, in_files.read(name)
            else:
                yield name, files.read(name).to(dtype) if host is None else grafted(host, dtype)

    def _named_in_files(self) -> Iterator[tuple[str, str | None]]:
        """The tensors of the Instruct's files, each with the parameter that it is, if it is one by itself."""
        aliases = aliases_of(self.model)
        by_key = {canonical_key(alias): first for alias, first in aliases.items()}
        for name in self._instruct_reader.tensors:
            host = self._by_name.get(aliases.get(name) or by_key.get(canonical_key(name), name))
            yield name, None if host is None or name in self._parts else host.name

    @torch.no_grad()
    def delta_tensors(self, factored: bool = False, variant: str = "") -> Iterator[tuple[str, Tensor | Factors]]:
        """Yield the update of every selected tensor that is trained, ``tuned − base``, under its name in the files.

        With :attr:`fitted` scales it is multiplied by them. One whole tensor at a time, float32, on the CPU, in the
        order of their names. Every rank must iterate to the end; all ranks get them. With ``factored``, what an adapter
        has learned as a product of two matrices comes so.
        """
        for name, read in self._updates(factored, variant).items():
            yield name, read()

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Return the fingerprint of what was learned of the files' tensors that are grafted, before any transform; a
        collective. See :meth:`shadowlit.grafting.update.Update.fingerprint`.
        """
        assert not self.fitted
        # On tuned weights it is a sum, also where these are the Base's.
        updates = self._updates(factored=not self._on_tuned, variant=None)
        named = [(name, name if host is None else host) for name, host in sorted(self._named_in_files())]
        chosen = [(name, of) for name, of in named if of in updates]

        def parts(name: str, of: str) -> Iterator[Part]:
            found = updates[of]()
            if isinstance(found, Factors):
                return factor_parts(name, found)
            return iter([dense_part(name, tuple(found.shape), partial(rows_of(lambda _: found), name))])

        return fingerprint_of((part for one in chosen for part in parts(*one)), len(chosen))

    def _updates(self, factored: bool, variant: str | None) -> dict[str, Callable[[], Tensor | Factors]]:
        """What reads each tensor of :meth:`delta_tensors`; the variant None has no transforms."""
        assert self.subject == TUNED
        reshard_all(self.model)
        trained = {host.name: host for host in self._hosts if host.selected and host.trained}

        def update(name: str) -> Tensor:
            host = trained[name]
            update = whole(self._update(host, variant).to(host.parameter.device), host.parameter).float().cpu()
            return self.fitted[name] * update if name in self.fitted else update

        infos = described({name: info.shape for name, info in self._infos.items()})
        in_files = laid_out(infos, self._instruct_reader, update) if self._parts else self._instruct_reader
        apart = {part.name for parts in self._parts.values() for part in parts}
        cut = {name for name, parts in self._parts.items() if trained.keys() >= {part.name for part in parts}}

        def read(name: str) -> Tensor | Factors:
            factors = self._factors(trained[name], variant) if factored and name not in cut else None
            if factors is not None and name in self.fitted:
                factors = Factors(self.fitted[name] * factors.up, factors.down)
            return factors or (in_files.read(name) if name in cut else update(name))

        return {name: partial(read, name) for name in sorted(cut | (trained.keys() - apart))}

    @torch.no_grad()
    def delta_bytes(self, variant: str = "") -> int:
        """Return the bytes of the update as it is stored, in bfloat16 or as factors; a collective if sharded."""
        reshard_all(self.model)
        total = 0
        for host in self._hosts:
            if host.selected and host.trained:
                dense = 2 * host.parameter.numel()
                factors = self._factors(host, variant)
                total += dense if factors is None else min(dense, factors.num_bytes)
        return total

    def _factors(self, host: HostParameter, variant: str | None) -> Factors | None:
        """The whole update of a parameter as factors on the CPU; None if it isn't an adapter's product alone."""
        if variant in self._transforms or host.adapted is None or host.base is not None:
            return None
        found = host.adapted.factors(self._whole_tuned)
        return None if found is None else Factors(found.up.cpu(), found.down.cpu())

    @torch.no_grad()
    def adapter_tensors(self, scale: float = 1.0, variant: str = "") -> dict[str, Tensor]:
        """Return the adapter's factors, whole and on the CPU, by their names in the module; a collective when sharded.

        ``scale`` (0 outside the selection) is folded into a factor in which the update is linear, so that the adapter
        on the Instruct is the graft.

        Raises:
            GraftError: The update is transformed, so that the factors don't give it.
        """
        assert self.subject == TUNED
        if variant in self._transforms:
            raise GraftError(
                "the graft transforms the update, so the adapter's factors do not give it. Export the model or the "
                "delta; 'shadowlit delta lora' makes an adapter of a delta."
            )
        reshard_all(self.model)
        scales = {h.adapted.layer: self._scale(h, scale) if h.selected else 0.0 for h in self._hosts if h.adapted}
        tensors = {}
        for prefix, module in self.model.named_modules():
            if module not in scales:
                continue
            for name, parameter in module.named_parameters():
                if not is_adapter_name(name.partition(".")[0]):  # also those of a layer that this one is wrapped around
                    continue
                tensor = whole(local(parameter), parameter).cpu()
                folded = is_linear_factor(name)
                tensors[f"{prefix}.{name}"] = tensor * scales[module] if folded else tensor.clone()
        buffers = self.model.named_buffers(remove_duplicate=False)  # the adapter's own, which layers share (VeRA)
        return {**tensors, **{name: buffer.cpu().clone() for name, buffer in buffers if is_adapter_name(name)}}

    def _host(
        self, name: str, parameter: Tensor, layer: AdaptedLayer | None, base: TensorReader, instruct: TensorReader
    ) -> HostParameter:
        live = local(parameter)
        slices = local_slices(parameter)
        start = base.read_slice(name, slices)
        target = instruct.read_slice(name, slices)
        for values, reader in ((start, base), (target, instruct)):
            if not is_finite(values):  # found before the training, and not by the export after it
                raise CheckpointError(
                    f"tensor '{name}' of {reader.folder} holds NaN or infinities, and so would the grafted model. Save "
                    "or download this model again."
                )
        selected = name in self.selected
        four_bit = self._quantised.get(name)
        same = four_bit.holds(base.read(name)) if four_bit else torch.equal(live, start.to(live.device, live.dtype))
        frozen = not parameter.requires_grad and same
        moved = self._on_tuned or (layer and leaves_residual(self.model))
        if not (frozen or parameter.requires_grad or moved):
            raise GraftError(
                f"{name} is frozen in the trained module, but is not the Base's. Expected the weights of "
                f"{base.folder}. Check pair.base, and that no other callback changes weights."
            )
        added_to = four_bit is not None or (layer is not None and selected)
        swapped = is_swapped(frozen, added_to, self.dtype, target.dtype)
        if swapped:
            # What is swapped with the parameter must be of its dtype. The pair check warns when they differ.
            target = target.to(live.dtype)
        held = self._to_storage(target, live)
        before = None if frozen else self._to_storage(start, live)
        swap = Swap(live, held) if swapped else None
        exchanged = frozen and not swapped and four_bit is None and held.dtype == live.dtype
        exchange = Swap(live, held) if exchanged else None
        return HostParameter(
            name, parameter, held, before, selected, swap, adapted=layer, quantised=four_bit, exchange=exchange
        )

    def _to_storage(self, tensor: Tensor, live: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        if self.offload or live.device.type == "cpu":
            return tensor.pin_memory() if live.is_cuda else tensor
        return tensor.to(live.device)

    def _scale(self, host: HostParameter, scale: float) -> float:
        """The scale of a parameter's update where the graft's is ``scale``."""
        return self.fitted.get(host.name, scale)

    def _rounding(self, host: HostParameter) -> torch.dtype:
        return self.dtype or host.instruct.dtype

    def _update(self, host: HostParameter, variant: str | None = "") -> Tensor:
        """This rank's part of an update, with the transforms of a variant."""
        transforms = self._transforms.get(variant)
        if transforms is None or not host.trained:
            return self._learned(host)
        return transforms(host.name, lambda name: self._learned(self._by_name[name]))

    def _learned(self, host: HostParameter) -> Tensor:
        device = local(host.parameter).device
        total = delta(host.tuned(), host.base.to(device)) if host.base is not None else None
        if host.adapted is not None:
            learned = host.adapted.delta_weight(host.parameter, self._whole_tuned)
            total = learned if total is None else total + learned
        return torch.zeros(host.instruct.shape, device=device) if total is None else total

    def _whole_tuned(self, parameter: Tensor) -> Tensor:
        """The whole of the trained values of a parameter of the host or of an adapter, whichever are loaded."""
        host = self._by_parameter.get(id(parameter))
        part = local(parameter) if host is None else host.tuned().to(parameter.device)
        return whole(part, parameter)

    def _grafted(self, host: HostParameter, scale: float, variant: str) -> Tensor:
        instruct = host.instruct.to(local(host.parameter).device)
        if not host.selected:
            return instruct.clone()  # the frozen weights themselves are swapped with the Base's in place
        if host.adapted is None and host.base is not None and variant not in self._transforms:
            return graft(instruct, host.tuned(), host.base.to(instruct.device), scale)
        return add_delta(instruct, self._update(host, variant), scale)

    def _squares(self, host: HostParameter, scale: float, variant: str) -> Tensor:
        """Sums of squares of an update and of its rounding error, float64 ``[2]``."""
        update, instruct = self._update(host, variant).flatten(), host.instruct.view(-1)
        sums = torch.zeros(2, dtype=accumulation_dtype(update.device), device=update.device)
        for part in windows(update):
            exact = add_delta(instruct[part].to(update.device, non_blocking=True), update[part], scale)
            sums += sums_of_squares(update[part], exact, exact.to(self._rounding(host)))
        return sums


def _norm(rows: Iterable[Sequence[float]]) -> float:
    """The norm of an update, from the squared ones of its tensors, which come first in their rows."""
    return sum(row[0] for row in rows) ** 0.5


def _relative(rows: list[list[float]]) -> dict[str, float]:
    """``relative_delta`` and ``survival``, from the squared norms of updates, of what is lost, and of weights, and the
    scales.
    """
    update, lost, weights = (sum(row[i] for row in rows) for i in range(3))
    scales = {row[3] for row in rows}
    scaled = scales.pop() ** 2 * update if len(scales) == 1 else sum(row[3] ** 2 * row[0] for row in rows)
    relative = {"relative_delta": (update / weights) ** 0.5 if weights else 0.0}
    return relative | ({"survival": 1 - (lost / scaled) ** 0.5} if scaled else {})


def sums_of_squares(update: Tensor, exact: Tensor, rounded: Tensor) -> Tensor:
    """Of a window's update and of its rounding error: products in float32, at which BLAS is fast; ``[2]``."""
    lost = rounded.to(exact.dtype) - exact
    return torch.stack([torch.dot(update, update), torch.dot(lost, lost)])


def is_swapped(frozen: bool, grafted: bool, dtype: torch.dtype | None, stored: torch.dtype) -> bool:
    """Return whether a parameter is swapped with the Instruct's values in place, without a copy of its own values.

    Not under a selected adapter, whose update is added to the weights that it sits on; and not where the graft alone
    rounds to a narrower dtype than that of the files.
    """
    rounding = dtype or stored
    return frozen and not grafted and torch.promote_types(rounding, stored) == rounding

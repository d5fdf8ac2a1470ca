"""The graft inside a training module: frozen shards next to the parameters, swapped in and out in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowlit.checkpoint.folder import is_finite
from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import LayoutReader, Range, in_layout_of_module
from shadowlit.checkpoint.names import (
    canonical_key,
    canonical_name,
    factor_of,
    is_adapter_name,
    layer_label,
    split_selection,
)
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described
from shadowlit.distributed import from_first_rank, local, local_slices, reshard_all, whole
from shadowlit.errors import CheckpointError, GraftError
from shadowlit.grafting.adapter import AdaptedLayer, adapted_layers, leaves_residual, require_untied
from shadowlit.grafting.arithmetic import accumulation_dtype, add_delta, delta, graft
from shadowlit.grafting.parameters import host_parameters, linear_names
from shadowlit.grafting.quantised import FourBitLinear, four_bits, quantised_layers
from shadowlit.grafting.selection import coverage, resolve
from shadowlit.grafting.subject import BASE, INSTRUCT, TUNED, Subject
from shadowlit.grafting.swap import Swap, windows
from shadowlit.grafting.transformed import ParameterTransforms, Transforms, laid_out

Squares = dict[str, Tensor]  # by name: sums of squares of an update and of its rounding error, float64 [2]
_Found = TypeVar("_Found")


@dataclass
class HostParameter:
    """A parameter of the host model and its frozen shards; all of one local shape."""

    name: str
    parameter: Tensor
    instruct: Tensor
    base: Tensor | None  # None where the parameter is frozen at the Base's own value
    selected: bool
    swap: Swap | None  # where `base` is None
    saved: Tensor | None = None  # the tuned values while others are loaded
    adapted: AdaptedLayer | None = None
    quantised: FourBitLinear | None = None  # the layer, where `parameter` stands for its weight in 4 bits
    instruct_square: Tensor | None = None  # sum of squares of `instruct`, once it was computed

    @property
    def trained(self) -> bool:
        """Whether it is trained itself, or has a trained adapter."""
        return self.base is not None or self.adapted is not None

    def tuned(self) -> Tensor:
        """The trained values, whichever are loaded."""
        return local(self.parameter) if self.saved is None else self.saved


class LiveGraft:
    """Loads the weights of a subject into the module that is being trained, and swaps the trained ones back.

    Every operation is elementwise on this rank's shards, and the frozen shards are placed as the parameters are: only
    an adapter's sharded factors are gathered, and multiplied as one process would, one layer at a time. Trained
    parameters and those under an adapter are overwritten with ``instruct + scale * (tuned - base)``, where ``tuned``
    includes the adapter's update, rounded once to the dtype of the export, and restored from a copy; the adapter itself
    is switched off. So the module holds the very weights that an export writes. With ``transforms`` it is ``instruct +
    scale * T(tuned - base)``. Other parameters become the Instruct's own. A weight in 4 bits stays, and its layer
    computes with another.
    Parameters are paired by name; experts that the module holds in one tensor and the files one by one (or the other
    way round) by :mod:`shadowlit.checkpoint.layout`.

    :meth:`restore` leaves the module as it was, bit for bit, from any point at which an exception or an interrupt may
    have left a call. Does not compose with other callbacks that swap weights (EMA, SWA), nor with a merged adapter.

    Args:
        model: Trained model (not the LightningModule), wrapped by peft or not, sharded by FSDP2 or not.
        base: Checkpoint that training started from.
        instruct: Checkpoint that is grafted onto.
        select: ``linear``, ``all`` or patterns; see :func:`shadowlit.grafting.selection.resolve`. Patterns are searched
            in the names of the Instruct's files, and those that match none there in the module's parameters' names.
        dtype: Dtype that the graft is rounded to, as its export will be; ``None`` for that of the Instruct's file.
        offload: Keep the frozen shards and the copy of the tuned ones on the CPU.
        transforms: Functions of the update, applied before it is scaled; only elementwise ones if it is sharded.

    Raises:
        GraftError: A name, a shape or an adapter can't be paired or grafted, the selection is empty, or a
            transform can't be applied to these parameters.
        CheckpointError: A tensor of the Base or the Instruct holds NaN or infinities.
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
    ) -> None:
        self.model, self.dtype, self.offload = model, dtype, offload
        self.subject = TUNED  # whose weights are loaded
        self.interruptions = 0  # checkpoints saved while other weights than the tuned ones were loaded
        self.apply_s = 0.0  # spent on swapping in and out
        self._busy = False
        self._instruct_reader = instruct
        require_untied(model)
        parameters = host_parameters(model)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        base, by_module = in_layout_of_module(base, shapes), in_layout_of_module(instruct, shapes)
        _require_pairing(parameters, base, by_module)
        # For each tensor of the Instruct's files that is no parameter by itself, the parts of parameters it is made of.
        self._parts = {} if by_module is instruct else _parts(shapes, instruct)
        self._infos = {name: by_module.info(name) for name in shapes}
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        self.selected = _select(select, list(parameters), self._parts, linear_names(model), model_type)
        self._transforms = ParameterTransforms(transforms, parameters, instruct, self._parts) if transforms else None
        layers = adapted_layers(model)
        self._quantised = quantised_layers(model)
        reshard_all(model)
        self._hosts = [
            self._host(name, parameter, layers.get(name), base, by_module) for name, parameter in parameters.items()
        ]
        self._by_name = {host.name: host for host in self._hosts}
        trained = frozenset(host.name for host in self._hosts if host.trained)
        if not self.selected & trained:
            raise GraftError(
                f"graft.select={select!r} chooses nothing that is trained: it chooses "
                f"{some_of(sorted(self.selected))}, and trained are {some_of(sorted(trained))}. Change one of the two."
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

    @property
    def serves_adapter(self) -> bool:
        """Whether the adapter on the untouched Instruct computes the graft, except for rounding."""
        adapted = any(host.adapted is not None for host in self._hosts)
        return adapted and self._transforms is None and all(host.base is None for host in self._hosts)

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

    @contextmanager
    def applied(self, subject: Subject, squares: Squares | None = None) -> Iterator[None]:
        """Load the weights of ``subject`` within the context, and afterwards those before; see :meth:`apply`.

        After an exception the trained weights are loaded.
        """
        before = self.subject
        if subject == before:
            yield
            return
        try:
            self.apply(subject, squares)
            yield
            self.apply(before)
        except BaseException:
            self.restore()
            raise

    def measure(self, subject: Subject, function: Callable[[], _Found], squares: Squares | None = None) -> _Found:
        """Call ``function`` with the weights of ``subject`` loaded, and return its result.

        It is called again if a checkpoint was saved meanwhile, for which the trained weights were swapped in.
        """
        while True:
            interruptions = self.interruptions
            with self.applied(subject, squares):
                found = function()
                if self.interruptions == interruptions:
                    return found

    @torch.no_grad()
    def apply(self, subject: Subject, squares: Squares | None = None) -> None:
        """Load the weights of ``subject`` into the module; ``squares`` collects what :meth:`statistics` needs."""
        if subject == TUNED:
            self.restore()
            return
        start = time.perf_counter()
        self._busy = True
        reshard_all(self.model)
        if self.subject == TUNED:
            # Lightning moves a module to the CPU when a command ends, and back when the next one begins.
            for host in self._hosts:
                if host.swap is not None:
                    host.swap.follow(local(host.parameter))
        self.subject = subject
        for host in self._hosts:
            self._write_state(host, subject, squares)
            if host.adapted is not None:
                host.adapted.set_scale(subject.scale if subject.kind == "adapter" and host.selected else 0.0)
        self._synchronize()
        self._busy = False
        self.apply_s += time.perf_counter() - start

    @torch.no_grad()
    def restore(self) -> None:
        """Swap the trained weights back, bit for bit; harmless when they are loaded already."""
        if self.subject == TUNED:
            return
        start = time.perf_counter()
        self._busy = True
        reshard_all(self.model)
        for host in self._hosts:
            if host.quantised is not None:
                host.quantised.load(None)
            elif host.swap is not None:
                host.swap.undo()
            elif host.saved is not None:
                local(host.parameter).copy_(host.saved, non_blocking=True)
                host.saved = None
            if host.adapted is not None:
                host.adapted.set_scale(1.0)
        self._synchronize()
        self.subject = TUNED
        self._busy = False
        self.apply_s += time.perf_counter() - start

    def close(self) -> None:
        """Swap the trained weights back and close the Instruct's files."""
        self.restore()
        self._instruct_reader.close()

    def restore_for_checkpoint(self) -> None:
        """Swap the trained weights back before anything reads the module's state."""
        if self._busy:
            raise GraftError(
                "a checkpoint was requested while weights were being swapped for a grafted validation; none was "
                "written, since it would not hold the trained weights. The last regular checkpoint remains valid."
            )
        self.interruptions += self.subject != TUNED
        self.restore()

    @torch.no_grad()
    def statistics(self, scale: float = 1.0, squares: Squares | None = None) -> dict[str, float]:
        """Norms of the update, and the fraction that survives rounding to the exported dtype; a collective if sharded.

        ``squares`` is what :meth:`apply` collected for this scale, if the weights have not changed since.

        Returns:
            ``delta_norm`` (Frobenius, over the selected tensors), ``relative_delta`` (its ratio to the norm of the
            Instruct's), ``survival`` (1: all of the update survives rounding, 0: nothing useful does; absent if it is
            zero), and ``delta_norm/<layer>`` for every decoder layer. With transforms, all describe the transformed
            update.
        """
        assert self.subject == TUNED
        reshard_all(self.model)
        known = squares or {}
        layers: dict[str, Tensor] = {}
        for host in self._hosts:
            if not (host.selected and host.trained):
                continue
            found = known[host.name] if host.name in known else self._squares(host, scale)
            if host.instruct_square is None:
                parts = (host.instruct.view(-1)[part].to(found.device).float() for part in windows(host.instruct))
                host.instruct_square = torch.stack([torch.dot(x, x).to(found.dtype) for x in parts]).sum()
            key = layer_label(host.name)
            layers[key] = layers.get(key, 0) + torch.stack([*found, host.instruct_square])
        table = torch.stack(list(layers.values()))
        sharded = next((h.parameter for h in self._hosts if isinstance(h.parameter, DTensor)), None)
        if sharded is not None:
            dist.all_reduce(table, group=sharded.device_mesh.get_group())
        update_square, lost_square, instruct_square = table.sum(0).tolist()
        scaled_square = scale**2 * update_square
        return {
            "delta_norm": update_square**0.5,
            "relative_delta": (update_square / instruct_square) ** 0.5 if instruct_square else 0.0,
            **({"survival": 1 - (lost_square / scaled_square) ** 0.5} if scaled_square else {}),
            **{f"delta_norm/{key}": row[0] ** 0.5 for key, row in zip(layers, table.tolist(), strict=True)},
        }

    @torch.no_grad()
    def grafted_tensors(self, scale: float = 1.0) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the Instruct's checkpoint with the update grafted on, under its name there.

        One whole tensor at a time, on the CPU, computed in float32 and rounded once; of experts that the files hold
        one by one those of one layer. Every rank must iterate to the end; all ranks get the tensors. What the module
        has no parameter for keeps the Instruct's values.
        """
        assert self.subject == TUNED
        reshard_all(self.model)
        aliases = _aliases(self.model)
        by_key = {canonical_key(alias): first for alias, first in aliases.items()}

        def grafted(name: str, dtype: torch.dtype) -> Tensor:
            host = self._by_name[name]
            part = self._grafted(host, scale).to(dtype)
            return whole(part.to(host.parameter.device), host.parameter).cpu()

        infos = {name: info.converted(self.dtype) for name, info in self._infos.items()}
        files = self._instruct_reader
        in_files = laid_out(infos, files, lambda n: grafted(n, infos[n].dtype)) if self._parts else files
        for name, info in files.tensors.items():
            dtype = info.converted(self.dtype).dtype
            if name in self._parts:
                yield name, in_files.read(name)
            elif (host := self._by_name.get(aliases.get(name) or by_key.get(canonical_key(name), name))) is not None:
                yield name, grafted(host.name, dtype)
            else:
                yield name, files.read(name).to(dtype)

    @torch.no_grad()
    def delta_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the update of every selected tensor that is trained, ``tuned − base``, under its name in the files.

        One whole tensor at a time, float32, on the CPU, in the order of their names. Every rank must iterate to the
        end; all ranks get them.
        """
        assert self.subject == TUNED
        reshard_all(self.model)
        trained = {host.name: host for host in self._hosts if host.selected and host.trained}

        def update(name: str) -> Tensor:
            host = trained[name]
            return whole(self._update(host).to(host.parameter.device), host.parameter).float().cpu()

        infos = described({name: info.shape for name, info in self._infos.items()})
        in_files = laid_out(infos, self._instruct_reader, update) if self._parts else self._instruct_reader
        apart = {part.name for parts in self._parts.values() for part in parts}
        cut = {name for name, parts in self._parts.items() if trained.keys() >= {part.name for part in parts}}
        for name in sorted(cut | (trained.keys() - apart)):
            yield name, in_files.read(name) if name in cut else update(name)

    @torch.no_grad()
    def adapter_tensors(self, scale: float = 1.0) -> dict[str, Tensor]:
        """The adapter's factors, whole and on the CPU, by their names in the module; a collective when sharded.

        ``scale`` (0 outside the selection) is folded into the factor that starts at zero, so that the adapter on the
        Instruct is the graft.

        Raises:
            GraftError: The update is transformed, so that the factors don't give it.
        """
        assert self.subject == TUNED
        if self._transforms is not None:
            raise GraftError(
                "the graft transforms the update, so the adapter's factors do not give it. Export the model or the "
                "delta; 'python -m shadowlit delta lora' makes an adapter of a delta."
            )
        reshard_all(self.model)
        scales = {host.adapted.layer: scale if host.selected else 0.0 for host in self._hosts if host.adapted}
        tensors = {}
        for prefix, module in self.model.named_modules():
            if module not in scales:
                continue
            for name, parameter in module.named_parameters():
                if not is_adapter_name(name.partition(".")[0]):  # also those of a layer that this one is wrapped around
                    continue
                tensor = whole(local(parameter), parameter).cpu()
                folded = factor_of(name) in ("B", "embedding_A")
                tensors[f"{prefix}.{name}"] = tensor * scales[module] if folded else tensor.clone()
        return tensors

    @contextmanager
    def loaded(self, files: TensorReader | None) -> Iterator[None]:
        """Load the tensors of a written graft within the context, and afterwards the trained weights again.

        Rank 0 reads ``files``, one whole tensor at a time, and the others, who give ``None``, get their parts from it:
        a collective.
        """
        shapes = {host.name: tuple(host.parameter.shape) for host in self._hosts}
        reader = None
        if files is not None:
            files.tied = self._instruct_reader.tied
            reader = in_layout_of_module(files, shapes)
        with self.applied(INSTRUCT):
            for host in self._hosts:
                dtype = self._infos[host.name].converted(self.dtype).dtype
                # No variable keeps a tensor while the next one is read.
                read = None if reader is None else partial(reader.read, host.name)
                self._overwrite(host, from_first_rank(read, dtype, host.parameter))
            yield

    def _host(
        self, name: str, parameter: Tensor, layer: tuple | None, base: TensorReader, instruct: TensorReader
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
        if not (frozen or parameter.requires_grad or (layer and leaves_residual(self.model))):
            raise GraftError(
                f"{name} is frozen in the trained module, but is not the Base's. Expected the weights of "
                f"{base.folder}. Check pair.base, and that no other callback changes weights."
            )
        # A selected adapter's update is added to the weights that it sits on.
        rounding = self.dtype or target.dtype
        narrower = torch.promote_types(rounding, target.dtype) != rounding
        added_to = four_bit is not None or (layer is not None and selected)
        swapped = frozen and not added_to and not narrower  # rounded only in the graft
        if swapped:
            # What is swapped with the parameter must be of its dtype. The pair check warns when they differ.
            target = target.to(live.dtype)
        held = self._to_storage(target, live)
        before = None if frozen else self._to_storage(start, live)
        swap = Swap(live, held) if swapped else None
        host = HostParameter(name, parameter, held, before, selected, swap, quantised=four_bit)
        if layer is not None:
            adapted, adapter = layer
            host.adapted = AdaptedLayer(adapted, adapter, adapted.scaling[adapter])
        return host

    def _to_storage(self, tensor: Tensor, live: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        if self.offload or live.device.type == "cpu":
            return tensor.pin_memory() if live.is_cuda else tensor
        return tensor.to(live.device)

    def _write_state(self, host: HostParameter, subject: Subject, squares: Squares | None) -> None:
        live = local(host.parameter)
        if host.swap is not None:
            if subject == BASE:
                host.swap.undo()
            else:
                host.swap.apply()
            return
        if host.quantised is not None:
            host.quantised.load(None if subject == BASE else self._replacement(host, subject, squares))
            return
        if subject == BASE and host.base is None and host.saved is None:  # it holds the Base's, under an adapter
            return
        if host.saved is None:
            host.saved = self._copy(live)
        if subject == BASE:
            live.copy_(host.saved if host.base is None else host.base, non_blocking=True)
        else:
            self._write(live, host, subject, squares)

    def _overwrite(self, host: HostParameter, values: Tensor) -> None:
        live = local(host.parameter)
        if host.quantised is not None:
            host.quantised.load(self._to_storage(values, live))
        else:
            live.copy_(values)

    def _replacement(self, host: HostParameter, subject: Subject, squares: Squares | None) -> Tensor:
        """What the layer computes with instead of its weight in 4 bits."""
        assert host.quantised is not None
        host.parameter = host.quantised.logical_weight()  # where the module is now
        live = local(host.parameter)
        values = live.contiguous()
        self._write(values, host, subject, squares)
        if subject.kind == "grafted_4bit":  # of whole matrices, since some of the scales are
            values = four_bits(whole(values, host.parameter))[local_slices(host.parameter)]
        return self._to_storage(values, live)

    def _write(self, live: Tensor, host: HostParameter, subject: Subject, squares: Squares | None) -> None:
        """Overwrite ``live`` with the Instruct or a graft."""
        scale = subject.scale if host.selected and host.trained and subject.kind != "adapter" else 0.0
        if not scale:  # the Instruct itself, even where the training has diverged; rounded in the graft alone
            rounding = self._rounding(host) if subject.kind in ("grafted", "grafted_4bit") else host.instruct.dtype
            live.copy_(host.instruct.to(rounding), non_blocking=True)
            return
        measured = torch.zeros(2, dtype=accumulation_dtype(live.device), device=live.device)
        # Trained elements alone are subtracted a window at a time, so that the update never exists as a whole.
        whole_update = self._update(host).reshape(-1) if self._transforms or host.adapted else None
        out, sides = live.view(-1), [host.instruct, *([host.tuned(), host.base] if whole_update is None else [])]
        for part in windows(out):
            goal, *ends = (t.view(-1)[part].to(out.device, non_blocking=True) for t in sides if t is not None)
            update = delta(*ends) if whole_update is None else whole_update[part]
            exact = add_delta(goal, update, scale)
            rounded = exact.to(self._rounding(host))
            if squares is not None:
                measured += _sums_of_squares(update, exact, rounded)
            out[part] = exact if subject.kind == "unrounded" else rounded
        if squares is not None:
            squares[host.name] = measured

    def _squares(self, host: HostParameter, scale: float) -> Tensor:
        """Sums of squares of an update and of its rounding error, float64 ``[2]``."""
        update, instruct = self._update(host).flatten(), host.instruct.view(-1)
        sums = torch.zeros(2, dtype=accumulation_dtype(update.device), device=update.device)
        for part in windows(update):
            exact = add_delta(instruct[part].to(update.device, non_blocking=True), update[part], scale)
            sums += _sums_of_squares(update[part], exact, exact.to(self._rounding(host)))
        return sums

    def _copy(self, live: Tensor) -> Tensor:
        """A copy of a parameter's values, kept while others are loaded."""
        if self.offload and live.is_cuda:
            return torch.empty_like(live, device="cpu", pin_memory=True).copy_(live, non_blocking=True)
        if live.device.type != "cpu" or live.numel() < 2**20:
            return live.clone()
        # numpy asks the kernel for large pages, which are there twice as soon as the small ones that torch gets.
        memory = torch.from_numpy(np.empty(live.numel() * live.element_size(), dtype=np.uint8))
        return memory.view(live.dtype).view(live.shape).copy_(live)

    def _synchronize(self) -> None:
        """Wait for a GPU: offloaded tensors may be read on the CPU next, and the time is measured."""
        device = next((local(host.parameter).device for host in self._hosts), None)
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    def _rounding(self, host: HostParameter) -> torch.dtype:
        return self.dtype or host.instruct.dtype

    def _update(self, host: HostParameter) -> Tensor:
        """This rank's part of an update, transformed if there are transforms."""
        if self._transforms is None or not host.trained:
            return self._learned(host)
        return self._transforms(host.name, lambda name: self._learned(self._by_name[name]))

    def _learned(self, host: HostParameter) -> Tensor:
        device = local(host.parameter).device
        total = delta(host.tuned(), host.base.to(device)) if host.base is not None else None
        if host.adapted is not None:
            learned = host.adapted.delta_weight(host.parameter).detach().float()
            total = learned if total is None else total + learned
        return torch.zeros(host.instruct.shape, device=device) if total is None else total

    def _grafted(self, host: HostParameter, scale: float) -> Tensor:
        instruct = host.instruct.to(local(host.parameter).device)
        if not host.selected:
            return instruct.clone()  # the frozen weights themselves are swapped with the Base's in place
        if host.adapted is None and host.base is not None and self._transforms is None:
            return graft(instruct, host.tuned(), host.base.to(instruct.device), scale)
        return add_delta(instruct, self._update(host), scale)


def _parts(shapes: Mapping[str, tuple[int, ...]], instruct: TensorReader) -> dict[str, list[Range]]:
    """The parts of parameters that make up each tensor of the Instruct's files that is no parameter by itself."""
    layout = LayoutReader(ComputedReader(instruct.folder, described(shapes)), instruct, ties=False)
    return {name: layout.ranges[name] for name in instruct.tensors if name in layout.ranges and name not in shapes}


def _select(
    select: str | list[str], names: list[str], parts: dict[str, list[Range]], linear: frozenset[str], model_type: str
) -> frozenset[str]:
    """The parameters that a selection chooses; a pattern means what it means for the files."""
    if select in ("linear", "all") or not parts:
        return resolve(select, names, linear, model_type)
    towers, patterns = split_selection(select)
    apart = {part.name for ranges in parts.values() for part in ranges}
    in_files = [*(name for name in names if name not in apart), *parts]
    by_file: set[str] = set()
    by_parameter: set[str] = set()
    for pattern in patterns or ["all"]:
        within = [*towers, pattern]
        try:
            if pattern in ("linear", "all"):
                by_parameter |= resolve(within, names, linear, model_type)
            else:
                by_file |= resolve(within, in_files, linear, model_type)
        except GraftError:
            by_parameter |= resolve(within, names, linear, model_type)
    touched = {part.name for name, ranges in parts.items() if name in by_file for part in ranges}
    missed = {part.name for name, ranges in parts.items() if name not in by_file for part in ranges}
    if torn := sorted((touched & missed) - by_parameter):
        raise GraftError(
            f"graft.select={select!r} chooses some of the matrices that the module holds in {some_of(torn)}, and not "
            "others. Expected all of them or none: in memory they are one tensor, which gets the update as a whole. "
            "Choose all ('experts'), or graft on disk, where each is chosen by itself (python -m shadowlit graft)."
        )
    return frozenset(by_file & set(names) | touched | by_parameter)


def _sums_of_squares(update: Tensor, exact: Tensor, rounded: Tensor) -> Tensor:
    """Of a window's update and of its rounding error: products in float32, at which BLAS is fast; ``[2]``."""
    lost = rounded.to(exact.dtype) - exact
    return torch.stack([torch.dot(update, update), torch.dot(lost, lost)])


def _require_pairing(parameters: dict[str, Tensor], base: TensorReader, instruct: TensorReader) -> None:
    problems = []
    for title, reader in (("Base", base), ("Instruct", instruct)):
        missing = [name for name in parameters if name not in reader.tensors]
        if missing:
            problems.append(f"the {title}'s checkpoint {reader.folder} has no tensor {', '.join(missing[:5])}")
        problems += [
            f"{name} has the shape {reader.tensors[name].shape} in the {title}'s checkpoint and "
            f"{tuple(parameter.shape)} in the module"
            for name, parameter in parameters.items()
            if name in reader.tensors and reader.tensors[name].shape != tuple(parameter.shape)
        ][:5]
    if problems:
        raise GraftError(
            "the trained module and the pair can't be paired by name: " + "; ".join(problems) + ". Every parameter "
            "needs its tensor in both checkpoints. Check pair.base and pair.instruct."
        )


def _aliases(model: nn.Module) -> dict[str, str]:
    """Checkpoint names of shared storage, mapped to the name under which the parameter is listed first."""
    parameters = host_parameters(model)
    first = {id(parameter): name for name, parameter in parameters.items()}
    return {name: name for name in parameters} | {
        canonical_name(name): first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in first
    }

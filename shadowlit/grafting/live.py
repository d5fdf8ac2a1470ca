"""The graft inside a training module: frozen shards next to the parameters, swapped in and out in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from shadowlit.checkpoint.layout import in_layout_of_module
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.distributed import from_first_rank, local, local_slices, of_all_ranks, reshard_all, whole
from shadowlit.errors import GraftError
from shadowlit.grafting.adapter import leaves_residual
from shadowlit.grafting.arithmetic import accumulation_dtype, add_delta, delta
from shadowlit.grafting.module import ModuleGraft, Squares, sums_of_squares
from shadowlit.grafting.pairing import HostParameter
from shadowlit.grafting.quantised import four_bits
from shadowlit.grafting.subject import ANCHORED, BASE, INSTRUCT, TUNED, Subject
from shadowlit.grafting.swap import windows

_Found = TypeVar("_Found")


class LiveGraft(ModuleGraft):
    """Loads the weights of a subject into the module that is being trained, and swaps the trained ones back.

    Every operation is elementwise on this rank's shards, and the frozen shards are placed as the parameters are: only
    an adapted layer's sharded tensors are gathered, and merged as one process would, one layer at a time. Trained
    parameters and those under an adapter are overwritten with ``instruct + scale * (tuned - base)``, where ``tuned``
    includes the adapter's update, rounded once to the dtype of the export, and restored from a copy; the adapter itself
    is switched off. So the module holds the very weights that an export writes. With ``transforms`` it is ``instruct +
    scale * T(tuned - base)``. Other parameters become the Instruct's own. A weight in 4 bits stays, and its layer
    computes with another. ``anchored`` is what can be trained: trained parameters become ``instruct + (tuned - base)``
    in their own dtype, whatever is selected, and frozen ones the Instruct's, with the adapter at work.
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
        variants: The functions, instead of these, of the subjects of a variant, by the variant's name.
        on_tuned: Whether the training started at the weights of a tuned Base, so that frozen ones may not be the
            Base's; the update is counted from the Base.

    Raises:
        GraftError: A name, a shape or an adapter can't be paired or grafted, the selection is empty, or a
            transform can't be applied to these parameters.
        CheckpointError: A tensor of the Base or the Instruct holds NaN or infinities.
    """

    interruptions = 0  # checkpoints saved while other weights than the tuned ones were loaded
    apply_s = 0.0  # spent on swapping in and out
    _busy = False

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

    @contextmanager
    def trained_as(self, values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Load other values of trained parameters within the context: pairs of a parameter and this rank's part.

        No checkpoint can be saved meanwhile.
        """
        self.restore()
        reshard_all(self.model)
        kept: list[tuple[Tensor, Tensor]] = []
        self._busy = True
        try:
            with torch.no_grad():
                for parameter, value in values:
                    kept.append((local(parameter), self._copy(local(parameter))))
                    local(parameter).copy_(value)
            yield
        finally:
            reshard_all(self.model)
            with torch.no_grad():
                for live, before in kept:
                    live.copy_(before)
            self._busy = False

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
        if ANCHORED in (self.subject, subject):  # which holds other values than the validation's subjects
            if self.subject == subject:
                return
            self.restore()
        start = time.perf_counter()
        self._busy = True
        reshard_all(self.model)
        if self.subject == TUNED:
            # Lightning moves a module to the CPU when a command ends, and back when the next one begins.
            for host in self._hosts:
                if (swap := host.swap or host.exchange) is not None:
                    swap.follow(local(host.parameter))
        self.subject = subject
        for host in self._hosts:
            self._write_state(host, subject, squares)
        for name, layer in self._layers.items():
            acts = subject == ANCHORED or (subject.kind == "adapter" and name in self.selected)
            layer.set_scale(subject.scale if acts else 0.0)
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
            elif host.exchange is not None and host.exchange.begun:
                host.exchange.undo()
            elif host.saved is not None:
                local(host.parameter).copy_(host.saved, non_blocking=True)
                host.saved = None
        for layer in self._layers.values():
            layer.set_scale(1.0)
        self._synchronize()
        self.subject = TUNED
        self._busy = False
        self.apply_s += time.perf_counter() - start

    @torch.no_grad()
    def unchanged(self) -> tuple[bool, bool]:
        """Return whether the tuned weights compute what the Base does, and whether every graft without a variant holds
        the Instruct's weights, bit for bit; a collective.

        Both hold before the first step, unless the adapter or the rounding to the export's dtype changes something.
        """
        reshard_all(self.model)
        trained = [host for host in self._hosts if host.trained]
        is_zero = {host.name: not self._learned(host).any().item() for host in trained}  # of all: some are gathered
        additive = all(host.adapted is None or host.adapted.additive for host in trained)
        computes_base = additive and not leaves_residual(self.model) and all(is_zero.values())
        rounds = any(self._rounding(host) != host.instruct.dtype for host in self._hosts)
        kept = all(is_zero[host.name] for host in trained if host.selected)
        flags = of_all_ranks([(computes_base, kept and not rounds and "" not in self._transforms)])
        return all(flag for flag, _ in flags), all(flag for _, flag in flags)

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

    def _write_state(self, host: HostParameter, subject: Subject, squares: Squares | None) -> None:
        live = local(host.parameter)
        if host.swap is not None:
            if subject == BASE:
                host.swap.undo()
            else:
                host.swap.apply()
            return
        if subject == ANCHORED and host.exchange is not None:
            host.exchange.apply()
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
        grafted = host.selected and host.trained and subject.kind != "adapter"
        scale = self._scale(host, subject.scale) if (host.base is not None if subject == ANCHORED else grafted) else 0.0
        if not scale:  # the Instruct itself, even where the training has diverged; rounded in the graft alone
            rounding = self._rounding(host) if subject.kind in ("grafted", "grafted_4bit") else host.instruct.dtype
            live.copy_(host.instruct.to(rounding), non_blocking=True)
            return
        measured = torch.zeros(2, dtype=accumulation_dtype(live.device), device=live.device)
        # Trained elements alone are subtracted a window at a time, so that the update never exists as a whole.
        computed = (subject.variant in self._transforms or host.adapted) and subject != ANCHORED
        whole_update = self._update(host, subject.variant).reshape(-1) if computed else None
        out, sides = live.view(-1), [host.instruct, *([host.tuned(), host.base] if whole_update is None else [])]
        for part in windows(out):
            goal, *ends = (t.view(-1)[part].to(out.device, non_blocking=True) for t in sides if t is not None)
            update = delta(*ends) if whole_update is None else whole_update[part]
            exact = add_delta(goal, update, scale)
            rounded = exact.to(self._rounding(host))
            if squares is not None:
                measured += sums_of_squares(update, exact, rounded)
            out[part] = exact if subject.kind in ("unrounded", "anchored") else rounded
        if squares is not None:
            squares[host.name] = measured

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

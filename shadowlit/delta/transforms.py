"""Transforms of an update: pure functions from tensor to tensor with their formulas and papers, and lists of them.

A new transform is a function here, with a test, and nothing else::

    @transform("sign_only", elementwise=True)
    def sign_only(update: Tensor, *, size: float = 1e-4) -> Tensor:
        return size * update.sign()

The command line, the analysis and both grafts find it by its name; see :mod:`shadowlit.delta.registry` for functions in
other packages. All compute in float32 (float64 for a float64 update).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowlit.delta.registry import DATA, NOISE, ROWS, SEED, SIGNS, Transform, Where, checked, find, transform
from shadowlit.delta.spectrum import gram
from shadowlit.errors import GraftError, ShadowlitError, first_line
from shadowlit.grafting.arithmetic import widen
from shadowlit.grafting.factors import Factors
from shadowlit.grafting.transformed import GradientRows, Signs

_TRIAL = 256  # rows and columns of the matrix on which a chosen transform is tried before anything is loaded
_MOST_ROWS = 127  # votes for a sign that one byte counts
_Step = tuple[Transform, dict[str, Any]]


@transform("magnitude")
def magnitude(update: Tensor, *, density: float) -> Tensor:
    """Keep the elements of largest magnitude and set the others to zero.

    Han et al., arXiv 1506.02626.

    Args:
        update: Update of any shape.
        density: Fraction of the elements to keep, in (0, 1].

    Returns:
        A tensor of the same shape; exactly ``round(density * n)`` elements, at least one, keep their values.

    Raises:
        GraftError: The density is outside (0, 1].
    """
    _require_density(density)
    values = widen(update)
    keep = max(1, round(density * values.numel()))
    if keep >= values.numel():
        return values.clone()
    flat = values.flatten()
    kept = flat.abs().topk(keep, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(values)


@transform("dare", elementwise=True)
def dare(update: Tensor, *, density: float, noise: Tensor) -> Tensor:
    """Drop elements at random and rescale the rest: ``m * update / density`` with ``m ~ Bernoulli(density)``.

    DARE, arXiv 2311.03099, with drop rate ``1 - density``. The expectation is the update itself.

    Args:
        update: Update of any shape.
        density: Probability that an element is kept, in (0, 1].
        noise: Uniform random numbers in [0, 1), in the update's shape; an element is kept where its number is below
            the density.

    Raises:
        GraftError: The density is outside (0, 1].
    """
    _require_density(density)
    values = widen(update)
    return values * (noise < density) / density


@transform("gradfix", elementwise=True)
def gradfix(update: Tensor, *, gradient_signs: Tensor) -> Tensor:
    """Keep the elements that go down the loss at the untouched Instruct: those with ``sign(update) = -sign(gradient)``.

    GradFix, arXiv 2510.09658: the sign of each element's gradient is the one that most of a few rows have. To first
    order no kept element raises the loss of these rows. Elements without a majority are set to zero.

    Args:
        update: Update of any shape.
        gradient_signs: Signs -1, 0 or 1, in the update's shape; those of the loss's gradient at the Instruct.
    """
    values = widen(update)
    return torch.where(values.sign() * gradient_signs < 0, values, 0.0)


@transform("svd")
def svd(update: Tensor, *, rank: int | None = None, explained_variance: float | None = None) -> Tensor:
    """Cut each matrix by its singular values, see :func:`truncated_svd`; tensors of other shapes keep their values.

    Args:
        update: Update of any shape.
        rank: Number of singular values to keep.
        explained_variance: Or: the fewest that hold this fraction of the squared norm, in (0, 1].

    Raises:
        GraftError: Not exactly one of ``rank`` and ``explained_variance`` is given, or it is out of range.
    """
    return truncated_svd(update, rank, explained_variance).matrix if update.ndim == 2 else widen(update).clone()


@transform("ties")
def trim(update: Tensor, *, density: float = 0.2) -> Tensor:
    """Keep the elements of largest magnitude: the first step of TIES, and all of it for a single update.

    TIES-Merging, arXiv 2306.01708, which keeps 20 %. Several updates are merged by :func:`ties`. Arguments and errors
    are those of :func:`magnitude`.
    """
    return magnitude(update, density=density)


def ties(updates: Sequence[Tensor], density: float, weights: Sequence[float] | None = None) -> Tensor:
    """Merge updates of one Base: trim each, elect a sign per element, and average the elements that have it.

    TIES-Merging, arXiv 2306.01708: with trimmed ``t_k``, ``γ = sign(Σ w_k t_k)`` and the mean
    ``Σ w_k t_k [sign(t_k) = γ] / Σ w_k [sign(t_k) = γ]`` over the non-zero agreeing ones.

    Args:
        updates: Tensors of one shape.
        density: Fraction of each update's elements that trimming keeps, in (0, 1].
        weights: Positive weight of each update; equal ones by default.

    Returns:
        A tensor of the same shape. Scale it like any other update (the paper's λ).

    Raises:
        GraftError: There are no updates, their shapes differ, a weight is not positive, or the density is outside
            (0, 1].
    """
    weights = [1.0] * len(updates) if weights is None else list(weights)
    if not updates or len({u.shape for u in updates}) > 1 or len(weights) != len(updates) or min(weights) <= 0:
        raise GraftError(
            f"ties was given {len(updates)} updates of shapes {[tuple(u.shape) for u in updates]} and weights "
            f"{weights}; expected at least one, all of one shape, and a positive weight for each."
        )
    trimmed = [magnitude(update, density=density) for update in updates]
    elected = sum((w * t for w, t in zip(weights, trimmed, strict=True)), torch.zeros_like(trimmed[0])).sign()
    total, share = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, tensor in zip(weights, trimmed, strict=True):
        agrees = (tensor.sign() == elected) & (tensor != 0)
        total += weight * tensor * agrees
        share += weight * agrees
    return torch.where(share > 0, total / share.clamp_min(torch.finfo(share.dtype).tiny), 0.0)


@dataclass(frozen=True)
class LowRank(Factors):
    """The best approximation of a matrix by one of lower rank, as a product."""

    explained: float  # fraction of the squared norm that is kept, Σ_{i≤r} s_i² / Σ s_i² (1 for a zero matrix)


@torch.no_grad()
def truncated_svd(
    update: Tensor | Factors, rank: int | None = None, explained_variance: float | None = None
) -> LowRank:
    """Cut the singular value decomposition of an update, by rank or by explained variance.

    Eckart and Young (1936); by explained variance as in LoRE-Adapt, arXiv 2405.15007. The projector on the leading
    singular vectors comes from the eigenvectors of the Gram matrix of the smaller side in float64, so that the
    cost is one product and one symmetric decomposition of that side, and no division by a singular value is needed.

    Args:
        update: Matrix, [out, in], or its factors, which are not multiplied out.
        rank: Number of singular values to keep; more than there are keeps all.
        explained_variance: Or: the fewest that hold this fraction of the squared norm, in (0, 1].

    Returns:
        Both factors of equal norm per component, in float32 (float64 for a float64 update).

    Raises:
        GraftError: The update is not a matrix, or not exactly one of ``rank`` and ``explained_variance`` is given, or
            it is out of range.
    """
    if isinstance(update, Factors):
        left, core, right = update.core()
        cut = truncated_svd(core, rank, explained_variance)
        up, down = (left @ cut.up).to(update.up), (cut.down @ right.T).to(update.down)
        return LowRank(up.contiguous(), down.contiguous(), cut.explained)
    if update.ndim != 2:
        raise GraftError(f"truncated_svd was given a tensor of shape {tuple(update.shape)}; expected a matrix.")
    if (rank is None) == (explained_variance is None):
        raise GraftError(
            f"rank is {rank} and explained_variance is {explained_variance}; expected exactly one of them."
        )
    if rank is not None and rank < 1:
        raise GraftError(f"rank is {rank}; expected a positive number of singular values.")
    if explained_variance is not None and not 0 < explained_variance <= 1:
        raise GraftError(f"explained_variance is {explained_variance}; expected a fraction in (0, 1].")
    values = widen(update)
    wide = values.shape[0] < values.shape[1]
    tall = (values.T if wide else values).double()
    energy, vectors = torch.linalg.eigh(gram(tall))
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    total = float(energy.sum())
    if rank is None:
        assert explained_variance is not None
        reached = energy.cumsum(0) >= explained_variance * total * (1 - 1e-12)
        rank = int(reached.int().argmax()) + 1
    rank = min(rank, len(energy))
    leading = vectors[:, :rank]
    # Components of equal norm in both factors: half-precision adapters lose least that way.
    balance = energy[:rank].sqrt().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    up, down = (tall @ leading) / balance, balance[:, None] * leading.T
    if wide:
        up, down = down.T, up.T
    explained = float(energy[:rank].sum()) / total if total else 1.0
    return LowRank(up.to(values.dtype).contiguous(), down.to(values.dtype).contiguous(), explained)


def _require_density(density: float) -> None:
    if not 0 < density <= 1:
        raise GraftError(f"density is {density}; expected a share of elements in (0, 1], e.g. 0.1.")


# -- choosing -------------------------------------------------------------------------------------------------


class Transforms:
    """Chosen transforms, applied in order: a function of a tensor's name and its update.

    Each is tried on a small matrix, so that a parameter out of range is reported before anything is loaded.

    Args:
        specs: Name and parameters of each transform, e.g. ``[{"name": "dare", "density": 0.2}]``. The name may also be
            the import path of a function, or an entry point in the group ``shadowlit.transforms``. One transform may
            occur several times, but not twice in a row with the same parameters, and a random one not with the same
            seed, which would drop the same elements. Or transforms that were chosen before.
        key: Name of the list in messages.
        option: Function that returns the name of a parameter in messages, if the only transform is not in a list.

    Raises:
        GraftError: A name, a parameter or a value is wrong.
    """

    def __init__(
        self,
        specs: Sequence[Mapping[str, Any]] | Transforms = (),
        key: str = "graft.transforms",
        option: Where | None = None,
    ) -> None:
        self.key = key
        self._steps: list[_Step] = []
        self.specs: list[dict[str, Any]] = []  # with the defaults filled in
        given = specs.specs if isinstance(specs, Transforms) else specs
        example = '{"name": "dare", "density": 0.2}'
        if not isinstance(given, list | tuple):
            raise GraftError(f"{key} is {given!r}; expected a list of names with their parameters, e.g. [{example}].")
        for i, spec in enumerate(given):
            where = option or f"{key}[{i}].{{}}".format
            if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
                raise GraftError(
                    f"{key}[{i}] is {spec!r}; expected a name and the transform's parameters, e.g. {example}."
                )
            found = find(spec["name"], where("name"))
            parameters = checked(found, {k: v for k, v in spec.items() if k != "name"}, where)
            if found.needs_gradient and not 1 <= parameters[ROWS] <= _MOST_ROWS:
                raise GraftError(f"{where(ROWS)} is {parameters[ROWS]}; expected 1 to {_MOST_ROWS} rows, e.g. 31.")
            self._require_new(found, parameters, where)
            _try((found, parameters), where)
            self._steps.append((found, parameters))
            self.specs.append({"name": spec["name"], **parameters})

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def gradient_rows(self) -> list[GradientRows]:
        """Rows whose gradients at the untouched Instruct the transforms need."""
        return [GradientRows(given[DATA], given[ROWS]) for found, given in self._steps if found.needs_gradient]

    @property
    def whole(self) -> list[str]:
        """Names of the transforms that need whole tensors."""
        return [found.name for found, _ in self._steps if not found.elementwise]

    def __call__(self, name: str, update: Tensor, signs: Signs | None = None) -> Tensor:
        """The transformed update of a whole tensor, in float32 (float64 for a float64 update)."""
        return self.on_part(name, update, lambda seed: self.noise(name, tuple(update.shape), seed), signs)

    def require_without_gradients(self) -> None:
        """Raise a GraftError if a transform needs gradients, which don't exist where no model is in memory."""
        if needing := [found.name for found, _ in self._steps if found.needs_gradient]:
            raise GraftError(
                f"{self.key} has {needing[0]!r}, which needs the gradient of the Instruct's loss on {DATA}, but no "
                "model is in memory here. Use it in a training (graft.variants), whose export has its graft; fit with "
                "the run's configuration, --ckpt_path and --trainer.max_steps of that step exports an earlier one."
            )

    @torch.no_grad()
    def on_part(self, name: str, update: Tensor, noise: Callable[[int], Tensor], signs: Signs | None = None) -> Tensor:
        """Return the transformed part of an update; of the whole tensor where a transform is not elementwise.

        Args:
            name: Name of the tensor.
            update: Part of the update.
            noise: Gives the same part of the tensor's random numbers by their seed.
            signs: Gives the same part of the gradient's signs by its rows.

        Raises:
            GraftError: A transform fails, or returns another shape, or NaN or infinity for a finite update.
        """
        for step in self._steps:
            try:
                result = _apply(step, update, noise, signs)
            except Exception as error:  # of a function from outside the package
                raise GraftError(
                    f"the transform {step[0].name!r} fails for the update of {name}, whose shape is "
                    f"{list(update.shape)} ({_cause(error)}). Correct the function, or leave the tensor out of the "
                    "selection (graft.select)."
                ) from error
            _require_result(step[0].name, name, update, result)
            update = result
        return update

    @staticmethod
    def noise(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Return uniform random numbers in [0, 1) for a tensor, float32, on the CPU: the same on every machine and
        device.
        """
        # The CPU's generator looks at 32 bits of its seed only, so that both must be in them.
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode(), seed))
        return torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)

    def _require_new(self, found: Transform, parameters: dict[str, Any], where: Where) -> None:
        if self._steps and self._steps[-1] == (found, parameters):
            raise GraftError(
                f"{where('name')} is {found.name!r} with the same parameters as the transform before it. Remove one."
            )
        if found.is_random and any((f, p[SEED]) == (found, parameters[SEED]) for f, p in self._steps if f.is_random):
            raise GraftError(
                f"{where(SEED)} is {parameters[SEED]}, as of another {found.name!r} in the list, which would choose "
                "by the same random numbers. Give each its own seed."
            )


def _apply(step: _Step, update: Tensor, noise: Callable[[int], Tensor], signs: Signs | None) -> Tensor:
    found, given = step[0], dict(step[1])
    if found.is_random:
        given[NOISE] = noise(given.pop(SEED)).to(update.device)
    if found.needs_gradient:
        assert signs is not None  # see require_without_gradients
        given[SIGNS] = signs(GradientRows(given.pop(DATA), given.pop(ROWS))).to(update.device)
    return found.function(update, **given)


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, ShadowlitError) else first_line(error)


def _require_result(transform: str, name: str, update: Tensor, result: Tensor) -> None:
    found = f"the transform {transform!r} returns"
    if result.shape != update.shape:
        raise GraftError(
            f"{found} a tensor of shape {list(result.shape)} for the update of {name}, whose shape is "
            f"{list(update.shape)}. Correct the function so that it keeps every shape, or leave the tensor out of the "
            "selection (graft.select)."
        )
    if not result.isfinite().all() and update.isfinite().all():  # of a training that diverged it may be otherwise
        raise GraftError(
            f"{found} NaN or infinity for the update of {name}, which is finite. Correct the function, also for an "
            "update of zeros, which every training starts with; or leave the tensor out of the selection "
            "(graft.select)."
        )


def _try(step: _Step, where: Where) -> None:
    """Apply a transform to a small random matrix; raise if it fails, or is not the pure function it has to be."""
    update = torch.randn(_TRIAL, _TRIAL, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    before, rows = update.clone(), slice(_TRIAL // 4, _TRIAL // 2)

    def noise(seed: int) -> Tensor:
        return Transforms.noise("trial", (_TRIAL, _TRIAL), seed)

    def signs(_: GradientRows) -> Tensor:
        return (noise(0) - 0.5).sign()

    try:
        result = _apply(step, update, noise, signs)
        again = _apply(step, update, noise, signs)
        part = again[rows]
        if step[0].elementwise:
            part = _apply(step, update[rows], lambda seed: noise(seed)[rows], lambda given: signs(given)[rows])
    except Exception as error:  # a user's own function may raise anything
        raise GraftError(f"{where('name').removesuffix('.name')}, {step[0].name}: {_cause(error)}") from error
    problem = ""
    if not isinstance(result, Tensor) or (result.shape, result.dtype) != (update.shape, update.dtype):
        problem = "returns something else than a float32 tensor of the update's shape"
    elif not torch.equal(update, before):
        problem = "changes its input; it must return a new tensor"
    elif not torch.equal(result, again):
        problem = "returns other values when it is called again (or NaN); take random numbers from a parameter 'noise'"
    elif not torch.equal(result[rows], part):
        problem = "is registered as elementwise, but returns other values for a part of a tensor"
    if problem:
        raise GraftError(
            f"{where('name')} is {step[0].name!r}, which {problem} (tried on a {_TRIAL} x {_TRIAL} matrix)."
        )

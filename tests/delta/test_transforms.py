"""Transforms of updates, against values by hand, loops and torch's own decompositions; and how they are chosen."""

import importlib.metadata
import math
import sys
import zlib
from typing import Any, Literal

import pytest
import torch

from shadowlit import plugins
from shadowlit.delta import registry
from shadowlit.delta.registry import Transform, checked, find, transform
from shadowlit.delta.transforms import Transforms, dare, magnitude, svd, ties, trim, truncated_svd
from shadowlit.errors import GraftError

HAND = torch.tensor([[4.0, -1.0], [2.0, -3.0]])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(update, approximation):
    return float((approximation - update).norm() / update.norm())


# --- values ---


def test_by_hand():
    assert magnitude(HAND, density=0.5).tolist() == [[4.0, 0.0], [0.0, -3.0]]
    assert trim(HAND, density=0.75).tolist() == [[4.0, 0.0], [2.0, -3.0]]
    assert trim(torch.arange(10.0)).tolist() == [0.0] * 8 + [8.0, 9.0]  # the paper's 20 %
    noise = torch.tensor([[0.1, 0.3], [0.25, 0.2]])
    assert dare(HAND, density=0.25, noise=noise).tolist() == [[16.0, 0.0], [0.0, -12.0]]
    # Singular values 3 and 2 along the axes.
    cut = svd(torch.tensor([[0.0, 3.0], [-2.0, 0.0]]), rank=1)
    assert torch.allclose(cut, torch.tensor([[0.0, 3.0], [0.0, 0.0]]), atol=1e-6)
    # 9 of 13 is less than 70 %, so both are needed; of 69 % one is enough.
    for share, kept in ((0.70, 2), (0.69, 1)):
        cut = svd(torch.tensor([[0.0, 3.0], [-2.0, 0.0]]), explained_variance=share)
        assert int(torch.linalg.matrix_rank(cut, rtol=1e-4)) == kept
    assert svd(HAND[0], rank=1).tolist() == [4.0, -1.0]  # no matrix


@pytest.mark.parametrize("density", [0.01, 0.3, 0.999, 1.0])
def test_magnitude_keeps_the_largest(density):
    update = random(37, 41)
    kept = magnitude(update, density=density)
    count = max(1, round(density * update.numel()))
    assert int((kept != 0).sum()) == count
    threshold = sorted(update.abs().flatten().tolist(), reverse=True)[count - 1]
    assert torch.equal(kept, update * (update.abs() >= threshold))
    assert torch.equal(trim(update, density=density), kept)
    assert torch.equal(ties([update], density), kept)


def test_magnitude_of_equal_values_keeps_exactly_the_share():
    assert int((magnitude(torch.ones(10), density=0.3) != 0).sum()) == 3


def test_dare_is_the_update_in_expectation_and_repeats_by_seed():
    update = random(64, 64)
    draws = [Transforms([{"name": "dare", "density": 0.25, "seed": s}])("w", update) for s in range(400)]
    assert all(torch.equal(d[d != 0], (update * 4)[d != 0]) for d in draws[:3])
    assert abs(float((draws[0] != 0).float().mean()) - 0.25) < 0.03
    assert relative_error(update, torch.stack(draws).mean(0)) < 3 * math.sqrt(3 / 400)
    assert torch.equal(draws[5], Transforms([{"name": "dare", "density": 0.25, "seed": 5}])("w", update))


def test_the_random_numbers_are_those_of_seed_and_name():
    """For seed 0 as ``delta compress`` has always drawn them; the global generator stays where it is."""
    update = random(30, 7)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for seed, name in ((0, "a.weight"), (7, "b.weight")):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        expected = update * (torch.rand(30, 7, generator=generator) < 0.3) / 0.3
        got = Transforms([{"name": "dare", "density": 0.3, "seed": seed}])(name, update)
        assert torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), state)
    masks = [Transforms.noise(name, (1000,), seed) < 0.5 for seed in (0, 1, 2**31) for name in ("a", "b")]
    shares = [float((one == other).float().mean()) for i, one in enumerate(masks) for other in masks[:i]]
    assert max(abs(share - 0.5) for share in shares) < 0.08  # five standard deviations of independent ones


def test_several_are_applied_in_order():
    update = random(20, 30)
    chosen = Transforms([{"name": "magnitude", "density": 0.5}, {"name": "svd", "rank": 2}])
    assert torch.equal(chosen("w", update), svd(magnitude(update, density=0.5), rank=2))
    assert not torch.equal(chosen("w", update), magnitude(svd(update, rank=2), density=0.5))
    assert chosen.whole == ["magnitude", "svd"]
    assert not Transforms() and Transforms()("w", update) is update


def test_an_elementwise_one_gives_a_part_what_it_gives_the_whole():
    update, parts = random(40, 6), (slice(0, 13), slice(13, 40))
    chosen = Transforms([{"name": "dare", "density": 0.3}])
    assert chosen.whole == []
    got = [chosen.on_part("w", update[p], lambda seed, p=p: chosen.noise("w", (40, 6), seed)[p]) for p in parts]
    assert torch.equal(torch.cat(got), chosen("w", update))


def flattening(update):
    return update if update.shape == (256, 256) else update.flatten()


def normalised(update):
    return update / update.norm()


def anything(update, *, option: Any):
    assert option in ("a", 1, None)
    return update.clone()


@pytest.mark.parametrize(
    ("function", "update", "message"),
    [
        (
            "flattening",
            random(3, 4),
            r"returns a tensor of shape \[12\] for the update of w, whose shape is \[3, 4\]\. Corr",
        ),
        (
            "normalised",
            torch.zeros(3, 4),
            "returns NaN or infinity for the update of w, which is finite. Correct the func",
        ),
    ],
)
def test_a_result_that_does_not_fit_names_the_transform_and_the_tensor(function, update, message):
    chosen = Transforms([{"name": f"{__name__}.{function}"}])
    with pytest.raises(GraftError, match=f"the transform '{__name__}.{function}' {message}"):
        chosen("w", update)
    diverged = torch.full((3, 4), math.nan)  # which is no fault of the transform
    assert function == "flattening" or chosen("w", diverged).isnan().all()


@pytest.mark.parametrize("value", ["a", 1, None])
def test_a_parameter_of_any_type(value):
    update = random(3, 4)
    assert torch.equal(Transforms([{"name": f"{__name__}.anything", "option": value}])("w", update), update)


def test_ties_by_hand():
    a = torch.tensor([1.0, -2.0, 0.1, 3.0, 0.0])
    b = torch.tensor([3.0, 1.0, 0.2, -3.5, 0.0])
    # Trimmed to 3 of 5 each: a = 1, -2, 0, 3, 0; b = 3, 1, 0, -3.5, 0. Elected: +, -, 0, -.
    assert ties([a, b], 0.6).tolist() == [2.0, -2.0, 0.0, -3.5, 0.0]
    # Weighted 3 to 1 the fourth sign turns.
    assert ties([a, b], 0.6, [3.0, 1.0]).tolist() == [1.5, -2.0, 0.0, 3.0, 0.0]


def test_ties_against_a_loop():
    updates = [random(9, 7, seed=s) for s in range(3)]
    weights = [0.5, 1.0, 2.0]
    merged = ties(updates, 0.4, weights)
    trimmed = [magnitude(u, density=0.4).flatten().tolist() for u in updates]
    for i, value in enumerate(merged.flatten().tolist()):
        column = [t[i] for t in trimmed]
        sign = math.copysign(1, s) if (s := sum(w * v for w, v in zip(weights, column, strict=True))) else 0
        agreeing = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
        wanted = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        assert value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 30)])
def test_svd_by_rank_is_the_best(shape):
    update = random(*shape)
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    for rank in (1, 5, 29, 1000):
        cut = truncated_svd(update, rank)
        r = min(rank, *shape)
        best = u[:, :r] @ torch.diag(s[:r]) @ v[:r]
        assert cut.rank == r
        assert torch.allclose(cut.matrix.double(), best, atol=1e-5)
        assert cut.explained == pytest.approx(float((s[:r] ** 2).sum() / (s**2).sum()))
        assert torch.allclose(cut.up.norm(dim=0), cut.down.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1.0])
def test_svd_by_explained_variance_takes_the_fewest(share):
    update = random(25, 50)
    energy = torch.linalg.svdvals(update.double()).square()
    cumulated = (energy.cumsum(0) / energy.sum()).tolist()
    wanted = next(i for i, c in enumerate(cumulated, 1) if c >= share - 1e-12)
    assert truncated_svd(update, explained_variance=share).rank == wanted


def test_svd_of_low_rank_zero_and_tiny_matrices():
    exact = random(50, 3) @ random(3, 70, seed=1)
    assert relative_error(exact, truncated_svd(exact, 3).matrix) < 1e-6
    assert truncated_svd(exact, explained_variance=1 - 1e-9).rank == 3
    zero = truncated_svd(torch.zeros(4, 5), 2)
    assert zero.explained == 1.0 and not zero.matrix.any()
    tiny = truncated_svd(exact * 1e-12, 3)
    assert relative_error(exact * 1e-12, tiny.matrix) < 1e-6


def test_half_precision_is_computed_in_float32():
    update = random(8, 8).bfloat16()
    assert magnitude(update, density=0.5).dtype == torch.float32
    assert truncated_svd(update, 8).up.dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda u: magnitude(u, density=0.0),
        lambda u: dare(u, density=1.5, noise=u),
        lambda u: ties([], 0.5),
        lambda u: ties([u, u[:2]], 0.5),
        lambda u: ties([u], 0.5, [-1.0]),
        lambda u: truncated_svd(u),
        lambda u: truncated_svd(u, 2, 0.5),
        lambda u: truncated_svd(u, 0),
        lambda u: truncated_svd(u, explained_variance=1.1),
        lambda u: truncated_svd(u[0], 2),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(GraftError, match="expected"):
        call(random(4, 4))


# --- choosing ---


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "darre"}, r"\.name is 'darre'; expected one of dare, gradfix, magnitude, svd, ties, or the import "
                            r"path .* Did you mean 'dare'\?"),
        ({"name": "zzz"}, r"\.name is 'zzz'; expected one of dare, gradfix, magnitude, svd, ties, .*\.my_transform\.$"),
        ({"name": "nowhere.sign"}, r"\.name is 'nowhere\.sign', which can't be imported \(ModuleNotFoundError: No "
                                   r"module named 'nowhere'\)"),
        ({"name": "shadowlit.nothing"}, r"can't be imported \(AttributeError: .*nothing"),
        ({"name": "math.pi"}, r"\.name is 'math\.pi', which is 3\.14\d* and no function; expected one of dare,"),
        ({"name": "torch.Tensor"}, r"is <class 'torch\.Tensor'> and no function"),
        ({"name": "torch.add"}, r"is not a transform; expected a function \(update"),
        ({"density": 0.2}, r"graft\.transforms\[1\] is \{'density': 0\.2\}; expected a name and"),
        ("dare", r"graft\.transforms\[1\] is 'dare'; expected a name and"),
        ({"name": "dare"}, r"\.density is missing; 'dare' has density: float, seed: int = 0\. Give it a value"),
        ({"name": "dare", "densty": 0.2}, r"\.densty is given, but 'dare' has no such parameter; it has density: float"
                                          r", seed: int = 0\. Did you mean 'density'\?"),
        ({"name": "magnitude", "density": 0.2, "seed": 1}, r"\.seed is given, but 'magnitude' has no such parameter"),
        ({"name": "dare", "density": 0.2, "noise": 1}, r"\.noise is given, but 'dare' has no such parameter"),
        ({"name": "dare", "density": "0.2"}, r"\.density is '0\.2'; expected float\. 'dare' has density: float"),
        ({"name": "dare", "density": True}, r"\.density is True; expected float"),
        ({"name": "dare", "density": 0.2, "seed": 0.5}, r"\.seed is 0\.5; expected int"),
        ({"name": "svd", "rank": 1.5}, r"\.rank is 1\.5; expected int \| None"),
        ({"name": "magnitude", "density": 1.5}, r"transforms\[1\], magnitude: density is 1\.5; expected a share"),
        ({"name": "magnitude", "density": float("nan")}, r"density is nan; expected a share"),
        ({"name": "svd"}, r"svd: rank is None and explained_variance is None; expected exactly one"),
        ({"name": "svd", "rank": 0}, r"svd: rank is 0; expected a positive number"),
        ({"name": "ties", "density": 0.5}, r"\.name is 'ties' with the same parameters as the transform before it"),
    ],
)  # fmt: skip
def test_errors_name_the_key_and_the_choices(spec, message):
    with pytest.raises(GraftError, match=message) as caught:
        Transforms([{"name": "ties", "density": 0.5}, spec])
    assert "graft.transforms[1]" in str(caught.value)


def test_one_transform_may_occur_again_where_that_means_something():
    chosen = Transforms([{"name": "svd", "rank": 2}, {"name": "magnitude", "density": 0.5}, {"name": "svd", "rank": 2}])
    assert len(chosen.specs) == 3
    Transforms([{"name": "dare", "density": 0.5}, {"name": "dare", "density": 0.5, "seed": 1}])
    with pytest.raises(GraftError, match=r"transforms\[1\]\.seed is 0, as of another 'dare' .* Give each its own seed"):
        Transforms([{"name": "dare", "density": 0.5}, {"name": "dare", "density": 0.2}])


def test_a_new_one_is_a_decorated_function():
    @transform("shrink", elementwise=True)
    def shrink(update: torch.Tensor, *, by: float = 0.5, times: int | None = None) -> torch.Tensor:
        """Multiply by a number."""
        return update * by ** (times or 1)

    assert shrink(HAND, by=0.5).tolist() == [[2.0, -0.5], [1.0, -1.5]]  # still the function itself
    chosen = Transforms([{"name": "shrink", "times": 2}])
    assert chosen("w", HAND).tolist() == [[1.0, -0.25], [0.5, -0.75]]
    assert chosen.specs == [{"name": "shrink", "by": 0.5, "times": 2}] and chosen.whole == []
    with pytest.raises(GraftError, match="expected one of dare, gradfix, magnitude, shrink, svd, ties"):
        find("none")


def test_two_of_one_name_are_an_error():
    with pytest.raises(GraftError, match=r"two transforms are registered as 'dare': shadowlit\.delta\.transforms\.dare "
                                         r"and tests\.delta\.test_transforms.*mine\. Rename"):  # fmt: skip

        @transform("dare")
        def mine(update):
            return update


@pytest.mark.parametrize("function", [lambda: None, lambda *update: update, lambda update, **rest: update, torch.sign])
def test_what_is_no_transform_is_not_registered(function):
    with pytest.raises(GraftError, match=r"is not a transform; expected a function \(update: Tensor, \*"):
        transform("odd")(function)


PACKAGE = """
from shadowlit.delta.transforms import transform

def sign_only(update, *, size: float = 1e-3):
    return size * update.sign()

@transform("halve", elementwise=True)
def halve(update):
    return update / 2
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/transforms.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("elsewhere", "elsewhere.transforms"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return "elsewhere.transforms"


def test_a_function_of_another_package_is_given_by_its_import_path(package):
    chosen = Transforms([{"name": f"{package}.sign_only", "size": 2}])
    assert chosen("w", HAND).tolist() == [[2.0, -2.0], [2.0, -2.0]]
    assert chosen.whole == [f"{package}.sign_only"]  # not decorated: nothing is known of it
    assert Transforms([{"name": f"{package}.halve"}]).whole == []


def test_an_entry_point_is_a_name(package, monkeypatch):
    def offered(group, path):
        assert group == "shadowlit.transforms" and path == tuple(sys.path)
        return entries

    monkeypatch.setattr(plugins, "_offered", offered)
    entry = importlib.metadata.EntryPoint
    entries = [
        entry("signs", f"{package}:sign_only", registry.GROUP),
        entry("halve", f"{package}:halve", registry.GROUP),
    ]
    assert Transforms([{"name": "signs"}])("w", HAND).tolist() == (1e-3 * HAND.sign()).tolist()
    for _ in range(2):  # the second time its decorator has run
        assert find("halve").elementwise
    with pytest.raises(
        GraftError, match=r"expected one of dare, gradfix, halve, magnitude, signs, svd, ties, or .* 'signs'\?"
    ):
        find("sgns")
    entries.append(entry("ties", f"{package}:halve", registry.GROUP))
    with pytest.raises(
        GraftError,
        match=r"is 'ties', which is a built-in transform and the entry point elsewhere.*; expected one transform",
    ):
        find("ties")
    entries.append(entry("broken", f"{package}:nothing", registry.GROUP))
    with pytest.raises(GraftError, match=r"is 'broken', which can't be imported \(AttributeError"):
        find("broken")


def changing(update):
    return update.mul_(2)


def flat(update):
    return update.flatten()


def unseeded(update):
    return update * torch.rand_like(update)


def failing(update):
    raise RuntimeError("no such thing")


def centred(update: torch.Tensor):
    return update - update.mean()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (changing, "which changes its input"),
        (flat, "which returns something else than a float32 tensor of the update's shape"),
        (unseeded, "which returns other values when it is called again .*'noise'"),
        (failing, r"graft\.transforms\[0\], bad: RuntimeError: no such thing"),
        (centred, "which is registered as elementwise, but returns other values for a part"),
    ],
)
def test_a_function_that_is_not_what_it_claims_is_refused_when_it_is_chosen(function, message):
    transform("bad", elementwise=True)(function)
    with pytest.raises(GraftError, match=message):
        Transforms([{"name": "bad"}])


def matrices_only(update: torch.Tensor) -> torch.Tensor:
    rows, _ = update.shape
    return update / rows


def test_a_function_that_fails_on_a_tensor_is_named_with_it():
    chosen = Transforms([{"name": f"{__name__}.matrices_only"}])
    message = (
        r"matrices_only' fails for the update of model\.norm\.weight, whose shape is \[8\] \(ValueError: not enough"
    )
    with pytest.raises(GraftError, match=message):
        chosen("model.norm.weight", torch.ones(8))


def test_types_are_checked_though_another_one_is_known_to_type_checkers_only():
    def lit(update: "Unknown", *, mode: "Literal['a', 'b']" = "a", n: "int" = 1):  # noqa: F821
        return update

    parameters = Transform("lit", lit).parameters
    assert checked(Transform("lit", lit), {"mode": "b", "n": 2}, str) == {"mode": "b", "n": 2}
    assert parameters["n"].annotation is int
    for wrong in ({"mode": "c"}, {"n": "c"}):
        with pytest.raises(GraftError, match="expected"):
            checked(Transform("lit", lit), wrong, str)

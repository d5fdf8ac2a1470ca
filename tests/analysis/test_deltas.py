import math

import pytest
import torch
from safetensors.torch import load_file

from shadowlit.analysis.deltas import (
    compare_deltas,
    compare_models,
    matrices,
    matrix,
    norm_maps,
    norm_table,
    norms_of,
    only,
    open_delta,
    open_deltas,
    open_model,
    pair_table,
    reader_of,
    trimmed,
)
from shadowlit.analysis.heat_map import of_similarity
from shadowlit.delta.delta import Delta
from shadowlit.errors import DataError, GraftError, ShadowlitError
from shadowlit.plotting import draw_heat_maps, in_order
from tests.analysis.test_similarity import save
from tests.tiny import save_pair

Q, UP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"


def delta(**tensors):
    return Delta.of({name: torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()})


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_angles_and_conflicts_by_hand():
    """⟨a, b⟩ = 1 − 4 + 1 = −2, ‖a‖² = 6, ‖b‖² = 10; of three elements that both change, one has another sign."""
    a, b = delta(x=[[1.0, 2.0], [1.0, 0.0]]), delta(x=[[1.0, -2.0], [1.0, 2.0]])
    (found,) = compare_deltas({"left": a, "right": b})
    assert (found.a, found.b) == ("left", "right")
    cosine = pytest.approx(-2 / math.sqrt(60))
    assert found.whole.sums.cosine == cosine
    conflict, agreement = matrix([found], "sign_conflict"), matrix([found], "sign_agreement")
    third = pytest.approx(1 / 3)
    assert conflict.values.tolist() == [[0.0, third], [third, 0.0]] and conflict.inverted
    assert agreement.values[0, 1] == pytest.approx(2 / 3) and not agreement.inverted
    assert matrix([found]).values[0, 1] == cosine and matrix([found]).names == ("left", "right")
    assert pair_table([found]).rows == [("left, right", cosine, third, pytest.approx(math.sqrt(10 / 6)))]


def test_a_tensor_that_one_lacks_is_zero():
    """‖a‖² = 1 + 1, b has only x: the cosine is 1 / √2."""
    (found,) = compare_deltas({"a": delta(x=[1.0], y=[1.0]), "b": delta(x=[1.0])})
    assert found.whole.sums.cosine == pytest.approx(1 / math.sqrt(2))


def test_three_updates_make_a_symmetric_matrix():
    deltas = {"a": delta(x=[1.0, 0.0]), "b": delta(x=[0.0, 1.0]), "c": delta(x=[1.0, 1.0])}
    found = matrix(compare_deltas(deltas))
    half = 1 / math.sqrt(2)
    expected = torch.tensor([[1, 0, half], [0, 1, half], [half, half, 1]], dtype=torch.float64)
    torch.testing.assert_close(found.values, expected)
    assert only(compare_deltas(deltas), "c", "a").whole.sums.cosine == pytest.approx(half)
    with pytest.raises(DataError, match="there are a, b, c"):
        only(compare_deltas(deltas), "c", "d")


def test_conflicts_among_the_largest():
    """Half of the elements, the largest of each: in both these are the first two, and they agree."""
    a, b = delta(x=[5.0, -4.0, 0.1, 0.2]), delta(x=[6.0, -3.0, -0.1, -0.2])
    (every,), (large,) = compare_deltas({"a": a, "b": b}), compare_deltas({"a": a, "b": b}, density=0.5)
    assert every.whole.sums.sign_agreement == 0.5
    assert large.whole.sums.sign_agreement == 1.0
    assert trimmed(a, 0.25).tensor("x").tolist() == [5.0, 0.0, 0.0, 0.0]
    with pytest.raises(GraftError, match=r"density is 0; expected a share of elements in \(0, 1\]"):
        trimmed(a, 0)


@pytest.mark.parametrize("shape", [(7, 5), (11,), (), (3, 4, 5), (1, 6)])
def test_a_delta_is_read_at_any_offset(shape):
    whole = noise(*shape, seed=1)
    reader = reader_of("d", Delta.of({"x": whole}))
    raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    for start in range(0, len(raw), 4):
        for size in (4, 12, len(raw) - start):
            if start + size <= len(raw):
                buffer = bytearray(size)
                reader.read_into(memoryview(buffer), "x", start)
                assert bytes(buffer) == raw[start : start + size]


def test_comparing_computed_deltas_equals_comparing_stored_ones(tmp_path):
    """More elements than a window has, and a sum that is computed while it is read."""
    a = {Q.format(0): noise(300, 70, seed=1), UP.format(1): noise(900, 33, seed=2)}
    b = {name: 0.3 * tensor + noise(*tensor.shape, seed=3) for name, tensor in a.items()}
    left = Delta.of(a) + Delta.of(b)
    (found,) = compare_deltas({"sum": left, "b": Delta.of(b)})
    x = torch.cat([(a[name] + b[name]).double().flatten() for name in a])
    y = torch.cat([b[name].double().flatten() for name in a])
    assert found.whole.sums.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), rel=1e-6)
    assert found.whole.sums.sign_agreement == pytest.approx(float((x.sign() == y.sign()).double().mean()))


def test_norms_by_hand(tmp_path):
    """‖(3, 4)‖ = 5 beside ‖(6, 8)‖ = 10; over both tensors √(25 + 4) / √(100 + 16)."""
    weights = open_model(save(tmp_path / "m", {Q.format(0): torch.tensor([[6.0, 8.0]]), "norm": torch.tensor([4.0])}))
    update = Delta.of({Q.format(0): torch.tensor([[3.0, 4.0]]), "norm": torch.tensor([2.0])})
    first, second = norms_of({"u": update}, weights)["u"]
    assert (first.layer, first.kind, first.square, first.weight_square) == (0, "q_proj", 5.0**2, 10.0**2)
    assert (second.layer, second.square, second.weight_square) == (None, 2.0**2, 4.0**2)
    (shown,) = norm_maps({"u": [first, second]})
    assert shown.cells == {("q_proj", 0): pytest.approx(50.0)} and shown.label == "‖Δ‖ / ‖W‖ (%)"
    ((name, elements, norm, rms, relative, share),) = norm_table({"u": [first, second]}).rows
    assert (name, elements) == ("u", 3) and norm == pytest.approx(math.sqrt(29))
    assert rms == pytest.approx(math.sqrt(29 / 3)) and relative == pytest.approx(0.5) and share == "q_proj (86%)"


def test_norms_without_weights_or_of_another_shape(tmp_path):
    update = Delta.of({UP.format(2): torch.full((2, 2), 3.0)})
    (alone,) = norm_maps(norms_of({"u": update}))
    assert alone.cells == {("up_proj", 2): pytest.approx(3.0)} and alone.label == "root mean square of Δ"
    weights = open_model(save(tmp_path / "m", {UP.format(2): torch.ones(3, 2)}))
    assert math.isnan(norms_of({"u": update}, weights)["u"][0].weight_square)


def test_opening(tmp_path):
    base, tuned = save_pair(tmp_path)
    made = open_delta(tuned, base)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name in before:
        torch.testing.assert_close(made.tensor(name), after[name] - before[name], rtol=0, atol=0)
    assert {"q_proj", "down_proj"} == {
        name.split(".")[-2] for name in open_delta(tuned, base, "q_proj|down_proj").shapes
    }
    made.save(tmp_path / "delta", torch.float32, manifest={})
    stored = open_deltas({"stored": tmp_path / "delta", "made": tuned}, base)
    assert matrix(compare_deltas(stored)).values[0, 1] == pytest.approx(1.0)
    linear = open_delta(tmp_path / "delta", select="linear")
    assert not any("embed" in name or "norm" in name for name in linear.shapes)
    with pytest.raises(DataError, match="needs the base that it was trained from"):
        open_delta(tuned)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no complete \*.ckpt"):
        open_delta(tmp_path / "empty")


def test_a_pair_as_a_map(tmp_path):
    base, instruct = save_pair(tmp_path)
    found = compare_models(base, instruct)
    shown = of_similarity(found)
    assert found.title == "Base, Instruct" and shown.label == "σ" and shown.centre is None
    assert f"{found.sigma:.4f}" in shown.title
    layer = {t.kind: t.sums.sigma for t in found.tensors if t.layer == 1 and t.name.endswith(".weight")}
    assert {kind: shown.cells[kind, 1] for kind in layer} == pytest.approx(layer)
    image = draw_heat_maps([shown]).axes[0].images[0]
    rows = [label.get_text() for label in image.axes.get_yticklabels()]
    assert rows[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"] and image.get_clim()[0] == 0
    assert image.get_array()[rows.index("o_proj"), 1] == pytest.approx(layer["o_proj"])


def test_a_map_of_cosines_is_centred_on_zero():
    a = {Q.format(0): noise(4, 4, seed=1), Q.format(1): noise(4, 4, seed=2)}
    b = {Q.format(0): a[Q.format(0)], Q.format(1): -0.1 * a[Q.format(1)] + noise(4, 4, seed=3)}
    (found,) = compare_deltas({"a": Delta.of(a), "b": Delta.of(b)})
    shown = of_similarity(found)
    assert shown.cells["q_proj", 0] == pytest.approx(1.0)
    low, high = draw_heat_maps([shown]).axes[0].images[0].get_clim()
    assert low == -high and high == pytest.approx(1.0)
    assert draw_heat_maps([of_similarity(found, "sign_agreement")]).axes[0].images[0].get_clim() == (0, 1)
    with pytest.raises(ShadowlitError, match="no tensor lies in a decoder layer"):
        draw_heat_maps([of_similarity(compare_deltas({"a": delta(x=[1.0]), "b": delta(x=[1.0])})[0])])


def test_kinds_in_the_order_of_a_layer():
    assert in_order(["zeta", "down_proj", "q_proj", "alpha", "gate_proj"]) == [
        "q_proj", "gate_proj", "down_proj", "alpha", "zeta",
    ]  # fmt: skip


def test_layers_evenly_spread_with_both_ends():
    update = Delta.of({Q.format(i): torch.ones(2, 2) for i in range(10)} | {"model.norm.weight": torch.ones(2)})
    assert matrices(update) == [Q.format(i) for i in (0, 3, 6, 9)]
    assert matrices(update, [7]) == [Q.format(7)]
    with pytest.raises(GraftError, match=r"no matrix in the layers \[12\]"):
        matrices(update, [12])

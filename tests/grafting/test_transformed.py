"""The graft of a transformed update: in a module, on disk, and by hand."""

import warnings
import zlib

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main
from shadowlit.delta import registry
from shadowlit.delta.delta import Delta
from shadowlit.delta.folders import graft as graft_on_disk
from shadowlit.delta.registry import transform
from shadowlit.delta.transforms import Transforms
from shadowlit.errors import GraftError
from shadowlit.grafting.disk import DiskGraft, Scale
from shadowlit.grafting.export import export_folder
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.subject import BASE, INSTRUCT
from shadowlit.grafting.tuned import open_update
from tests.grafting.test_live import grafted, load, logits, open_graft, train_a_bit
from tests.grafting.test_mixtures import pair_in
from tests.tiny import save_pair

SCALE = 0.5


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A few rows a part, so that every tensor comes in many."""
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)


def largest(name, update, density):
    count = max(1, round(density * update.numel()))
    return update * (update.abs() >= update.abs().flatten().sort(descending=True).values[count - 1])


def dropped(name, update, density, seed=0):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    return torch.where(torch.rand(update.shape, generator=generator) < density, update, 0) / density


def cut(name, update, rank):
    if update.ndim != 2:
        return update
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    return (u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]).float()


HERE = f"{__name__}.sign_only"


def sign_only(update: torch.Tensor, *, size: float = 0.01) -> torch.Tensor:
    return size * update.sign()


def not_embeddings(update: torch.Tensor) -> torch.Tensor:
    assert len(update) < 272, "called for the embedding"
    return update


# Specification, the same by hand, and whether both have the same bits.
TRANSFORMS = {
    "magnitude": ([{"name": "magnitude", "density": 0.3}], lambda n, u: largest(n, u, 0.3), True),
    "ties": ([{"name": "ties"}], lambda n, u: largest(n, u, 0.2), True),
    "dare": ([{"name": "dare", "density": 0.3, "seed": 2}], lambda n, u: dropped(n, u, 0.3, 2), True),
    "svd": ([{"name": "svd", "rank": 2}], lambda n, u: cut(n, u, 2), False),
    "two": (
        [{"name": "svd", "rank": 4}, {"name": "dare", "density": 0.5}],
        lambda n, u: dropped(n, cut(n, u, 4), 0.5),
        False,
    ),
    "another package's": ([{"name": HERE, "size": 0.02}], lambda n, u: 0.02 * u.sign(), True),
}
KINDS = {
    "full": None,
    "lora": {"target_modules": "all-linear"},
    "biases": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "pissa": {"target_modules": "all-linear", "init_lora_weights": "pissa"},
}


def make(folders, kind):
    options = KINDS[kind]
    model = load(folders[0], options and LoraConfig(r=4, **options))
    train_a_bit(model)
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def learned(model, folders, names):
    """What each tensor has learned: the difference to the Base, and peft's own product."""
    base = dict(AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).named_parameters())
    own = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    updates = {name: own[name].detach() - base[name].detach() for name in names}
    for prefix, module in model.named_modules():
        name = f"{prefix.removeprefix('base_model.model.')}.weight"
        if hasattr(module, "get_delta_weight") and name in names:
            updates[name] = updates[name] + module.get_delta_weight("default").detach()
    return updates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", TRANSFORMS)
def test_live_is_disk_is_by_hand(tmp_path, which, kind):
    """Validated, exported, from folders of models, from a delta, and written out; and restored bit for bit."""
    warnings.simplefilter("ignore")
    specs, by_hand, exact = TRANSFORMS[which]
    folders = save_pair(tmp_path, "qwen2", tied=True)
    model = make(folders, kind)
    before, tuned = weights(model), logits(model)
    graft = open_graft(model, folders, select="all", transforms=Transforms(specs))
    exported = dict(graft.grafted_tensors(SCALE))
    goal = dict(AutoModelForCausalLM.from_pretrained(folders[1]).named_parameters())
    updates = learned(model, folders, goal)
    for name, instruct in goal.items():
        expected = instruct + SCALE * by_hand(name, updates[name]) if updates[name].any() else instruct
        assert not exact or torch.equal(exported[name], expected), name
        torch.testing.assert_close(exported[name], expected.detach(), rtol=0, atol=2e-6)
    # The adapter is switched off: whatever it would add is in the weights.
    reference = AutoModelForCausalLM.from_pretrained(folders[1])
    reference.load_state_dict(exported, strict=False)
    reference.tie_weights()
    for subject in (grafted(SCALE), INSTRUCT, BASE, grafted(SCALE)):  # without a restore in between
        graft.apply(subject)
        if subject in (INSTRUCT, BASE):
            like = AutoModelForCausalLM.from_pretrained(folders[subject == INSTRUCT])
            assert torch.equal(logits(model), logits(like))
    assert torch.equal(logits(model), logits(reference))
    graft.restore()
    assert torch.equal(logits(model), tuned)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    instruct = CheckpointReader(folders[1])
    raw = dict(open_graft(model, folders, select="all").delta_tensors())
    plan = DiskGraft(Delta.of(raw).map(specs), instruct, Scale(SCALE), "all")
    export_folder(tmp_path / "out", folders[1], plan.tensors())
    assert same(tmp_path / "out", exported)
    if kind == "full":
        model.save_pretrained(tmp_path / "tuned")
        update = open_update(CheckpointReader(folders[0]), tmp_path / "tuned")
        plan = DiskGraft(Delta.from_update(update).map(specs), instruct, Scale(SCALE), "all")
        export_folder(tmp_path / "out2", folders[1], plan.tensors())
        assert same(tmp_path / "out2", exported)
    transformed = dict(graft.delta_tensors())
    assert all(torch.equal(transformed[name], Transforms(specs)(name, update)) for name, update in raw.items())


def same(folder, tensors):
    reader = CheckpointReader(folder)
    assert reader.tensors.keys() == tensors.keys()
    return [name for name in tensors if not torch.equal(reader.read(name), tensors[name])] == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_validated_in_half_precision_is_what_is_exported(tmp_path, kind):
    folders = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    model = make(folders, kind)
    before = weights(model)
    graft = open_graft(model, folders, transforms=Transforms([{"name": "dare", "density": 0.5}]))
    exported = dict(graft.grafted_tensors(SCALE))
    with graft.applied(grafted(SCALE)):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                stored = name.removeprefix("base_model.model.").replace(".base_layer", "")
                assert torch.equal(parameter.to(torch.bfloat16), exported[stored]), name
                assert torch.equal(parameter.float(), exported[stored].float()), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if kind == "lora":
        assert graft.frozen_bytes == open_graft(model, folders).frozen_bytes


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_statistics_are_of_the_transformed_update(tmp_path, kind):
    folders = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    model = make(folders, kind)
    chosen = Transforms([{"name": "dare", "density": 0.25}])
    graft = open_graft(model, folders, transforms=chosen)
    numbers, squares = graft.statistics(SCALE), {}
    with graft.applied(grafted(SCALE), squares):
        pass
    assert squares.keys() == graft.selected
    assert graft.statistics(SCALE, squares) == numbers
    updates = {n: chosen(n, u) for n, u in open_graft(model, folders).delta_tensors()}
    norm = torch.cat([u.flatten().double() for u in updates.values()]).norm().item()
    assert numbers["delta_norm"] == pytest.approx(norm, rel=1e-5)
    goal = {name: CheckpointReader(folders[1]).read(name).double() for name in updates}
    lost = [
        (goal[n] + SCALE * u.double()).bfloat16().double() - goal[n] - SCALE * u.double() for n, u in updates.items()
    ]
    share = torch.cat([part.flatten() for part in lost]).norm().item() / norm / SCALE
    assert numbers["survival"] == pytest.approx(1 - share, abs=1e-3)
    raw = open_graft(model, folders).statistics(SCALE)["delta_norm"]
    assert numbers["delta_norm"] == pytest.approx(2 * raw, rel=0.05)  # dropped by four, and four times as large


@pytest.mark.parametrize("kind", ["full", "everything"])
@pytest.mark.parametrize("which", ["magnitude", "dare", "svd", "two"])
def test_experts_are_transformed_as_the_files_hold_them(tmp_path, which, kind):
    """The module holds those of a layer in one tensor, the files a matrix each, under other names."""
    specs, by_hand, exact = TRANSFORMS[which]
    folders = pair_in(tmp_path, "mixtral", "single")
    adapter = LoraConfig(r=4, target_modules="all-linear") if kind == "everything" else None
    model = load(folders[0], adapter)
    train_a_bit(model)
    before = weights(model)
    raw = dict(open_graft(model, folders).delta_tensors())
    assert raw[next(name for name in raw if name.endswith(".experts.3.w2.weight"))].ndim == 2
    graft = open_graft(model, folders, transforms=Transforms(specs))
    exported = dict(graft.grafted_tensors(SCALE))
    goal = {n: CheckpointReader(folders[1]).read(n) for n in raw}
    for n, update in raw.items():
        expected = goal[n] + SCALE * by_hand(n, update)
        assert not exact or torch.equal(exported[n], expected), n
        torch.testing.assert_close(exported[n], expected, rtol=0, atol=2e-6)
    plan = DiskGraft(Delta.of(raw).map(specs), CheckpointReader(folders[1]), Scale(SCALE))
    export_folder(tmp_path / "out", folders[1], plan.tensors())
    assert same(tmp_path / "out", exported)
    with graft.applied(grafted(SCALE)):
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_outside_the_selection_nothing_is_transformed(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    model = make(folders, "lora")
    graft = open_graft(model, folders, select=["q_proj"], transforms=Transforms([{"name": HERE}]))
    goal = {name: CheckpointReader(folders[1]).read(name) for name in CheckpointReader(folders[1]).tensors}
    exported = dict(graft.grafted_tensors())
    assert {n for n in goal if not torch.equal(goal[n], exported[n])} == graft.selected
    export_folder(tmp_path / "out", folders[1], exported.items())
    with graft.applied(grafted(1.0)):
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_on_disk_nothing_is_transformed_outside_the_selection(tmp_path):
    base, instruct = save_pair(tmp_path, "qwen3")
    model = load(base)
    train_a_bit(model)
    model.save_pretrained(tmp_path / "tuned")
    specs = [{"name": f"{__name__}.not_embeddings"}]
    done = graft_on_disk(base, tmp_path / "tuned", instruct, tmp_path / "out", transforms=specs)
    assert "model.embed_tokens.weight" in done.coverage.left_out


def test_an_adapter_is_not_what_is_grafted(tmp_path):
    folders = save_pair(tmp_path, "qwen3")
    graft = open_graft(make(folders, "lora"), folders, transforms=Transforms([{"name": "ties"}]))
    with pytest.raises(GraftError, match="the adapter's factors do not give it"):
        graft.adapter_tensors()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A package of somebody else's."""
    (tmp_path / "own_transforms.py").write_text(
        "def sign_only(update, *, size: float = 0.01):\n    return size * update.sign()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_transforms.sign_only"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_on_the_command_line(tmp_path, elsewhere, kind, capsys):
    folders = save_pair(tmp_path, "qwen3")
    model = make(folders, kind)
    model.save_pretrained(tmp_path / "tuned")
    args = ["graft", str(folders[0]), str(tmp_path / "tuned"), str(folders[1])]
    chosen = f'[{{"name": "{elsewhere}", "size": 0.25}}, {{"name": "dare", "density": 0.5}}]'
    assert main([*args, str(tmp_path / "out"), "--transforms", chosen]) == 0
    specs = [{"name": elsewhere, "size": 0.25}, {"name": "dare", "density": 0.5, "seed": 0}]
    live = dict(open_graft(model, folders, transforms=Transforms(specs)).grafted_tensors())
    for name, tensor in live.items():
        torch.testing.assert_close(CheckpointReader(tmp_path / "out").read(name), tensor, rtol=0, atol=1e-6)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["transforms"] == specs
    assert main([*args, str(tmp_path / "plain")]) == 0
    assert "transforms" not in read_manifest(tmp_path / "plain")
    capsys.readouterr()
    for given, message in (
        ('[{"name": "dar"}]', "--transforms[0].name is 'dar'; expected one of dare, "),
        ('[{"name": "dare", "density": 7}]', "--transforms[0], dare: density is 7; expected a share"),
    ):
        assert main(["graft", "no", "such", "folders", str(tmp_path / "none"), "--transforms", given]) == 2
        assert message in capsys.readouterr().err


def test_compressed_and_applied_is_grafted_with_the_transform(tmp_path, elsewhere):
    folders = save_pair(tmp_path, "qwen3")
    make(folders, "full").save_pretrained(tmp_path / "tuned")
    files = [str(tmp_path / name) for name in ("delta", "small", "applied", "grafted")]
    wide = "--dtype=float32"
    assert main(["delta", "make", str(folders[0]), str(tmp_path / "tuned"), files[0], wide]) == 0
    method = [f"--method={elsewhere}", '--parameters={"size": 0.25}']
    assert main(["delta", "compress", files[0], files[1], *method, wide]) == 0
    assert read_manifest(tmp_path / "small")["history"][-1] == {
        "method": elsewhere, "size": 0.25, "density": None, "rank": None, "explained_variance": None, "seed": 0,
    }  # fmt: skip
    assert main(["delta", "apply", files[1], str(folders[1]), files[2]]) == 0
    spec = f'[{{"name": "{elsewhere}", "size": 0.25}}]'
    sides = [str(folders[0]), str(tmp_path / "tuned"), str(folders[1])]
    assert main(["graft", *sides, files[3], "--transforms", spec]) == 0
    applied = CheckpointReader(tmp_path / "applied")
    assert same(tmp_path / "grafted", {name: applied.read(name) for name in applied.tensors})


def test_a_checkpoint_in_bfloat16_is_transformed_too(tmp_path):
    """Its own fast way through must not be taken."""
    base, instruct = save_pair(tmp_path, "qwen3", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    train_a_bit(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    update = open_update(CheckpointReader(base), tmp_path / "tuned")
    chosen = Transforms([{"name": "dare", "density": 0.5}])
    tensors = {}
    plan = DiskGraft(Delta.from_update(update).map(chosen), CheckpointReader(instruct), Scale())
    export_folder(tmp_path / "out", instruct, plan.tensors())
    start, end, goal = (CheckpointReader(folder) for folder in (base, tmp_path / "tuned", instruct))
    for name in goal.tensors:
        change = dropped(name, end.read(name).float() - start.read(name).float(), 0.5)
        tensors[name] = (goal.read(name).float() + change).bfloat16() if name in plan.selected else goal.read(name)
    assert same(tmp_path / "out", tensors)


def test_weights_of_8_bits_are_refused_before_they_are_transformed(tmp_path):
    update = open_update(CheckpointReader(save_pair(tmp_path, "qwen3")[0]), tmp_path / "instruct")
    asked = []
    update.require_weights = asked.extend
    mapped = Delta.from_update(update).map([{"name": "ties"}])
    DiskGraft(mapped, CheckpointReader(tmp_path / "instruct"), Scale())
    assert len(asked) == 14


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_a_registered_function_is_all_that_a_new_transform_needs(tmp_path, empty_registry):
    @transform("double", elementwise=True)
    def double(update):
        return 2 * update

    folders = save_pair(tmp_path, "qwen3")
    model = make(folders, "full")
    doubled = dict(open_graft(model, folders, transforms=Transforms([{"name": "double"}])).grafted_tensors(0.5))
    plain = dict(open_graft(model, folders).grafted_tensors(1.0))
    assert all(torch.equal(doubled[name], plain[name]) for name in plain)

"""The fingerprint of an update: of its stored form, the same in a training, on disk and as a delta."""

import hashlib
import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from shadowlit.checkpoint.folder import DELTA_FILE, CheckpointReader
from shadowlit.cli.main import main
from shadowlit.delta.delta import Delta
from shadowlit.delta.folders import graft, plan_graft
from shadowlit.delta.transforms import Transforms
from shadowlit.errors import GraftError
from shadowlit.grafting.disk import Scale
from shadowlit.grafting.factors import Factors
from shadowlit.grafting.manifest import read_manifest
from tests.grafting.test_live import load, open_graft, train_a_bit
from tests.grafting.test_transformed import make
from tests.tiny import save_pair

DARE = [{"name": "dare", "density": 0.5}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3")


def factored():
    """A matrix as a product of rank 1, another one, and a scalar."""
    up, down = torch.arange(4.0)[:, None], torch.linspace(-1, 1, 16)[None]
    tensors = {"b": torch.linspace(-1, 1, 6).reshape(2, 3), "c": torch.tensor(0.3), "a": up @ down}
    return Delta(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        lambda name, start, stop: tensors[name][start:stop] if tensors[name].ndim else tensors[name],
        factored={"a": lambda: Factors(up, down)},
    ), (up, down, tensors)


def test_it_is_a_digest_of_headers_and_bytes():
    delta, (up, down, tensors) = factored()
    digest = hashlib.sha256()
    for header, tensor in (
        (["a.lora_A", "F32", [1, 16]], down), (["a.lora_B", "F32", [4, 1]], up),
        (["b", "BF16", [2, 3]], tensors["b"].bfloat16()), (["c", "BF16", []], tensors["c"].bfloat16()),
    ):  # fmt: skip
        digest.update(json.dumps(header).encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert delta.fingerprint(["c", "a", "b"]) == digest.hexdigest()
    assert len({delta.fingerprint(names) for names in ("a", "b", "c", "ab", "abc")}) == 5


def test_a_delta_has_that_of_its_files(tmp_path):
    delta, _ = factored()
    for dtype in (torch.bfloat16, torch.float32):
        delta.save(tmp_path / str(dtype), dtype)
        assert Delta.open(tmp_path / str(dtype)).fingerprint(delta.shapes) == delta.fingerprint(delta.shapes)
    stored = CheckpointReader(tmp_path / "torch.bfloat16", DELTA_FILE)
    assert stored.fingerprint() == delta.fingerprint(delta.shapes)
    assert (2 * delta).fingerprint("abc") != delta.fingerprint("abc")


def test_of_a_stored_product_that_is_rounded_it_is_another_one(tmp_path):
    """Factors that are larger than their matrix are stored as the matrix in bfloat16."""
    up, down = torch.ones(4, 3), torch.linspace(0.1, 1, 12).reshape(3, 4)
    delta = Delta(
        {"a": (4, 4)}, lambda _, start, stop: (up @ down)[start:stop], factored={"a": lambda: Factors(up, down)}
    )
    delta.save(tmp_path / "delta")
    stored = Delta.open(tmp_path / "delta")
    assert not stored.factored and stored.fingerprint("a") != delta.fingerprint("a")


def test_a_transform_does_not_change_it():
    delta, _ = factored()
    mapped = delta.map([{"name": "magnitude", "density": 0.5}])
    assert mapped.fingerprint("abc") == delta.fingerprint("abc")
    assert mapped.transforms == [{"name": "magnitude", "density": 0.5}] and delta.transforms == ()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("arch", ["qwen3", "qwen3_moe"])
def test_it_is_the_same_in_a_training_and_on_disk(tmp_path, arch, kind):
    """Of fused experts too, each matrix of the files by itself; and whatever the transforms of the graft are."""
    warnings.simplefilter("ignore")
    folders = save_pair(tmp_path, arch)
    model = make(folders, kind)
    live = open_graft(model, folders, transforms=Transforms(DARE))
    names = live.in_files(dict.fromkeys(live.grafted_parameters, 1.0))
    model.save_pretrained(tmp_path / "tuned")
    with plan_graft(folders[0], tmp_path / "tuned", folders[1], transforms=DARE) as (plan, _):
        assert plan.selected == names.keys() and live.fingerprint() == plan.update.fingerprint(names)


@pytest.mark.parametrize(("arch", "options"), [
    ("qwen3", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),  # peft stores the embedding too
    ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("qwen3", {"target_modules": "all-linear", "use_dora": True}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
])  # fmt: skip
def test_products_are_known_in_a_training_and_on_disk_alike(tmp_path, arch, options):
    """Of every kind of LoRA; where only one of the two knew the factors, scales of the same update were refused."""
    warnings.simplefilter("ignore")
    folders = save_pair(tmp_path, arch, tied=False)
    model = load(folders[0], LoraConfig(r=4, **options))
    train_a_bit(model)
    live = open_graft(model, folders, select="all")
    names = live.in_files(dict.fromkeys(live.grafted_parameters, 1.0))
    model.save_pretrained(tmp_path / "tuned")
    with plan_graft(folders[0], tmp_path / "tuned", folders[1], select="all") as (plan, _):
        assert plan.selected == names.keys() and live.fingerprint() == plan.update.fingerprint(names)


def test_of_tied_weights_that_the_files_hold_twice_it_has_both(tmp_path):
    """The module has one parameter, the files of the Instruct two tensors; the tuned model's one."""
    from safetensors.torch import load_file, save_file

    folders = save_pair(tmp_path, "qwen2", tied=True)
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folders[1] / "model.safetensors", {"format": "pt"})
    model = make(folders, "full")
    live = open_graft(model, folders, select="all")
    names = live.in_files(dict.fromkeys(live.grafted_parameters, 1.0))
    model.save_pretrained(tmp_path / "tuned")
    with plan_graft(folders[0], tmp_path / "tuned", folders[1], select="all") as (plan, _):
        assert "lm_head.weight" in names and live.fingerprint() == plan.update.fingerprint(names)


# --- scales that were fitted to an update ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, folders):
    """A tuned Base, and another one."""
    found = []
    for size in (0.02, 0.03):
        model = make(folders, "full")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[-1] += size
        found.append(tmp_path_factory.mktemp("tuned"))
        model.save_pretrained(found[-1])
    return found


def scales_file(folder, folders, tuned, transforms=(), **changes):
    with plan_graft(folders[0], tuned, folders[1], transforms=transforms) as (plan, _):
        update = {"fingerprint": plan.update.fingerprint(plan.selected), "transforms": list(plan.update.transforms)}
        content = {"update": update, "tensors": dict.fromkeys(sorted(plan.selected), 0.5)}
    (folder / "scales.json").write_text(json.dumps({**content, **changes}))
    return str(folder / "scales.json")


def test_scales_of_another_update_are_refused(tmp_path, folders, tuned, caplog):
    """Also where the two differ in one row alone; nothing is written."""
    scale = scales_file(tmp_path, folders, tuned[0])
    graft(folders[0], tuned[0], folders[1], tmp_path / "out", scale=scale)
    with pytest.raises(GraftError, match=r"scales\.json, whose scales were fitted to another update: its fingerprint"):
        graft(folders[0], tuned[1], folders[1], tmp_path / "other", scale=scale)
    assert not (tmp_path / "other").exists() and not caplog.records


def test_scales_belong_to_an_update_with_its_transforms(tmp_path, folders, tuned):
    scale = scales_file(tmp_path, folders, tuned[0], DARE)
    graft(folders[0], tuned[0], folders[1], tmp_path / "out", scale=scale, transforms=DARE)
    for transforms in ([], [{"name": "dare", "density": 0.5, "seed": 1}]):
        with pytest.raises(GraftError, match=r"the transforms \[\{.*\"seed\": 0\}\], but this one has \[.*\]\. Give"):
            graft(folders[0], tuned[0], folders[1], tmp_path / "no", scale=scale, transforms=transforms)


def test_scales_without_their_update_are_used_with_a_warning(tmp_path, folders, tuned, caplog):
    """As a file has them that was written by hand."""
    scale = scales_file(tmp_path, folders, tuned[0], update=None)
    with caplog.at_level(logging.WARNING):
        graft(folders[0], tuned[1], folders[1], tmp_path / "out", scale=scale)
    assert "doesn't say to which update its scales were fitted" in caplog.text


WRONG = {
    "not a finite number": [
        '{"tensors": {"a": NaN}}', '{"tensors": {"a": 1e400}}', '{"tensors": {"a": "0.5"}}', '{"tensors": {"a": true}}',
        '{"tensors": {"a": null}}', '{"tensors": {"a": [1]}}', f'{{"tensors": {{"a": 1{"0" * 400}}}}}',
        '{"tensors": {}}',
    ],
    "KeyError: 'tensors'": ['{"scales": {"a": 1}}'],
    "AttributeError": ['{"tensors": ["a"]}'],
    "JSONDecodeError": ["", '{"tensors": {"a": 1'],
    "RecursionError": ["[" * 100_000],
    "TypeError": ["[]", "1", '{"tensors": {"a": 1}, "update": "x"}', '{"tensors": {"a": 1}, "update": false}'],
    "KeyError: 'fingerprint'": ['{"tensors": {"a": 1}, "update": {}}'],
    "KeyError: 'transforms'": ['{"tensors": {"a": 1}, "update": {"fingerprint": "x"}}'],
    "'update' has a fingerprint that is no text": [
        f'{{"tensors": {{"a": 1}}, "update": {update}}}'
        for update in (
            '{"fingerprint": null, "transforms": []}', '{"fingerprint": 5, "transforms": []}',
            '{"fingerprint": "x", "transforms": {}}', '{"fingerprint": "x", "transforms": [], "instruct": 5}',
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize(("problem", "content"), [(problem, each) for problem in WRONG for each in WRONG[problem]])
def test_a_file_of_scales_is_read_strictly(tmp_path, problem, content):
    """Nothing is taken for a number or a fingerprint that is none."""
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(GraftError, match=r"which can't be read .*expected a JSON file whose 'tensors'.*Give") as error:
        Scale.parse(str(tmp_path / "s.json"))
    assert problem in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_whose_square_is_zero(tmp_path, dtype):
    """The update of these tensors is lost, as the scale says, and its norm is known without a division by zero."""
    folders = save_pair(tmp_path, "qwen3", dtype=dtype)
    make(folders, "full").to(dtype).save_pretrained(tmp_path / "tuned")
    graft(folders[0], tmp_path / "tuned", folders[1], tmp_path / "out", scale="1;q_proj=1e-200")
    out, instruct = CheckpointReader(tmp_path / "out"), CheckpointReader(folders[1])
    changed = [name for name in out.tensors if not torch.equal(out.read(name), instruct.read(name))]
    assert len(changed) == 12 and not any("q_proj" in name for name in changed)


def test_scales_on_another_instruct_are_reported(tmp_path, folders, tuned, caplog):
    """The update is the same, but what its scales were fitted on is not."""
    scale = Path(scales_file(tmp_path, folders, tuned[0]))
    content = json.loads(scale.read_text())
    for folder, told in ((folders[1], False), (folders[0], True)):
        with CheckpointReader(folder) as reader:
            content["update"]["instruct"] = reader.fingerprint()
        scale.write_text(json.dumps(content))
        graft(folders[0], tuned[0], folders[1], tmp_path / f"{told}", scale=str(scale))
        assert ("fitted on another Instruct than" in caplog.text) == told


def test_scales_can_be_applied_to_the_stored_delta(tmp_path, folders, tuned, capsys):
    """In bfloat16; but not to one that has been scaled."""
    scale = scales_file(tmp_path, folders, tuned[0])
    delta = Delta.make(*map(str, (folders[0], tuned[0])), select="linear")
    delta.save(tmp_path / "delta")
    (0.5 * delta).save(tmp_path / "scaled")
    for name, code in (("delta", 0), ("scaled", 1)):
        sides = map(str, (tmp_path / name, folders[1], tmp_path / f"{name}-out"))
        assert main(["delta", "apply", *sides, "--scale", scale]) == code
    assert set(read_manifest(tmp_path / "delta-out")["config"]["scales"].values()) == {0.5}
    told = " ".join(capsys.readouterr().err.split())
    assert "fitted to another update" in told and "remove 'update' from the file" in told

"""GradFix: elements of the update that go down the loss at the untouched Instruct, by the majority of a few rows."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main as command
from shadowlit.delta.delta import Delta
from shadowlit.delta.transforms import Transforms, gradfix
from shadowlit.distributed import local
from shadowlit.errors import GraftError
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.transformed import GradientRows
from shadowlit.lightning_cli import main
from shadowlit.training.gradient_signs import sign_votes
from shadowlit.training.objectives import KTO
from tests.callbacks.test_graft import KINDS, assert_same, fit, make_module, make_trainer, score_by_hand, weights
from tests.callbacks.test_transforms import ROOT, config
from tests.distributed import run_ranks
from tests.grafting.test_live import open_graft
from tests.grafting.test_transformed import make
from tests.synthetic import RandomData, random_samples
from tests.tiny import save_pair
from tests.training import test_distributed as distributed

FIVE = [{"name": "gradfix", "data": "few", "rows": 5}]
VARIANTS = {"gradfix": {"transforms": FIVE}}
UP = "model.layers.0.mlp.up_proj.weight"


class Data(RandomData):
    """Has five other rows, which are asked for by the name of their source."""

    def extra_loader(self, name, given, batch_size=None):
        assert given == "few" and batch_size == 1
        return DataLoader(random_samples(5, seed=9), batch_size)

    def overlap(self, name, extra=()):
        return {"train": 3, "left": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3")


@pytest.fixture(scope="module")
def votes(folders):
    """Of each parameter of the Instruct the sum of the rows' signs in float64, and which of them are beyond doubt."""
    model, found = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float64), {}
    for sample in random_samples(5, seed=9):
        model.zero_grad()
        used = sample["attention_mask"].bool()
        model(input_ids=sample["input_ids"][used][None], labels=sample["labels"][used][None]).loss.backward()
        for name, parameter in model.named_parameters():
            sign, size = parameter.grad.sign(), parameter.grad.abs()
            total, clear = found.get(name, (torch.zeros_like(sign), torch.ones_like(sign, dtype=torch.bool)))
            found[name] = total + sign, clear & (size > 1e-5 * size.max())
    return found


def test_an_element_is_kept_where_it_goes_against_the_gradient():
    update = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, -2.0, 0.0])
    signs = torch.tensor([1, 0, -1, 1, 0, -1, 1], dtype=torch.int8)
    kept = gradfix(update, gradient_signs=signs)
    assert kept.tolist() == [0.0, 0.0, 1.0, -2.0, 0.0, 0.0, 0.0] and not kept.signbit()[[0, 4, 5]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_graft_keeps_what_the_rows_vote_for_and_is_the_exported_one(tmp_path, folders, votes, kind, recwarn):
    callback = GraftCallback(variants=VARIANTS)
    export = ExportCallback(folder=str(tmp_path / "x"), parts=["model", "delta"], subject="grafted@gradfix")
    module, trainer = make_module(folders, kind), make_trainer(tmp_path, callback, export)
    trainer.fit(module, Data())
    assert weights_have_no_gradient_left(module)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    loss = trainer.callback_metrics["val/grafted@gradfix/loss"].item()
    assert loss == pytest.approx(score_by_hand(model, [(8, 1), (4, 2)]), rel=1e-6)
    assert read_manifest(tmp_path / "x/model")["logits_against_validated"]["max_abs"] == 0
    exported, instruct = CheckpointReader(tmp_path / "x/model"), CheckpointReader(folders[1])
    kept, learned = Delta.open(tmp_path / "x/delta"), dict(callback.build(module).delta_tensors())
    assert len(kept.shapes) == 14
    for name in kept.shapes:
        (vote, clear), gained = votes[name], exported.read(name).double() - instruct.read(name).double()
        assert clear.double().mean() > 0.9 and not gained[clear & (vote.sign() != -learned[name].sign())].any()
        agreeing = clear & (vote.sign() == -learned[name].sign())
        torch.testing.assert_close(gained[agreeing], learned[name][agreeing].double(), rtol=2**-8, atol=1e-7)
        assert 0.2 < gained.count_nonzero() / gained.numel() < 0.8
    told = [str(w.message) for w in recwarn if "favour the graft with graft.variants.gradfix" in str(w.message)]
    assert len(told) == 1 and "gradient rows of few shares 2 samples token for token with left" in told[0]
    # Nothing of this reaches the training.
    plain, other = fit(tmp_path, folders, kind, [GraftCallback()])
    assert_same(weights(module), weights(plain))
    assert trainer.callback_metrics["val/grafted/loss"] == other.callback_metrics["val/grafted/loss"]


def weights_have_no_gradient_left(module):
    frozen = [p for name, p in module.model.named_parameters() if not p.requires_grad]
    return all(p.grad is None for p in frozen) and any(p.requires_grad for p in module.model.parameters())


def test_validate_measures_them_too(tmp_path, folders):
    """Before the first step the graft is the Instruct."""
    trainer = make_trainer(tmp_path, GraftCallback(variants=VARIANTS))
    (logged,) = trainer.validate(make_module(folders, "lora"), Data(), verbose=False)[:1]
    assert logged["val/grafted@gradfix/loss"] == logged["val/instruct/loss"]
    with pytest.raises(GraftError, match=r"variants\.gradfix\.transforms needs gradients, .*inference_mode=False"):
        make_trainer(tmp_path, GraftCallback(variants=VARIANTS), inference_mode=True).validate(
            make_module(folders, "lora"), Data(), verbose=False
        )


@pytest.mark.parametrize("kind", KINDS)
def test_of_experts_each_matrix_of_the_files_gets_its_own_signs(tmp_path, kind):
    """Alone it gets the parameter that holds several; after an SVD of full rank, each matrix of the files."""
    folders = save_pair(tmp_path, "qwen3_moe")
    model = make(folders, kind)
    full = {"name": "svd", "explained_variance": 1.0}
    found = []
    for specs in (FIVE, [full, *FIVE]):
        graft = open_graft(model, folders, transforms=Transforms(specs))
        generator = torch.Generator().manual_seed(1)
        shapes = {name: local(parameter).shape for name, parameter in graft.grafted_parameters.items()}
        signs = {name: torch.randint(-1, 2, shape, generator=generator) for name, shape in shapes.items()}
        graft.signs[GradientRows("few", 5)] = {name: each.to(torch.int8) for name, each in signs.items()}
        found.append(dict(graft.delta_tensors()))
    assert found[0].keys() == found[1].keys() and any("experts.3" in name for name in found[0])
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=2e-6)
        assert 0 < tensor.count_nonzero() < tensor.numel()


# --- several processes ---


def train(folders, kind, strategy, world_size, out):
    """Train a few steps, and export the variant; the logged numbers."""
    module = distributed.make_module(folders, kind)
    export = ExportCallback(parts=["model"], folder=str(out), subject="grafted@gradfix")
    graft = GraftCallback(variants=VARIANTS, dtype="float32")
    trainer = distributed.make_trainer(strategy, world_size, [graft, export], max_epochs=1)
    trainer.fit(module, Data())
    return {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}


@pytest.mark.parametrize(("strategy", "kind"), [("fsdp2", "full"), ("fsdp2", "lora"), ("ddp", "lora")])
def test_two_processes_are_one(tmp_path, folders, strategy, kind):
    (one,) = run_ranks(train, 1, folders, kind, "auto", 1, tmp_path / "one")
    for rank in run_ranks(train, 2, folders, kind, strategy, 2, tmp_path / "two"):
        assert rank == pytest.approx(one, **distributed.SAME)
    assert one["val/grafted@gradfix/loss"] != one["val/grafted/loss"]
    assert read_manifest(tmp_path / "two/model")["logits_against_validated"]["max_abs"] == 0
    alone, shared = (CheckpointReader(tmp_path / name / "model").read(UP) for name in ("one", "two"))
    assert ((alone != shared) & ((alone - shared).abs() > 1e-6)).double().mean() < 1e-3  # signs of gradients near 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rows": 5}, r"graft\.transforms\[0\]\.data is missing; 'gradfix' has data: str, rows: int = 31"),
        ({"data": "few", "rows": 128}, r"graft\.transforms\[0\]\.rows is 128; expected 1 to 127 rows"),
        ({"data": "few", "gradient_signs": 1}, r"no such parameter"),
    ],
)
def test_wrong_parameters_are_errors(spec, message):
    with pytest.raises(GraftError, match=message):
        GraftCallback(transforms=[{"name": "gradfix", **spec}])


def test_too_few_rows_and_data_without_extra_rows_are_errors(tmp_path, folders):
    def run(data, rows=6, **options):
        callback = GraftCallback(variants={"gradfix": {"transforms": [{**FIVE[0], "rows": rows}]}})
        make_trainer(tmp_path, callback).fit(make_module(folders, "lora", **options), data)

    with pytest.raises(GraftError, match="asks for the gradients of 6 rows, but few has 5"):
        run(Data())
    with pytest.raises(GraftError, match="but RandomData has no extra_loader"):
        run(RandomData())
    with pytest.raises(GraftError, match=r"gradient of model\.objective's loss at the Instruct, but .*KTO learns from"):
        run(Data(), objective=KTO())


def test_a_gradient_that_is_not_a_number_is_an_error():
    """Of a loss that is one: the derivative of a root at 0 is infinite, and 0 times that is no vote."""
    model = torch.nn.Linear(2, 1)
    losses = [(0 * model.weight).sum().sqrt() + model.bias.sum(), model.bias.sum()]
    assert all(loss.isfinite() for loss in losses)
    with pytest.raises(GraftError, match="gradients of weight are not numbers"):
        sign_votes(model, dict(model.named_parameters()), losses)
    assert sign_votes(model, dict(model.named_parameters()), [2 * model.bias.sum()])["bias"] == 1


def test_it_is_refused_where_no_model_is_in_memory(tmp_path, folders, capsys):
    make(folders, "full").save_pretrained(tmp_path / "tuned")
    args = ["graft", str(folders[0]), str(tmp_path / "tuned"), str(folders[1]), str(tmp_path / "out")]
    assert command([*args, '--transforms=[{"name": "gradfix", "data": "few"}]']) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "--transforms has 'gradfix', which needs the gradient of the Instruct's loss" in told
    assert not (tmp_path / "out").exists()
    with pytest.raises(GraftError, match="transforms has 'gradfix', which needs"):
        Delta.of({"a": torch.ones(2, 2)}).map(FIVE)


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_the_rows_come_from_a_file_as_those_of_training(tmp_path, recwarn):
    torch.set_num_threads(1)
    few = ROOT / "shadowlit/demo/data/train.jsonl"
    variants = f'--graft.variants={{"gradfix": {{"transforms": [{{"name": "gradfix", "data": "{few}", "rows": 3}}]}}}}'
    tests = f"--data.test={{few: {few}}}"
    main([*config(tmp_path, []), variants, tests, "--export.subject=grafted@gradfix", "--export.parts=[delta]"])
    told = [str(w.message) for w in recwarn if "so that the scores there favour the graft with" in str(w.message)]
    assert len(told) == 1 and "is data.test.few too" in told[0]
    manifest = read_manifest(tmp_path / "export/delta")
    assert manifest["transforms"] == [{"name": "gradfix", "data": str(few), "rows": 3}]
    zeros = sum(tensor.num_zeros for tensor in Delta.open(tmp_path / "export/delta").statistics())
    assert 0.2 < zeros / Delta.open(tmp_path / "export/delta").num_elements < 0.8

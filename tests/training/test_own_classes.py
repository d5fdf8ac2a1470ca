"""Classes of the user's own, each in one file and a line of YAML: objectives, metrics, modules, optimizers."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForCausalLM

from shadowlit.data.module import ShadowData
from shadowlit.errors import ShadowlitError
from shadowlit.lightning_cli import check, main
from shadowlit.pair.pair import ModelPair
from shadowlit.training.bar import ProgressLine
from shadowlit.training.module import ShadowModule
from shadowlit.training.optimizer import MuonAndAdamW
from tests.tiny import save_pair

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own

OWN = """
    import torch
    import torch.nn.functional as F
    from torchmetrics import Metric

    from shadowlit.training.module import ShadowModule
    from shadowlit.training.objectives import Objective, PreferenceObjective, TokenObjective


    class Focal(TokenObjective):
        def __init__(self, gamma: float = 2.0) -> None:
            self.gamma = gamma

        def token_losses(self, logits, targets):
            losses = F.cross_entropy(logits, targets, reduction="none")
            return (1 - torch.exp(-losses)) ** self.gamma * losses


    class ZLoss(Objective):
        def step(self, outputs):
            logits = outputs.logits().flatten(0, 1)[outputs.positions]
            z = logits.logsumexp(-1).square().sum()
            loss = F.cross_entropy(logits, outputs.targets, reduction="sum") + 0.1 * z
            return {"loss": loss, "count": len(outputs.targets), "z": z}


    class Forgetful(Objective):
        def step(self, outputs):
            return {"loss": outputs.loss()}


    class Exponential(PreferenceObjective):
        has_reference = False

        def losses(self, answers):
            return torch.exp(answers.means[:, 1] - answers.means[:, 0])

        def rewards(self, answers):
            return answers.means


    class TopK(Metric):
        def __init__(self, k: int = 5) -> None:
            super().__init__()
            self.k = k
            self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, logits, labels):
            assert logits.dtype == torch.float32 and logits.shape == (len(labels), 272)
            self.hits += (logits.topk(self.k).indices == labels[:, None]).any(-1).sum()
            self.count += len(labels)

        def compute(self):
            return self.hits / self.count


    class Both(TopK):
        def compute(self):
            return {"hits": self.hits, "count": self.count}


    class Raw(TopK):
        def compute(self):
            return torch.stack([self.hits, self.count])


    class LongerAnswers(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("longer", torch.tensor(0.0), dist_reduce_fx="sum")

        def update(self, answers):
            self.longer += (answers.lengths[:, 0] > answers.lengths[:, 1]).sum()

        def compute(self):
            return self.longer


    class Bare(torch.optim.Optimizer):
        def __init__(self, params, lr: float = 1.0) -> None:
            self.lr = lr


    class Broken(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer, last_epoch: int = -1) -> None:
            raise KeyError("warmup")


    class Scaled(ShadowModule):
        '''A module of its own.

        Args:
            factor: Factor of the loss.
        '''

        def __init__(self, *args, factor: float = 1.0, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.factor = factor

        def training_step(self, batch, batch_idx):
            self.log("train/factor", self.factor)
            return self.factor * super().training_step(batch, batch_idx)


    class Nothing:
        pass
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pair, conversations, pairs of answers, a configuration, and a package of one's own on the path."""
    root = tmp_path_factory.mktemp("own")
    base, instruct = save_pair(root)
    (root / "ownpackage.py").write_text(textwrap.dedent(OWN))
    (root / "brokenpackage.py").write_text("1 / 0\n")
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ab" * (1 + i % 3)}]
             for i in range(8)]  # fmt: skip
    (root / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    pairs = [{"prompt": f"{i}?", "chosen": "ab" * (1 + i % 3), "rejected": "ba"} for i in range(8)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = {
        "pair": {"base": str(base), "instruct": str(instruct)},
        "model": {"lr": 1e-3, "warmup_ratio": 0},
        "graft": {"select": "all", "dtype": "float32"},
        "export": {"enabled": False},
        "run": {"root": str(root / "runs")},
        "data": {"train": str(root / "talks.jsonl"), "validation": {"a": str(root / "talks.jsonl"),
                 "b": str(root / "talks.jsonl")}, "batch_size": 4, "max_length": 64, "cache": False},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "log_every_n_steps": 1,
            "enable_model_summary": False, "enable_checkpointing": False, "gradient_clip_val": None,
            "num_sanity_val_steps": 0,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


@pytest.fixture
def nothing_is_opened(monkeypatch):
    """Fail where data, a tokenizer or weights are read."""
    for owner, name in ((ShadowData, "prepare_data"), (ModelPair, "instruct_tokenizer"), (ModelPair, "base_folder")):
        monkeypatch.setattr(owner, name, lambda self: pytest.fail("came too late"))


def write(root, name, **sections):
    """The configuration with keys of sections set; returns the file."""
    config = yaml.safe_load((root / "run.yaml").read_text())
    for section, values in sections.items():
        config[section] = {**config[section], **values}
    (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return str(root / f"{name}.yaml")


def fit(*args):
    torch.set_num_threads(1)
    cli = main(["fit", "--config", *args])
    return cli, {name: value.item() for name, value in cli.trainer.callback_metrics.items()}


def own(name, **init_args):
    return {"class_path": f"ownpackage.{name}", "init_args": init_args}


def supervised(cli, model):
    """Logits and targets of every supervised token of the training set, through transformers."""
    logits, targets = [], []
    for i in range(8):
        sample = cli.datamodule.dataset("train")[i]
        ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
        given = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        logits.append(given[labels[1:] != -100])
        targets.append(labels[1:][labels[1:] != -100])
    return torch.cat(logits), torch.cat(targets)


def assert_one_step(cli, logged, root, formula):
    """After one step of SGD the loss and every weight are those of the formula: base - lr * gradient."""
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    loss = formula(*supervised(cli, model))
    loss.backward()
    assert logged["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, found), start in zip(cli.model.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, start - 0.1 * start.grad, rtol=0, atol=1e-6, msg=name)
    assert any(p.grad.abs().max() > 1e-3 for p in model.parameters())


SGD = {"class_path": "torch.optim.SGD"}


@pytest.mark.parametrize("batch_size", [8, 2])
def test_a_loss_per_token(root, batch_size):
    """Focal, not cross entropy; the same in one batch and accumulated over four of unequal lengths."""
    objective = own("Focal", gamma=1.5)
    path = write(root, "focal", model={"objective": objective, "optimizer": SGD, "lr": 0.1, "schedule": "constant"},
                 data={"batch_size": batch_size}, trainer={"accumulate_grad_batches": 8 // batch_size})  # fmt: skip
    cli, logged = fit(path)

    def formula(logits, targets):
        losses = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return ((1 - (-losses).exp()).pow(1.5) * losses).mean()

    assert_one_step(cli, logged, root, formula)
    assert logged["train/tokens"] == len(supervised(cli, cli.model.model)[1])
    # Validation compares models by cross entropy, whatever they were trained for.
    with torch.no_grad():
        expected = F.cross_entropy(*supervised(cli, cli.model.model)).item()
    assert logged["val/tuned/loss"] == pytest.approx(expected, rel=1e-5)
    assert {"val/grafted/loss", "val/instruct/accuracy", "graft/gain"} <= logged.keys()


def test_an_objective_of_whole_logits_with_a_sum_of_its_own(root):
    path = write(root, "z", model={"objective": own("ZLoss"), "optimizer": SGD, "lr": 0.1, "schedule": "constant"},
                 data={"batch_size": 8})  # fmt: skip
    cli, logged = fit(path)
    squares = []

    def formula(logits, targets):
        squares.append(logits.exp().sum(-1).log().square())
        return F.cross_entropy(logits, targets) + 0.1 * squares[0].mean()

    assert_one_step(cli, logged, root, formula)
    assert logged["train/z"] == pytest.approx(squares[0].mean().item(), rel=1e-5)


def test_a_loss_per_pair(root):
    rows = str(root / "pairs.jsonl")
    path = write(root, "pairs", model={"objective": own("Exponential"), "metrics": {"longer": own("LongerAnswers")}},
                 data={"batch_size": 8, "train": rows, "validation": rows})  # fmt: skip
    cli, logged = fit(path)
    assert cli.datamodule.samples == "pairs"
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    losses = []
    for i in range(8):
        (sample,) = cli.datamodule.dataset("train")[i]
        means = []
        for answer in sample["answers"]:
            ids, labels = torch.tensor(answer["input_ids"]), torch.tensor(answer["labels"])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            means.append(-F.cross_entropy(logits, labels[1:]).item())
        losses.append(torch.tensor(means[1] - means[0]).exp().item())
    assert logged["train/loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert logged["train/margin"] == pytest.approx(logged["train/reward_chosen"] - logged["train/reward_rejected"])
    assert logged["val/base/loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert logged["val/grafted/longer"] == logged["val/instruct/longer"] == 5  # "ab" is as long as "ba" in 3 of 8


def test_an_objective_without_a_count_is_an_error(root, nothing_is_opened):
    with pytest.raises(ShadowlitError, match="returns the sums loss; expected a tensor loss and a count"):
        fit(write(root, "forgetful", model={"objective": own("Forgetful")}))


@pytest.mark.parametrize("path", ["nopackage.Mine", "ownpackage.Mine", "ownpackage.Nothing", "DPOO"])
def test_an_objective_that_is_none_names_the_known_ones(root, path):
    with pytest.raises(
        ShadowlitError,
        match=r"model\.objective is .*Known: SFT, DFT, EAFT, ContextDistillation, DPO, .*, ASFT",
    ):
        check(["fit", "--config", str(root / "run.yaml"), f"--model.objective={path}"])


@pytest.mark.parametrize("head_loss", ["auto", "recomputed", "logits"])
def test_metrics_beside_the_objective_s(root, head_loss):
    """By hand through transformers, for the tuned and the untouched models; the objective's own don't change."""
    metrics = {"top3": own("TopK", k=3), "parts": own("Both"),
               "torchs": {"class_path": "torchmetrics.classification.MulticlassAccuracy",
                          "init_args": {"num_classes": 272, "average": "micro"}}}  # fmt: skip
    cli, logged = fit(write(root, "metrics", model={"metrics": metrics, "head_loss": head_loss}))
    plain = fit(write(root, "plain", model={"head_loss": head_loss}))[1]
    models = {
        "tuned": cli.model.model,
        "instruct": AutoModelForCausalLM.from_pretrained(root / "instruct", dtype=torch.float32),
    }
    for who, model in models.items():
        with torch.no_grad():
            logits, targets = supervised(cli, model)
        ranks = (logits > logits.gather(1, targets[:, None])).sum(-1)
        for part in ("", "a/", "b/"):
            assert logged[f"val/{who}/{part}top3"] == pytest.approx((ranks < 3).float().mean().item())
        assert logged[f"val/{who}/a/parts_count"] == len(targets)
        assert logged[f"val/{who}/parts_count"] == 2 * len(targets)  # both sets
        assert logged[f"val/{who}/torchs"] == pytest.approx(logged[f"val/{who}/accuracy"])
    same = {name for name in plain if name.startswith("val/") or name in ("train/loss", "train/tokens", "graft/gain")}
    assert "val/grafted/loss" in same and "val/base/top3" in logged
    assert {name: logged[name] for name in same} == {name: plain[name] for name in same}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": own("TopK")}, "model.metrics.loss gives loss, which another metric gives too"),
        (
            {"fine": own("TopK"), "longer": own("LongerAnswers")},
            r"model\.metrics\.longer failed on a random batch of conversations \(TypeError: .*Expected update\(logits",
        ),
        ({"a b": own("TopK")}, "model.metrics has the name 'a b'; expected letters, digits, '_' and '-'"),
        ({"a/b": own("TopK")}, "model.metrics has the name 'a/b'; expected letters, digits, '_' and '-'"),
        ({"raw": own("Raw")}, r"'raw' of model.metrics gives a tensor of shape \[2\]; expected one number"),
    ],
)
def test_metrics_that_can_not_be_logged(root, metrics, message, nothing_is_opened):
    """Even without Lightning's sanity check."""
    with pytest.raises(ShadowlitError, match=message):
        fit(write(root, "wrong", model={"metrics": metrics}, trainer={"num_sanity_val_steps": 0}))


def test_a_metric_of_answers_that_does_not_fit(root, nothing_is_opened):
    rows = str(root / "pairs.jsonl")
    for objective in (own("Exponential"), {"class_path": "DPO"}):
        path = write(root, "wrong", model={"objective": objective, "metrics": {"top": own("TopK")}},
                     data={"train": rows, "validation": rows})  # fmt: skip
        with pytest.raises(ShadowlitError, match=r"metrics\.top failed on a random batch of pairs .*update\(answers\)"):
            fit(path)


# -- the module ---------------------------------------------------------------------------------------------------


def test_a_module_of_one_s_own(root, capsys):
    """By class path in the file, with its own keys next to ShadowModule's; the saved configuration runs again."""
    path = write(root, "module", model={"class_path": "ownpackage.Scaled", "factor": 2.0})
    cli, logged = fit(path, "--model.lr=2e-3")
    assert type(cli.model).__name__ == "Scaled" and cli.model.factor == logged["train/factor"] == 2
    assert cli.model.lr == 2e-3
    saved = cli.trainer.log_dir + "/config.yaml"
    model = yaml.safe_load(Path(saved).read_text())["model"]
    assert model["class_path"] == "ownpackage.Scaled" and model["factor"] == 2.0 and model["lr"] == 2e-3
    again, _ = fit(saved, "--model.factor=3")
    assert again.model.factor == 3 and type(again.model) is type(cli.model)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", "--config", path, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    assert shown["class_path"] == "ownpackage.Scaled" and shown["factor"] == 2.0
    with pytest.raises(SystemExit):
        main(["fit", "--model.class_path", "ownpackage.Scaled", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Factor of the loss" in shown and "Peak learning rate" in shown


def test_without_a_class_path_nothing_of_it_is_saved(root, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(root / "run.yaml"), "--print_config"])
    assert "class_path" not in yaml.safe_load(capsys.readouterr().out)["model"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "nopackage.Mine",
            "is 'nopackage.Mine', which can't be imported .*No module named 'nopackage'",
        ),
        (
            "brokenpackage.Mine",
            "is 'brokenpackage.Mine', which can't be imported .*ZeroDivisionError: division by zero",
        ),
        ("ownpackage.Mine", "model.class_path is 'ownpackage.Mine', which can't be imported .*no attribute 'Mine'"),
        ("Mine", "model.class_path is 'Mine', which can't be imported"),
        (
            "ownpackage.Focal",
            "is 'ownpackage.Focal', which is .*expected the import path of a subclass",
        ),
    ],
)
def test_a_module_that_is_none(root, path, message):
    with pytest.raises(ShadowlitError, match=message):
        check(["fit", "--config", write(root, "none", model={"class_path": path})])
    with pytest.raises(ShadowlitError, match=message):
        check(["fit", "--config", str(root / "run.yaml"), f"--model.class_path={path}"])


def test_a_class_path_that_is_no_text(root):
    with pytest.raises(ShadowlitError, match=r"model\.class_path is 5, which can't be imported"):
        check(["fit", "--config", write(root, "five", model={"class_path": 5})])


def test_a_key_of_another_class_is_an_error(root):
    with pytest.raises(ShadowlitError, match="factor"):
        check(["fit", "--config", str(root / "run.yaml"), "--model.factor=2"])


# -- optimizers and schedules -------------------------------------------------------------------------------------


def groups(cli):
    return [{key: group[key] for key in ("lr", "weight_decay")} for group in cli.trainer.optimizers[0].param_groups]


def test_muon_trains_an_adapter(root):
    options = {"adapter": {"r": 4}, "schedule": "constant"}
    muon = {"class_path": "torch.optim.Muon", "init_args": {"momentum": 0.9, "weight_decay": 0.0}}
    cli, logged = fit(write(root, "muon", model={**options, "optimizer": muon}))
    assert type(cli.trainer.optimizers[0]) is torch.optim.Muon
    assert groups(cli) == [{"lr": 1e-3, "weight_decay": 0.0}]  # the module's, which sweeps vary
    assert cli.trainer.optimizers[0].param_groups[0]["momentum"] == 0.9
    muon["init_args"]["lr"] = 0.02
    cli, again = fit(write(root, "muon", model={**options, "optimizer": muon}))
    assert groups(cli)[0]["lr"] == 0.02 and again["train/lr"] == pytest.approx(0.02)
    assert again["train/loss"] != logged["train/loss"]
    saved, third = fit(cli.trainer.log_dir + "/config.yaml")
    assert third["train/loss"] == again["train/loss"] and groups(saved) == groups(cli)


@pytest.mark.parametrize("init_args", [{}, {"momentum": 0.9}])
def test_muon_on_the_command_line_trains_all_weights(root, init_args):
    """The parser wraps the class, and schedules of transformers look at the optimizer's rate."""
    muon = {"class_path": "torch.optim.Muon", "init_args": init_args}
    schedule = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    cli, _ = fit(write(root, "muon", model={"optimizer": muon, "adapter": None, **schedule}), "--trainer.max_steps=1")
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer) is MuonAndAdamW and [group["lr"] for group in optimizer.param_groups] > [0]
    assert optimizer.parts[0].defaults["momentum"] == init_args.get("momentum", 0.95)


@pytest.mark.parametrize(("options", "message"), [
    ({"optimizer": {"class_path": "torch.optim.Muon", "init_args": {"adjust_lr_fn": "x"}}}, "optimizer can't take .*x"),
    ({"optimizer": own("Bare")}, r"optimizer can't take .*TypeError: its __init__ doesn't call super\(\).__init__\(\)"),
    ({"lr_scheduler": {"class_path": "ConstantLR", "init_args": {"factor": 2.0}}}, "Constant multiplicative factor"),
    ({"lr_scheduler": {"class_path": "OneCycleLR", "init_args": {"max_lr": [0.1] * 5, "total_steps": 9}}}, ""),
    ({"lr_scheduler": own("Broken")}, r"model\.lr_scheduler can't make a schedule \(KeyError: 'warmup'\)"),
    ({"lr_scheduler": "linear", "lr_scheduler_kwargs": {"power": 2}}, r"model\.lr_scheduler_kwargs can't .*'power'"),
], ids=lambda _: "")  # fmt: skip
def test_optimizers_and_schedules_that_can_not_be_made(root, options, message, nothing_is_opened):
    """Found before anything is opened, but for lists, whose length may depend on the number of parameter groups."""
    with pytest.raises(
        ShadowlitError if message else pytest.fail.Exception, match=message or "came too late"
    ) as raised:
        fit(write(root, "wrong", model=options))
    assert not message or raised.value.status == 2


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"offload_optimizer": True}])
def test_options_of_adamw_are_refused_with_a_class(root, options):
    with pytest.raises(ShadowlitError, match=r"model.optimizer is a class, but .* belong to adamw"):
        fit(write(root, "options", model={"optimizer": SGD, **options}))


def test_lora_plus(root):
    cli, _ = fit(write(root, "plus", model={"adapter": {"r": 4}, "loraplus_lr_ratio": 16.0, "schedule": "constant"}))
    first, second = cli.trainer.optimizers[0].param_groups
    named = {id(p): name for name, p in cli.model.named_parameters()}
    assert (first["lr"], second["lr"]) == (1e-3, 16e-3)
    assert all("lora_A" in named[id(p)] for p in first["params"]) and first["params"]
    assert all("lora_B" in named[id(p)] for p in second["params"]) and second["params"]


def test_schedules_by_name_and_by_class(root):
    """Four steps, half of them warm-up: 0, 1/2, 1, 1/2 of the rate for the last, linear; a step schedule as torch's."""
    options = {"data": {"batch_size": 2}, "trainer": {"max_epochs": 1}}
    linear = {"lr_scheduler": "linear", "warmup_ratio": 0.5}
    cli, logged = fit(write(root, "linear", model=linear, **options))
    assert logged["train/lr"] == pytest.approx(0.5e-3)
    least = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.4}}
    cli, _ = fit(write(root, "least", model=least, **options))
    assert cli.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [pytest.approx(0.4e-3)] * 2
    step = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.1}}
    cli, logged = fit(write(root, "step", model={"lr_scheduler": step}, **options))
    assert logged["train/lr"] == pytest.approx(1e-4)
    plateau = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
               "init_args": {"monitor": "val/grafted/loss", "mode": "max", "patience": 0}}  # fmt: skip
    options["trainer"]["max_epochs"] = 3
    cli, logged = fit(write(root, "plateau", model={"lr_scheduler": plateau}, **options))
    assert logged["train/lr"] == pytest.approx(1e-4)  # the loss fell, which is worse, after the second epoch
    plateau["class_path"] = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    del plateau["init_args"]["monitor"]
    with pytest.raises(ShadowlitError, match=r"lightning\.pytorch\.cli\.ReduceLROnPlateau with monitor"):
        fit(write(root, "plateau", model={"lr_scheduler": plateau}, **options))


@pytest.mark.parametrize(
    "argument", ["--model.optimizer=adamww", "--model.lr_scheduler=cosin", "--model.optimizer=torch.nn.Linear"]
)
def test_optimizers_and_schedules_that_are_none(root, argument):
    with pytest.raises(ShadowlitError, match=argument[2:].split("=")[0]):
        check(["fit", "--config", str(root / "run.yaml"), argument])


# -- mends --------------------------------------------------------------------------------------------------------


def test_a_run_without_a_logger_has_a_folder_too(root, tmp_path, monkeypatch):
    """And writes nothing anywhere else."""
    monkeypatch.chdir(tmp_path)
    options = [f"--run.root={tmp_path}/r", "--trainer.logger=false"]
    for _ in range(2):
        fit(str(root / "run.yaml"), "--trainer.max_steps=1", *options)
    main(["validate", "--config", str(root / "run.yaml"), *options])
    assert os.listdir() == ["r"] and os.listdir("r") == ["run"]
    found = {path: sorted(os.listdir(f"r/run/{path}")) for path in sorted(os.listdir("r/run"))}
    assert found.pop("version_2") == ["config.yaml", "metrics.csv"]
    assert found == {f"version_{n}": ["complete.json", "config.yaml", "metrics.csv"] for n in range(2)}


@pytest.mark.parametrize("in_python", [False, True])
def test_with_an_unlimited_number_of_epochs_the_steps_are_counted(root, tmp_path, monkeypatch, caplog, in_python):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    options = {"max_epochs": -1, "max_steps": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    if in_python:
        pair = ModelPair(str(root / "base"), str(root / "instruct"))
        data = ShadowData(pair, train=str(root / "talks.jsonl"), cache=False)
        options |= {"enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False}
        Trainer(**options, callbacks=[ProgressLine(every_s=0)]).fit(ShadowModule(pair), data)
    else:
        given = [f"--trainer.{name}={json.dumps(value)}" for name, value in options.items()]
        monkeypatch.setattr("shadowlit.training.bar.ProgressLine.__init__.__defaults__", (0,))
        main(["fit", "--config", str(root / "run.yaml"), *given, "--trainer.enable_progress_bar=true"])
    shown = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert shown[0] == "step 0/1, starting" and shown[-1].startswith("step 1/1, ")


def test_nothing_is_float64_where_the_device_has_none(root, monkeypatch):
    """As on MPS: whatever training and validation compute on the device stays in float32."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                assert getattr(tensor, "dtype", None) != torch.float64, function
            return result

    for name in ("training_step", "on_before_optimizer_step", "validation_step", "configure_optimizers", "_log_scores"):
        original = getattr(ShadowModule, name)

        def checked(self, *args, original=original, **kwargs):
            with NoFloat64():
                return original(self, *args, **kwargs)

        monkeypatch.setattr(ShadowModule, name, checked)

    def on_cpu(self, original=ShadowModule.configure_scores):  # metrics are made there, and moved
        with _disable_current_modes():
            return original(self)

    monkeypatch.setattr(ShadowModule, "configure_scores", on_cpu)
    with pytest.raises(AssertionError):
        fit(str(root / "run.yaml"))  # the stub does notice float64
    for module in [one for name, one in sys.modules.items() if name.startswith("shadowlit.")]:
        if "accumulation_dtype" in vars(module):
            monkeypatch.setattr(module, "accumulation_dtype", lambda device: torch.float32)
    _, logged = fit(str(root / "run.yaml"))
    assert {"train/loss", "val/tuned/loss", "val/grafted/loss"} <= logged.keys()
    pairs = {"train": str(root / "pairs.jsonl"), "validation": str(root / "pairs.jsonl")}
    fit(write(root, "small", model={"objective": {"class_path": "DPO"}}, data=pairs))

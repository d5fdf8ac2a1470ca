"""Wrong values: the key, the value, the cause and what is expected, in a few lines, before anything is loaded."""

import importlib
import json
import re
import sys
import typing
from types import SimpleNamespace

import pytest
import yaml
from lightning import pytorch
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.trainer import trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from shadowlit import lightning_cli
from shadowlit.cli.main import main
from shadowlit.delta import registry
from shadowlit.errors import Interrupted, ShadowlitError
from shadowlit.lightning_cli import ShadowCLI, ShadowParser
from shadowlit.parser import shorten
from shadowlit.training import loading
from shadowlit.training.objectives import Objective
from shadowlit.training.optimizer import OptimizerChoice
from tests.distributed import run_command, shadowlit
from tests.test_configs import ROOT

DEMO = ROOT / "configs/demo_lora.yaml"

METRIC = "names, and for each a class derived from torchmetrics.metric.Metric"
EVALUATOR = "names, and for each a class derived from shadowlit.evaluation.evaluator.Evaluator"
OPTIMIZER = "a name, or a class derived from torch.optim.optimizer.Optimizer"
SCHEDULER = "a name, or a class derived from torch.optim.lr_scheduler.LRScheduler"
OBJECTIVE = "a name, or a class derived from shadowlit.training.objectives.base.Objective"
STRATEGY = "a name, or a class derived from lightning.pytorch.strategies.strategy.Strategy"
CALLBACKS = "a list of classes derived from lightning.pytorch.callbacks.callback.Callback"
TRANSFORMS = r'a list of names with their parameters, e\.g\. \[\{"name": "dare", "density": 0\.2\}\]'
OPTIMIZERS = "Known: adamw, adamw_8bit; torch.optim: .*Muon"
CASES = [
    ("model.metrics", {"acc": {"class_path": "torchmetrics.Acuracy"}}, r"torchmetrics\.Acuracy can't be imported "
     r"\(module 'torchmetrics' has no attribute 'Acuracy'\)", METRIC, r"torchmetrics: Accuracy\."),
    ("model.metrics", {"acc": {"class_path": "torch.nn.Linear"}}, "torch.nn.Linear is not a subclass of Metric", METRIC,
     "Known: torchmetrics: AUROC, Accuracy"),
    ("model.metrics", 3, "", METRIC, r"Known: torchmetrics: .*, … \(\d+ more\)\.$"),
    ("model.metrics", {"acc": "nowhere.Nope"}, "nowhere.Nope can't be imported", METRIC, "Known: torchmetrics: "),
    ("model.metrics", {"m": {"class_path": "torchmetrics.MeanMetric", "init_args": {"nan_strateg": 1}}},
     "the class has no option nan_strateg", "", ""),
    ("evaluation.evaluators", {"x": {"class_path": "shadowlit.evaluation.generated.Generatio"}},
     "generated.Generatio can't be imported", EVALUATOR, "shadowlit.evaluation.generated: Generation"),
    ("evaluation.evaluators", {"x": {"class_path": "torch.nn.Linear"}}, "is not a subclass of Evaluator", EVALUATOR,
     "shadowlit.evaluation.multiple_choice: MultipleChoice"),
    ("evaluation.evaluators", {"x": "Genration"}, "Genration is neither a known name nor", EVALUATOR, "Generation"),
    ("evaluation.evaluators", 3, "", EVALUATOR, "shadowlit.evaluation.forgetting: Divergence"),
    ("evaluation.evaluators", {"x": {"class_path": "shadowlit.evaluation.forgetting.Divergence",
     "init_args": {"data": "d.jsonl", "limit": "abc"}}}, "limit is abc", "int, null", ""),
    ("model.optimizer", "adamww", "adamww is neither a known name nor an import path", OPTIMIZER, OPTIMIZERS),
    ("model.optimizer", {"class_path": "torch.nn.Linear"}, "Linear is not a subclass of", OPTIMIZER, OPTIMIZERS),
    ("model.optimizer", {"class_path": "torch.optim.Muonn"}, "torch.optim.Muonn can't be imported", OPTIMIZER,
     OPTIMIZERS),
    ("model.optimizer", 3, "", OPTIMIZER, OPTIMIZERS),
    ("model.lr_scheduler", "cosin", "cosin is neither", SCHEDULER, r"Known: .*\bcosine\b"),
    ("model.lr_scheduler", {"class_path": "torch.optim.SGD"}, "torch.optim.SGD is not a subclass of", SCHEDULER,
     r"Known: linear, cosine, .*; torch\.optim\.lr_scheduler: "),
    ("model.lr_scheduler", 3, "", SCHEDULER, "Known: linear, cosine, "),
    ("model.objective", "DPOO", "DPOO is neither", OBJECTIVE, r"Known: SFT, DFT, EAFT, Context.*, DPO, .*, ASFT\."),
    ("model.objective", {"class_path": "nowhere.DPO"}, "nowhere.DPO can't be imported", OBJECTIVE, "Known: SFT, DFT"),
    ("model.objective", 3, "", OBJECTIVE, "Known: SFT, DFT"),
    ("model.lr", "abc", "", "float", ""),
    ("graft.transforms", ["ties"], "", TRANSFORMS, r"Known: dare, gradfix, magnitude, svd, ties\."),
    ("graft.transforms", 3, "", TRANSFORMS, r"Known: dare, gradfix, magnitude, svd, ties\."),
    ("data.format", 3, "", "a name, or the import path of a function", "Known: alpaca, auto, messages, "),
    ("trainer.strategy", "ddpp", "", STRATEGY, r"Known: ddp, ddp_spawn\."),
    ("trainer.strategy", {"class_path": "nowhere.DDP"}, "nowhere.DDP can't be imported", STRATEGY, "Known: .*ddp"),
    ("trainer.strategy", 3, "", STRATEGY, "Known: auto, ddp, "),
    ("trainer.callbacks", [{"class_path": "ModelCheckpoin"}], "ModelCheckpoin is neither", CALLBACKS,
     "callbacks: .*ModelCheckpoint"),
    ("trainer.callbacks", [{"class_path": "torch.nn.Linear"}], "not a subclass of Callback", CALLBACKS, "callbacks: "),
    ("trainer.callbacks", ["nowhere.Nope"], "nowhere.Nope can't be imported", CALLBACKS, "callbacks: "),
    ("trainer.callbacks", 3, "", CALLBACKS, "callbacks: .*EarlyStopping"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tests/cli")
    monkeypatch.setattr(loading, "load_for_training", None)


def configuration(tmp_path, key, value):
    config = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    *sections, name = key.split(".")
    section = config
    for each in sections:
        section = section.setdefault(each, {})
    section[name] = value
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "wrong.yaml")


def error_of(capsys, *arguments):
    """The message of a command that ends with status 2; it is short, and doesn't repeat jsonargparse's list."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr().err.strip()
    assert status == 2
    assert len(shown.splitlines()) <= 6 and len(shown) < 1500, shown
    assert "Union" not in shown.replace("Union[LRScheduler", "") and "usage" not in shown
    return shown.partition("error: ")[2]


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize("source", ["file", "command line"])
@pytest.mark.parametrize(("key", "value", "cause", "expected", "known"), CASES, ids=lambda _: "")
def test_the_key_the_value_the_cause_and_the_choices_are_named(
    tmp_path, capsys, source, key, value, cause, expected, known
):
    if source == "file":
        shown = error_of(capsys, "fit", "--config", configuration(tmp_path, key, value))
    else:
        written = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1000)
        written = written.removesuffix("...\n").strip()
        if isinstance(value, int) and key == "data.format":
            return  # a number on the command line is a name, which names no format: see below
        if key == "trainer.strategy":  # what is written there is a name in any case
            value, cause = written, ""
        shown = error_of(capsys, "fit", "--config", str(DEMO), f"--{key}={written}")
    first, _, rest = shown.partition("\n")
    given = "ties" if value == ["ties"] else str(value)
    assert first.startswith(f"{key} is {given[:100]}")
    assert re.search(rf"^{re.escape(key)} is .*{cause}.*{f'; expected {expected}' if expected else ''}", first), shown
    assert re.search(known, rest), shown


def test_choices_are_read_from_the_registries(monkeypatch):
    """A new class or transform is among the choices without further ado."""
    monkeypatch.setattr(callbacks, "Mine", type("Mine", (Callback,), {}), raising=False)
    monkeypatch.setitem(registry._registered, "new_one", next(iter(registry._registered.values())))
    assert "lightning.pytorch.callbacks.Mine" in ShadowParser.known["trainer.callbacks"].names()
    assert "new_one" in ShadowParser.known["graft.transforms"].names()
    assert "torch.optim.Muon" in ShadowParser.known["model.optimizer"].names()


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize(("key", "value", "message"), [
    ("graft.transforms", [{"name": "ties", "densty": 0.5}], r"graft.transforms[0].densty is given, but 'ties' has no"),
    ("graft.transforms", [{"name": "ties"}, {"name": "ties"}], "graft.transforms[1].name is 'ties' with the same"),
    ("model.class_path", "nowhere.Mine", "model.class_path is 'nowhere.Mine', which can't be imported (ModuleNotFound"),
    ("model.class_path", 3, "model.class_path is 3, which can't be imported"),
    ("model.class_path", "torch.nn.Linear", "model.class_path is 'torch.nn.Linear', which is <class 'torch.nn.modules"),
    ("data.format", "mesages", "data.format is 'mesages'; expected one of alpaca, auto, messages, "),
    ("model.lr", -1.0, "model.lr is -1.0; expected a positive learning rate"),
    ("model.objective", {"class_path": "DPO", "init_args": {"beta": -1}}, "model.objective: DPO's beta is -1.0; "),
    ("model.objective", {"class_path": "breaking.Crashing"}, "model.objective is breaking.Crashing, which "
     "can't be created (KeyError: 'gamma'; breaking.py, line "),
    ("model.objective", "breaking.Triples", "model.objective is breaking.Triples, whose samples are "
     "'triples'; expected one of conversations, contexts, pairs, labels"),
    ("model.objective", "exiting.Mine", "model.objective names a class of exiting, which ends the "
     "program when it is imported (SystemExit: 7)"),
    ("trainer.callbacks", [{"class_path": "ModelSummary"}, {"class_path": "breaking.Exiting"}],
     "trainer.callbacks[1] is breaking.Exiting, which can't be created (SystemExit: 3; breaking.py, line "),
    ("model.class_path", "breaking.WithoutPair", "model.class_path is breaking.WithoutPair, whose __init__ "
     "doesn't take model.objective, model.pair. Pass"),
    ("model.class_path", "breaking.WithoutSuper", "model.class_path is breaking.WithoutSuper, but its "
     "__init__ doesn't call super().__init__()."),
    ("data.format", "exiting.mine", "data.format is 'exiting.mine', which can't be imported "
     "(SystemExit: 7); expected one of alpaca, "),
])  # fmt: skip
def test_what_only_a_class_can_tell_is_wrong_usage_too(tmp_path, capsys, key, value, message):
    assert error_of(capsys, "fit", "--config", configuration(tmp_path, key, value)).startswith(message)


@pytest.mark.parametrize(("key", "value", "first", "rest"), [
    ("model.objective", {"class_path": "breaking.Abstract"}, "breaking.Abstract is abstract, since it lacks "
     "losses, rewards; expected", "Known: SFT, DFT"),
    ("model.objective", {"class_path": "breaking.Crashing", "gamma": 2}, "breaking.Crashing is given gamma "
     "next to class_path, which belongs under init_args; expected", "Known: SFT"),
    ("model.objective", {"class_path": "unreadable.Mine"}, "unreadable.Mine can't be imported "
     "(SyntaxError: invalid syntax (unreadable.py, line 1)); expected", "Known: SFT, DFT"),
    ("model.objective", "unreadable.Mine", "unreadable.Mine can't be imported (SyntaxError: ", "Known"),
    ("model.objective", {"class_path": "torch.nn.Linear", "init_args": {"bias": True}}, "torch.nn.Linear is not a "
     "subclass of Objective; expected", "Known: SFT, DFT"),
    ("model.objective", {"class_path": "DPO", "init_args": {"bta": 1}}, "the class has no option bta. Did you "
     "mean beta?", "Known: beta, loss, label_smoothing, sft_weight."),
    ("model.optimizer", {"class_path": "torch.optim.SGD", "init_args": {"momentumm": 1}}, "the class has no option "
     "momentumm. Did you mean momentum?", "Known: lr, momentum, dampening, "),
    ("trainer.callbacks", [{"class_path": "EarlyStopping", "monitor": "x"}], "EarlyStopping is given monitor next to "
     "class_path", "Known: lightning.pytorch.callbacks: "),
], ids=lambda _: "")  # fmt: skip
@pytest.mark.parametrize("source", ["file", "command line"])
def test_what_is_wrong_with_a_class(tmp_path, monkeypatch, capsys, key, value, first, rest, source):
    """By a parser of one key, which is quick to build."""
    (tmp_path / "unreadable.py").write_text("class Mine(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    section, _, name = key.partition(".")
    kinds = {"objective": Objective | None, "optimizer": OptimizerChoice, "callbacks": list[Callback] | Callback}
    parser = ShadowParser(prog="shadowlit")
    parser.add_argument(f"--{key}", type=kinds[name])
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({section: {name: value}}))
    with pytest.raises(SystemExit, match="2"):
        if source == "file":
            parser.parse_path(tmp_path / "wrong.yaml")
        else:
            parser.parse_args([f"--{key}={value if isinstance(value, str) else json.dumps(value)}"])
    lines = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert lines[0].startswith(f"{key} is {value}, but {first}") and lines[1].startswith(rest), lines


@pytest.mark.parametrize(("arguments", "message"), [
    (["delta", "compress", "a", "b", "--method=dare", "--parameters", "3"],
     'parameters is 3; expected values by the name of the parameter, e.g. {"size": 1e-4}.'),
    (["graft", "a", "b", "c", "d", '--transforms=["ties"]'], "transforms is ties; expected a list of names with "),
    (["graft", "a", "b", "c", "d", "--dtype=float8"], "dtype is float8; expected auto, float32, bfloat16, float16."),
    (["graft", "a", "b", "c", "d", "--scalee=2"], "unrecognized arguments: --scalee=2\nDid you mean scale?"),
    (["sweep", "run", "--gird.model.lr=[1]"], "unrecognized arguments: --gird.model.lr=[1]\nDid you mean grid?"),
    (["graft", "a"], "the following arguments are required: tuned, instruct, out"),
    (["fit", "--config", str(DEMO), "--model.lrr=1"], "unrecognized arguments: --model.lrr=1\nDid you mean model.lr?"),
    (["fit", "--config", str(DEMO), "--run.folder=x"],
     "unrecognized arguments: --run.folder=x\nKnown: run.allow_changes, run.name, run.resume, run.root."),
    (["fit", "--config", str(DEMO), "--data.batchsize=1"],
     "unrecognized arguments: --data.batchsize=1\nDid you mean data.batch_size?"),
    (["fit", "--config", str(DEMO), "--data.optimizer=x"],
     "unrecognized arguments: --data.optimizer=x\nDid you mean model.optimizer?"),
    (["graft", "a", "b", "c", "d", "--scal=2"], "unrecognized arguments: --scal=2\nDid you mean scale?"),
    (["fit", "--config", str(DEMO), "--data.trai=x"],
     "unrecognized arguments: --data.trai=x\nDid you mean data.train?"),
    (["fit", "--config", "/none.yaml"], "config is /none.yaml, which does not exist. Correct the path."),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_other_commands_and_unknown_keys(capsys, arguments, message):
    assert error_of(capsys, *arguments).startswith(message)


def test_an_unknown_form_of_message_is_kept():
    assert shorten("something else\n\n  in two lines", {}) == "something else\n  in two lines"


@pytest.mark.parametrize(("key", "value", "message"), [
    ("trainer.devices", "9", "trainer.accelerator is gpu, trainer.devices is 9: No supported gpu backend found! Set "),
    ("trainer.check_val_every_n_epoch", None, "trainer.val_check_interval is 1.0: `val_check_interval` should be "
     "an integer or a time-based duration "),
    ("run.root", "{file}/runs", "run.root is '{file}/runs', which can't be written ([Errno 20] Not a directory: "),
    ("trainer.logger", "{file}", "save_dir of lightning.pytorch.loggers.csv_logs.CSVLogger is '{file}', which can't "),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_what_lightning_refuses(tmp_path, monkeypatch, capsys, key, value, message):
    """No traceback of forty lines; a folder that can't be written is found before models are loaded."""
    monkeypatch.setattr(pytorch.accelerators.CUDAAccelerator, "is_available", lambda *_: False)
    file = tmp_path / "file"
    file.write_text("")
    value = value and value.replace("{file}", str(file))
    if key == "trainer.logger":
        value = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": value}}
    more = ["--trainer.accelerator=gpu"] if key == "trainer.devices" else []
    words = ["fit", "--config", configuration(tmp_path, key, value), *more]
    assert error_of(capsys, *words).startswith(message.replace("{file}", str(file)))


@pytest.mark.parametrize(("text", "expected"), [
    (" `val_check_interval` (100) must be at most 19.\n Set `limit_val_batches` to 0.0",
     "trainer.val_check_interval is 100: `val_check_interval` (100) must be at most 19. Set `overfit_batches` to 0.0"),
    ("0.1 of `val_dataloader`: increase the `limit_val_batches`",
     "trainer.overfit_batches is 0.1: 0.1 of `val_dataloader`: increase the `overfit_batches`"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [ValueError, MisconfigurationException])
def test_what_lightning_finds_out_late(text, expected, kind):
    """With overfit_batches, which sets what Lightning's message names."""
    options = {"val_check_interval": 100, "overfit_batches": 0.1, "limit_val_batches": 1.0}
    cli = SimpleNamespace(subcommand="fit", config={"fit": {"trainer": options}})

    def raised_in(module):
        try:
            exec("raise kind(text)", {"__name__": module, "kind": kind, "text": text})
        except kind as error:
            return error

    with pytest.raises(ShadowlitError, match=re.escape(expected) + "$"):
        ShadowCLI._raise_of_trainer(cli, raised_in("lightning.pytorch.loops"))
    ShadowCLI._raise_of_trainer(cli, raised_in("torch.nn"))  # is none of Lightning's


def test_a_signal_while_a_configuration_is_checked_is_no_error_of_it(tmp_path, monkeypatch):
    """Of sweep, which checks its trials before it starts them."""

    def interrupt(*_, **__):
        raise Interrupted(143)

    monkeypatch.setattr(ShadowParser, "parse_args", interrupt)
    with pytest.raises(Interrupted, match="143"):
        lightning_cli.check(["fit", "--config", str(DEMO)])


def fit_with_a_hint_in_the_other_order(*args):
    """In a process in which a union of the same types in the other order has become Trainer's type hint."""
    for clear in typing._cleanups:
        clear()
    made_before = typing.Optional[typing.Union[float, int]]  # noqa: UP007, UP045
    pytorch.Trainer = importlib.reload(trainer).Trainer
    importlib.reload(pytorch.cli)
    hint = trainer.Trainer.__init__.__annotations__["limit_val_batches"]
    assert typing.get_args(hint) == typing.get_args(made_before), hint
    for name in [name for name in sys.modules if name.partition(".")[0] == "shadowlit"]:
        del sys.modules[name]
    return shadowlit(*args)


def test_one_batch_is_not_all_batches(tmp_path):
    config = configuration(tmp_path, "trainer.limit_val_batches", 1)
    arguments = ["fit", "--config", config, "--trainer.limit_test_batches=1", "--trainer.overfit_batches=0.5",
                 "--trainer.limit_train_batches=1.0", "--print_config"]  # fmt: skip
    (tmp_path / "reordered").mkdir()
    reordered = run_command(tmp_path / "reordered", *arguments, function=fit_with_a_hint_in_the_other_order)
    for done in (reordered, run_command(tmp_path, *arguments)):
        assert done.returncode == 0, done.stderr
        found = yaml.safe_load(done.stdout)["trainer"]
        values = [found[name] for name in ("limit_val_batches", "limit_test_batches", "limit_train_batches")]
        assert [(type(value), value) for value in values] == [(int, 1), (int, 1), (float, 1.0)]
        assert found["overfit_batches"] == 0.5

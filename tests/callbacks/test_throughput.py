"""What is counted is what was trained on, what is shared adds up to the whole, and training does not notice."""

import logging
import time

import pytest
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

import shadowlit.callbacks.throughput as throughput
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.throughput import ThroughputCallback
from shadowlit.text import count
from shadowlit.training.flops import Work
from tests.callbacks.test_graft import assert_same, folders, make_module, make_trainer, weights  # noqa: F401
from tests.distributed import run_ranks
from tests.synthetic import RandomData, random_samples

PARTS = ["data", "forward_backward", "optimizer", "validation", "graft", "evaluation"]


class Clock:
    """A second passes with every look at it."""

    now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def fit(tmp_path, folders, *callbacks, kind="full", **options):  # noqa: F811
    module = make_module(folders, kind)
    callback = ThroughputCallback()
    trainer = make_trainer(tmp_path, *callbacks, callback, log_every_n_steps=2, **options)
    trainer.fit(module, RandomData())
    return module, trainer, callback


def test_rates_by_hand(tmp_path, folders, monkeypatch):  # noqa: F811
    """Marks are seconds apart: three per micro-batch that steps, two for the others."""
    monkeypatch.setattr(throughput, "time", Clock())
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e6)
    module, trainer, callback = fit(tmp_path, folders, max_epochs=1, limit_val_batches=0)
    samples = random_samples(16, 0)
    tokens = sum(int(s["attention_mask"].sum()) for s in samples)
    supervised = sum(int((s["labels"] != -100).sum()) for s in samples)
    pairs = sum(n * (n + 1) // 2 for n in (int(s["attention_mask"].sum()) for s in samples))
    seconds = 4 * 2 + 4 * 3 + 1
    assert callback.summary["tokens_per_s"] == pytest.approx(tokens / seconds)
    assert callback.summary["supervised_tokens_per_s"] == pytest.approx(supervised / seconds)
    flops = Work.of(module.model).flops(tokens, supervised, {None: pairs})
    assert callback.summary["mfu"] == pytest.approx(flops / seconds / 1e6)
    assert callback.summary["data"] == pytest.approx(9 / seconds)
    assert callback.summary["optimizer"] == pytest.approx(4 / seconds)
    # The last two steps of four: the last eight samples, but for the end's own mark.
    logged = trainer.callback_metrics
    last = sum(int(s["attention_mask"].sum()) for s in samples[8:])
    assert logged["train/tokens_per_s"].item() == pytest.approx(last / 10)
    assert logged["time/optimizer"].item() == pytest.approx(4 / 20)


def test_shares_add_up_and_are_said(tmp_path, folders, caplog):  # noqa: F811
    graft = GraftCallback()
    with caplog.at_level(logging.INFO):
        _, _, callback = fit(tmp_path, folders, graft, logger=CSVLogger(tmp_path, "logs"))
    assert sum(callback.summary[part] for part in PARTS) == pytest.approx(1)
    assert all(callback.summary[part] >= 0 for part in PARTS)
    assert callback.summary["graft"] * callback.summary["seconds"] == pytest.approx(
        graft.record.run.seconds["graft"], rel=1e-6
    )
    assert callback.summary["validation"] > 0 and callback.summary["evaluation"] == 0
    assert callback.summary["peak_memory_gb"] > 0.05 and "mfu" not in callback.summary
    (said,) = [record.message for record in caplog.records if record.message.startswith("throughput:")]
    assert f"tokens per second             {count(callback.summary['tokens_per_s'])}\n" in said
    columns = (tmp_path / "logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"train/tokens_per_s", "train/supervised_tokens_per_s", "train/peak_memory_gb", "time/graft"}
    assert wanted <= set(columns)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_does_not_notice(tmp_path, folders, kind):  # noqa: F811
    module, *_ = fit(tmp_path, folders, kind=kind)
    plain = make_module(folders, kind)
    make_trainer(tmp_path).fit(plain, RandomData())
    assert_same(weights(module), weights(plain))


def test_waiting_for_data_is_seen(tmp_path, folders):  # noqa: F811
    class Slow(RandomData):
        def train_dataloader(self):
            loader = super().train_dataloader()

            def rows():
                for batch in loader:
                    time.sleep(0.2)
                    yield batch

            return _Rows(rows, len(loader))

    callback = ThroughputCallback()
    trainer = make_trainer(tmp_path, callback, max_epochs=1, limit_val_batches=0, val_check_interval=None)
    trainer.fit(make_module(folders), Slow())
    assert callback.summary["data"] * callback.summary["seconds"] >= 0.2 * 6


class _Rows:
    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def __iter__(self):
        return self.rows()

    def __len__(self):
        return self.length


def summary_of(folders, world_size):  # noqa: F811
    from lightning.pytorch import Trainer, seed_everything

    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.module import ShadowModule

    seed_everything(0)
    callback = ThroughputCallback()
    module = ShadowModule(ModelPair(*map(str, folders)), LoraConfig(r=4), lr=1e-3)
    Trainer(
        accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto", max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, limit_val_batches=0, callbacks=[callback], log_every_n_steps=3,
    ).fit(module, RandomData())  # fmt: skip
    return callback._total, callback.summary["peak_memory_gb"]


def test_ranks_are_counted_together(folders):  # noqa: F811
    (one,) = run_ranks(summary_of, 1, folders, 1)
    two = run_ranks(summary_of, 2, folders, 2)
    assert two[0][0] == two[1][0] == one[0] and one[0][0] > 0
    assert two[0][1] == two[1][1]

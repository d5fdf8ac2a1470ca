"""Sources with settings of their own, mixed by weight; and rows that are wrong, left out and listed."""

import json
from collections import Counter
from itertools import chain, cycle, islice
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import shadowlit.data.tokenise as tokenise_module
from shadowlit.data.given import Source
from shadowlit.data.mixing import MixedPacks, Mixture, take_turns
from shadowlit.data.module import ShadowData
from shadowlit.data.preview import preview
from shadowlit.errors import DataError
from tests.data.templates import talk
from tests.data.test_resume import PAIR, answer, fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources of 12, 6 and 3 rows, whose answers are letters; a file with wrong rows."""
    folder = tmp_path_factory.mktemp("data")
    for name, letters in (("a", "abcdefghijkl"), ("b", "mnopqr"), ("c", "xyz")):
        rows = [{"messages": talk("?" * (1 + i % 4), letter)} for i, letter in enumerate(letters)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        json.dumps({"messages": talk("?", "a")}),
        "{broken",
        json.dumps({"messages": [{"role": "user", "content": "?"}]}),
        json.dumps({"messages": talk("? " * 30, "b")}),
        json.dumps({"messages": talk("?", "c")}),
    ]
    (folder / "wrong.jsonl").write_text("\n".join(lines))
    return folder


def source(folder, name, weight=None, **options):
    return {"path": str(folder / f"{name}.jsonl"), **({} if weight is None else {"weight": weight}), **options}


def make(train, **options):
    data = ShadowData(PAIR, train, **{"batch_size": 3, "seed": 1, "cache": False, **options})
    data.setup("fit")
    return data


def answers(batches):
    return "".join(answer(row) for batch in batches for row in batch["labels"])


def epochs(data, count):
    loader = data.train_dataloader()
    return [answers(loader) for _ in range(count)]


def parts(text):
    """How many answers are of each source."""
    return tuple(sum(letter in letters for letter in text) for letters in ("abcdefghijkl", "mnopqr", "xyz"))


# -- turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "expected"), [
    ((2, 1), [0, 1, 0, 0, 1, 0]),
    ((0.5, 0.3, 0.2), [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]),
    ((1e-3,), [0, 0, 0]),
])  # fmt: skip
def test_turns_by_hand(weights, expected):
    assert list(islice(take_turns(weights), len(expected))) == expected
    begun = np.bincount(expected[:2], minlength=len(weights))
    assert list(islice(take_turns(weights, begun.tolist()), len(expected) - 2)) == expected[2:]  # resumed


def test_no_source_is_ever_a_row_away_from_its_share():
    random = np.random.default_rng(0)
    for num_sources in (2, 3, 4, 8):
        weights = (random.random(num_sources) ** 3 + 1e-3).round(3)
        turns = np.fromiter(islice(take_turns(weights.tolist()), 500), int)
        counts = np.cumsum(turns[:, None] == np.arange(num_sources), axis=0)
        off = counts - np.arange(1, 501)[:, None] * weights / weights.sum()
        assert np.abs(off).max() <= 1 - 1 / (2 * num_sources - 2) + 1e-9
        assert np.ptp(np.vstack([np.zeros(num_sources), off]), axis=0).max() < 2  # any stretch


# -- epochs -------------------------------------------------------------------------------------------------------


def test_epochs_have_their_proportions_and_use_every_sample(folder):
    # 6 rows of the second source for a quarter of the epoch are fewer than 12 for a half or 3 for an eighth … of 24.
    train = [source(folder, "a", 4), source(folder, "b", 3), source(folder, "c", 1)]
    data = make(train)
    found = epochs(data, 6)
    assert {len(epoch) for epoch in found} == {16}  # 6 · 8/3
    assert {parts(epoch) for epoch in found} == {(8, 6, 2)}
    for start, count, letters in ((0, 3, "abcdefghijkl"), (0, 1, "mnopqr"), (0, 3, "xyz")):
        # 3 · 8 = 2 · 12 and 3 · 2 = 2 · 3: after three epochs, every row has been used equally often.
        seen = Counter("".join(found[start : start + count]))
        assert len({seen[letter] for letter in letters}) == 1
    first = "".join(found[:2])
    assert all(first.count(letter) >= 1 for letter in "abcdefghijklmnopqrxyz")  # before any row is used a third time
    assert len(set(found)) == 6 and epochs(make(train), 6) == found
    report = data.reports["train"]
    assert (report.num_samples, report.drawn) == (21, 16)
    assert [(each.num_rows, each.drawn) for each in report.sources] == [(12, 8), (6, 6), (3, 2)]
    assert report.drawn_tokens == sum(batch["attention_mask"].sum() for batch in make(train).train_dataloader())
    assert data.trained_tokens(2.0) == 2 * report.drawn_tokens and 0 < report.fill <= 1


def test_without_shuffling_sources_take_turns(folder):
    train = [source(folder, "a", 2), source(folder, "b", 1)]
    assert epochs(make(train, shuffle=False), 2) == ["ambcndeofgphiqjkrl"] * 2


def test_without_weights_sources_follow_each_other(folder):
    data = make([source(folder, "c"), Source(str(folder / "b.jsonl"), max_rows=4), folder / "c.jsonl"], shuffle=False)
    assert epochs(data, 1) == ["xyzmnopxyz"]
    assert [each.num_rows for each in data.reports["train"].sources] == [3, 4, 3]
    assert [data.dataset("train").origin(i).endswith("c.jsonl (line 1)") for i in (0, 3, 7)] == [True, False, True]


@pytest.mark.parametrize("options", [
    {"group_by_length": True}, {"packing": "padding_free"}, {"packing": "best_fit", "max_length": 40, "batch_size": 1},
])  # fmt: skip
def test_mixed_epochs_in_other_orders(folder, options):
    train = [source(folder, "a", 2), source(folder, "b", 2), source(folder, "c", 1)]
    data = make(train, **options)
    loader = data.train_dataloader()
    found = [answers(loader) for _ in range(4)]
    if options.get("packing") != "best_fit":
        assert {parts(epoch) for epoch in found} == {(6, 6, 3)}
        return
    assert parts(found[0]) == (6, 6, 3)
    # No sample is lost between the epochs: together they are a beginning of the endless order.
    together = Counter("".join(found))
    assert all(abs(together[x] - together[y]) <= 1 for x in "mnopqr" for y in "mnopqr")
    shares = np.array(parts("".join(found))) / len("".join(found))
    assert np.abs(shares - (0.4, 0.4, 0.2)).max() < 1 / len(found[0])


def test_as_many_packs_in_every_epoch():
    random = np.random.default_rng(0)
    lengths = np.concatenate([random.integers(1, 30, 300), random.integers(20, 90, 200)])
    mixture = Mixture(np.repeat([0, 1], [300, 200]), [1, 3])
    assert len(mixture) == 266 and mixture.counts.tolist() in ([66, 200], [67, 199])  # 200 · 4/3, and 66.5 : 199.5
    packs = MixedPacks(mixture, lengths, 100)
    used = []
    for epoch in range(6):
        found = list(packs(epoch))
        assert len(found) == len(packs)
        assert packs.sizes(epoch).tolist() == [lengths[list(one)].sum() for one in found]
        assert packs.sizes(epoch).max() <= 100
        used += [sorted(sample for pack in found for sample in pack)]
    assert len(used[0]) == 266 and all(240 < len(one) <= 266 for one in used)
    total = sum(map(len, used))
    assert sorted(chain.from_iterable(used)) == sorted(mixture.samples(0, total).tolist())
    later = MixedPacks(mixture, lengths, 100)
    assert list(later(5)) == list(packs(5))  # as after a resume


def test_a_mixed_run_resumes_where_it_was(folder, tmp_path):
    train = [source(folder, "a", 2), source(folder, "b", 1)]

    def run(seed=1, **options):
        save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
        data = ShadowData(PAIR, train, batch_size=3, seed=seed, cache=False)
        return fit(data, callbacks=[save], limit_val_batches=0, **options)[0]

    whole = run(max_epochs=2)
    assert run(max_epochs=2, ckpt_path=tmp_path / "saved" / "step=8.ckpt") == whole[8:]
    train[0]["weight"] = 3
    with pytest.raises(DataError, match=r"weights \[2, 1\] → \[3, 1\]"):
        run(max_epochs=2, ckpt_path=tmp_path / "saved" / "step=8.ckpt")


def test_overfitting_repeats_the_first_batches(folder):
    data = ShadowData(PAIR, [source(folder, "a", 1), source(folder, "b", 1)], batch_size=2, cache=False)
    seen = fit(data, max_epochs=3, overfit_batches=2)[0]
    assert [rows for _, rows in seen[:2]] == [rows for _, rows in seen[2:4]] == [rows for _, rows in seen[4:]]


# -- streams ------------------------------------------------------------------------------------------------------


def stream(train, count, **options):
    data = ShadowData(
        PAIR, train, **{"batch_size": 3, "seed": 1, "cache": False, "streaming": True, "stream_window": 6, **options}
    )
    data.trainer = SimpleNamespace(
        max_steps=100, accumulate_grad_batches=1, world_size=1, global_rank=0, accelerator=None, loggers=[],
    )  # fmt: skip
    data.setup("fit")
    return answers(islice(data.train_dataloader(), count))


def test_a_stream_is_mixed_over_any_rows_and_its_sources_begin_again(folder):
    train = [source(folder, "a", 1), source(folder, "b", 1), source(folder, "c", 2, max_rows=2)]
    turns = list(islice(take_turns([1, 1, 2]), 24))
    rows = [cycle("abcdefghijkl"), cycle("mnopqr"), cycle("xy")]
    assert stream(train, 8, shuffle=False) == "".join(next(rows[turn]) for turn in turns)
    found = stream(train, 40)  # windows of 6 rows
    assert all(sum(parts(found[start : start + 6])) == 6 for start in range(0, 120, 6))
    for start in range(0, 120, 6):
        assert np.abs(np.array(parts(found[start : start + 6])) - (1.5, 1.5, 3)).max() < 2
        assert np.abs(np.array(parts(found[:start])) - start * np.array([0.25, 0.25, 0.5])).max() < 1
    assert set(found) == set("abcdefghijklmnopqrxy")
    used = Counter(found)
    assert max(used[x] for x in "mnopqr") - min(used[x] for x in "mnopqr") <= 1


def test_a_mixed_stream_resumes_with_the_next_batch(folder, tmp_path):
    train = [source(folder, "a", 0.3), source(folder, "wrong", 0.7)]

    def run(**options):
        save = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        data = ShadowData(
            PAIR, train, batch_size=3, seed=1, streaming=True, stream_window=7, on_bad_row="skip", max_length=40,
            overlong="error",
        )  # fmt: skip
        return fit(data, callbacks=[save], limit_val_batches=0, max_epochs=None, max_steps=24, **options)[0]

    with pytest.warns(
        UserWarning, match=r"(?s)train: data.on_bad_row=skip leaves out 3 rows.*3 so far.*1\. sample 1 of"
    ) as seen:
        whole = run()
    assert sum("on_bad_row=skip leaves out" in str(one.message) for one in seen) == 1  # not in every pass
    for step in (4, 5, 19):
        assert run(ckpt_path=tmp_path / "saved" / f"step={step}.ckpt") == whole[step:], step
    with pytest.raises(DataError, match=r"wrong\.jsonl \(line 2\) is broken JSON"):
        stream(train, 9)


# -- settings -----------------------------------------------------------------------------------------------------


def test_every_source_is_read_by_its_own_settings(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "?", "completion": "a", "id": "x"}) + "\n")
    (tmp_path / "two.jsonl").write_text(json.dumps({"ask": "?", "say": "b", "id": "y"}) + "\n")
    two = {
        "path": tmp_path / "two.jsonl", "columns": {"prompt": "ask", "completion": "say"},
        "format": "prompt_completion",
    }  # fmt: skip
    data = make([tmp_path / "one.jsonl", two], ignore_columns=["id"], shuffle=False)
    assert epochs(data, 1) == ["ab"]
    with pytest.raises(DataError, match="id"):
        make([tmp_path / "one.jsonl", {**two, "ignore_columns": []}], ignore_columns=["id"])
    assert ShadowData(PAIR, validation={"path": "x", "max_rows": 3}).validation_sets["val"].max_rows == 3
    held_out = ShadowData(PAIR, validation={"v": two}, test=two, predict=two, ignore_columns=["id"], cache=False)
    held_out.setup(None)
    assert [len(held_out.dataset(name)) for name in ("v", "test")] == [1, 1] and len(held_out.prompts) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"train": ["a", {"path": "b", "wieght": 1}]}, r"data\.train\[1\] has the key 'wieght'; .*Did you mean weight\?"),
    ({"train": ["a", {"weight": 1}]}, r"data\.train\[1\] is \{'weight': 1\}; expected a path, or a mapping"),
    ({"train": {"path": "b", "weight": 0}}, r"data\.train\.weight is 0; expected a number above 0, or null\."),
    ({"train": {"path": "b", "weight": "much"}}, r"data\.train\.weight is 'much'; expected a number above 0"),
    ({"train": {"path": "b", "weight": float("nan")}}, r"data\.train\.weight is nan; expected"),
    ({"train": [{"path": "b", "max_rows": 2.5}]}, r"data\.train\.max_rows is 2\.5; expected a whole number of at l"),
    ({"train": {"path": "b", "format": "parrot"}}, r"data\.train\.format.*parrot"),
    ({"train": {"path": "b", "columns": ["x"]}}, r"data\.train\.columns is \['x'\]; expected a mapping of names"),
    ({"train": ["a", {"path": "b", "weight": 2}]}, r"data\.train\[0\] \(a\) has no weight, but others have one"),
    ({"validation": {"v": {"path": "b", "weight": 2}}}, r"data\.validation\.v\.weight is 2, but only training"),
    ({"predict": {"path": ""}}, r"data\.predict\.path is ''; expected a path"),
])  # fmt: skip
def test_wrong_settings_of_a_source_are_named_before_anything_is_read(options, message):
    with pytest.raises(DataError, match=message):
        ShadowData(PAIR, **options)


def test_weights_that_leave_a_source_out_are_an_error(folder):
    with pytest.raises(DataError, match=r"data\.train\[1\] has so small a weight .* among the 3 .* data\.train\[0\]"):
        make([source(folder, "c", 999), source(folder, "a", 1)])


# -- wrong rows ---------------------------------------------------------------------------------------------------


def test_wrong_rows_are_an_error_or_are_left_out_and_listed(folder, tmp_path, capsys):
    train, options = [source(folder, "c"), source(folder, "wrong")], {"max_length": 40, "overlong": "error"}
    with pytest.raises(DataError, match=r"sample 1 of \S*wrong\.jsonl \(line 2\) is broken JSON"):
        make(train, **options)
    for start in range(2):  # the second one reads the cache
        trainer = SimpleNamespace(
            loggers=[CSVLogger(tmp_path)], log_dir=str(tmp_path / f"run{start}"), is_global_zero=True, world_size=1,
        )  # fmt: skip
        data = ShadowData(PAIR, train, on_bad_row="skip", cache_dir=str(tmp_path / "cache"), **options)
        data.trainer = trainer
        with pytest.warns(
            UserWarning, match=r"(?s)train: data.on_bad_row=skip leaves out 3 of 8 rows.*1\. sample 1 of .*3\. "
        ):
            data.setup("fit")
        report = data.reports["train"]
        assert (report.num_rows, report.num_samples, len(report.skipped)) == (8, 5, 3)
        assert [len(each.skipped) for each in report.sources] == [0, 3]
        assert str(report).endswith("; 3 rows skipped")
        lines = (tmp_path / f"run{start}" / "skipped_rows.txt").read_text().splitlines()
        assert [line.split(" ")[2] for line in lines] == ["1", "2", "3"] and "has 82 tokens" in lines[2]
    data.trainer = None
    preview(data)
    assert "rows of train that are left out:" in capsys.readouterr().out
    strict = ShadowData(PAIR, train, cache_dir=str(tmp_path / "cache"), **options)
    with pytest.raises(DataError, match="broken JSON"):
        strict.setup("fit")


@pytest.mark.parametrize("options", [{}, {"streaming": True, "stream_window": 5}])
def test_the_first_row_may_be_a_wrong_one(tmp_path, options):
    rows = [{"version": 2}, [1], {"messages": talk("?", "a")}, {"messages": talk("?", "b")}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = make(tmp_path / "x.jsonl", on_bad_row="skip", **options).dataset("train")
    assert len(found) == 2 and found.origin(0).endswith("x.jsonl (line 3)")
    with pytest.raises(DataError, match="version"):
        make(tmp_path / "x.jsonl", **options)


def test_nothing_but_wrong_rows_is_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_text('{\n{"messages": []}\n')
    with pytest.raises(
        DataError,
        match=r"(?s)train has no sample left of 2 rows\. Rows left out by data.on_bad_row=skip: 2:.*1\. sample 0",
    ):
        make(tmp_path / "x.jsonl", on_bad_row="skip")


@pytest.mark.parametrize(("samples", "row", "wrong"), [
    ("pairs", {"prompt": "?", "chosen": "a", "rejected": "b"}, {"prompt": "?", "chosen": "a", "rejected": "a"}),
    ("labels", {"prompt": "?", "completion": "a", "label": True}, {"prompt": "?", "completion": "a", "label": "yes"}),
])  # fmt: skip
def test_wrong_preferences_are_left_out(tmp_path, samples, row, wrong):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, wrong, row)))
    data = make(tmp_path / "x.jsonl", on_bad_row="skip", samples=samples)
    assert len(data.dataset("train")) == 2 and data.reports["train"].skipped[0].startswith("sample 1 of ")


def test_wrong_prompts_are_left_out(tmp_path):
    rows = [{"messages": talk("?")}, {"messages": talk("?" * 99)}, {"messages": "no"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ShadowData(PAIR, predict=tmp_path / "x.jsonl", max_length=50, on_bad_row="skip", cache=False)
    data.setup("predict")
    assert len(data.prompts) == 1 and len(data.reports["predict"].skipped) == 2
    data = ShadowData(PAIR, predict=tmp_path / "x.jsonl", max_length=50, cache=False)
    with pytest.raises(DataError, match="sample 2"):
        data.setup("predict")


# -- processes ----------------------------------------------------------------------------------------------------


def test_any_number_of_processes_gives_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise_module, "_CHUNK", 2)
    monkeypatch.setattr(tokenise_module, "_WORTH_FORKING", 1)
    asked, original = [], tokenise_module.by_processes

    def by_processes(function, items, count):
        asked.append(count)
        return original(function, items, count)

    monkeypatch.setattr(tokenise_module, "by_processes", by_processes)
    train = [source(folder, "a"), source(folder, "wrong"), source(folder, "b")]
    files, errors = {}, set()
    for count in (1, 3):
        monkeypatch.setattr("shadowlit.data.module.num_cores", lambda count=count: count)
        data = ShadowData(PAIR, train, on_bad_row="skip", cache_dir=str(tmp_path / str(count)))
        data.setup("fit")
        (file,) = (tmp_path / str(count)).iterdir()
        files[count] = file.read_bytes()
        with pytest.raises(DataError, match=r"(?s)^12 problems.*1\. sample 0 of .*2\. sample 1 of ") as error:
            ShadowData(PAIR, source(folder, "a"), max_length=20, overlong="error", cache=False).setup("fit")
        errors.add(str(error.value))
    assert files[1] == files[3] and len(errors) == 1
    assert asked == [1, 1, 3, 3]

"""The configuration next to a checkpoint may be a stranger's: nothing that it names is imported or called."""

import logging
import sys
from pathlib import Path

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig

from shadowlit.analysis.scoring import _data
from shadowlit.delta.configured import adapter_of, pair_of, require_known
from shadowlit.errors import DataError
from shadowlit.plugins import path_of

HOME = Path("runs/a")
PAIR = {"base": "b", "instruct": "i"}


def with_adapter(path, **settings):
    return {"model": {"adapter": {"class_path": path, "init_args": settings}}}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported, and another when its function is called."""
    for name, trace in {"stranger.py": "imported", "peft_stranger.py": "imported"}.items():
        (tmp_path / name).write_text(
            f"from pathlib import Path\nPath({str(tmp_path / trace)!r}).touch()\n"
            f"def call(*args, **options):\n    Path({str(tmp_path / 'called')!r}).touch()\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert {path.suffix for path in tmp_path.iterdir()} == {".py"} and "stranger" not in sys.modules


@pytest.mark.parametrize("path", ["stranger.call", "peft_stranger.call", "subprocess.getoutput", "peft.PeftModel",
                                  "peft.utils.other.Path", "peft.config.PeftConfig.from_pretrained", "call", "", 3,
                                  ["stranger.call"]])  # fmt: skip
def test_an_adapter_is_a_class_of_peft_s_settings(stranger, path):
    with pytest.raises(DataError, match=r"runs/a/config.yaml has model.adapter.class_path .*; expected a class"):
        adapter_of(with_adapter(path, cmd="id", r=4), HOME)


@pytest.mark.parametrize("kind", PEFT_TYPE_TO_CONFIG_MAPPING.values())
def test_all_adapters_of_peft_are_known(kind):
    for path in (f"peft.{kind.__name__}", path_of(kind)):
        try:
            assert type(adapter_of(with_adapter(path), HOME)) is kind
        except DataError as error:  # some need more arguments
            assert "class_path" not in str(error)


def test_settings_that_fail_are_an_error_in_a_line():
    assert adapter_of({"model": {"adapter": {"r": 3}}}, HOME) == LoraConfig(r=3)
    with pytest.raises(DataError, match=r"config.yaml has a model.adapter that fails \("):
        adapter_of(with_adapter("peft.LoraConfig", use_dora=True, megatron_config={"a": 1}), HOME)


def test_no_file_lets_code_of_models_run(caplog):
    config = {"pair": {**PAIR, "trust_remote_code": True}}
    with caplog.at_level(logging.WARNING):
        assert not pair_of(config, HOME).trust_remote_code
    assert "runs/a/config.yaml sets pair.trust_remote_code, which counts only in" in caplog.text
    assert pair_of(config, HOME, trusted=True).trust_remote_code


def test_functions_by_import_path_need_trust(stranger):
    require_known(["dare", "my.own"], ["dare", "my.own"], "graft.transforms", HOME)
    with pytest.raises(DataError, match=r"has graft.transforms 'stranger.call', a function .* one of dare\. If"):
        require_known(["dare", "stranger.call"], ["dare"], "graft.transforms", HOME)
    rows = {"path": "rows.jsonl", "format": "stranger.call"}
    for data in ({"format": "stranger.call", "validation": "rows.jsonl"}, {"validation": {"new": rows}}):
        with pytest.raises(DataError, match=r"has data.format 'stranger.call'"):
            _data(None, {"data": data}, HOME, trusted=False)

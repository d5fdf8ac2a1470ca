"""Fuzz tests of everything that reads a model's folder: the right answer or a ShadowlitError, and nothing else.

The reference is safetensors' own reader. Deterministic, so that a failure is one of the change at hand; to search on,
``SHADOWLIT_FUZZ_EXAMPLES=20000 pytest tests/checkpoint/test_fuzz.py`` draws that many new examples for each test.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import struct
import tracemalloc
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.errors import CheckpointError, ShadowlitError
from shadowlit.grafting.export import export_folder
from shadowlit.grafting.tuned import open_update

EXAMPLES = int(os.environ.get("SHADOWLIT_FUZZ_EXAMPLES", "0"))

# What we refuse and safetensors reads: (1) keys twice, of which one would silently win; (2) names that garble a
# message or a terminal; (3) more dimensions than any weight has; (4) empty tensors of absurd shape, which no loop over
# rows survives; (5) "__metadata__": null, which no writer writes; (6) dtypes that torch cannot compute with.
STRICTER = re.compile(
    r"occurs twice|printable characters|dimensions, expected at most 16|but no elements|__metadata__ None|known are F64"
)


def fuzz(examples: int) -> settings:
    """Settings of a test: so many examples in the suite, each in bounded time."""
    return settings(
        max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, database=None, deadline=timedelta(seconds=10),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )  # fmt: skip


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64,
]  # fmt: skip
printable = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1, max_size=12)
numbers = (
    st.integers(-2, 20)
    | st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 8, 2**64, 10**30, 10**400, -(2**63)])
    | st.floats()
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Random bits in up to five tensors of any dtype, dimensions and size up to a few hundred bytes."""
    tensors = {}
    for name in draw(st.lists(printable.filter(lambda n: n != "__metadata__"), max_size=5, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        size = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        tensors[name] = (
            (bits % 2 if dtype is torch.bool else bits).view(dtype).view(shape)
            if size
            else torch.empty(shape, dtype=dtype)
        )
    return tensors


def told(name: str, dtype: str, value: torch.Tensor) -> tuple[str, str, tuple[int, ...], bytes]:
    flat = value.contiguous().reshape(-1)
    return name, dtype, tuple(value.shape), bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


Told = list[tuple[str, str, tuple[int, ...], bytes]]


def theirs(file: Path) -> Told | None:
    """What safetensors reads from a file: names, dtypes, shapes and bits; None if it refuses it."""
    try:
        with safe_open(file, "pt") as stream:
            return sorted(
                told(name, stream.get_slice(name).get_dtype(), stream.get_tensor(name))
                for name in stream.keys()  # noqa: SIM118
            )
    except Exception:
        return None


def ours(folder: Path) -> Told | CheckpointError:
    """What we read, or our refusal; every other exception, and memory beyond the file's size, fails the test."""
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    tracemalloc.start()
    try:
        with CheckpointReader(folder) as reader:
            assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 100 * size
            assert sum(info.num_bytes for info in reader.tensors.values()) <= size
            reader.fingerprint()
            return sorted(told(name, info.code, reader.read(name)) for name, info in reader.tensors.items())
    except CheckpointError as error:
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 100 * size
        assert str(folder) in str(error) and str(error).isprintable() and len(str(error)) < 4000
        return error
    finally:
        tracemalloc.stop()


def require_same(folder: Path, may_refuse: re.Pattern[str] = STRICTER) -> bool:
    """We read what safetensors reads, or refuse what it refuses, or more for a known reason; whether we read it."""
    expected, found = theirs(folder / "model.safetensors"), ours(folder)
    if isinstance(found, CheckpointError):
        assert expected is None or may_refuse.search(str(found)), (str(found), expected)
        return False
    assert found == expected
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """Two shards, and beside them all that an index must not be led to."""
    folder = tmp_path_factory.mktemp("root") / "sharded"
    folder.mkdir()
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, folder / "x.safetensors")
    save_file({"c": torch.zeros(3)}, folder / "y.safetensors")
    save_file({"c": torch.zeros(3)}, folder.parent / "outside.safetensors")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name, target in (("loop", "loop"), ("gone", "nowhere"), ("alias", "y.safetensors"), ("zero", "/dev/zero")):
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    import peft  # noqa: F401  its seconds are none of the first example's

    root = tmp_path_factory.mktemp("models")
    for name in ("base", "adapter"):
        (root / name).mkdir()
    weights = {f"model.layers.0.{name}.weight": torch.ones(4, 6) for name in ("q_proj", "k_proj")}
    save_file(weights, root / "base" / "model.safetensors")
    factors = {}
    for name in ("q_proj", "k_proj"):
        stem = f"base_model.model.model.layers.0.{name}"
        factors |= {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors, root / "adapter" / "adapter_model.safetensors")
    return root


def join(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def split(whole: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


class TestHeader:
    @fuzz(150)
    @given(
        tensors=tensor_sets(),
        metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1),
    )
    def test_valid_files(self, folder, tensors, metadata):
        save_file(tensors, folder / "model.safetensors", metadata)
        assert require_same(folder, re.compile("$^"))

    @fuzz(300)
    @given(tensors=tensor_sets(), data=st.data())
    def test_changed_bytes(self, folder, tensors, data):
        """Bytes flipped, cut out, put in, or the header's length replaced; mostly in the header."""
        whole = bytearray(save(tensors))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(whole)))
            stop = at + data.draw(st.sampled_from([0, 1, 2, 8, len(whole)]))
            kind = data.draw(st.sampled_from(["put", "length", "repeat"]))
            if kind == "put":
                whole[at:stop] = data.draw(st.binary(max_size=4) | st.sampled_from([b'"', b"{}", b",", b"\xff", b"0"]))
            elif kind == "repeat":
                whole[at:at] = whole[at:stop]
            else:
                whole[:8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, len(whole), 2**31, 2**63, 2**64 - 1])))
        (folder / "model.safetensors").write_bytes(whole)
        require_same(folder)

    @fuzz(400)
    @given(tensors=tensor_sets(), data=st.data())
    def test_changed_entries(self, folder, tensors, data):
        """Any field replaced by any JSON, offsets swapped, shared or moved, shapes changed; and its spelling."""
        header, body = split(save({"a": torch.ones(2, 3), "b": torch.zeros(2, 3), **tensors}))
        text = json.dumps(_changed(data, header))
        if data.draw(st.booleans()):
            text = text.replace(*data.draw(st.sampled_from([
                ('"dtype"', '"dtype":"F32","dtype"'), ('"dtype"', '"x":NaN,"dtype"'), ('"dtype"', '"shape"'),
                ("[0,", "[-0,"), ("[0,", "[0.0,"), ("[0,", "[00,"), ('"a"', '"\\u0061"'), ('"b"', '"\\u0061"'),
            ])))  # fmt: skip
        text += data.draw(st.sampled_from(["", " ", "\n\t", "x", "\0"]))
        encoding = data.draw(st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32-le"]))
        (folder / "model.safetensors").write_bytes(join(text.encode(encoding), body))
        require_same(folder)

    @fuzz(100)
    @given(header=values, body=st.binary(max_size=16))
    def test_any_json(self, folder, header, body):
        (folder / "model.safetensors").write_bytes(join(json.dumps(header).encode(), body))
        require_same(folder)

    @fuzz(100)
    @given(content=st.binary(max_size=64), size=st.none() | st.integers(0, 64))
    def test_any_bytes(self, folder, content, size):
        whole = content if size is None else struct.pack("<Q", size) + content
        (folder / "model.safetensors").write_bytes(whole)
        require_same(folder)

    def test_enough_changes_are_read(self, folder):
        """The mutations that change nothing that matters are read: the tests above do not pass by refusing all."""
        header, body = split(save({"a": torch.ones(2, 3), "b": torch.zeros(4)}))
        for harmless in (
            dict(reversed(header.items())),
            {**header, "__metadata__": {"x": "y"}},
            {name: {**entry, "extra": [1, {"deep": None}]} for name, entry in header.items()},
            {**header, "a": {**header["a"], "shape": [3, 1, 2]}},
        ):
            (folder / "model.safetensors").write_bytes(join(b" \n" + json.dumps(harmless).encode() + b"   ", body))
            assert require_same(folder)


def _changed(data: st.DataObject, header: dict[str, Any]) -> dict[str, Any]:
    header = copy.deepcopy(header)
    names = sorted(header)
    for _ in range(data.draw(st.integers(1, 2))):
        entry, other = (header[data.draw(st.sampled_from(names))] for _ in range(2))
        if not isinstance(entry, dict) or not isinstance(other, dict):
            continue
        kind = data.draw(
            st.sampled_from(["field", "swap", "share", "move", "shape", "dtype", "drop", "entry", "copy", "metadata"])
        )
        match kind:
            case "field":
                entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(values)
            case "swap":
                entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
            case "share":
                entry |= {name: other[name] for name in ("shape", "dtype", "data_offsets") if name in other}
            case "move":
                entry["data_offsets"] = data.draw(st.lists(numbers, min_size=2, max_size=2))
            case "shape":
                entry["shape"] = data.draw(st.lists(numbers | st.just(1), max_size=20))
            case "dtype":
                entry["dtype"] = data.draw(st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", "F6_E2M3", "", "f32"]))
            case "drop":
                entry.pop(data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
            case "entry":
                header[data.draw(st.sampled_from(names))] = data.draw(values)
            case "copy":
                header[data.draw(st.text(max_size=3) | st.just("x" * 1001))] = dict(entry)
            case "metadata":
                header["__metadata__"] = data.draw(values | st.dictionaries(st.text(), st.text()))
    return header


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


class TestIndex:
    WEIGHT_MAP = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}  # noqa: RUF012

    def require_right(self, sharded: Path, text: bytes) -> None:
        """An index is taken only if it says all that is true of the files it names, which lie beside it."""
        (sharded / "model.safetensors.index.json").write_bytes(text)
        found = ours(sharded)
        if isinstance(found, CheckpointError):
            return
        weight_map = json.loads(text, object_pairs_hook=_without_twins)["weight_map"]
        assert set(weight_map.values()) <= {"x.safetensors", "y.safetensors", "alias"}
        shards = {file: theirs(sharded / file) for file in set(weight_map.values())}
        assert weight_map == {name: file for file, entries in shards.items() for name, *_ in entries}
        assert found == sorted(entry for entries in shards.values() for entry in entries)

    FILES = [  # noqa: RUF012
        "x.safetensors", "y.safetensors", "Y.safetensors", "alias", "../outside.safetensors", "folder", "pipe", "loop",
        "gone", "zero", "", ".", "..", "./x.safetensors", "/etc/passwd", "x" * 300, "a\0b", "\ud800", "folder\\x",
        "model.safetensors.index.json", None,
    ]  # fmt: skip

    @pytest.mark.parametrize("name", ["a", "b", "c", "d", "__metadata__"])
    def test_every_file_for_every_tensor(self, sharded, name):
        """And, for None, the tensor not listed."""
        for file in self.FILES:
            weight_map = {key: value for key, value in {**self.WEIGHT_MAP, name: file}.items() if value is not None}
            self.require_right(sharded, json.dumps({"weight_map": weight_map}).encode())

    @fuzz(200)
    @given(data=st.data())
    def test_changed_entries(self, sharded, data):
        weight_map: dict[str, Any] = dict(self.WEIGHT_MAP)
        for _ in range(data.draw(st.integers(0, 2))):
            name = data.draw(st.sampled_from(["a", "b", "c", "d", "", "__metadata__", "\x1b[2J", "\ud800"]))
            weight_map[name] = data.draw(st.sampled_from(self.FILES) | values)
        index = {"metadata": data.draw(values), "weight_map": weight_map}
        if data.draw(st.integers(0, 5)) == 0:
            index["weight_map"] = data.draw(values)
        text = json.dumps(index)
        if data.draw(st.integers(0, 3)) == 0:
            text = text.replace('"a"', '"a": "y.safetensors", "a"')
        self.require_right(sharded, text.encode())

    @fuzz(150)
    @given(data=st.data())
    def test_changed_bytes(self, sharded, data):
        text = bytearray(json.dumps({"metadata": {"total_size": 44}, "weight_map": self.WEIGHT_MAP}).encode())
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        self.require_right(sharded, bytes(text))

    def test_true_ones_are_read(self, sharded):
        for file in ("y.safetensors", "alias"):
            text = json.dumps({"metadata": {"x": [1.5]}, "weight_map": {**self.WEIGHT_MAP, "c": file}})
            (sharded / "model.safetensors.index.json").write_text(text)
            assert [name for name, *_ in ours(sharded)] == ["a", "b", "c"]


class TestConfigs:
    """The JSON files that the graft on disk reads beside the weights."""

    CONFIG = {  # noqa: RUF012
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"],
        "alpha_pattern": {"q_proj": 8}, "rank_pattern": {}, "use_rslora": False, "use_dora": False, "bias": "none",
        "init_lora_weights": True, "fan_in_fan_out": False, "base_model_name_or_path": "x", "revision": None,
    }  # fmt: skip

    def update(self, models: Path, text: bytes) -> torch.Tensor | None:
        """The update of ``q_proj``, or None if the adapter is refused."""
        (models / "adapter" / "adapter_config.json").write_bytes(text)
        with CheckpointReader(models / "base") as base, contextlib.suppress(ShadowlitError):
            update = open_update(base, models / "adapter")
            return torch.as_tensor(update.rows("model.layers.0.q_proj.weight", 0, 4))
        return None

    @pytest.mark.filterwarnings("ignore")
    @fuzz(150)
    @given(data=st.data())
    def test_adapter_config(self, models, data):
        """2 * alpha / r where all is well; no other field changes the update that is read, it can only refuse it."""
        config = copy.deepcopy(self.CONFIG)
        fields = st.sampled_from([*config, "unknown"])
        for name in data.draw(st.sets(fields, max_size=2)):
            config[name] = data.draw(values | st.sampled_from([*self.CONFIG.values(), {"[": 1}, {"q_proj": "x"}]))
        got = self.update(models, json.dumps(config).encode())
        if got is not None:
            assert got.shape == (4, 6) and bool(torch.isfinite(got).all())
            if self.CONFIG.items() <= config.items():
                assert torch.equal(got, torch.full((4, 6), 8.0))

    @pytest.mark.filterwarnings("ignore")
    @fuzz(100)
    @given(data=st.data())
    def test_adapter_config_bytes(self, models, data):
        text = bytearray(json.dumps(self.CONFIG).encode())
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 60))] = data.draw(st.binary(max_size=3))
        self.update(models, bytes(text))

    def test_the_adapter_itself_is_read(self, models):
        assert torch.equal(self.update(models, json.dumps(self.CONFIG).encode()), torch.full((4, 6), 8.0))

    @fuzz(100)
    @given(data=st.data())
    def test_model_config(self, models, data):
        """config.json gets another dtype only if it is a JSON object; nothing else of it changes."""
        text = bytearray(json.dumps({"model_type": "x", "dtype": "float32", "text_config": {"dtype": 3}}).encode())
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 30))] = data.draw(
            st.binary(max_size=3) | values.map(lambda value: json.dumps(value).encode())
        )
        (models / "base" / "config.json").write_bytes(text)
        target = models / "out"
        with CheckpointReader(models / "base") as reader:
            tensors = [(name, reader.read(name)) for name in reader.tensors]
        try:
            export_folder(target, models / "base", tensors, torch.float32)
        except ShadowlitError:
            assert not target.exists()
        else:
            after, before = (json.loads((folder / "config.json").read_bytes()) for folder in (target, models / "base"))
            assert after.keys() - {"dtype"} == before.keys() - {"dtype"}
            for path in target.iterdir():
                path.unlink()
            target.rmdir()

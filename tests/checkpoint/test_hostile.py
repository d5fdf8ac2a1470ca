"""Models and adapters that are not floating-point weights, or do not fit: told from the headers, never rounded away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main
from shadowlit.errors import GraftError
from shadowlit.grafting.tuned import open_update
from tests.tiny import save_model, save_pair

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path) -> Path:
    base, _ = save_pair(tmp_path, "qwen3")
    save_model(tmp_path / "tuned", "qwen3", near=base, seed=5, distance=0.02)
    return tmp_path


def run(models: Path, *options: str) -> int:
    given = [f"--{name}={models / name}" for name in ("base", "tuned", "instruct")]
    return main(["graft", *given, f"--out={models / 'out'}", *options])


def change(folder: Path, **values: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **values}, file, {"format": "pt"})


class TestDtypes:
    @pytest.mark.parametrize("who", ["base", "tuned", "instruct"])
    @pytest.mark.parametrize(
        ("dtype", "code"),
        [(torch.int8, "I8"), (torch.int32, "I32"), (torch.uint8, "U8"), (torch.bool, "BOOL"),
         (torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64")],
    )  # fmt: skip
    def test_other_dtypes_are_refused_before_anything_is_written(self, models, capsys, who, dtype, code):
        weight = load_file(models / who / "model.safetensors")[NAME]
        change(models / who, **{NAME: weight.to(dtype)})
        for dry in ("false", "true"):
            assert run(models, f"--dry_run={dry}") == 1
            err = " ".join(capsys.readouterr().err.split())
            assert f"error: {models / who} holds {NAME} ({code}), expected F64, F32, F16 or BF16" in err
            assert "Dequantise the model first" in err
        assert sorted(path.name for path in models.iterdir()) == ["base", "instruct", "tuned"]

    def test_left_out_of_the_selection_they_stay_as_they_are(self, models):
        for who in ("base", "tuned", "instruct"):
            weight = load_file(models / who / "model.safetensors")[NAME]
            change(models / who, **{NAME: (weight * 100).to(torch.int8)})
        assert run(models, r"--select=q_proj") == 0
        before, after = (load_file(models / who / "model.safetensors") for who in ("instruct", "out"))
        assert after[NAME].dtype == torch.int8 and torch.equal(after[NAME], before[NAME])

    def test_eight_bit_floats_are_not_converted(self, models, capsys):
        """Without the scales beside them their values mean nothing in another dtype."""
        weight = load_file(models / "instruct" / "model.safetensors")[NAME]
        change(models / "instruct", **{NAME: weight.to(torch.float8_e4m3fn)})
        assert run(models, "--select=q_proj", "--dtype=bfloat16") == 1
        assert f"{NAME} (F8_E4M3)" in capsys.readouterr().err
        assert run(models, "--select=q_proj") == 0


class TestAdapters:
    CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}  # noqa: RUF012
    DOWN, UP = (f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight" for x in "AB")

    def write(self, models: Path, config: dict | None = None, **tensors: torch.Tensor) -> Path:
        """An adapter, changed by config entries and tensors."""
        folder = models / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({**self.CONFIG, **(config or {})}))
        factors = {self.DOWN: torch.ones(2, 32), self.UP: torch.ones(64, 2)}
        save_file({**factors, **tensors}, folder / "adapter_model.safetensors")
        return folder

    def refuse(self, models: Path, message: str, config: dict | None = None, **tensors: torch.Tensor) -> None:
        folder = self.write(models, config, **tensors)
        with CheckpointReader(models / "base") as base, pytest.raises(GraftError, match=message) as error:
            open_update(base, folder)
        assert str(folder) in str(error.value)

    def test_unchanged_it_is_read(self, models):
        with CheckpointReader(models / "base") as base:
            update = open_update(base, self.write(models))
            assert update.shapes == {NAME: (64, 32)}
            assert bool((update.rows(NAME, 0, 64) == 4 / 2 * 2).all())  # alpha / rank, and a sum over the rank

    @pytest.mark.parametrize(
        ("down", "up"),
        [((2, 31), (64, 2)), ((2, 32), (63, 2)), ((2, 32), (64, 3)), ((0, 32), (64, 0)), ((2, 32, 1), (64, 2)),
         ((2,), (64, 2)), ((), ())],
    )  # fmt: skip
    def test_factors_that_do_not_fit(self, models, down, up):
        self.refuse(models, rf"changes {NAME} \(64, 32\) by tensors of the shapes .* don't fit. Give the Base",
                    **{self.DOWN: torch.ones(down), self.UP: torch.ones(up)})  # fmt: skip

    def test_whole_tensor_of_another_shape(self, models):
        self.refuse(models, r"changes model\.norm\.weight \(32,\) by tensors of the shapes \(31,\)",
                    **{"base_model.model.model.norm.weight": torch.ones(31)})  # fmt: skip

    def test_left_over_and_doubled_tensors(self, models):
        magnitude = self.UP.replace("lora_B.weight", "lora_magnitude_vector")
        self.refuse(models, r"once, but doesn't for .*lora_magnitude_vector", **{magnitude: torch.ones(64)})
        self.refuse(models, r"once, but doesn't for .*layers\.1.*lora_B", **{
            self.UP.replace("layers.0", "layers.1"): torch.ones(64, 2)
        })  # fmt: skip
        self.refuse(models, r"once, but doesn't for model\.norm\.weight|base_model\.model\.model\.norm\.weight", **{
            name: torch.ones(32) for name in ("model.norm.weight", "base_model.model.model.norm.weight")
        })  # fmt: skip

    @pytest.mark.parametrize(
        "config",
        [{"lora_alpha": "4"}, {"lora_alpha": None}, {"lora_alpha": 10**400}, {"lora_alpha": float("nan")},
         {"lora_alpha": float("inf")}, {"alpha_pattern": None}, {"alpha_pattern": {"up_proj": []}},
         {"alpha_pattern": {"(": 1}}],
    )  # fmt: skip
    def test_strength_that_is_no_number(self, models, config):
        self.refuse(
            models, r"adapter_config\.json has lora_alpha=.* by which .*up_proj gets .* Save the adapter", config
        )

    def test_transposed_layers(self, models):
        self.refuse(models, r"transposed layers \(fan_in_fan_out=true\)", {"fan_in_fan_out": True})

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": "NOTHING"}', '{"peft_type": []}', "\x00"])
    def test_config_that_peft_does_not_read(self, models, text):
        (models / "tuned" / "adapter_config.json").write_text(text)
        with (
            CheckpointReader(models / "base") as base,
            pytest.raises(GraftError, match=r"adapter_config\.json is not an"),
        ):
            open_update(base, models / "tuned")

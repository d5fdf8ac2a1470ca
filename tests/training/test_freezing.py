"""What is chosen learns and is grafted; the rest stays the Base's, and in the graft the Instruct's."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from tests.callbacks.test_graft import make_trainer
from tests.synthetic import RandomData
from tests.tiny import save_pair

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(("options", "chosen"), [
    ({"train_towers": [r"layers\.1\.", "embed_tokens"]}, ("model.layers.1.", "model.embed_tokens")),
    ({"adapter": LoraConfig(r=2, target_modules=PROJECTIONS, layers_to_transform=[1])}, ("model.layers.1.",)),
    ({"adapter": LoraConfig(r=2, target_modules=PROJECTIONS, exclude_modules=r".*layers\.0\..*")}, ("model.layers.1",)),
], ids=["pattern", "layers_to_transform", "exclude_modules"])  # fmt: skip
def test_only_what_is_chosen_learns(tmp_path, options, chosen):
    base, instruct = save_pair(tmp_path, "qwen3", tied=False)
    module = ShadowModule(ModelPair(str(base), str(instruct)), lr=1e-2, **options)
    export = ExportCallback(folder=str(tmp_path / "export"))
    trainer = make_trainer(tmp_path, GraftCallback(select="all"), export, max_steps=2, val_check_interval=2)
    trainer.fit(module, RandomData())
    assert all(any(name in p for name in chosen) for p, one in module.named_parameters() if one.requires_grad)
    before, after = load_file(instruct / "model.safetensors"), load_file(tmp_path / "export/model/model.safetensors")
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.startswith(chosen)}
    if "adapter" in options:
        expected = {name for name in expected if any(p in name for p in PROJECTIONS)}
    assert learned == expected

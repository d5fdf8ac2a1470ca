"""Exported folders as any user loads them."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shadowlit.pair.folders import is_image_text, load_config


def reload_logits(folder, input_ids, attention_mask, dtype="auto", images=None):
    """The logits [B, T, V] of a folder for token ids and a mask [B, T]; float32, computed on the CPU in ``dtype``."""
    config = load_config("instruct", folder, False)
    auto = AutoModelForImageTextToText if is_image_text(config) else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        seen = {name: value.cpu() for name, value in (images or {}).items()}
        return model.eval()(input_ids=input_ids.cpu(), attention_mask=attention_mask.cpu(), **seen).logits.float()

"""The embedded pair: two small models of a synthetic world, their data and the demonstration."""

from __future__ import annotations

from pathlib import Path

PAIR = Path(__file__).parent / "pair"
"""The folder of the shipped pair."""
BASE = PAIR / "base"
"""The shipped Base: a Hugging Face folder without a chat template."""
INSTRUCT = PAIR / "instruct"
"""The shipped Instruct: the Base tuned on conversations; its chat template marks the assistant's tokens."""
DATA = Path(__file__).parent / "data"
"""The folder of the JSONL files, which ``experiments/embedded/world.py`` of the repository describes and writes."""
CONFIG = Path(__file__).parent / "demo_lora.yaml"
"""The configuration of the demonstration, ``configs/demo_lora.yaml`` of the repository."""

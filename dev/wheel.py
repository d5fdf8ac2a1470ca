"""Try the wheel as a new user does: build it, install it into an empty environment, and use it in an empty folder.

Usage: python dev/wheel.py [FOLDER]

Needs a package index. Installed are the wheel and its dependencies in the versions of constraints.txt, without the
extras; the commands then run without a network. The first command that fails ends the script with its status.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAIR = "from shadowlit.demo import {0}; print({0})"


def main(folder: Path) -> None:
    """Build, install and run, below ``folder``."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "dist", ROOT)
    (wheel,) = (folder / "dist").glob("shadowlit-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    empty = folder / "empty"
    empty.mkdir()

    def shadowlit(*words: str | Path) -> None:
        run(python.with_name("shadowlit"), *words, cwd=empty)

    def path_of(name: str) -> str:
        return subprocess.check_output([python, "-c", PAIR.format(name)], text=True, cwd=empty, env=ALONE).strip()

    shadowlit("--version")
    shadowlit("demo")
    train = Path(path_of("DATA")) / "train_house.jsonl"
    models = "--base", path_of("BASE"), "--instruct", path_of("INSTRUCT")
    shadowlit("init", *models, "--train", train, "--max_length=128", "--out=my.yaml")
    shadowlit("plan", "--config=my.yaml", "--data.ignore_columns=[skill, answer]")
    shadowlit("fit", "--config=my.yaml", "--data.ignore_columns=[skill, answer]", "--trainer.max_steps=2")
    exported = sorted(str(file.relative_to(empty)) for file in empty.rglob("export/model/model.safetensors"))
    print(f"exported  {', '.join(exported)}")


# Nothing of this repository or of the network may help.
ALONE = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
    "HF_HUB_OFFLINE": "1"
}


def run(*words: str | Path, cwd: Path | None = None) -> None:
    """Run a command and print its time; a failure ends the script."""
    start = time.perf_counter()
    shown = " ".join(Path(words[0]).name if i == 0 else str(word) for i, word in enumerate(words))
    print(f"$ {shown}", flush=True)
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=ALONE if cwd else None, check=False)
    print(f"  {time.perf_counter() - start:.0f} s, status {done.returncode}", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))

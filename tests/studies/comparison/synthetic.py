"""Rows of a comparison that never took place, with scores of known rates of success."""

from __future__ import annotations

import numpy as np

from shadowlit.studies.arms import is_grafted
from shadowlit.studies.comparison.plan import Training
from shadowlit.studies.rows import Row

# by arm: chance of a right answer to (new, old, format) at the low and at the high rate
CHANCES = {
    "B2B": ((0.80, 0.95, 0.02), (0.95, 0.95, 0.01)),
    "B2I": ((0.70, 0.95, 0.95), (0.92, 0.94, 0.90)),
    "I2B": ((0.60, 0.90, 0.05), (0.80, 0.80, 0.04)),
    "I2I": ((0.85, 0.92, 0.60), (0.97, 0.80, 0.30)),
}
EVALUATORS = ("new", "old", "format")
RATES = (1e-4, 1e-3)


def trained(arm: str, lr: float, seed: int, scale: float = 1.0, **measured) -> Row:
    """A row of a training."""
    return Training(arm[0], lr, seed).row(arm, scale if is_grafted(arm) else None, **measured)


def rows(generator: np.random.Generator, chance: float, num_rows: int) -> dict[int, float]:
    return {i: float(score) for i, score in enumerate(generator.random(num_rows) < chance)}


def records(num_rows: int = 80, seeds: tuple[int, ...] = (0, 1, 2), scales: tuple[float, ...] = (1.0, 0.5)):
    generator = np.random.default_rng(0)

    def samples(chances):
        return {name: rows(generator, chance, num_rows) for name, chance in zip(EVALUATORS, chances, strict=True)}

    metrics = {"forgetting/kl": 0.0, "loss": 2.5, "old/loss": 0.5}
    found = [
        Row("Base", metrics=metrics | {"forgetting/kl": 0.8}, samples=samples((0.05, 0.97, 0.0))),
        Row("Instruct", metrics=metrics, samples=samples((0.02, 0.98, 0.97)), cost={"evaluation_s": 2.0}),
    ]
    for arm, by_rate in CHANCES.items():
        for lr, chances in zip(RATES, by_rate, strict=True):
            for seed in seeds:
                for scale in scales if arm == "B2I" else (1.0,):
                    line = {0.0: 2.5, 0.5: 1.5 + seed / 10, 1.0: 1.0 + lr * 100} if arm == "B2I" and scale == 1 else {}
                    found.append(
                        trained(
                            arm,
                            lr,
                            seed,
                            scale,
                            metrics={"forgetting/kl": 0.1 + seed / 100, "loss": 1.0, "old/loss": 0.6},
                            samples=samples([chance * scale for chance in chances]),
                            cost={"train_s": 10.0 + seed, "tokens_per_s": 1e4, "peak_memory_bytes": 2.0**30},
                            facts={"sigma": 0.02, "cos_deltas": 0.3 + lr * 100, "delta_over_offset": lr * 500}
                            | {"survival": 0.9},
                            line=line,
                        )
                    )
    return found

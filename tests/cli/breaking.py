"""Classes that break the contract of their base, named by the tests of errors."""

import sys

from lightning.pytorch import Callback

from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import PreferenceObjective, TokenObjective


class Abstract(PreferenceObjective):
    """It misspells its methods."""

    def loss(self, answers):
        return answers.means


class Crashing(TokenObjective):
    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = {}["gamma"]

    def token_losses(self, logits, targets):
        return logits[:, 0]


class Triples(TokenObjective):
    samples = "triples"

    def token_losses(self, logits, targets):
        return logits[:, 0]


class Exiting(Callback):
    def __init__(self, code: int = 3) -> None:
        sys.exit(code)


class WithoutPair(ShadowModule):
    def __init__(self, *args, **kwargs) -> None:
        self.factor = 1.0


class WithoutSuper(ShadowModule):
    def __init__(self, *args, factor: float = 0.0, **kwargs) -> None:
        if factor:
            super().__init__(*args, **kwargs)

"""Training objectives, ``model.objective`` of the configuration.

An objective takes what it needs from the model's outputs (:class:`shadowlit.training.outputs.Outputs`) and returns
sums; ``ShadowModule`` adds them over the micro-batches and ranks of a step and divides the gradients by the sum called
``count``. The loss of an effective batch is thus the same however its samples are spread.

An objective of your own is a subclass, chosen by ``model.objective.class_path``:

- :class:`TokenObjective` for a loss per supervised token of conversations,
- :class:`PreferenceObjective` for a loss per pair or labelled answer,
- :class:`Objective` for anything else.

The constructors raise a ShadowlitError for an option that is out of its range.
"""

from __future__ import annotations

from shadowlit.training.objectives.base import Objective as Objective
from shadowlit.training.objectives.base import require_sums as require_sums
from shadowlit.training.objectives.base import require_weighed as require_weighed
from shadowlit.training.objectives.base import samples_of as samples_of
from shadowlit.training.objectives.preferences import ASFT as ASFT
from shadowlit.training.objectives.preferences import CPO as CPO
from shadowlit.training.objectives.preferences import DPO as DPO
from shadowlit.training.objectives.preferences import KTO as KTO
from shadowlit.training.objectives.preferences import ORPO as ORPO
from shadowlit.training.objectives.preferences import PreferenceObjective as PreferenceObjective
from shadowlit.training.objectives.preferences import SimPO as SimPO
from shadowlit.training.objectives.preferences import preference_metrics as preference_metrics
from shadowlit.training.objectives.preferences import preference_sums as preference_sums
from shadowlit.training.objectives.tokens import DFT as DFT
from shadowlit.training.objectives.tokens import EAFT as EAFT
from shadowlit.training.objectives.tokens import SFT as SFT
from shadowlit.training.objectives.tokens import ContextDistillation as ContextDistillation
from shadowlit.training.objectives.tokens import TokenObjective as TokenObjective

OBJECTIVES = tuple(one.__name__ for one in (SFT, DFT, EAFT, ContextDistillation, DPO, KTO, ORPO, SimPO, CPO, ASFT))

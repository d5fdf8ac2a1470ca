"""shadowlit: adapt Instruct language models through their Base (Shadow-FT, arXiv 2505.12716)."""

import logging
from typing import TYPE_CHECKING

from shadowlit.lazy import lazy_exports
from shadowlit.version import __version__ as __version__

if TYPE_CHECKING:
    from shadowlit.analysis.similarity import similarity as similarity
    from shadowlit.callbacks.checkpoint import CheckpointCallback as CheckpointCallback
    from shadowlit.callbacks.evaluation import EvaluationCallback as EvaluationCallback
    from shadowlit.callbacks.export import ExportCallback as ExportCallback
    from shadowlit.callbacks.graft import GraftCallback as GraftCallback
    from shadowlit.data.module import ShadowData as ShadowData
    from shadowlit.delta.delta import Delta as Delta
    from shadowlit.delta.folders import graft as graft
    from shadowlit.evaluation.forgetting import Divergence as Divergence
    from shadowlit.evaluation.generated import Generation as Generation
    from shadowlit.evaluation.multiple_choice import MultipleChoice as MultipleChoice
    from shadowlit.pair.check import check_pair as check_pair
    from shadowlit.pair.pair import ModelPair as ModelPair
    from shadowlit.quiet import quieten as quieten
    from shadowlit.training.module import ShadowModule as ShadowModule

# The only note of another library that an import of ours would show: on CPUs with bfloat16 instructions bitsandbytes
# misses an optional package, with models in 4 bits or without. Everything else waits for quieten().
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

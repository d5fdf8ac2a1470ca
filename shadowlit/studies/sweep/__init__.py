"""Any keys of ``fit`` over a grid or a search; its tables and plots are exported for notebooks."""

from typing import TYPE_CHECKING

from shadowlit.lazy import lazy_exports

if TYPE_CHECKING:
    from shadowlit.plotting import save_figure as save_figure
    from shadowlit.studies.sweep.notebook import best as best
    from shadowlit.studies.sweep.notebook import effects as effects
    from shadowlit.studies.sweep.notebook import progress as progress
    from shadowlit.studies.sweep.notebook import settings as settings
    from shadowlit.studies.sweep.plots import draw_interaction as draw_interaction
    from shadowlit.studies.sweep.plots import main_effects as main_effects
    from shadowlit.studies.sweep.plots import trial_curves as trial_curves
    from shadowlit.studies.sweep.table import read_curves as read_curves
    from shadowlit.studies.sweep.table import read_table as read_table

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

"""Reading what runs leave behind: similarity, updates, spectra, runs and their plots, as notebooks use them."""

from typing import TYPE_CHECKING

from shadowlit.lazy import lazy_exports

if TYPE_CHECKING:
    from shadowlit.analysis.delta_plots import draw_costs as draw_costs
    from shadowlit.analysis.delta_plots import draw_evolution as draw_evolution
    from shadowlit.analysis.delta_plots import draw_kinds as draw_kinds
    from shadowlit.analysis.delta_plots import draw_matrices as draw_matrices
    from shadowlit.analysis.delta_plots import draw_overlaps as draw_overlaps
    from shadowlit.analysis.delta_plots import draw_spectra as draw_spectra
    from shadowlit.analysis.deltas import compare_deltas as compare_deltas
    from shadowlit.analysis.deltas import compare_models as compare_models
    from shadowlit.analysis.deltas import matrix as matrix
    from shadowlit.analysis.deltas import norm_maps as norm_maps
    from shadowlit.analysis.deltas import norm_table as norm_table
    from shadowlit.analysis.deltas import norms_of as norms_of
    from shadowlit.analysis.deltas import only as only
    from shadowlit.analysis.deltas import open_deltas as open_deltas
    from shadowlit.analysis.deltas import open_model as open_model
    from shadowlit.analysis.deltas import pair_table as pair_table
    from shadowlit.analysis.evolution import evolution_table as evolution_table
    from shadowlit.analysis.evolution import evolutions as evolutions
    from shadowlit.analysis.heat_map import of_similarity as of_similarity
    from shadowlit.analysis.run import answers as answers
    from shadowlit.analysis.run import changes as changes
    from shadowlit.analysis.run import overview as overview
    from shadowlit.analysis.run import read_run as read_run
    from shadowlit.analysis.run import scores as scores
    from shadowlit.analysis.run_plots import forgetting as forgetting
    from shadowlit.analysis.run_plots import four_curves as four_curves
    from shadowlit.analysis.run_plots import gains as gains
    from shadowlit.analysis.run_plots import score_curves as score_curves
    from shadowlit.analysis.run_plots import survival as survival
    from shadowlit.analysis.run_plots import training as training
    from shadowlit.analysis.subspaces import overlaps as overlaps
    from shadowlit.analysis.subspaces import rank_maps as rank_maps
    from shadowlit.analysis.subspaces import rank_table as rank_table
    from shadowlit.analysis.subspaces import spectra_of as spectra_of
    from shadowlit.analysis.truncation import density_cost as density_cost
    from shadowlit.analysis.truncation import losses as losses
    from shadowlit.analysis.truncation import rank_cost as rank_cost
    from shadowlit.plotting import draw_heat_maps as draw_heat_maps
    from shadowlit.plotting import save_figure as save_figure

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

"""Heat maps of comparisons, of layer by kind of tensor."""

from __future__ import annotations

from shadowlit.analysis.similarity import Similarity
from shadowlit.checkpoint.names import is_bias
from shadowlit.plotting import HeatMap

_LABELS = {
    "sigma": "σ",
    "cosine": "cosine",
    "relative_norm": "relative norm",
    "sign_agreement": "share of equal signs",
    "norm_ratio": "ratio of norms",
}


def of_similarity(similarity: Similarity, measure: str | None = None) -> HeatMap:
    """Return a comparison by layer and kind: by one of its measures, or by its first, σ of models, the cosine of all
    others.

    A cell is the value of all weights of that kind in that layer: the mean σ, or any other measure over all elements.
    Biases aren't shown. Example: ``of_similarity(compare_models(base, instruct))``.
    """
    measure = measure or similarity.measures[0]
    # Several tensors of one kind in one layer, as experts are, count together.
    groups = similarity.whole.split(lambda t: None if t.layer is None or is_bias(t.name) else (t.kind, t.layer))
    cells = {group.key: group.measure(measure) for group in groups}
    if measure == "sigma":
        title = f"σ({similarity.title}): their mean is {similarity.sigma:.4f}"
    else:
        short = "cos" if measure == "cosine" else _LABELS[measure]
        title = f"{short}({similarity.title}): {similarity.total.measure(measure):.3f} over the matrices"
    centre = {"cosine": 0.0, "sign_agreement": 0.5}.get(measure) if similarity.of != "weights" else None
    return HeatMap(title, cells, _LABELS[measure], centre)

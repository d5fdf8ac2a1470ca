"""Imported once by the process that trainings are forked from. Nothing here may compute: a fork has no threads."""

import shadowlit.cli
import shadowlit.trials.trial  # noqa: F401

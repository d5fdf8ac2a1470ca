"""Imported once by the process that trainings are forked from. Nothing here may compute: a fork has no threads."""

import shadowlit.lightning_cli
import shadowlit.studies.trials.trial  # noqa: F401

"""Imported once by the process that forks trainings. Nothing here may compute: threads don't survive a fork."""

import shadowlit.lightning_cli
import shadowlit.studies.trials.trial  # noqa: F401

"""Imported once by the process that trainings are forked from. Nothing here may compute: a fork has no threads."""

import shadowlit.cli
import shadowlit.comparison.trial  # noqa: F401

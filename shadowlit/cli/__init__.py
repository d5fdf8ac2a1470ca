"""The commands of ``shadowlit``, one module each."""

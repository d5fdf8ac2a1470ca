"""The commands of ``python -m shadowlit``, one module each."""

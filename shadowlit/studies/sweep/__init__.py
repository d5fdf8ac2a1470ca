"""Ablation sweeps: trials of ``fit`` over any key of its configuration, kept in Optuna's storage."""

"""Reading runs and deltas: plots and similarity."""

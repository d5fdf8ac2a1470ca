"""Many trainings at once: arms compared, ablation sweeps, and the processes (trials) that run them."""

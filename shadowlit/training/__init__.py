"""Training the Base: the module, its objective, its parallelism."""

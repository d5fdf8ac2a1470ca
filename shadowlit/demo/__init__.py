"""The embedded pair: a synthetic world, its builder and the demonstration."""

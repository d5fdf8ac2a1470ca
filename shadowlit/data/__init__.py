"""From files to batches: formats, messages, tokens with a mask, sampler, DataModule."""

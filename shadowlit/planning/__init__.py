"""What a run will need, before it begins: memory, disk and time."""

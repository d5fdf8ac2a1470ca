"""A Base and its Instruct: their folders, whether they fit together, and the registry of known pairs."""

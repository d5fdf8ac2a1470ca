"""The update as an object: its arithmetic, transforms, spectrum, and its form as a LoRA adapter."""

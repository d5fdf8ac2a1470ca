"""shadowlit: adapt Instruct language models through their Base (Shadow-FT, arXiv 2505.12716)."""

__version__ = "0.1.0"

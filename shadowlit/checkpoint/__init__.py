"""Safetensors folders, read and written in parts: headers, names, layouts, parallel streaming. Imports no torch."""

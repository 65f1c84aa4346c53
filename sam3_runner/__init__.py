"""SAM3 as a Python library: images and text prompts in, instances as run-length masks out."""

"""Train and evaluate a tiny SAM 3 on synthetic scenes."""

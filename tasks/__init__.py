"""Rows of `segmentation_results`, and the pipeline that takes one task from image to mask to row."""

"""Copies of a feature store in the formats of other tools: Lance, WebDataset and NumPy."""

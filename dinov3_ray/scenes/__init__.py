"""Drawn scenes with their labels, a teacher that has learned them, and a probe that shows what a map knows of them."""

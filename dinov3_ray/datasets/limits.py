"""The limit of what is decoded, for modules that load no image library."""

__all__ = ["MAX_PIXELS"]

MAX_PIXELS = 89_478_485
"""Pillow's own threshold (a quarter of a gigabyte of RGB): beyond it, an image is taken for a decompression bomb."""

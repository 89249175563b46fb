"""Extraction: a teacher runs over a whole data set, block by block, and can be resumed."""

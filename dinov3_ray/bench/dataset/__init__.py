"""The speed of data sets: images decoded, features extracted, and rows of a store read."""

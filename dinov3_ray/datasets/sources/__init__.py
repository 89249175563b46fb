"""Where images come from: folders, tar shards, Parquet files and Ray Datasets."""

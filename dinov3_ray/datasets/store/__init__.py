"""Features on disk: Parquet files that are written once and memory-mapped."""

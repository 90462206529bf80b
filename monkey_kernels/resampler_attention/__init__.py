"""Cross-attention of the resampler: learned queries, shared by all crops, over patch tokens."""

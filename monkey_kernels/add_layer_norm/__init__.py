"""Residual addition and LayerNorm in one pass."""

"""Scoring answers and comparing models: ``monkey evaluate`` and ``monkey compare``."""

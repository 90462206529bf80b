"""A package, so that a stray ``tests`` folder among installed packages cannot stand in for it."""

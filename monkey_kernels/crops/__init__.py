"""Resize, normalise and cut images into the crops that the encoder reads."""

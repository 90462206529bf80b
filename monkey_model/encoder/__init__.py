"""The parts of the visual encoder."""

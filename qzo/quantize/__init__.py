"""From a float model to a 4-bit checkpoint."""

"""Seeded random directions: counter-based draws, their distribution and shape."""

"""Decoder layers that pass through memory instead of staying in it."""

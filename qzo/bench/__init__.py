"""``qzo bench``: what a step costs in time and memory, against what a user would run instead."""

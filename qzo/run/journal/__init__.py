"""The journal of a run: its lines, its compact form, stored gradients."""

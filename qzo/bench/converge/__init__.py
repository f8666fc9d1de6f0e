"""Optimizers, estimators and step sizes compared at equal forwards: `qzo bench converge`."""

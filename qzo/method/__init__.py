"""The paper: probes, directions, estimators, coordinates, optimizers."""

"""The seam between estimators and the loop, and what a step costs."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from qzo.method.probes import DirectionalDerivative, Probe


@runtime_checkable
class Estimator(Protocol):
    """The seam: ``ask(step) -> probes``, ``tell(probes, losses) -> directional derivatives``."""

    def ask(self, step: int) -> list[Probe]:
        """Return where the loss of this step is to be evaluated."""
        ...

    def tell(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[DirectionalDerivative]:
        """Turn one loss per probe into one derivative per direction; NaN where one is missing.

        None is left out: the journal knows a direction by its place.
        """
        ...


def evaluations_per_example(estimator: Estimator, num_examples: int) -> int:
    """Return how many times a step computes the loss of each of its examples."""
    covered_by = [probe.examples or (0, num_examples) for probe in estimator.ask(0)]
    return sum(stop - first for first, stop in covered_by) // num_examples

"""Step sizes by layer: factors given by hand, and MeZO's layer-wise variants of SPSA.

By hand: the directions of a layer are multiplied by a factor ``s``, probe and step alike.

MeZO: every layer has a size ``d``. A probe moves along ``s z / d``; a step along ``s d z`` by the
rule ``variance``, which leaves the estimate unbiased, or ``s z`` by the rule ``expectation``, whose
expectation is the gradient divided by ``d``. The size is

- ``param_norm``: the Euclidean norm of the layer's scales in the file,
- ``grad_norm``: ``|L+ - L-| / (2 epsilon)`` along a direction of that layer alone, at the start,

divided by the mean over the layers. Ours: where it is below 0.1 then it counts as 0.1, since one
direction may see almost nothing of a gradient and its reciprocal is the radius of the probe.

Source: MeZO, arXiv 2305.17333, the appendix on variance- and expectation-modified SPSA.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qzo.errors import CheckpointError, ConfigError, QZOError
from qzo.method.probes import Probe, layer_seed
from qzo.method.trained_vector import Scales
from qzo.model.layer_names import is_named, none_named

SMALLEST = 0.1

Losses = Callable[[Sequence[Probe]], Sequence[float]]


def factors_of(names: Sequence[str], factors: Mapping[str, float]) -> list[float]:
    """Return the factor of every layer: that of the longest key that names it; 1 without one.

    Raises:
        ConfigError: A key names no layer.
    """
    for key in factors:
        if not any(is_named(name, [key]) for name in names):
            raise ConfigError(none_named("zo.stretch", names, key))
    matches = [[key for key in factors if is_named(name, [key])] for name in names]
    return [factors[max(keys, key=len)] if keys else 1.0 for keys in matches]


def gradient_norms(scales: Scales, losses: Losses, epsilon: float, seed: int) -> list[float]:
    """Return ``|L+ - L-| / (2 epsilon)`` of every layer, with all else at rest.

    Args:
        scales: At the start; they are stretched meanwhile.
        losses: Measures the loss at probes.
        epsilon: Probe radius.
        seed: Of the run.
    """
    result = []
    stretch = scales.directions.stretch
    for layer, _ in enumerate(scales.names):
        scales.directions.stretch = scales.by_layer(
            [float(i == layer) for i in range(len(scales.names))], on_sections=0.0
        )
        z = layer_seed(seed, layer)
        plus, minus = losses([Probe(z, epsilon), Probe(z, -epsilon)])
        result.append(abs(plus - minus) / (2 * epsilon))
    scales.directions.stretch = stretch
    return result


def relative_sizes(names: Sequence[str], sizes: Sequence[float]) -> list[float]:
    """Divide sizes by their mean; what is below ``SMALLEST`` then becomes that.

    Raises:
        QZOError: A size is not finite, or all are 0.
    """
    for name, size in zip(names, sizes, strict=True):
        if not math.isfinite(size):
            raise QZOError(
                f"zo.layer_scaling: expected a finite size of {name}, got {size}; lower zo.epsilon"
            )
    mean = math.fsum(sizes) / len(sizes)
    if mean == 0:
        raise QZOError("zo.layer_scaling: expected sizes above 0, got 0 for all layers")
    return [max(size / mean, SMALLEST) for size in sizes]


def measured_stretches(
    scales: Scales,
    losses: Losses,
    *,
    by_hand: Mapping[str, float] | None,
    scaling: str,
    rule: str,
    epsilon: float,
    seed: int,
) -> dict[str, list[float]] | None:
    """Return the factors of directions by layer, as a run starts; None where there are none.

    Args:
        scales: The trained vector; where losses are measured, it is set to where training starts.
        losses: Measures the loss at probes.
        by_hand: Factors by names of layers, see ``layer_names``.
        scaling: ``none``, ``param_norm`` or ``grad_norm``.
        rule: ``variance`` or ``expectation``.
        epsilon: Probe radius.
        seed: Of the run.
    """
    if by_hand is None and scaling == "none":
        return None
    factors, sizes = factors_of(scales.names, by_hand or {}), None
    if scaling == "param_norm":
        sizes = relative_sizes(scales.names, scales.file_norms())
    if scaling == "grad_norm":
        scales.reset()
        sizes = relative_sizes(scales.names, gradient_norms(scales, losses, epsilon, seed))
    return stretches(factors, sizes, rule)


def stretches(
    factors: Sequence[float], sizes: Sequence[float] | None, rule: str
) -> dict[str, list[float]]:
    """Return what the directions of every layer are multiplied by, in probes and in steps."""
    if sizes is None:
        return {"probe": list(factors), "update": list(factors)}
    pairs = list(zip(factors, sizes, strict=True))
    update = [s * d for s, d in pairs] if rule == "variance" else list(factors)
    return {"probe": [s / d for s, d in pairs], "update": update}


def stretch_scales(scales: Scales, header: Mapping[str, Any]) -> None:
    """Let directions be stretched as the header of a journal says; not at all if it is silent."""
    given = header.get("stretch")
    if given is None:
        scales.directions.stretch = scales.directions.update_stretch = None
        return
    probe, update = (_numbers(given, key, len(scales.names)) for key in ("probe", "update"))
    scales.directions.stretch = scales.by_layer(probe)
    scales.directions.update_stretch = None if update == probe else scales.by_layer(update)


def _numbers(given: Any, key: str, count: int) -> list[float]:
    numbers = given.get(key) if isinstance(given, dict) else None
    if (
        not isinstance(numbers, list)
        or len(numbers) != count
        or not all(_is_positive(number) for number in numbers)
    ):
        raise CheckpointError(
            f"journal: expected stretch.{key} with a positive number for each of {count} layers, "
            "got something else"
        )
    return numbers


def _is_positive(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and 0 < value < math.inf  # type: ignore[operator]  # checked above

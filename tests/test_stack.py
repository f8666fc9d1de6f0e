from pathlib import Path

import pytest
import torch
from support.gptq_files import write_gptq
from support.models import ARCHITECTURES, tiny_model
from support.training import examples
from transformers import PreTrainedModel

import qzo
from qzo.coordinates import Coordinates
from qzo.linear import Live
from qzo.model import trained_layers
from qzo.probes import Probe
from qzo.scales import Scales
from qzo.stack import answer_scores, build_stack

CPU = torch.device("cpu")


def scores(
    model: PreTrainedModel, live: Live, scales: Scales, probes: list[Probe], *, together: bool
) -> list[float]:
    """Return the score of every example at every probe, in one forward or in one each."""
    if together:
        stack = build_stack([examples() for _ in probes], CPU)
        with scales.shifted(live, probes):
            return [row[0] for row in answer_scores(model, live, stack)]
    result = []
    for probe in probes:
        for example in examples():
            with scales.shifted(live, [probe]):
                result += answer_scores(model, live, build_stack([[example]], CPU))
    return [row[0] for row in result]


@pytest.mark.parametrize("num_blocks", [None, 1])
@pytest.mark.parametrize(("coordinates", "radius"), [("row", 0.05), ("absolute", 2e-3)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stacked_forward_equals_a_forward_per_probe_and_example(
    tmp_path: Path,
    architecture: str,
    coordinates: Coordinates,
    radius: float,
    num_blocks: int | None,
) -> None:
    write_gptq(tmp_path, tiny_model(architecture, num_layers=2))
    model = qzo.load(tmp_path)
    layers = trained_layers(model, num_blocks)
    scales = Scales.of_layers(layers, coordinates=coordinates, direction="rademacher")
    probes = [Probe(1, radius), Probe(2, radius), Probe(1, -radius)]
    together, alone = (
        scores(model, layers[0].live, scales, probes, together=together)
        for together in (True, False)
    )
    assert len(set(alone)) == 9
    # a few float32 roundings of logits below 10
    assert together == pytest.approx(alone, abs=1e-5)

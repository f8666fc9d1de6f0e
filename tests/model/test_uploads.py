"""Tensors of adapters that stay on the device of the model."""

import torch

from qzo.model.kernels.uploads import Resident

CPU = torch.device("cpu")


def test_a_resident_tensor_is_converted_once_for_many_forwards() -> None:
    values = torch.tensor([1.003, 2.0])
    resident = Resident(values)

    first = resident.on(CPU, torch.bfloat16)

    assert torch.equal(first, values.bfloat16())
    assert resident.on(CPU, torch.bfloat16) is first


def test_a_resident_tensor_loses_nothing_by_what_it_was_asked_for_before() -> None:
    values = torch.tensor([1.003, 2.0])
    resident = Resident(values)
    resident.on(CPU, torch.bfloat16)

    assert torch.equal(resident.on(CPU), values)
    assert resident.on(torch.device("meta")).device.type == "meta"


def test_a_resident_tensor_may_be_used_outside_of_inference_mode() -> None:
    resident = Resident(torch.tensor([1.0, 2.0]))
    with torch.inference_mode():
        resident.on(CPU, torch.float64)

    assert not resident.on(CPU, torch.float64).is_inference()

import pytest
import torch
from support.gptq_files import pack_stream, signed, unpack_stream
from torch import Tensor

from quantizers import packing
from quantizers.errors import FormatError


def random_values(bits: int, elements: int, columns: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (elements, columns), generator=generator)


def naive_words(values: Tensor, bits: int) -> Tensor:
    columns = [pack_stream(column, bits) for column in values.T.tolist()]
    return signed(columns).T.contiguous()


def test_bits_are_those_of_gptq() -> None:
    assert packing.BITS == (2, 3, 4, 8)


@pytest.mark.parametrize("bits", packing.BITS)
def test_pack_lays_elements_end_to_end_from_the_lowest_bit(bits: int) -> None:
    values = random_values(bits, 96)
    assert torch.equal(packing.pack(values, bits), naive_words(values, bits))


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("count", [96, 64, 37, 5, 1])
def test_unpack_reads_the_first_elements_of_the_words(bits: int, count: int) -> None:
    words = naive_words(random_values(bits, 96), bits)
    out = torch.full((count, 3), torch.nan)
    packing.unpack_into(words, bits, out)
    want = [unpack_stream(column, bits, count) for column in words.T.tolist()]
    assert out.T.tolist() == want


@pytest.mark.parametrize("bits", packing.BITS)
def test_unpack_reads_words_with_all_bits_set(bits: int) -> None:
    out = torch.empty(32, 2)
    packing.unpack_into(torch.full((bits, 2), -1, dtype=torch.int32), bits, out)
    assert torch.equal(out, torch.full((32, 2), 2.0**bits - 1))


@pytest.mark.parametrize("bits", packing.BITS)
def test_unpack_leaves_the_words_alone(bits: int) -> None:
    words = naive_words(random_values(bits, 96), bits)
    before = words.clone()
    packing.unpack_into(words, bits, torch.empty(96, 3))
    assert torch.equal(words, before)


def test_unpack_takes_a_slice_of_columns() -> None:
    values = random_values(3, 64, columns=5)
    out = torch.empty(64, 2)
    packing.unpack_into(naive_words(values, 3)[:, 1:3], 3, out)
    assert torch.equal(out, values[:, 1:3].float())


@pytest.mark.parametrize(("bits", "run"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_pack_refuses_elements_that_do_not_fill_a_run(bits: int, run: int) -> None:
    message = rf"^elements: expected a multiple of {run}, got {run + 1}$"
    with pytest.raises(FormatError, match=message):
        packing.pack(torch.zeros(run + 1, 1, dtype=torch.int64), bits)


def test_as_int32_keeps_the_bits_of_large_words() -> None:
    words = torch.tensor([[0, 2**31 - 1, 2**31, 2**32 - 1]])
    assert packing.as_int32(words).tolist() == [[0, 2**31 - 1, -(2**31), -1]]

"""Weights that stay in the file's dtype, against the same model with converted weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.gptq_files import write_gptq
from support.models import logits_of, relative_error, some_tokens, tiny_model
from torch import Tensor, nn

import qzo
from qzo.model.lazy_layers import MappedEmbedding, MappedLinear, keep_stored
from qzo.model.linear import Live
from qzo.model.streaming.mapped_pages import file_maps

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def half_weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).half()


def lies_in_a_file(tensor: Tensor) -> bool:
    return any(entry.start <= tensor.data_ptr() < entry.stop for entry in file_maps())


def test_an_embedding_gathers_the_numbers_of_the_converted_table() -> None:
    weight, ids = half_weight(9, 4), torch.tensor([[3, 3], [8, 0]])
    mapped = MappedEmbedding(nn.Embedding(9, 4, padding_idx=0), torch.float32)
    mapped.weight = weight
    assert torch.equal(mapped(ids), weight.float()[ids])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tile_elements", [1, 12, 2**20])
def test_a_linear_layer_multiplies_tile_by_tile(
    monkeypatch: pytest.MonkeyPatch, tile_elements: int, has_bias: bool
) -> None:
    monkeypatch.setattr("qzo.model.lazy_layers.TILE_ELEMENTS", tile_elements)
    plain = nn.Linear(4, 7, bias=has_bias).requires_grad_(False)
    weight, x = half_weight(7, 4), torch.arange(24.0).view(2, 3, 4)
    want = x @ weight.float().T + (plain.bias if has_bias else 0)
    mapped = MappedLinear(plain, torch.float32, Live())
    mapped.weight = weight
    torch.testing.assert_close(mapped(x), want)


@TIED
def test_embeddings_and_head_stay_in_the_file(tmp_path: Path, tied: bool) -> None:
    dense = write_gptq(tmp_path, tiny_model(tied=tied))
    model = qzo.load(tmp_path)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()

    assert isinstance(table, nn.Embedding)
    assert isinstance(head, nn.Linear)
    assert table.weight.dtype == head.weight.dtype == torch.float16
    assert lies_in_a_file(table.weight)
    assert lies_in_a_file(head.weight)
    assert (table.weight is head.weight) is tied
    assert model.dtype == torch.float32
    assert relative_error(logits_of(model), logits_of(dense)) < 1e-5


@TIED
def test_a_moved_model_computes_in_its_new_dtype(tmp_path: Path, tied: bool) -> None:
    want = logits_of(write_gptq(tmp_path, tiny_model(tied=tied)))
    model = qzo.load(tmp_path)
    nn.Module.to(model, torch.bfloat16)
    logits = logits_of(model)
    assert logits.dtype == model.dtype == torch.bfloat16
    assert relative_error(logits, want) < 0.05  # 8 bits of precision
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_generate_continues_as_the_converted_model_does(tmp_path: Path) -> None:
    dense: Any = write_gptq(tmp_path, tiny_model())
    prompt = some_tokens(rows=1)
    options = {"max_new_tokens": 5, "do_sample": False}
    model: Any = qzo.load(tmp_path)
    got = model.generate(prompt, **options)
    assert got.shape == (1, prompt.shape[1] + 5)
    assert torch.equal(got, dense.generate(prompt, **options))


def test_nothing_is_replaced_where_the_file_has_the_dtype_of_the_model(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model())
    model = qzo.load(tmp_path, dtype=torch.float16)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear


class Scaled(nn.Embedding):
    """As Gemma has one."""


def test_a_table_that_an_own_class_reads_is_converted_with_all_that_share_it() -> None:
    model = nn.ModuleDict({"table": Scaled(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["table"].weight
    stored = {"table.weight": half_weight(8, 4)}
    assert keep_stored(model, stored, torch.float32, Live()) == []
    assert type(model["head"]) is nn.Linear

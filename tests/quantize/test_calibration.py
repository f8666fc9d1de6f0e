from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qzo.errors import DataError
from qzo.model.fp32_compute import computing_in_fp32
from qzo.quantize.calibration import read_calibration_texts, samples_of_model, token_windows

WORDS = ["<s>", *[f"w{number}" for number in range(1, 300)]]


def tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        built.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", add_bos_token=adds_bos)


def tiny_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
        **changes,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (0.3 * noise).to(dtype)
    model.eval()
    return model


def test_windows_of_a_short_text_cover_it_without_overlap() -> None:
    text = " ".join(WORDS[1:21])

    windows = token_windows([text], tokenizer(adds_bos=False), num_samples=9, seq_len=5)

    assert windows.tolist() == [list(range(start, start + 5)) for start in (1, 6, 11, 16)]


def test_windows_are_spread_from_the_start_to_the_end() -> None:
    text = " ".join(WORDS[1:300])

    windows = token_windows([text], tokenizer(adds_bos=False), num_samples=3, seq_len=40)

    assert windows[:, 0].tolist() == [1, 130, 260]


def test_windows_start_with_bos_where_the_tokenizer_adds_it() -> None:
    text = " ".join(WORDS[1:21])

    windows = token_windows([text], tokenizer(adds_bos=True), num_samples=9, seq_len=5)

    assert windows.tolist() == [[0, *range(start, start + 4)] for start in (1, 5, 9, 13, 17)]


def test_a_text_shorter_than_a_window_gives_one_window() -> None:
    windows = token_windows(["w3 w4", "w5"], tokenizer(adds_bos=False), num_samples=4, seq_len=9)

    assert windows.tolist() == [[3, 4, 5]]


def test_a_long_text_is_thinned_out_but_still_read_to_its_end() -> None:
    texts = ["w1 " * 5000, "w2 " * 5000]

    windows = token_windows(texts, tokenizer(adds_bos=False), num_samples=4, seq_len=8)

    assert windows.shape == (4, 8)
    assert windows[0].tolist() == [1] * 8
    assert windows[-1, 1:].tolist() == [2] * 7


def test_windows_refuse_a_text_of_nothing() -> None:
    with pytest.raises(DataError, match=r"^calibration: expected text, got none$"):
        token_windows(["  "], tokenizer(adds_bos=False), num_samples=4, seq_len=8)


def test_texts_come_from_text_or_prompt_and_completion(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "b ", "completion": "c"}\n')

    assert read_calibration_texts(path) == ["a", "b c"]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a\nb\n")

    assert read_calibration_texts(path) == ["a\nb\n"]


def test_texts_refuse_rows_without_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"label": 1, "words": "b"}\n')

    with pytest.raises(
        DataError, match=r"expected a column text or prompt, got label, words in .*"
    ):
        read_calibration_texts(path)


def test_samples_of_a_model_start_with_bos_and_depend_on_the_seed_only() -> None:
    model = tiny_model(bos_token_id=7)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()

    first = samples_of_model(model, num_samples=4, seq_len=12, seed=0)

    assert first.shape == (4, 12)
    assert first[:, 0].tolist() == [7] * 4
    assert torch.equal(first, samples_of_model(model, num_samples=4, seq_len=12, seed=0))
    assert not torch.equal(first, samples_of_model(model, num_samples=4, seq_len=12, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_samples_of_a_model_without_bos_start_with_different_tokens() -> None:
    samples = samples_of_model(tiny_model(bos_token_id=None), num_samples=20, seq_len=3, seed=0)

    assert len(set(samples[:, 0].tolist())) > 10


def test_samples_follow_the_distribution_of_the_model() -> None:
    model = tiny_model(bos_token_id=7)

    samples = samples_of_model(model, num_samples=5000, seq_len=2, seed=0)

    with torch.no_grad():
        want = model(input_ids=torch.tensor([[7]])).logits[0, -1].softmax(-1)
    found = torch.bincount(samples[:, 1], minlength=50) / 5000
    assert (found - want).abs().max() < 0.03  # four standard deviations at 5,000 samples


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_model_computes_as_its_fp32_copy(dtype: torch.dtype) -> None:
    model, tokens = tiny_model(dtype), torch.arange(12).view(2, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with torch.no_grad(), computing_in_fp32(model.modules()):
        found = model(input_ids=tokens).logits

    with torch.no_grad():
        want = tiny_model(dtype).float()(input_ids=tokens).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, want)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, before[name])


def test_parameters_are_16_bit_again_after_an_exception() -> None:
    class Failing(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(str(inputs.dtype))

    module = Failing(2, 2).half()

    with pytest.raises(RuntimeError, match=r"^torch.float32$"), computing_in_fp32([module]):
        module(torch.zeros(1, 2, dtype=torch.float16))
    assert module.weight.dtype == torch.float16

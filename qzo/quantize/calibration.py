"""Token windows on which GPTQ measures what a layer's inputs look like.

From text of the user, or from the model itself: with no text, samples are drawn from the model,
each starting with its first token (BOS where it has one) and drawn from the full softmax. Such
samples look like what the model has learnt and need neither a download nor a tokenizer.

Source: Williams et al., "Self-calibration for language model quantization and pruning",
arXiv 2410.17170, without its temperature schedule.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from qzo.data.records import read_records, read_text
from qzo.errors import DataError
from qzo.model.fp32_compute import computing_in_fp32

_CHARS_PER_TOKEN = 16  # more text than this a token is thinned out before it is tokenized
_COLUMNS = ("text", "prompt", "completion")


def read_calibration_texts(path: Path) -> list[str]:
    """Read the texts of a file: all of a ``.txt``, or a text per row of any other data file.

    A row's text is its ``text`` column, or its ``prompt`` and ``completion`` joined.

    Raises:
        DataError: The file cannot be read, or a row has no text.
    """
    if path.suffix.lower() == ".txt":
        return [read_text(path)]
    texts = []
    for number, record in enumerate(read_records(path), start=1):
        parts = [record[column] for column in _COLUMNS if isinstance(record.get(column), str)]
        if not parts:
            raise DataError(
                f"{path}: expected a column text or prompt, got {', '.join(record)} in row "
                f"{number}; rename the column that holds the text"
            )
        texts.append("".join(parts))
    return texts


def token_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, num_samples: int, seq_len: int
) -> Int[Tensor, "samples time"]:
    """Cut texts into windows of tokens, evenly spread over them.

    Each window starts with BOS if the tokenizer adds one. A text too short for all windows gives
    fewer of them; one shorter than a single window gives one that is as long as the text.

    Raises:
        DataError: There is no text.
    """
    joined = _thinned("\n\n".join(texts), num_samples * seq_len * _CHARS_PER_TOKEN, num_samples)
    tokens: list[int] = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens:
        raise DataError("calibration: expected text, got none")
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = [tokenizer.bos_token_id] if adds_bos else []
    width = min(seq_len - len(bos), len(tokens))
    num_windows = min(num_samples, len(tokens) // width)
    last = len(tokens) - width
    starts = [last * i // max(1, num_windows - 1) for i in range(num_windows)]
    return torch.tensor([bos + tokens[start : start + width] for start in starts])


def _thinned(text: str, num_chars: int, num_pieces: int) -> str:
    """Keep evenly spread pieces of a long text, so that only about as much is tokenized as used."""
    if len(text) <= num_chars:
        return text
    width = num_chars // num_pieces
    last = len(text) - width
    starts = [last * i // max(1, num_pieces - 1) for i in range(num_pieces)]
    return "\n\n".join(text[start : start + width] for start in starts)


@torch.no_grad()
def samples_of_model(
    model: PreTrainedModel, *, num_samples: int, seq_len: int, seed: int
) -> Int[Tensor, "samples time"]:
    """Draw token sequences from the model, all of them of full length.

    Args:
        model: A float model; not modified.
        num_samples: Sequences, computed together.
        seq_len: Tokens of each.
        seed: Of a generator of its own; the global one is left alone.

    Returns:
        Sequences that start with BOS; with different random tokens if the model has no BOS.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    first = torch.randint(config.vocab_size, (num_samples, 1), generator=generator)
    bos = getattr(config, "bos_token_id", None)
    tokens = [first if bos is None else torch.full_like(first, bos)]
    is_new = "cache" in inspect.signature(model.forward).parameters  # transformers 5.24 renamed it
    cache = {"cache" if is_new else "past_key_values": DynamicCache()}  # grows in place
    with computing_in_fp32(model.modules()):
        for _ in range(seq_len - 1):
            output = model(input_ids=tokens[-1], use_cache=True, **cache)
            probabilities = output.logits[:, -1].float().softmax(dim=-1)
            tokens.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(tokens, dim=1)

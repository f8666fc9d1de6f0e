"""What a user would run instead: dense weights, MeZO, bitsandbytes.

All of them compute the loss of the same examples as a QZO step does: rows padded on the right, no
cache, and the head at the answer positions only.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantizers.weight import dequantize
from qzo.encoding import EncodedExample
from qzo.model import quant_linears

Batch = tuple[Int[Tensor, "rows width"], Int[Tensor, "rows answers"], Int[Tensor, "rows answers"]]


def make_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the quantized layers of a model by ``nn.Linear`` with their weights; in place.

    Args:
        model: From ``qzo.load``; modified.

    Returns:
        The same model, all its tensors its own: none is a view of a file.
    """
    for parameter in model.parameters():  # embeddings, norms, head: may be pages of the file
        parameter.data = parameter.data.clone()
    return _replace_linears(model, lambda linear: linear)


def make_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the quantized layers of a model by bitsandbytes' ``Linear4bit`` (NF4); in place.

    The weights are quantized anew, in blocks of 64. On processors with AVX512-BF16 bitsandbytes
    repacks the codes at the first forward and multiplies in bfloat16, whatever ``compute_dtype``
    says; that is left as it is.

    Args:
        model: From ``qzo.load``; modified.
    """
    return _replace_linears(model, _linear4bit)


def _replace_linears(
    model: PreTrainedModel, convert: Callable[[nn.Linear], nn.Module]
) -> PreTrainedModel:
    names = {id(module): name for name, module in model.named_modules()}
    for layer in quant_linears(model):
        weight = dequantize(layer.quantized).to(model.dtype).contiguous()
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = layer.in_features, layer.out_features
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
        model.set_submodule(names[id(layer)], convert(linear))
    return model.eval()


def _linear4bit(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    has_bias = linear.bias is not None
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=has_bias,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    if has_bias:
        layer.bias = linear.bias
    quantized: nn.Module = layer.to(linear.weight.device)  # quantizes
    return quantized.eval()


def as_batch(examples: Sequence[EncodedExample], device: torch.device) -> Batch:
    """Return input ids, answer positions and answer tokens; every answer has as many tokens."""
    rows = [example.rows[0] for example in examples]
    width = max(map(len, rows))
    answers = [example.candidates[0] for example in examples]
    return (
        torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device),
        torch.tensor([answer.positions for answer in answers], device=device),
        torch.tensor([answer.targets for answer in answers], device=device),
    )


def answer_loss(model: PreTrainedModel, batch: Batch) -> float:
    """Return the mean negative log-probability of the answer tokens, in nats."""
    input_ids, positions, targets = batch
    with torch.inference_mode():
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        index = positions[..., None].expand(-1, -1, hidden.shape[-1])
        logits = model.get_output_embeddings()(hidden.gather(1, index))
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    return float(losses)


def two_forwards(model: PreTrainedModel, batch: Batch) -> tuple[float, float]:
    """Compute the loss twice, as two probes do."""
    return answer_loss(model, batch), answer_loss(model, batch)


class MeZO:
    """MeZO on all weights of a dense model (arXiv 2305.17333, algorithm 1), with a batch of its own.

    ``w <- w + eps z; L+; w <- w - 2 eps z; L-; w <- w + eps z; w <- w - lr (L+ - L-) / (2 eps) z``.
    The normals ``z`` are drawn again from the seed in each of the four passes, one parameter after
    the other, into one reused buffer.

    Args:
        model: With dense weights, tied ones only once; modified.
        epsilon: Perturbation radius; MeZO's default.
        learning_rate: MeZO's default.
    """

    def __init__(
        self, model: PreTrainedModel, *, epsilon: float = 1e-3, learning_rate: float = 1e-6
    ) -> None:
        self.model, self.epsilon, self.learning_rate = model, epsilon, learning_rate
        parameters = list(model.parameters())
        self._generator = torch.Generator(parameters[0].device)
        largest = max(parameter.numel() for parameter in parameters)
        self._buffer = parameters[0].new_empty(largest)

    def step(self, seed: int, batch: Batch) -> tuple[float, float]:
        """Move the weights; return the losses at the two probes."""
        self._move(seed, self.epsilon)
        plus = answer_loss(self.model, batch)
        self._move(seed, -2 * self.epsilon)
        minus = answer_loss(self.model, batch)
        self._move(seed, self.epsilon)
        self._move(seed, -self.learning_rate * (plus - minus) / (2 * self.epsilon))
        return plus, minus

    def _move(self, seed: int, size: float) -> None:
        with torch.inference_mode():
            for parameter, z in self._normals(seed):
                parameter.data.add_(z, alpha=size)

    def _normals(self, seed: int) -> Iterator[tuple[Tensor, Float[Tensor, "..."]]]:
        self._generator.manual_seed(seed)
        for parameter in self.model.parameters():
            z = self._buffer[: parameter.numel()].view(parameter.shape)
            yield parameter, z.normal_(generator=self._generator)

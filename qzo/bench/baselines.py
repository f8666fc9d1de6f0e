"""What a user would run instead: dense weights, MeZO, bitsandbytes.

All of them compute the loss of the same examples as a QZO step does: rows padded on the right, no
cache, and the head at the answer positions only.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantizers.weight import dequantize
from qzo.checkpoint.checkpoint import Checkpoint
from qzo.data.tokenize import EncodedExample

Batch = tuple[Int[Tensor, "rows width"], Int[Tensor, "rows answers"], Int[Tensor, "rows answers"]]


def dense_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Build transformers' own model of a 4-bit checkpoint, its codes dequantized.

    Args:
        checkpoint: Gives the codes, the scales and everything else.
        dtype: Of all weights.
        device: Where the model goes.

    Returns:
        The model in eval mode; none of its tensors is a view of a file.
    """
    from accelerate import init_empty_weights

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    names = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    state = {
        key if key in names else prefix + key: tensor.to(device, dtype, copy=True).contiguous()
        for key, tensor in _dense_tensors(checkpoint, device)
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    nn.Module.to(model, device)
    model.eval()
    return model


def _dense_tensors(checkpoint: Checkpoint, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    used: set[str] = set()
    for layer in checkpoint.layers:
        yield f"{layer}.weight", dequantize(checkpoint.weight(layer).to(device))
        used |= set(checkpoint.layer_keys(layer).values())
    for key in checkpoint.tensors.files:
        if key not in used:
            yield key, checkpoint.tensors[key]


def use_bitsandbytes(model: PreTrainedModel, layers: Iterable[str]) -> PreTrainedModel:
    """Replace linear layers of a dense model by bitsandbytes' ``Linear4bit`` (NF4), in place.

    The weights are quantized anew, in blocks of 64. On processors with AVX512-BF16 bitsandbytes
    repacks the codes at the first forward and multiplies in bfloat16, whatever ``compute_dtype``
    says; that is left as it is.

    Args:
        model: From ``dense_model``; modified.
        layers: Dotted names of the layers.
    """
    for name in layers:
        model.set_submodule(name, linear4bit(model.get_submodule(name)))
    return model


def linear4bit(linear: Any) -> nn.Module:
    """Return bitsandbytes' layer with the weights of a linear one; see ``use_bitsandbytes``."""
    import bitsandbytes

    modules: Any = bitsandbytes.nn  # untyped
    has_bias = linear.bias is not None
    layer = modules.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=has_bias,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = modules.Params4bit(
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
    with torch.inference_mode():
        return float(answer_losses(model, batch))


def answer_losses(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """Return the same as a tensor, which can be differentiated."""
    input_ids, positions, targets = batch
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    index = positions[..., None].expand(-1, -1, hidden.shape[-1])
    logits = model.get_output_embeddings()(hidden.gather(1, index))
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def two_forwards(model: PreTrainedModel, batch: Batch) -> tuple[float, float]:
    """Compute the loss twice, as two probes do."""
    return answer_loss(model, batch), answer_loss(model, batch)


class MeZO:
    """MeZO on all weights of a dense model (arXiv 2305.17333, algorithm 1).

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


class QLoRA:
    """QLoRA (arXiv 2305.14314): backpropagation to LoRA factors beside frozen NF4 weights.

    peft's factors of rank 16 on all quantized layers, AdamW on them in float32, and gradient
    checkpointing: a decoder block's activations are computed again in the backward.

    Args:
        model: From ``use_bitsandbytes``; modified.
        layers: Dotted names of the layers with factors.
        learning_rate: QLoRA's for 7B and 13B.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[str], *, learning_rate: float = 2e-4
    ) -> None:
        import peft

        config = peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(layers))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        self.model: Any = peft.get_peft_model(model, config)
        self.model.train()  # checkpointing is off otherwise; there is no dropout
        factors = [each for each in self.model.parameters() if each.requires_grad]
        for factor in factors:
            factor.data = factor.data.float()
        device = factors[0].device.type
        self._autocast = torch.autocast(device, model.dtype, enabled=model.dtype != torch.float32)
        self._optimizer = torch.optim.AdamW(factors, lr=learning_rate)

    def step(self, batch: Batch) -> float:
        """Move the factors; return the loss."""
        with self._autocast:
            loss = answer_losses(self.model.get_base_model(), batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gptq_files import GPTQVariant, read_layer, write_gptq
from support.models import block_linears, logits_of, relative_error, tiny_model
from support.nf4_files import bnb_config, load_bnb, write_bnb
from support.runs import write_tokenizer
from support.training import short_run, tuned_logits
from torch import Tensor, nn
from transformers import PreTrainedModel

import qzo
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError
from qzo.model.load import quant_linears
from qzo.model.wrap import checkpoint_of, save_base, tokenizer_of

# Weights are bitwise the same and all is computed in float32: only the order of sums differs.
TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("natural_bitsandbytes")

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4-double": {"bnb_4bit_use_double_quant": True},
    "fp4": {"quant_type": "fp4"},
    "fp4-double": {"quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "bfloat16-storage": {"bnb_4bit_quant_storage": "bfloat16"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def float_model(folder: Path, architecture: str = "llama", **options: Any) -> Path:
    """Save a float model whose layers are whole blocks.

    bitsandbytes 0.50.2 dequantizes blocks that cross rows wrongly on CPUs with AVX512.
    """
    tiny_model(architecture, intermediate=128, **options).save_pretrained(folder)
    return folder


def wrapped(folder: Path, **options: Any) -> PreTrainedModel:
    return qzo.wrap(load_bnb(float_model(folder), bnb_config(**options)))


def refusal(model: PreTrainedModel) -> str:
    with pytest.raises(CheckpointError) as error:
        qzo.wrap(model)
    return str(error.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
@every_option
def test_a_model_quantized_on_the_fly_keeps_the_logits_of_bitsandbytes(
    tmp_path: Path, options: dict[str, Any], architecture: str
) -> None:
    model = load_bnb(float_model(tmp_path, architecture), bnb_config(**options))
    want = logits_of(model)
    assert relative_error(logits_of(qzo.wrap(model)), want) < TOLERANCE


@every_option
def test_a_model_quantized_before_keeps_the_logits_of_bitsandbytes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    write_bnb(tmp_path, tiny_model(intermediate=128), **options)
    model = load_bnb(tmp_path)
    want = logits_of(model)
    assert relative_error(logits_of(qzo.wrap(model)), want) < TOLERANCE


def test_a_bfloat16_model_keeps_the_logits_of_bitsandbytes(tmp_path: Path) -> None:
    config = bnb_config(bnb_4bit_compute_dtype=torch.bfloat16)
    model = load_bnb(float_model(tmp_path), config, dtype=torch.bfloat16)
    want = logits_of(model)
    got = logits_of(qzo.wrap(model))
    assert got.dtype == torch.bfloat16
    # both round weights to bf16 and multiply in bf16; sums of another order differ by a bf16 step
    assert relative_error(got, want) < 2 * torch.finfo(torch.bfloat16).eps


def test_codes_are_adopted_without_a_copy(tmp_path: Path) -> None:
    model = load_bnb(float_model(tmp_path), bnb_config())
    before = {name: m.weight.data_ptr() for name, m in block_linears(model).items()}
    layers = quant_linears(qzo.wrap(model))
    assert len(layers) == len(before) == 7
    for layer in layers:
        assert layer.quantized.packed.data_ptr() == before[layer.name]  # type: ignore[attr-defined]


def test_plain_scales_are_adopted_without_a_copy(tmp_path: Path) -> None:
    model = load_bnb(float_model(tmp_path), bnb_config())
    weights: dict[str, Any] = {name: m.weight for name, m in block_linears(model).items()}
    absmax = {name: weight.quant_state.absmax for name, weight in weights.items()}
    for layer in quant_linears(qzo.wrap(model)):
        assert layer.quantized.scales.data_ptr() == absmax[layer.name].data_ptr()


def test_the_model_is_changed_in_place(tmp_path: Path) -> None:
    model = load_bnb(float_model(tmp_path), bnb_config())
    assert qzo.wrap(model) is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_wrapped_model_generates(tmp_path: Path) -> None:
    model = wrapped(tmp_path)
    tokens = torch.tensor([[3, 4, 5]])
    got = model.generate(  # type: ignore[operator]  # transformers leaves it untyped
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False
    )
    assert got.shape[1] > 3


@every_option
def test_the_saved_base_holds_the_same_model(tmp_path: Path, options: dict[str, Any]) -> None:
    model = wrapped(tmp_path / "float", **options)
    save_base(model, tmp_path / "base")
    want = logits_of(model)
    assert torch.equal(logits_of(qzo.load(tmp_path / "base")), want)
    # bitsandbytes' own forward
    assert relative_error(logits_of(load_bnb(tmp_path / "base")), want) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_saved_base_holds_a_tied_head_once(tmp_path: Path, tied: bool) -> None:
    model = load_bnb(float_model(tmp_path / "float", tied=tied), bnb_config())
    save_base(qzo.wrap(model), tmp_path / "base")
    keys = open_checkpoint(tmp_path / "base").tensors.files
    assert ("lm_head.weight" in keys) is not tied
    assert torch.equal(logits_of(qzo.load(tmp_path / "base")), logits_of(model))


def test_the_saved_base_holds_what_transformers_would_save(tmp_path: Path) -> None:
    write_bnb(tmp_path / "own", tiny_model("qwen2", intermediate=128))
    save_base(qzo.wrap(load_bnb(tmp_path / "own")), tmp_path / "base")
    own, base = (open_checkpoint(tmp_path / name).tensors for name in ("own", "base"))
    assert sorted(base.files) == sorted(own.files)
    assert all(torch.equal(base[key], own[key]) for key in own.files)


@pytest.mark.parametrize(
    "options", [OPTIONS["nf4"], OPTIONS["nf4-double"], OPTIONS["fp4"]], ids=["nf4", "double", "fp4"]
)
def test_a_wrapped_model_is_trained_and_exported(tmp_path: Path, options: dict[str, Any]) -> None:
    model = wrapped(tmp_path / "float", **options)
    before = logits_of(model)
    trainer = short_run(model, tmp_path / "run")
    tuned = tuned_logits(trainer)
    assert relative_error(tuned, before) > 0.01  # three steps of five percent
    qzo.export(tmp_path / "run", tmp_path / "out")
    # absmax * multiplier is rounded once more in the file: a few 2**-24 of a weight
    assert relative_error(logits_of(qzo.load(tmp_path / "out")), tuned) < TOLERANCE
    assert relative_error(logits_of(load_bnb(tmp_path / "out")), tuned) < TOLERANCE


def test_the_base_of_a_run_is_written_once_and_not_taken_for_another_model(tmp_path: Path) -> None:
    base = tmp_path / "run" / "base"
    model = wrapped(tmp_path / "float")
    assert checkpoint_of(model, base).folder == base
    written = (base / "config.json").stat().st_mtime_ns

    again = wrapped(tmp_path / "float")
    assert checkpoint_of(again, base).codes_sha256() == checkpoint_of(model, base).codes_sha256()
    assert (base / "config.json").stat().st_mtime_ns == written

    other = wrapped(tmp_path / "float")
    layer = quant_linears(other)[1]
    key = f"{layer.name}.weight.absmax"
    assert layer.stored is not None
    tensors = layer.stored.tensors
    layer.stored = replace(layer.stored, tensors={**tensors, "absmax": tensors["absmax"] * 2})
    with pytest.raises(CheckpointError) as error:
        checkpoint_of(other, base)
    assert str(error.value) == (
        f"{base}: expected the base of this model, found another {key}; choose another output_dir"
    )


def test_a_trained_export_can_be_wrapped_again(tmp_path: Path) -> None:
    trainer = short_run(wrapped(tmp_path / "float"), tmp_path / "run")
    qzo.export(tmp_path / "run", tmp_path / "out")
    again = qzo.wrap(load_bnb(tmp_path / "out"))
    assert relative_error(logits_of(again), tuned_logits(trainer)) < TOLERANCE


def test_a_float_model_is_refused() -> None:
    model = tiny_model()
    assert refusal(model) == ("model: expected a quantization_config in its config, found none")


def test_a_model_wrapped_before_is_refused(tmp_path: Path) -> None:
    model = wrapped(tmp_path)
    assert refusal(model) == (
        "model: expected modules quantized by bitsandbytes (4 bit) or GPTQ, found none; pass "
        "quantization_config=BitsAndBytesConfig(load_in_4bit=True) to from_pretrained"
    )


def test_codes_that_a_forward_repacked_are_refused(tmp_path: Path) -> None:
    from bitsandbytes import functional

    model = load_bnb(float_model(tmp_path), bnb_config())
    module: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    # what bitsandbytes does at the first forward on a CPU with AVX512-BF16
    module.weight.data, module.weight.quant_state = functional._convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )
    assert refusal(model) == (
        "model.layers.0.mlp.down_proj: expected codes in their natural layout, found them "
        "repacked by a forward pass; call qzo.wrap before the first forward"
    )
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")).__name__ == "Linear4bit"


def test_modules_that_are_not_quantized_yet_are_refused(tmp_path: Path) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    model = load_bnb(float_model(tmp_path), bnb_config())
    unused = Linear4bit(128, 64, bias=False)  # type: ignore[no-untyped-call]
    model.set_submodule("model.layers.0.mlp.down_proj", unused)
    assert refusal(model) == (
        "model.layers.0.mlp.down_proj: expected 4-bit codes, found a float weight; bitsandbytes "
        "quantizes when the model is moved to its device: load it with device_map"
    )


class TorchLinear(nn.Module):
    """Stands for GPTQModel's module of this name: tensors of the file, zero points of v2."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.bias = None
        for role, tensor in tensors.items():
            self.register_buffer(role, tensor)


class MarlinLinear(TorchLinear):
    """Stands for a module that repacks its codes."""


class TorchAtenLinear(TorchLinear):
    """Stands for a module that repacks its codes at its first forward."""

    linear_mode = "train"


def gptq_model(
    folder: Path, kind: type[TorchLinear], variant: GPTQVariant
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model as transformers loads it with GPTQModel, and its dense equal."""
    dense = write_gptq(folder, tiny_model("qwen2"), variant)
    v2 = write_v2(folder, variant)
    model = tiny_model("qwen2")
    for name in block_linears(model):
        bias = model.get_submodule(name).bias
        module = kind(v2[name])
        module.bias = bias  # type: ignore[assignment]  # a parameter, or None
        model.set_submodule(name, module)
    model.config.quantization_config = variant.config()
    return model, dense


def write_v2(folder: Path, variant: GPTQVariant) -> dict[str, dict[str, Tensor]]:
    """Return the stored tensors of every layer with zero points as v2 stores them."""
    from support.gptq_files import pack_zero_rows, read_zeros

    checkpoint = open_checkpoint(folder)
    v2 = GPTQVariant(bits=variant.bits, checkpoint_format="gptq_v2")
    layers = {name: checkpoint.layer_tensors(name) for name in checkpoint.layers}
    for tensors in layers.values():
        zeros = read_zeros(tensors["qzeros"], variant, tensors["scales"].shape[1])
        tensors["qzeros"] = pack_zero_rows(zeros, v2)
    return layers


GPTQ_VARIANTS = {
    "v1": GPTQVariant(sym=False),
    "v2": GPTQVariant(sym=False, checkpoint_format="gptq_v2"),
    "desc_act": GPTQVariant(sym=False, desc_act=True),
    "zeros-of-zero": GPTQVariant(sym=False, writer="gptqmodel", lowest_zero=0),
}
every_gptq = pytest.mark.parametrize("variant", GPTQ_VARIANTS.values(), ids=GPTQ_VARIANTS)


@every_gptq
def test_gptq_modules_in_their_natural_layout_are_adopted(
    tmp_path: Path, variant: GPTQVariant
) -> None:
    model, dense = gptq_model(tmp_path, TorchLinear, variant)
    assert relative_error(logits_of(qzo.wrap(model)), logits_of(dense)) < TOLERANCE


def test_gptq_codes_are_adopted_without_a_copy(tmp_path: Path) -> None:
    model, _ = gptq_model(tmp_path, TorchLinear, GPTQVariant())
    before = {n: m.qweight.data_ptr() for n, m in model.named_modules() if hasattr(m, "qweight")}
    layers = quant_linears(qzo.wrap(model))
    assert len(layers) == len(before) == 7
    for layer in layers:
        assert layer.quantized.qweight.data_ptr() == before[layer.name]  # type: ignore[attr-defined]


@every_gptq
def test_the_saved_base_of_gptq_modules_holds_the_same_model(
    tmp_path: Path, variant: GPTQVariant
) -> None:
    model, dense = gptq_model(tmp_path / "file", TorchLinear, variant)
    save_base(qzo.wrap(model), tmp_path / "base")
    assert relative_error(logits_of(qzo.load(tmp_path / "base")), logits_of(dense)) < TOLERANCE
    base, file = (open_checkpoint(tmp_path / name) for name in ("base", "file"))
    assert base.codes_sha256() == file.codes_sha256()
    assert base.scales_sha256() == file.scales_sha256()
    for layer in file.layers:
        want = read_layer(file.layer_tensors(layer), variant)
        assert torch.equal(read_layer(base.layer_tensors(layer), variant), want)


def test_gptq_modules_that_are_not_used_yet_are_adopted(tmp_path: Path) -> None:
    model, dense = gptq_model(tmp_path, TorchAtenLinear, GPTQVariant())
    assert relative_error(logits_of(qzo.wrap(model)), logits_of(dense)) < TOLERANCE


def test_gptq_modules_that_a_forward_repacked_are_refused(tmp_path: Path) -> None:
    model, _ = gptq_model(tmp_path, TorchAtenLinear, GPTQVariant())
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    module.linear_mode = "inference"  # type: ignore[assignment]  # no tensor or module
    assert refusal(model) == (
        "model.layers.0.mlp.up_proj: expected GPTQ tensors in their natural layout, found "
        "TorchAtenLinear, which a forward pass has repacked; call qzo.wrap before the first "
        "forward"
    )


def test_gptq_modules_of_other_kernels_are_refused_by_name(tmp_path: Path) -> None:
    model, _ = gptq_model(tmp_path, MarlinLinear, GPTQVariant())
    assert refusal(model) == (
        "model.layers.0.self_attn.q_proj: expected GPTQ tensors in their natural layout, found "
        "MarlinLinear, which may repack them; use qzo.load on the checkpoint, or load it with "
        "backend 'torch'"
    )


def test_the_saved_config_names_format_and_dtype(tmp_path: Path) -> None:
    save_base(wrapped(tmp_path / "float"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_a_model_on_two_devices_is_refused(tmp_path: Path) -> None:
    model = load_bnb(float_model(tmp_path), bnb_config())
    model.get_output_embeddings().to("meta")  # where accelerate leaves what it offloads
    assert refusal(model) == (
        "model: expected all of it on one device, found tensors on cpu and meta; pass one device "
        'to from_pretrained, such as device_map={"": 0}'
    )


def test_a_model_without_a_name_takes_no_tokenizer_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path)
    model = wrapped(tmp_path / "float")
    model.config.name_or_path = ""
    with pytest.raises(CheckpointError) as error:
        tokenizer_of(model)
    assert str(error.value) == (
        "tokenizer: expected one for a model without a name_or_path, got none; pass tokenizer= to "
        "qzo.Trainer"
    )
    checkpoint_of(model, tmp_path / "base")
    assert not list((tmp_path / "base").glob("tokenizer*"))


def test_the_tokenizer_of_the_caller_is_written_beside_the_base(tmp_path: Path) -> None:
    model = wrapped(tmp_path / "float")
    model.config.name_or_path = ""
    given = write_tokenizer(tmp_path / "own")
    checkpoint_of(model, tmp_path / "base", given)
    written = tokenizer_of(model)
    assert written.get_vocab() == given.get_vocab()

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import gptq_files, nf4_files
from support.gptq_files import GPTQVariant, write_gptq
from support.models import (
    ARCHITECTURES,
    block_linears,
    logits_of,
    relative_error,
    some_tokens,
    tiny_model,
)
from support.runs import tiny_checkpoint
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import qzo
from quantizers.errors import FormatError
from quantizers.weight import dequantize
from qzo.checkpoint.checkpoint import open_checkpoint
from qzo.errors import CheckpointError
from qzo.model.linear import QuantLinear
from qzo.model.load import decoder_blocks, load_tokenizer, quant_linears, trained_layers

SINGLE = "model.safetensors"

# float32 sums in another order, through one or two blocks
TOLERANCE = 1e-5

VARIANTS = {
    "v1-sym": GPTQVariant(),
    "v2-asym": GPTQVariant(sym=False, checkpoint_format="gptq_v2"),
    "desc_act": GPTQVariant(sym=False, desc_act=True),
    "one-group": GPTQVariant(group_size=-1),
    "ragged": GPTQVariant(group_size=64, sym=False),
    "3bit": GPTQVariant(bits=3, sym=False, writer="gptqmodel"),
    "8bit": GPTQVariant(bits=8, sym=False),
}
LAYER = "model.layers.0.mlp.down_proj"


def edited(folder: Path, edit: Any) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def with_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises((CheckpointError, FormatError)) as error:
        qzo.load(folder)
    return str(error.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_gptq(tmp_path, tiny_model())
    return tmp_path


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gptq_model_computes_the_logits_of_its_dense_equal(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    dense = write_gptq(tmp_path, tiny_model(architecture, tied=tied, num_layers=2))
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_nf4_model_computes_the_logits_of_its_dense_equal(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    dense = nf4_files.write_nf4(tmp_path, tiny_model(architecture, tied=tied))
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_gptq_variant_loads(tmp_path: Path, variant: GPTQVariant) -> None:
    dense = write_gptq(tmp_path, tiny_model(), variant)
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_every_bitsandbytes_variant_loads(
    tmp_path: Path, quant_type: str, double_quant: bool
) -> None:
    dense = nf4_files.write_nf4(
        tmp_path, tiny_model(), quant_type=quant_type, double_quant=double_quant, blocksize=32
    )
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_what_transformers_saves_loads(tmp_path: Path, double_quant: bool, storage: str) -> None:
    model = tiny_model("qwen2")
    nf4_files.write_bnb(
        tmp_path, model, bnb_4bit_use_double_quant=double_quant, bnb_4bit_quant_storage=storage
    )
    checkpoint = open_checkpoint(tmp_path)
    for name, linear in block_linears(model).items():
        layer = nf4_files.read_layer(checkpoint.layer_tensors(name))
        linear.weight = nn.Parameter(layer, requires_grad=False)
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(model)) < TOLERANCE


@pytest.mark.parametrize("write", [write_gptq, nf4_files.write_nf4], ids=["gptq", "nf4"])
def test_a_sharded_checkpoint_loads(tmp_path: Path, write: Any) -> None:
    dense = write(tmp_path, tiny_model(num_layers=2), num_shards=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


def test_the_quantization_config_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    variant = GPTQVariant(sym=False)
    dense = write_gptq(tmp_path, tiny_model(), variant, config_file="quantize_config.json")
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


def test_an_old_file_without_quant_method_loads(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, tiny_model(), has_quant_method=False)
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


def test_a_file_without_g_idx_loads(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, tiny_model())
    edited(tmp_path, lambda t: [t.pop(key) for key in list(t) if key.endswith("g_idx")])
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


def test_a_bias_that_the_config_does_not_know_is_added(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, tiny_model())
    bias = torch.arange(64).half() / 64
    edited(tmp_path, lambda tensors: tensors.update({f"{LAYER}.bias": bias}))
    dense.get_submodule(LAYER).bias = nn.Parameter(bias.float(), requires_grad=False)
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


def test_keys_without_the_prefix_of_the_base_model_load(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, tiny_model())
    tensors = load_file(tmp_path / SINGLE)
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, tmp_path / SINGLE)
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


def test_a_tied_head_that_is_also_stored_loads(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, tiny_model(tied=True))
    edited(
        tmp_path,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    model = qzo.load(tmp_path)
    assert relative_error(logits_of(model), logits_of(dense)) < TOLERANCE
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_gives_the_greedy_tokens_of_the_dense_equal(
    tmp_path: Path, architecture: str
) -> None:
    dense = write_gptq(tmp_path, tiny_model(architecture))
    got, want = (greedy(model) for model in (qzo.load(tmp_path), dense))
    assert torch.equal(got, want)


def greedy(model: PreTrainedModel) -> Tensor:
    tokens = some_tokens(2, 5)
    model.generation_config.eos_token_id = None
    result: Tensor = model.generate(  # type: ignore[operator]  # transformers leaves it untyped
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
    )
    assert result.shape == (2, 13)
    return result


def test_a_model_is_in_eval_mode_and_needs_no_gradients(base: Path) -> None:
    model = qzo.load(base)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_on_the_cpu_is_in_float32(base: Path) -> None:
    assert {p.dtype for p in qzo.load(base).parameters()} == {torch.float32}


def test_a_model_may_have_another_dtype(base: Path) -> None:
    model = qzo.load(base, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits_of(model).dtype == torch.bfloat16
    # activations keep 8 bits: 2**-8 of a value after each of some ten products and sums
    assert relative_error(logits_of(model), logits_of(qzo.load(base))) < 0.05


def test_all_linears_but_the_head_are_quantized(base: Path) -> None:
    model = qzo.load(base)
    assert {layer.name for layer in quant_linears(model)} == set(block_linears(tiny_model()))
    assert not isinstance(model.get_output_embeddings(), QuantLinear)


def test_a_quantized_head_loads(tmp_path: Path) -> None:
    dense = write_gptq(tmp_path, tiny_model())
    layer = gptq_files.random_layer(64, 64, GPTQVariant(), seed=9)
    edited(
        tmp_path,
        lambda tensors: (
            tensors.pop("lm_head.weight"),
            tensors.update({f"lm_head.{role}": tensor for role, tensor in layer.items()}),
        ),
    )
    head = nn.Parameter(gptq_files.read_layer(layer, GPTQVariant()), requires_grad=False)
    dense.get_output_embeddings().weight = head
    assert relative_error(logits_of(qzo.load(tmp_path)), logits_of(dense)) < TOLERANCE


def test_quantized_layers_come_in_natural_order(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model(num_layers=11))
    names = [layer.name for layer in quant_linears(qzo.load(tmp_path))]
    numbers = [int(name.split(".")[2]) for name in names]
    assert numbers == sorted(numbers)
    assert names == list(open_checkpoint(tmp_path).layers)


def test_a_model_without_quantized_layers_is_refused() -> None:
    message = r"^model: expected quantized layers of qzo, found none; use qzo.load or qzo.wrap$"
    with pytest.raises(CheckpointError, match=message):
        quant_linears(tiny_model())


def test_the_generation_config_is_that_of_the_folder(base: Path) -> None:
    (base / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": 5}')
    config = qzo.load(base).generation_config
    assert (config.max_new_tokens, config.eos_token_id) == (3, 5)


def test_the_same_codes_give_bitwise_the_same_logits(base: Path) -> None:
    assert torch.equal(logits_of(qzo.load(base)), logits_of(qzo.load(base)))


@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(base: Path, key: str) -> None:
    edited(base, lambda tensors: tensors.pop(key))
    assert refusal(base) == f"{key}: expected this tensor in the checkpoint, not found"


def test_a_missing_untied_head_is_named(base: Path) -> None:
    edited(base, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(base) == "lm_head.weight: expected this tensor in the checkpoint, not found"


@pytest.mark.parametrize("role", ["qzeros", "scales"])
def test_a_missing_part_of_a_layer_is_named(base: Path, role: str) -> None:
    edited(base, lambda tensors: tensors.pop(f"{LAYER}.{role}"))
    assert refusal(base) == f"{LAYER}.{role}: expected this tensor in the checkpoint, not found"


def test_a_layer_without_its_codes_is_named(base: Path) -> None:
    edited(base, lambda t: [t.pop(key) for key in list(t) if key.startswith(LAYER)])
    assert refusal(base) == f"{LAYER}.weight: expected this tensor in the checkpoint, not found"


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model("qwen2"))
    key = "model.layers.0.self_attn.q_proj.bias"
    edited(tmp_path, lambda tensors: tensors.pop(key))
    assert refusal(tmp_path) == f"{key}: expected this tensor in the checkpoint, not found"


def test_an_unexpected_tensor_is_named(base: Path) -> None:
    edited(base, lambda tensors: tensors.update({"vision.weight": torch.zeros(1)}))
    assert refusal(base) == (
        "vision.weight: expected only tensors of LlamaForCausalLM, found this one; does "
        "config.json belong to these files?"
    )


def test_rotary_frequencies_of_old_files_are_passed_over(base: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(base, lambda tensors: tensors.update({key: torch.zeros(8)}))
    want = logits_of(qzo.load(base))
    assert torch.isfinite(want).all()


def test_a_layer_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    write_gptq(tmp_path, tiny_model(num_layers=2))
    with_config(tmp_path, num_hidden_layers=1)
    assert refusal(tmp_path) == (
        "model.layers.1.mlp.down_proj: expected a linear layer of LlamaForCausalLM, found none; "
        "does config.json belong to these files?"
    )


def test_a_config_with_another_layer_size_is_refused(base: Path) -> None:
    with_config(base, intermediate_size=128)
    assert refusal(base) == (
        f"{LAYER}: expected shape (64, 128) by config.json, got (64, 96); are the bits and the "
        "config right?"
    )


def test_a_config_with_other_bits_is_refused(base: Path) -> None:
    with_config(base, quantization_config=GPTQVariant(bits=8).config())
    assert refusal(base) == (
        f"{LAYER}.scales: expected shape (2, 64), got (3, 64); are bits 8, group_size 32 right?"
    )


def test_a_config_with_another_group_size_is_refused(base: Path) -> None:
    with_config(base, quantization_config=GPTQVariant(group_size=16).config())
    assert refusal(base) == (
        f"{LAYER}.scales: expected shape (6, 64), got (3, 64); are bits 4, group_size 16 right?"
    )


def test_a_config_with_another_vocabulary_is_refused(base: Path) -> None:
    with_config(base, vocab_size=80)
    message = r"^(lm_head|model\.embed_tokens)\.weight: expected shape \(80, 64\), got \(64, 64\)$"
    with pytest.raises(CheckpointError, match=message):
        qzo.load(base)


def test_a_config_of_an_unknown_architecture_is_refused(base: Path) -> None:
    with_config(base, model_type="unheard-of")
    with pytest.raises(CheckpointError, match=rf"\A{base / 'config.json'}: not understood: .+\Z"):
        qzo.load(base)


def test_a_config_of_no_causal_language_model_is_refused(base: Path) -> None:
    config = {"model_type": "vit", "quantization_config": GPTQVariant().config()}
    (base / "config.json").write_text(json.dumps(config))
    message = rf"\A{base / 'config.json'}: expected a causal language model: .+\Z"
    with pytest.raises(CheckpointError, match=message):
        qzo.load(base)


def test_a_float_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        "quantization_config: expected one in config.json, found none; this is a float "
        "checkpoint: make a 4-bit one with `qzo quantize`"
    )


def test_a_folder_without_a_tokenizer_is_refused_as_one(base: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"\A{base}: expected a tokenizer: .+\Z"):
        load_tokenizer(base)


def test_code_in_the_folder_is_not_run(base: Path) -> None:
    marker = base / "ran"
    (base / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with_config(
        base,
        model_type="evil",
        auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    )
    with pytest.raises(CheckpointError, match=rf"\A{base / 'config.json'}: not understood: .+\Z"):
        qzo.load(base)
    assert not marker.exists()


NAIVE_READERS = {
    "gptq_sym": lambda tensors: gptq_files.read_layer(
        tensors, GPTQVariant(group_size=128, writer="gptqmodel")
    ),
    "nf4_dq1": nf4_files.read_layer,
}


@pytest.fixture(params=NAIVE_READERS)
def shared_checkpoint(shared: Path, request: pytest.FixtureRequest) -> tuple[Path, Any]:
    """A checkpoint of the original tools, and a naive reader of its layers."""
    folder = shared / "checkpoints" / request.param
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder, NAIVE_READERS[request.param]


def test_a_shared_checkpoint_dequantizes_as_the_naive_reader_says(
    shared_checkpoint: tuple[Path, Any],
) -> None:
    folder, read = shared_checkpoint
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.layers) in {7, 14}
    for layer in checkpoint.layers:
        want = read(checkpoint.layer_tensors(layer))
        assert torch.equal(dequantize(checkpoint.weight(layer)), want)


def test_a_shared_checkpoint_computes_the_logits_of_its_dense_equal(
    shared_checkpoint: tuple[Path, Any],
) -> None:
    folder, read = shared_checkpoint
    checkpoint = open_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    names = [key for key in checkpoint.tensors.files if key in dense.state_dict()]
    state = {name: checkpoint.tensors[name].float() for name in names}
    state |= {f"{n}.weight": read(checkpoint.layer_tensors(n)) for n in checkpoint.layers}
    dense.load_state_dict(state)
    assert relative_error(logits_of(qzo.load(folder)), logits_of(dense)) < TOLERANCE


@pytest.mark.parametrize(
    ("depth", "modules", "want"),
    [
        ((0.25, 0.75), None, {1, 2}),
        ((0.0, 0.25), ["q_proj", "k_proj"], {0}),
        ((0.4, 0.6), None, {2}),
        ((0.5, 1.0), ["down_proj"], {2, 3}),
    ],
)
def test_blocks_of_a_part_of_the_depth_are_trained(
    tmp_path: Path, depth: tuple[float, float], modules: list[str] | None, want: set[int]
) -> None:
    model = qzo.load(tiny_checkpoint(tmp_path / "base", num_layers=4))

    chosen = trained_layers(model, None, modules, depth=depth)

    assert {int(layer.name.split(".")[2]) for layer in chosen} == want
    assert all(any(part in layer.name for part in modules or [""]) for layer in chosen)
    assert len(chosen) == len(want) * (len(modules) if modules else 7)
    assert list(chosen[0].live.forked) == decoder_blocks(model)[min(want) :]
    inside = {layer.name for layer in chosen}
    assert {x.index for x in quant_linears(model) if x.name not in inside} == {-1}

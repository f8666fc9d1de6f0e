import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.gptq_files import GPTQVariant, write_gptq, write_tensors
from support.models import logits_of, relative_error, tiny_model
from support.nf4_files import bnb_config, load_bnb, write_bnb, write_nf4
from support.training import examples, short_run
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import qzo
from qzo.errors import ConfigError
from qzo.model.load import quant_linears
from qzo.model.wrap import checkpoint_of
from qzo.run.recipe.keys import Recipe
from qzo.run.recipe.read import recipe
from qzo.run.trainer import Trainer

pytestmark = pytest.mark.usefixtures("natural_bitsandbytes")

Write = Callable[[Path], Any]
BASES: dict[str, Write] = {
    "gptq": lambda folder: write_gptq(folder, tiny_model("qwen2", tied=True)),
    "gptq-asym": lambda folder: write_gptq(
        folder, tiny_model("opt"), GPTQVariant(sym=False, desc_act=True), num_shards=2
    ),
    "nf4": lambda folder: write_nf4(folder, tiny_model("qwen2")),
    "nf4-double": lambda folder: write_nf4(folder, tiny_model(intermediate=128), double_quant=True),
}
every_base = pytest.mark.parametrize("write", BASES.values(), ids=BASES)
SCALES: dict[str, Any] = {
    "coordinates": "relative",
    "estimator": "spsa",
}  # NF4 blocks here cross rows


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, read by safetensors itself."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), key


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def in_files_dtype(folder: Path) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config_of(folder)["dtype"])
    return dtype


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as error:
        act()
    return str(error.value)


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_loaded_model_is_saved_as_its_base(
    tmp_path: Path, write: Write, dtype: torch.dtype
) -> None:
    write(tmp_path / "base")
    model = qzo.load(tmp_path / "base", dtype)
    model.save_pretrained(tmp_path / "saved")
    assert_same(stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "base"))
    saved, base = config_of(tmp_path / "saved"), config_of(tmp_path / "base")
    assert saved["quantization_config"] == base["quantization_config"]
    assert (saved["dtype"], saved["architectures"]) == (base["dtype"], base["architectures"])
    assert torch.equal(logits_of(qzo.load(tmp_path / "saved", dtype)), logits_of(model))


@every_base
def test_a_trained_model_is_saved_as_it_is_exported(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "base")
    model = qzo.load(tmp_path / "base")
    before = logits_of(model)
    short_run(model, tmp_path / "run", **SCALES)
    model.save_pretrained(tmp_path / "saved")
    qzo.export(tmp_path / "run", tmp_path / "exported")
    assert_same(stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "exported"))
    saved, exported = config_of(tmp_path / "saved"), config_of(tmp_path / "exported")
    assert saved["quantization_config"] == exported["quantization_config"]
    again = logits_of(qzo.load(tmp_path / "saved"))
    assert torch.equal(again, logits_of(model))
    assert relative_error(again, before) > 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_trained_norms_and_biases_are_saved_as_they_are_exported(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    write_gptq(tmp_path / "base", tiny_model("qwen2"))
    model = qzo.load(tmp_path / "base", dtype)
    short_run(model, tmp_path / "run", unquantized=["norms", "biases"])
    model.save_pretrained(tmp_path / "saved")
    qzo.export(tmp_path / "run", tmp_path / "exported")
    saved, base = stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "base")
    assert_same(saved, stored_tensors(tmp_path / "exported"))
    changed = [key for key in base if not torch.equal(saved[key], base[key])]
    assert {key.rpartition(".")[2] for key in changed} == {"scales", "weight", "bias"}
    assert torch.equal(model.state_dict()["model.norm.weight"], saved["model.norm.weight"])


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
@pytest.mark.parametrize("is_trained", [False, True], ids=["as wrapped", "trained"])
def test_a_wrapped_model_is_saved_as_bitsandbytes_reads_it(
    tmp_path: Path, double: bool, is_trained: bool
) -> None:
    tiny_model(intermediate=128).save_pretrained(tmp_path / "float")
    config = bnb_config(bnb_4bit_use_double_quant=double)
    model = qzo.wrap(load_bnb(tmp_path / "float", config))
    if is_trained:
        short_run(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "saved")
    want = logits_of(model)
    assert torch.equal(logits_of(qzo.load(tmp_path / "saved")), want)
    # Weights are the same in float32; only the order of sums differs.
    assert relative_error(logits_of(load_bnb(tmp_path / "saved")), want) < 1e-5
    if is_trained:
        qzo.export(tmp_path / "run", tmp_path / "exported")
        assert_same(stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "exported"))
        nested = config_of(tmp_path / "saved")["quantization_config"]["bnb_4bit_use_double_quant"]
        assert not nested


def test_a_wrapped_model_is_saved_as_transformers_saves_it(tmp_path: Path) -> None:
    write_bnb(tmp_path / "own", tiny_model("qwen2", intermediate=128, tied=True))
    qzo.wrap(load_bnb(tmp_path / "own")).save_pretrained(tmp_path / "saved")
    own, saved = config_of(tmp_path / "own"), config_of(tmp_path / "saved")
    assert_same(stored_tensors(tmp_path / "saved"), load_file(tmp_path / "own/model.safetensors"))
    assert saved["quantization_config"] == own["quantization_config"]
    assert saved["dtype"] == own["dtype"]


def test_a_file_without_the_base_prefix_is_saved_without_it(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model(tied=True))
    path = tmp_path / "base/model.safetensors"
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_file(path).items()}
    write_tensors(tmp_path / "base", tensors)
    model = qzo.load(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    assert_same(stored_tensors(tmp_path / "saved"), tensors)
    assert "model.layers.0.mlp.up_proj.qweight" in model.state_dict()


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert_same(stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "base"))
    assert torch.equal(logits_of(qzo.load(tmp_path / "saved")), logits_of(model))


class _SaveAt(TrainerCallback):
    """Saves the model after a step, as callbacks of transformers do."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if state.global_step == self.step:
            given["model"].save_pretrained(self.folder)


def short_recipe(folder: Path, steps: int, **zo: Any) -> Recipe:
    return recipe(
        {
            **{"model": "given", "data": "given", "output_dir": str(folder), "max_steps": steps},
            **{"per_device_train_batch_size": 2, "learning_rate": 0.05},
            "zo": {"modules": None, "depth": None, **zo},
            "lr_scheduler_type": "constant",
        }
    )


def test_a_callback_saves_the_scales_of_its_step(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model("qwen2"))
    zo = {"coordinates": "row", "unquantized": ["norms"]}
    model = qzo.load(tmp_path / "base")
    saver = _SaveAt(2, tmp_path / "saved")
    Trainer(model, short_recipe(tmp_path / "run", 4, **zo), examples(), callbacks=[saver]).train()
    other = qzo.load(tmp_path / "base")
    Trainer(other, short_recipe(tmp_path / "short", 2, **zo), examples()).train()
    qzo.export(tmp_path / "short", tmp_path / "exported")
    assert_same(stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "exported"))


def test_codes_of_a_state_dict_are_the_mapped_ones(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    state = model.state_dict()
    stored = checkpoint_of(model, tmp_path).tensors
    assert sorted(state) == sorted(stored.files)
    layers = quant_linears(model)
    assert len(layers) == 7
    for layer in layers:
        for role in ("qweight", "qzeros", "scales"):
            key = f"{layer.name}.{role}"
            assert state[key].data_ptr() == stored[key].data_ptr()


@every_base
def test_a_state_dict_takes_a_model_to_where_another_was_trained(
    tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "base")
    trained, fresh = qzo.load(tmp_path / "base"), qzo.load(tmp_path / "base")
    base = fresh.state_dict()
    before = logits_of(fresh)
    short_run(trained, tmp_path / "run", **SCALES)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(logits_of(fresh), logits_of(trained))
    trained.load_state_dict(base)
    assert torch.equal(logits_of(trained), before)
    assert all(layer.tuned is None for layer in quant_linears(trained))


def test_other_codes_are_refused(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    key = "model.layers.0.mlp.up_proj.qweight"
    state = {**model.state_dict(), key: model.state_dict()[key] + 1}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert f"{key}: expected the codes of this model, got others; load the other" in str(
        error.value
    )


def test_a_state_dict_without_codes_is_incomplete(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    state = {key: tensor for key, tensor in model.state_dict().items() if "up_proj" not in key}
    missing, unexpected = model.load_state_dict(state, strict=False)
    roles = ("qweight", "qzeros", "scales", "g_idx")
    assert sorted(missing) == sorted(f"model.layers.0.mlp.up_proj.{role}" for role in roles)
    assert not unexpected
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj\.qweight"):
        model.load_state_dict(state)


def test_tensors_that_an_adapter_replaces_are_loaded_as_they_are_or_not_at_all(
    tmp_path: Path,
) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    base = model.model.norm.weight.clone()
    short_run(model, tmp_path / "run", unquantized=["norms"])
    want, state = logits_of(model), model.state_dict()
    assert not torch.equal(state["model.norm.weight"].float(), base)
    model.load_state_dict(state)
    assert torch.equal(logits_of(model), want)
    assert torch.equal(model.model.norm.weight, base)
    state["model.norm.weight"] = state["model.norm.weight"] * 2
    assert refusal(lambda: model.load_state_dict(state)) == (
        "load_state_dict: another model.norm.weight cannot be combined with an adapter that "
        "replaces this tensor: it would not be seen; load the checkpoint again"
    )


def test_the_folder_of_the_base_is_not_written_over(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    before = (tmp_path / "base/model.safetensors").read_bytes()
    model = qzo.load(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert refusal(lambda: model.save_pretrained(tmp_path / "link")) == (
        f"save_directory: expected another folder than {tmp_path / 'link'}, whose files hold the "
        "codes of this model; choose a new one"
    )
    assert (tmp_path / "base/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("zo", "what"),
    [({"tuned": "lora", "lora_rank": 2}, "LoRA factors"), ({"tuned": "prefix"}, "a prefix")],
    ids=["lora", "prefix"],
)
def test_what_no_checkpoint_holds_is_not_dropped(
    tmp_path: Path, zo: dict[str, Any], what: str
) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    values = {"max_steps": 1, "learning_rate": 0.01, "zo": {**zo, "coordinates": "row"}}
    trainer = Trainer(
        model,
        recipe({"model": "given", "data": "given", "output_dir": str(tmp_path / "run"), **values}),
        examples(),
    )
    trainer.train()
    assert refusal(lambda: model.save_pretrained(tmp_path / "saved")) == (
        f"save_pretrained cannot be combined with {what}: a 4-bit checkpoint has no place for "
        "them; use the adapter in output_dir, or save the model before an adapter is applied"
    )
    assert not (tmp_path / "saved").exists()


def test_arguments_that_save_something_else_are_refused(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    given = refusal(lambda: model.save_pretrained(tmp_path / "a", state_dict=model.state_dict()))
    assert given.startswith("state_dict cannot be combined with a 4-bit model: ")
    pushed = refusal(lambda: model.save_pretrained(tmp_path / "a", push_to_hub=True))
    assert pushed.endswith("call model.push_to_hub(repo_id)")


def test_a_model_stays_of_its_class(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model) is type(qzo.load(tmp_path / "base"))


@every_base
def test_a_copy_is_a_model_of_its_own_over_the_same_codes(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "base")
    model = qzo.load(tmp_path / "base")
    twin = copy.deepcopy(model)
    before = logits_of(model)
    assert torch.equal(logits_of(twin), before)
    short_run(twin, tmp_path / "run", **SCALES)
    assert torch.equal(logits_of(model), before)
    assert not torch.equal(logits_of(twin), before)
    twin.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(qzo.load(tmp_path / "saved")), logits_of(twin))
    for one, other in zip(quant_linears(model), quant_linears(twin), strict=True):
        assert one.quantized is other.quantized
        assert one.live is not other.live


def test_a_copy_of_a_trained_model_keeps_its_scales(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    short_run(model, tmp_path / "run")
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
    short_run(model, tmp_path / "norms", unquantized=["norms"])
    assert refusal(lambda: copy.deepcopy(model)).startswith("copy.deepcopy cannot be combined with")


def test_pickling_is_refused_in_words(tmp_path: Path) -> None:
    write_gptq(tmp_path / "base", tiny_model())
    model = qzo.load(tmp_path / "base")
    assert refusal(lambda: pickle.dumps(model)).startswith(
        "pickle, and torch.save of a whole model"
    )
    assert refusal(lambda: torch.save(model, tmp_path / "model.pt")).endswith(
        "use model.save_pretrained(folder), or torch.save(model.state_dict(), file)"
    )


@every_base
def test_sizes_are_those_of_the_dense_model_and_of_the_file(tmp_path: Path, write: Write) -> None:
    dense: PreTrainedModel = write(tmp_path / "base")
    model = qzo.load(tmp_path / "base")
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(
        exclude_embeddings=True
    )
    assert model.num_parameters(only_trainable=True) == 0
    in_files = stored_tensors(tmp_path / "base").values()
    buffers = sum(buffer.nbytes for buffer in dense.buffers())  # of rotary embeddings
    same = qzo.load(tmp_path / "base", in_files_dtype(tmp_path / "base"))
    assert same.get_memory_footprint() == sum(tensor.nbytes for tensor in in_files) + buffers

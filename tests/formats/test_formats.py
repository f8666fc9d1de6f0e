import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantizers import gptq, nf4
from quantizers.errors import FormatError
from quantizers.formats import FORMATS, detect
from qzo.checkpoint.checkpoint import open_checkpoint

OTHERS = [
    "aqlm",
    "auto-round",
    "awq",
    "bitnet",
    "compressed-tensors",
    "eetq",
    "fbgemm_fp8",
    "fp8",
    "higgs",
    "hqq",
    "mxfp4",
    "quanto",
    "spqr",
    "torchao",
    "vptq",
]


def refusal(method: str) -> str:
    return (
        f"quant_method: expected one of ['bitsandbytes', 'gptq'], got '{method}'; quantize the "
        "float model with `qzo quantize` instead"
    )


def test_formats_are_gptq_and_bitsandbytes() -> None:
    assert {"gptq": gptq, "bitsandbytes": nf4} == FORMATS


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_detect_goes_by_the_quant_method(method: str) -> None:
    assert detect({"quant_method": method}, []) is FORMATS[method]


def test_detect_knows_an_old_gptq_file_by_its_tensors() -> None:
    assert detect({"bits": 4}, ["a.qweight"]) is gptq


def test_detect_refuses_a_config_without_a_method_or_gptq_tensors() -> None:
    with pytest.raises(FormatError) as error:
        detect({"bits": 4}, ["a.weight"])
    assert str(error.value) == refusal("none")


def test_detect_refuses_a_float_checkpoint() -> None:
    with pytest.raises(FormatError) as error:
        detect(None, ["a.weight"])
    assert str(error.value) == (
        "quantization_config: expected one in config.json, found none; this is a float "
        "checkpoint: make a 4-bit one with `qzo quantize`"
    )


@pytest.mark.parametrize("method", OTHERS)
def test_a_checkpoint_in_another_format_is_refused_by_name(tmp_path: Path, method: str) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError) as error:
        open_checkpoint(tmp_path)
    assert str(error.value) == refusal(method)


@pytest.mark.parametrize(
    ("name", "method"), [("awq", "awq"), ("aqlm_2x8", "aqlm"), ("ct_0", "compressed-tensors")]
)
def test_a_shared_checkpoint_in_another_format_is_refused_by_name(
    shared: Path, name: str, method: str
) -> None:
    with pytest.raises(FormatError) as error:
        open_checkpoint(shared / "checkpoints" / name)
    assert str(error.value) == refusal(method)

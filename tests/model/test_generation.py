from pathlib import Path
from typing import Any

import pytest
import torch
from support.gptq_files import write_gptq
from support.models import ARCHITECTURES, tiny_model
from support.runs import VARIANT, loaded, tiny_checkpoint, write_tokenizer

import qzo
from qzo.data.tokenize import RenderedPrompt
from qzo.errors import ConfigError
from qzo.method.coordinates import Coordinates
from qzo.method.probes import Probe
from qzo.method.trained_vector import Scales
from qzo.model.generate import Generator, generate
from qzo.model.linear import Live
from qzo.model.load import load_tokenizer, trained_layers

PROMPTS = ["a fine film", "x:", "say 12345 and then", "q"]
PROBES = [Probe(5, 0.2), Probe(5, -0.2), Probe(9, 0.2)]
COORDINATES: tuple[Coordinates, ...] = ("absolute", "relative", "row")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("generation") / "base")


@pytest.fixture
def model(base: Path) -> Any:
    return loaded(base, (base / "model.safetensors").stat().st_mtime_ns)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base)


def scales_of(model: Any, coordinates: Coordinates = "row") -> tuple[Scales, Live]:
    layers = trained_layers(model, None)
    scales = Scales.of_layers(layers, coordinates=coordinates, direction="rademacher")
    return scales, layers[0].live


def naive(model: Any, tokenizer: Any, prompt: str, *, num_tokens: int, stop: str | None) -> str:
    """Write token by token: one row, no padding, no cache, no loop of transformers'."""
    tokens = tokenizer(prompt)["input_ids"]
    written: list[int] = []
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
        text: str = tokenizer.decode(written, skip_special_tokens=True)
        if written[-1] == tokenizer.eos_token_id:
            return text
        if stop is not None and stop in text:
            return text.split(stop)[0]
    return text


@pytest.mark.parametrize(
    ("coordinates", "stop"), [("row", "f"), *((name, None) for name in COORDINATES)]
)
def test_stacked_probes_write_what_each_writes_alone(
    model: Any, tokenizer: Any, coordinates: Coordinates, stop: str | None
) -> None:
    scales, live = scales_of(model, coordinates)
    offset = 0.01 if coordinates == "absolute" else 0.2
    probes = [Probe(probe.seed, offset if probe.offset > 0 else -offset) for probe in PROBES]
    prompts = [PROMPTS, PROMPTS[1:3], PROMPTS[:1]]  # unequal parts

    with scales.shifted(live, probes):
        got = Generator(model, tokenizer, live, max_new_tokens=12, stop=stop).write(prompts)

    want = []
    for probe, of_probe in zip(probes, prompts, strict=True):
        with scales.shifted(live, [probe]):
            texts = [naive(model, tokenizer, p, num_tokens=12, stop=stop) for p in of_probe]
        want.append(texts)
    assert got == want
    assert len({text for texts in want for text in texts}) > 3  # probes and prompts differ


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_does_not_show(tmp_path: Path, architecture: str) -> None:
    write_gptq(tmp_path, tiny_model(architecture), VARIANT)
    tokenizer, model = write_tokenizer(tmp_path), qzo.load(tmp_path)

    (got,) = Generator(model, tokenizer, max_new_tokens=10, stop=None).write([PROMPTS])

    assert got == [naive(model, tokenizer, p, num_tokens=10, stop=None) for p in PROMPTS]


def test_a_penalty_for_repetition_does_not_see_the_padding(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)

    (got,) = Generator(model, tokenizer, max_new_tokens=10, stop=None).write([PROMPTS])

    alone = [generate(model, tokenizer, prompt, max_new_tokens=10) for prompt in PROMPTS]
    assert got == alone


def test_one_prompt_is_not_held_up_by_another(model: Any, tokenizer: Any) -> None:
    (texts,) = Generator(model, tokenizer, max_new_tokens=12, stop="f").write([PROMPTS])

    lengths = {len(text) for text in texts}
    assert not any("f" in text for text in texts)
    assert len(lengths) > 1


def test_a_conversation_is_answered_past_line_ends_up_to_the_end_of_the_turn(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    spoken = [*tokenizer("a\nb")["input_ids"][1:], tokenizer.eos_token_id]

    def generated(rows: torch.Tensor, **named: Any) -> torch.Tensor:
        told.append({"rows": rows.tolist(), **named})
        return torch.cat([rows, torch.tensor([[*spoken, 0]])], dim=1)

    monkeypatch.setattr(model.generation_config, "eos_token_id", 0)  # as base models have it
    monkeypatch.setattr(model, "generate", generated)
    generator = Generator(model, tokenizer, max_new_tokens=5)

    ((answer,),) = generator.write([[RenderedPrompt("<s>x:")]])
    ((line,),) = generator.write([["x:"]])

    assert (answer, line) == ("a\nb", "a")
    assert told[0]["rows"] == told[1]["rows"] == [tokenizer("x:")["input_ids"]]  # one "<s>"
    assert [len(one["stopping_criteria"]) for one in told] == [0, 1]
    assert told[0]["eos_token_id"] == [0, tokenizer.eos_token_id]


def test_an_answer_ends_where_the_template_ends_a_turn(model: Any, tokenizer: Any) -> None:
    free = Generator(model, tokenizer, max_new_tokens=12, stop=None).write([["x:"]])[0][0]
    assert len(free) == 12
    prompt = RenderedPrompt("<s>x:")
    prompt.end = free[3:5]

    ((text,),) = Generator(model, tokenizer, max_new_tokens=12).write([[prompt]])

    assert text == free[: free.index(prompt.end)]


def test_nothing_of_a_generation_stays_behind(model: Any, tokenizer: Any) -> None:
    scales, live = scales_of(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]

    with scales.shifted(live, PROBES[:2]):
        Generator(model, tokenizer, live, max_new_tokens=2).write([PROMPTS, PROMPTS])

    assert live.bounds is None
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize(("max_length", "kept"), [(None, 56), (6, 6), (60, 56)])
def test_a_prompt_is_cut_on_the_left_to_the_length_and_to_the_room_there_is(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, max_length: int | None, kept: int
) -> None:
    prompt = "a fine film " * 10
    tokens = tokenizer(prompt)["input_ids"]
    assert len(tokens) > 64
    assert tokens[0] == tokenizer.bos_token_id
    told: list[list[list[int]]] = []

    def generated(rows: torch.Tensor, **_: Any) -> torch.Tensor:
        told.append(rows.tolist())
        return rows

    monkeypatch.setattr(model, "generate", generated)
    generator = Generator(model, tokenizer, max_length=max_length, max_new_tokens=8)

    generator.write([[prompt]])

    assert told == [[[tokens[0], *tokens[1 - kept :]]]]


def test_a_stop_that_no_token_holds_is_refused(model: Any, tokenizer: Any) -> None:
    message = r"^generation_stop: expected null, or a string that can .*, got '#': .+$"
    with pytest.raises(ConfigError, match=message):
        Generator(model, tokenizer, max_new_tokens=2, stop="#").write([["x"]])


def test_a_generator_needs_room_for_a_prompt(model: Any, tokenizer: Any) -> None:
    message = r"^max_new_tokens: expected less than the model's 64 positions, got 64$"
    with pytest.raises(ConfigError, match=message):
        Generator(model, tokenizer, max_new_tokens=64)


@pytest.mark.parametrize("split", [{"batch_size": 1}, {"batch_size": 2}, {"max_tokens": 40}])
@pytest.mark.parametrize("coordinates", ["row", "absolute"])
def test_answers_do_not_depend_on_what_is_generated_together(
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    coordinates: Coordinates,
    split: Any,
) -> None:
    scales, live = scales_of(model, coordinates)
    offset = 0.01 if coordinates == "absolute" else 0.2
    probes = [Probe(probe.seed, offset if probe.offset > 0 else -offset) for probe in PROBES]
    prompts = [PROMPTS, PROMPTS[1:3], PROMPTS[:1]]
    with scales.shifted(live, probes):
        want = Generator(model, tokenizer, live, max_new_tokens=12).write(prompts)
    sizes: list[tuple[int, int]] = []
    generate_rows = model.generate

    def noted(rows: torch.Tensor, **named: Any) -> Any:
        sizes.append((rows.shape[0], rows.shape[1]))
        return generate_rows(rows, **named)

    monkeypatch.setattr(model, "generate", noted)
    generator = Generator(model, tokenizer, live, max_new_tokens=12, **split)

    with scales.shifted(live, probes):
        got = generator.write(prompts)

    assert got == want
    assert sum(count for count, _ in sizes) == sum(map(len, prompts))
    assert len(sizes) > 1
    for count, width in sizes:
        assert count <= split.get("batch_size", count)
        assert count == 1 or count * (width + 12) <= split.get("max_tokens", 10**9)


def test_probes_whose_prompts_fit_run_together(model: Any, tokenizer: Any) -> None:
    prompts = [["ab"] * 2, ["ab"] * 2, ["ab"] * 5, ["ab"], []]

    def runs(**split: Any) -> list[tuple[int, int]]:
        found = Generator(model, tokenizer, max_new_tokens=5, **split).runs(prompts)
        return [(run.start, run.stop) for run in found]

    assert runs() == [(0, 5)]
    assert runs(batch_size=4) == [(0, 2), (2, 3), (3, 5)]
    assert runs(batch_size=6) == [(0, 2), (2, 5)]
    assert runs(batch_size=1) == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert runs(max_tokens=3 * (3 + 5)) == [(0, 1), (1, 2), (2, 3), (3, 5)]  # "<s>ab"


def test_prompts_of_like_lengths_are_answered_together(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []

    def generated(rows: torch.Tensor, **_: Any) -> torch.Tensor:
        widths.append(rows.shape[1])
        return rows

    monkeypatch.setattr(model, "generate", generated)
    prompts = ["a" * 20, "a", "a" * 19, "aa"]

    Generator(model, tokenizer, max_new_tokens=5, batch_size=2).write([prompts])

    assert widths == [3, 21]

"""The keys of a recipe: what `qzo train` is told. Names follow transformers' TrainingArguments.

``read`` reads them, ``presets`` puts a preset under them and fills in what follows from
others, and ``compatibility`` checks what one key says of another.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from qzo.data.labelled import Labelling, key_of
from qzo.method.coordinates import Coordinates
from qzo.method.directions.settings import RANK_MAX, RANKS, DirectionSettings, LawName, MaskName
from qzo.method.schedules import ScheduleName, learning_rate
from qzo.plan.workload import EVAL_BATCH_SIZE


def _no_truth(value: Any) -> Any:
    """Refuse true and false, which are numbers in Python.

    Raises:
        PydanticCustomError: The value is one of them.
    """
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


Int = Annotated[int, BeforeValidator(_no_truth)]
Float = Annotated[float, BeforeValidator(_no_truth)]
Part = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[Int, Field(ge=1)]


def _words(value: Any) -> Any:
    """Take the labels of a YAML mapping as text, and refuse words that are none.

    Raises:
        PydanticCustomError: There are fewer than two words, or one is no text or there twice.
    """
    if not isinstance(value, Mapping):
        return value
    words = list(value.values())
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise PydanticCustomError(
            "words", "Input should be a word for each label, in quotes as in {0: 'no', 1: 'yes'}"
        )
    if len(set(words)) < max(len(words), 2):
        raise PydanticCustomError("words", "Input should be two or more different words")
    return {str(key_of(label)): word for label, word in value.items()}


LabelWords = Annotated[dict[str, str], BeforeValidator(_words)]


class ZOConfig(BaseModel):
    """How the loss is estimated and the scales move."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    estimator: Literal[
        "spsa", "one_sided", "fzoo", "rloo", "per_example", "spsa_1_5", "forward_gradient"
    ] = "per_example"
    examples_per_direction: Int = Field(default=1, ge=1)  # per_example: examples that share one
    sides: Literal["two", "leave_one_out"] = "two"  # per_example: where a group is evaluated
    coordinates: Coordinates = "row"
    direction: LawName = "rademacher"
    rank: Int | None = Field(default=None, ge=1, le=RANK_MAX)  # lozo (2), subzero (8)
    sparsity: Float | None = Field(default=None, ge=0, lt=1)  # part that is not perturbed
    mask: MaskName | None = None  # with a sparsity: random, or magnitude, which is fixed
    blocks_per_step: Int | None = Field(default=None, ge=1)  # perturb so many at a time
    basis_steps: Int | None = Field(default=None, ge=1)  # steps whose directions share a basis
    epsilon: Float = Field(default=1e-2, gt=0)
    num_directions: Int = Field(default=1, ge=1)
    num_blocks: Int | None = Field(default=None, ge=1)  # train the last so many decoder blocks
    depth: tuple[Part, Part] | None = None  # or those from this to before that part of the depth
    modules: list[str] | None = (
        None  # train these layers, such as k_proj; see qzo/model/layer_names.py
    )
    normalize: bool = True  # per_example: derivatives have a root mean square of 1
    normalize_over: Literal["step", "group"] = "step"  # all of them, or those of each group
    max_loss_difference: Float | None = Field(default=None, gt=0)
    optimizer: Literal[
        "sgd",
        "sign",
        "momentum",
        "adam",
        "meazo",
        "hizoo",
        "conmezo",
        "conservative",
        "lozo_momentum",
    ] = "sgd"
    momentum: Float = Field(default=0.9, ge=0, lt=1)
    adam_beta1: Float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: Float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: Float = Field(default=1e-8, gt=0, lt=1)
    meazo_beta: Float = Field(default=0.99, ge=0, lt=1)
    meazo_epsilon: Float = Field(default=1e-8, gt=0, lt=1)
    hizoo_alpha: Float = Field(default=1e-8, ge=0, lt=1)
    conmezo_angle: Float = Field(default=1.35, ge=0, le=math.pi / 2)  # radians
    conmezo_beta: Float = Field(default=0.99, ge=0, lt=1)
    # A factor of the directions of layers, by names as those of modules; the longest one wins.
    stretch: dict[str, Annotated[Float, Field(gt=0)]] | None = None
    layer_scaling: Literal["none", "param_norm", "grad_norm"] = "none"
    layer_scaling_rule: Literal["variance", "expectation"] = "variance"
    max_skipped_steps: Int = Field(default=10, ge=1)
    tuned: Literal["scales", "lora", "prefix"] = "scales"  # the others leave the scales as they are
    unquantized: list[Literal["norms", "biases", "head"]] = []  # trained besides the scales
    unquantized_factor: Float = Field(default=1.0, gt=0)  # of their directions: step factor**2
    lora_rank: Int = Field(default=8, ge=1)
    lora_alpha: Float = Field(default=16, gt=0)
    lora_modules: list[str] = ["q_proj", "v_proj"]  # names as those of modules
    prefix_tokens: Int = Field(default=5, ge=1)

    # Exact gradients for the scales of the last so many trained blocks, or of as many as have a
    # share of the importance that a profile finds; the other scales stay zeroth-order.
    first_order_blocks: Int = Field(default=0, ge=0)
    first_order_layers: Literal["last", "profile"] = "last"
    first_order_share: Float = Field(default=0.5, gt=0, le=1)
    first_order_optimizer: Literal["adam", "sgd"] = "adam"
    first_order_learning_rate: Float | None = Field(default=None, gt=0)  # Adam: see below

    @property
    def has_first_order(self) -> bool:
        """Whether exact gradients move a part of the scales."""
        return self.first_order_blocks > 0 or self.first_order_layers == "profile"

    @property
    def first_order_rate(self) -> float:
        """The learning rate of the first-order part, before the schedule."""
        if self.first_order_learning_rate is not None:
            return self.first_order_learning_rate
        return 1e-5 if self.coordinates == "absolute" else 3e-3  # of Adam, not tuned

    @property
    def first_order_settings(self) -> dict[str, float]:
        """The arguments of the rule of the first-order part."""
        names = ("adam_beta1", "adam_beta2", "adam_epsilon")
        return {name: getattr(self, name) for name in names if self.first_order_optimizer == "adam"}

    @property
    def optimizer_settings(self) -> dict[str, float]:
        """The arguments of the optimizer."""
        names: dict[str, tuple[str, ...]] = {
            "momentum": ("momentum",),
            "lozo_momentum": ("momentum",),
            "adam": ("adam_beta1", "adam_beta2", "adam_epsilon"),
            "meazo": ("meazo_beta", "meazo_epsilon"),
            "hizoo": ("hizoo_alpha",),
            "conmezo": ("conmezo_angle", "conmezo_beta"),
        }
        return {name: getattr(self, name) for name in names.get(self.optimizer, ())}

    @property
    def direction_settings(self) -> DirectionSettings:
        """What the law of the directions is told; defaults are filled in."""
        return DirectionSettings(
            self.rank or RANKS.get(self.direction),
            self.sparsity,
            self.mask or (None if self.sparsity is None else "random"),
            self.blocks_per_step,
        )


class Recipe(BaseModel):
    """A run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    model: str
    revision: str | None = None  # branch, tag or commit of a model on the hub
    output_dir: str
    data: str | None = None
    task: Literal["sst2", "rte", "boolq", "copa", "squad", "trec", "e2e"] | None = None
    prompt: Literal["template", "none"] = "template"  # none: a task without its template's words
    eval_data: str | None = None
    # Rows of a text and its label, see qzo/data/labelled.py: their columns, the prompt with columns
    # in braces, and the word to answer for each label. label_column: none learns the text alone.
    text_column: str | None = None
    label_column: str | None = None
    template: str | None = None
    label_words: LabelWords | None = None
    quantize: Literal["nf4", "gptq"] | None = None
    # Values under those of the recipe, see presets.py; none: the defaults that stand here.
    preset: Literal["default", "paper", "none"] = "default"

    max_steps: Int = Field(default=500, ge=1)
    learning_rate: Float = Field(default=5e-2, gt=0)
    lr_scheduler_type: ScheduleName = "cosine"
    warmup_steps: Int = Field(default=0, ge=0)
    per_device_train_batch_size: Int = Field(default=16, ge=1)
    # Micro-batches of a step. Several processes share them, so that a run does not depend on their
    # number; transformers takes as many in each process.
    gradient_accumulation_steps: Int = Field(default=1, ge=1)
    stratified_batches: bool = True  # classes are spread evenly over an epoch
    per_device_eval_batch_size: Int = Field(default=EVAL_BATCH_SIZE, ge=1)
    max_length: Int = Field(default=512, ge=2)
    num_train_examples: Int | None = Field(default=None, ge=1)
    num_eval_examples: Int = Field(default=500, ge=0)

    logging_steps: Int = Field(default=10, ge=1)
    eval_steps: Count | tuple[Count, ...] | None = None  # every so many, or after these
    save_steps: Int = Field(default=500, ge=1)
    save_total_limit: Int = Field(default=2, ge=1)
    load_best_model_at_end: bool = False
    seed: Int = Field(default=0, ge=0, lt=2**63)
    data_seed: Int = Field(default=0, ge=0, lt=2**63)
    report_to: str | list[str] = "none"
    resume_from_checkpoint: bool = False
    # Steps until the journal is forced onto the disk; power loss costs at most one less than that.
    journal_sync_steps: Int = Field(default=1, ge=1)
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    memory_limit: str | None = None  # such as 4GiB; what does not fit streams from the files

    # What is trained on: the loss, or a reward of the answers; see qzo/objective/rewards.py.
    objective: Literal["loss", "accuracy", "f1", "exact_match", "reward"] = "loss"
    reward: str | None = None  # path/to/file.py:function, which is run
    max_new_tokens: Int = Field(default=50, ge=1)  # of a written answer
    # Answers that are generated together, over all probes; as many as memory holds unless set.
    generation_batch_size: Int | None = Field(default=None, ge=1)
    generation_stop: str | None = Field(default="auto", min_length=1)  # see qzo/model/generate.py

    zo: ZOConfig = ZOConfig()

    @property
    def labelling(self) -> Labelling:
        """What is said of rows with a text and its label."""
        return Labelling(self.text_column, self.label_column, self.template, self.label_words)

    @property
    def examples_per_step(self) -> int:
        """Examples of a step, of all its micro-batches and processes together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def estimator_settings(self) -> dict[str, Any]:
        """The arguments of the estimator."""
        zo = self.zo
        names = ("epsilon", "num_directions", "max_loss_difference", "basis_steps")
        settings = {"seed": self.seed, **{name: getattr(zo, name) for name in names}}
        if zo.optimizer == "hizoo" and zo.estimator == "spsa":
            settings["measures_curvature"] = True
        if zo.estimator != "per_example":
            return settings
        own = {"examples_per_direction": zo.examples_per_direction, "sides": zo.sides}
        return {
            **settings,
            **own,
            "num_examples": self.examples_per_step,
            "normalized_over": zo.normalize_over if zo.normalize else None,
        }

    def evaluates_at(self, step: int) -> bool:
        """Tell whether ``eval_steps`` names this number of steps."""
        if isinstance(self.eval_steps, tuple):
            return step in self.eval_steps
        return self.eval_steps is not None and step % self.eval_steps == 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self._scheduled(self.learning_rate, step)

    def first_order_rate_at(self, step: int) -> float:
        """Return the learning rate of the first-order part in a step."""
        return self._scheduled(self.zo.first_order_rate, step)

    def _scheduled(self, highest: float, step: int) -> float:
        return learning_rate(
            self.lr_scheduler_type,
            highest,
            step,
            max_steps=self.max_steps,
            warmup_steps=self.warmup_steps,
        )

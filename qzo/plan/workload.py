"""What a training step is asked to do, as its plan sees it."""

from collections.abc import Sequence
from dataclasses import dataclass

from qzo.plan.shapes import LinearShape

EVAL_BATCH_SIZE = 32  # examples of a forward that evaluates, unless a recipe says otherwise


@dataclass(frozen=True)
class Workload:
    """What one training step is asked to do.

    Attributes:
        batch_size: Examples of a step.
        seq_len: Tokens an example, padding included.
        answer_len: Positions an example whose logits are needed.
        coordinates: What is trained: ``row`` (a number an output row), ``column`` (a number a group
            of inputs), ``rank_one`` (both), ``relative`` or
            ``absolute`` (a number a scale).
        num_probes: Forwards stacked on the batch.
        first_order_blocks: Last blocks with exact gradients.
        optimizer: What moves the trained values.
        lora_rank: Of factors that are trained instead of the scales; 0 for none.
        prefix_tokens: Of a prefix that is trained instead of the scales; 0 for none.
        modules: Only layers that one of these names are trained, see ``layer_names``; None for all.
        num_blocks: Only the last so many blocks are trained; None for all.
        max_new_tokens: Generated behind each sequence; 0: losses are computed instead.
        generation_batch_size: Sequences that are generated together; None for all.
        depth: Or those from the first to before the second part of the depth, 0 to 1.
        dtype: Type of activations and of the weights that are not quantized.
        device: Where this runs: ``cpu`` or ``cuda``.
    """

    batch_size: int = 16
    seq_len: int = 512
    answer_len: int = 16
    coordinates: str = "row"
    num_probes: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    first_order_blocks: int = 0
    optimizer: str = "sgd"
    lora_rank: int = 0
    prefix_tokens: int = 0
    modules: tuple[str, ...] | None = None
    num_blocks: int | None = None
    depth: tuple[float, float] | None = None
    max_new_tokens: int = 0
    generation_batch_size: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the stacked batch."""
        return self.num_probes * self.batch_size

    @property
    def forward_rows(self) -> int:
        """Rows of a forward: all, or those that are generated together."""
        return min(self.num_rows, self.generation_batch_size or self.num_rows)


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Attributes:
        linears: Layers whose scales are.
        num_instead: LoRA factors, or keys and values of a prefix, if these are instead.
    """

    linears: Sequence[LinearShape]
    num_instead: int = 0


@dataclass(frozen=True)
class Differentiated:
    """What gets exact gradients.

    Attributes:
        linears: Trained layers of the last blocks.
        row_bytes: Of the graph of one row of the batch, at the peak of its backward.
    """

    linears: Sequence[LinearShape]
    row_bytes: int

"""What the graphs of a bundle cost, counted from sizes alone: for models that nobody has exported, and other memory lengths.

Products are those of the exported graphs, one by one. What is no product is counted as the exporter writes it today, and agrees
with a count of the graphs themselves to some per cent.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.runtime.manifest import Cost, Dims, Work
from keepsight.runtime.planning.costs import Product

__all__ = ["QFormerShape", "VisionShape", "host_memory_cost", "memory_cost", "qformer_costs", "vision_cost"]

_CHANNELS = 3
_FLOPS: dict[Work, int] = {"map": 1, "gelu": 8, "softmax": 5, "norm": 7, "reduce": 1, "move": 0}


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer with a class token: pre-norm blocks with a fused projection to queries, keys and values."""

    image_size: int = 224
    patch: int = 14
    width: int = 1408
    blocks: int = 39
    heads: int = 16
    mlp: int = 6144

    @property
    def tokens(self) -> int:
        """N: the class token and the patches."""
        return 1 + (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class QFormerShape:
    """A Q-Former, and the memory that it reads.

    Attributes:
        ffn: width inside the feed-forward nets.
        position_rows: of a position table; 0 for a model without positions.
    """

    dims: Dims
    ffn: int
    position_rows: int = 0


def vision_cost(shape: VisionShape) -> Cost:
    """One frame of a vision transformer."""
    work, tokens, width = _Work(), shape.tokens, shape.width
    pixels = shape.image_size**2 * _CHANNELS
    work.other("map", 3 * 2 * pixels, 3)
    work.other("move", 2 * pixels, 1)
    work.product(Product(1, tokens - 1, _CHANNELS * shape.patch**2, width, convolution=True, weights=True))
    work.other("move", 2 * 2 * tokens * width, 2)
    work.other("map", 2 * tokens * width, 1)
    for _ in range(shape.blocks):
        work.norm(tokens, width)
        work.linear(tokens, width, 3 * width, apart=True)
        work.other("move", 20 * tokens * width, 8)  # parts, heads, and back
        work.other("map", 2 * 2 * tokens * width, 2)  # scale
        work.attention(shape.heads, tokens, width // shape.heads, tokens)
        work.linear(tokens, width, width, apart=True)
        work.residual(tokens, width)
        work.norm(tokens, width)
        work.linear(tokens, width, shape.mlp, apart=True)
        work.gelu(tokens * shape.mlp)
        work.linear(tokens, shape.mlp, width, apart=True)
        work.residual(tokens, width)
    work.norm(tokens, width)
    return work.cost(inputs_outputs=pixels + tokens * width)


def memory_cost(dims: Dims) -> Cost:
    """The visual bank's update on a device (`export/memory_graph.py`): the whole bank is read, and another one written."""
    work, rows = _Work(), dims.tokens * (dims.channels + 2 * len(dims.cross_layers) * dims.hidden)
    bank = dims.slots * rows
    work.other("map", 8 * bank, 115)  # two masks, two sums, and what finds the slots
    work.other("move", 18 * rows, 40)
    work.other("reduce", 10 * dims.tokens * dims.channels, 26)
    return work.cost(inputs_outputs=2 * bank + rows)


def host_memory_cost(dims: Dims) -> Cost:
    """The same on the host (`runtime/memory.py: MemoryBank`): of each token the new row and the rows of one merge."""
    work, rows = _Work(), dims.tokens * (dims.channels + 2 * len(dims.cross_layers) * dims.hidden)
    work.other("move", 6 * rows, 10)  # the new row, and three that a merge reads or writes
    work.other("map", 4 * rows, 10)
    work.other("reduce", 6 * dims.tokens * dims.channels, 6)  # three cosines, in double precision
    return work.cost(inputs_outputs=2 * rows)


def qformer_costs(shape: QFormerShape, text: int) -> dict[str, Cost]:
    """The Q-Former's graphs and the memory's, by name, at a text bucket."""
    graphs = {name: build(shape, text) for name, build in _BUILDERS.items()}
    return {**graphs, MEMORY: memory_cost(shape.dims)}


@dataclass
class _Work:
    """A tally; sizes are those of tensors."""

    flops: int = 0
    weights: int = 0
    product_values: int = 0
    kernels: int = 0
    other_values: Counter[Work] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)

    def product(self, product: Product) -> None:
        batch, m, k, n = product.batch, product.m, product.k, product.n
        self.products[str(product)] += 1
        self.flops += product.flops
        self.kernels += 1
        self.product_values += batch * (m * k + m * n + (0 if product.weights else k * n))
        if product.weights:
            self.weights += batch * k * n

    def linear(self, m: int, k: int, n: int, *, apart: bool = False) -> None:
        """With its bias, which is added `apart` where rows have a batch axis (MatMul and Add, not Gemm)."""
        self.product(Product(1, m, k, n, weights=True))
        self.weights += n
        if apart:
            self.other("map", 2 * m * n)

    def other(self, kind: Work, values: int, kernels: int = 1) -> None:
        self.other_values[kind] += values
        self.flops += _FLOPS[kind] * values // 2
        self.kernels += kernels

    def norm(self, m: int, width: int) -> None:
        self.other("norm", 2 * m * width)

    def gelu(self, values: int) -> None:
        self.other("gelu", 2 * values)

    def residual(self, m: int, width: int) -> None:
        self.other("map", 3 * m * width)

    def attention(self, batch: int, queries: int, depth: int, keys: int, *, shared: int = 1) -> None:
        """`shared`: how many of the batch read the same keys and values."""
        self.product(Product(batch, queries, depth, keys))
        self.other("softmax", 2 * batch * queries * keys)
        self.product(Product(batch, queries, keys, depth))
        self.product_values -= 2 * (batch - batch // shared) * keys * depth

    def cost(self, *, text: int = 0, inputs_outputs: int) -> Cost:
        return Cost(
            text=text, flops=self.flops, weights=self.weights, product_values=self.product_values,
            other_values=dict(sorted(self.other_values.items())), inputs_outputs=inputs_outputs, kernels=self.kernels,
            products=dict(sorted(self.products.items())),
        )  # fmt: skip


class _Parts:
    """The parts that the graphs share, for `steps` frames at once."""

    def __init__(self, shape: QFormerShape, text: int, steps: int = 1) -> None:
        dims = shape.dims
        self.work, self.shape, self.dims, self.text, self.steps = _Work(), shape, dims, text, steps
        self.rows, self.hidden, self.queries = dims.queries + text, dims.hidden, dims.queries
        self.depth, self.visual = dims.hidden // dims.heads, dims.slots * dims.tokens

    def self_attention(self, rows: int, keys: int, steps: int = 1) -> None:
        """Query and output projections, and the reading; keys and values are projected apart."""
        work, all_rows = self.work, steps * rows
        work.linear(all_rows, self.hidden, self.hidden, apart=self.steps > 1)
        heads = steps * self.dims.heads
        work.other("map", 3 * heads * rows * keys + 4 * all_rows * self.hidden + 2 * keys * self.hidden, 3)
        work.other("move", 4 * keys * self.hidden + 4 * all_rows * self.hidden, 4)
        work.attention(heads, rows, self.depth, keys, shared=steps)
        work.linear(all_rows, self.hidden, self.hidden, apart=self.steps > 1)
        work.residual(all_rows, self.hidden)
        work.norm(all_rows, self.hidden)

    def key_value(self, rows: int) -> None:
        for _ in range(2):
            self.work.linear(rows, self.hidden, self.hidden, apart=self.steps > 1)

    def feed_forward(self, rows: int) -> None:
        work = self.work
        work.linear(rows, self.hidden, self.shape.ffn, apart=self.steps > 1)
        work.gelu(rows * self.shape.ffn)
        work.linear(rows, self.shape.ffn, self.hidden, apart=self.steps > 1)
        work.residual(rows, self.hidden)
        work.norm(rows, self.hidden)

    def feed_forwards(self) -> None:
        self.feed_forward(self.steps * self.queries)
        if self.text:
            self.feed_forward(self.steps * self.text)
            self.work.other("move", 4 * self.steps * self.rows * self.hidden, 3)

    def cross(self, steps: int, *, shares: bool) -> None:
        """Cross-attention of the query rows with everything that is remembered."""
        work, queries, heads = self.work, self.queries, steps * self.dims.heads
        scores = heads * queries * self.visual
        work.linear(steps * queries, self.hidden, self.hidden, apart=self.steps > 1)
        work.other("map", 4 * scores, 2)
        work.other("move", 4 * self.visual * self.hidden, 2)
        work.attention(heads, queries, self.depth, self.visual, shared=steps)
        self._positions(steps, reading=True)
        work.linear(steps * queries, self.hidden, self.hidden, apart=self.steps > 1)
        work.residual(steps * queries, self.hidden)
        work.norm(steps * queries, self.hidden)
        if shares:
            once = self.dims.heads * queries * self.visual
            work.product(Product(self.dims.heads, queries, self.depth, self.visual))
            work.other("softmax", 2 * once)
            work.other("map", 4 * once, 2)
            work.other("reduce", once)
            work.other("move", 2 * self.visual * self.hidden)
            self._positions(1, reading=False)

    def _positions(self, steps: int, *, reading: bool) -> None:
        """What the position tables add to scores and, if it is read, to what is read."""
        rows, queries, heads = self.shape.position_rows, self.queries, self.dims.heads
        if not rows:
            return
        batch, m = (1, heads * queries) if steps == 1 else (steps * heads, queries)
        self.work.product(Product(steps * heads, queries, self.depth, rows, weights=True))
        self.work.product(Product(batch, m, rows, self.visual))
        shared = (batch - steps) * rows * self.visual if steps > 1 else 0  # heads read the same
        self.work.product_values -= (1 + reading) * shared
        self.work.weights -= (1 + reading) * (steps - 1) * heads * self.depth * rows
        self.work.other("map", 3 * steps * heads * queries * self.visual + 6 * steps * self.visual * rows, 8)
        if reading:
            self.work.product(Product(batch, m, self.visual, rows))
            self.work.product(Product(steps * heads, queries, rows, self.depth, weights=True))


def _visual_kv(shape: QFormerShape, text: int) -> Cost:
    dims, work = shape.dims, _Work()
    crosses = len(dims.cross_layers)
    for _ in range(2 * crosses):
        work.linear(dims.tokens, dims.channels, dims.hidden)
    made = 2 * crosses * dims.tokens * dims.hidden
    work.other("move", 2 * made, 2)
    return work.cost(inputs_outputs=dims.tokens * dims.channels + made)


def _prompt(shape: QFormerShape, text: int) -> Cost:
    parts = _Parts(shape, text)
    parts.work.norm(parts.rows, parts.hidden)
    parts.work.other("move", 6 * parts.rows * parts.hidden, 4)
    parts.key_value(parts.rows)
    parts.self_attention(parts.rows, parts.rows)
    return parts.work.cost(text=text, inputs_outputs=2 * text + parts.rows * parts.hidden)


def _step(shape: QFormerShape, text: int) -> Cost:
    parts = _Parts(shape, text)
    dims, work, last = shape.dims, parts.work, shape.dims.layers - 1
    keys = (dims.slots + 1) * parts.rows
    for index in range(last + 1):
        if index:
            parts.key_value(parts.rows)
        if index == last:
            break
        if index:
            work.other("move", 2 * 4 * keys * parts.hidden, 4)  # the bank and the new rows, joined
            parts.self_attention(parts.rows, keys)
        if index in dims.cross_layers:
            parts.cross(1, shares=False)
        parts.feed_forwards()
    rows = last * parts.rows * parts.hidden
    work.other("move", 3 * 2 * rows, 3)
    visual = 2 * len(dims.cross_layers) * parts.visual * parts.hidden
    moved = parts.rows * parts.hidden + visual + 2 * dims.slots * rows + 3 * rows + 3 * parts.visual + text
    return work.cost(text=text, inputs_outputs=moved)


def _answer(shape: QFormerShape, text: int) -> Cost:
    parts = _Parts(shape, text)
    dims, keys = shape.dims, (shape.dims.slots + 1) * parts.rows
    parts.work.other("move", 2 * 4 * keys * parts.hidden // 2, 4)
    _last_layer(parts, keys)
    bank = 2 * keys * parts.hidden + parts.rows * parts.hidden + keys
    visual = 2 * parts.visual * (parts.hidden + 1) if dims.layers - 1 in dims.cross_layers else 0
    return parts.work.cost(text=text, inputs_outputs=bank + visual + dims.queries * (parts.hidden + dims.n_embd))


def _replay(shape: QFormerShape, text: int) -> Cost:
    steps = shape.dims.slots
    parts = _Parts(shape, text, steps)
    dims, last = shape.dims, shape.dims.layers - 1
    all_rows = steps * parts.rows
    for index in range(last + 1):
        if index:
            parts.key_value(all_rows)
        if index == last:
            break
        if index:
            parts.self_attention(parts.rows, all_rows, steps)
        if index in dims.cross_layers:
            parts.cross(steps, shares=True)
        parts.feed_forwards()
    _last_layer(parts, all_rows, shares=True)
    visual = 2 * len(dims.cross_layers) * parts.visual * parts.hidden
    said = dims.queries * (parts.hidden + dims.n_embd) + len(dims.cross_layers) * parts.visual
    moved = parts.rows * parts.hidden + visual + steps * parts.visual + parts.visual + steps + text + said
    return parts.work.cost(text=text, inputs_outputs=moved)


def _last_layer(parts: _Parts, keys: int, *, shares: bool = False) -> None:
    """The newest frame's query rows through the last layer, and to the language model."""
    dims = parts.dims
    parts.self_attention(dims.queries, keys)
    if dims.layers - 1 in dims.cross_layers:
        parts.cross(1, shares=shares)
    parts.feed_forward(dims.queries)
    parts.work.linear(dims.queries, dims.hidden, dims.n_embd)


_BUILDERS = {"visual_kv": _visual_kv, "prompt": _prompt, "step": _step, "answer": _answer, "replay": _replay}

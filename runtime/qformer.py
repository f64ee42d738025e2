"""The exported Q-Former over the memory: one visual bank for the stream, one query bank for each standing question.

The order of things is MA-LMM's (`blip2_vicuna_instruct.py : generate`): a frame enters the visual bank before the Q-Former
reads it; each layer's input rows enter the query bank after the layer has attended; each bank makes room before its next
reading, so that a question between two frames sees what the reference would see there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.bank import Bank
from keepsight.runtime.bank_state import RIDER, rows_in_order
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.backends import Engines, open_engines
from keepsight.runtime.graphs.device_bank import DeviceMemoryBank, visual_bank
from keepsight.runtime.graphs.engine import Tensor, check_finite
from keepsight.runtime.memory import MemoryBank, Policy, Rider
from keepsight.runtime.position_table import position_table
from keepsight.runtime.positions import position_policy, ranks, step_mask
from keepsight.streams.errors import BundleError, UsageError

Float32 = NDArray[np.float32]

_log = logging.getLogger("keepsight.qformer")


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """What the Q-Former says about the memory.

    Attributes:
        query_output: float32 `[Q, H]`, the last layer's query rows.
        rows: float32 `[Q, n_embd]`, for the language model.
        attention: float32 `[X, S, N]`, where the query rows looked at last: of each cross-attention layer the mean over heads and
            rows, each layer sums to 1. None for a standing question, and from a bundle whose `replay` does not give it.
    """

    query_output: Float32
    rows: Float32
    attention: Float32 | None = None


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question as the Q-Former reads it, constant over the stream: layer 0's rows `[R, H]` and the text mask `[L]`."""

    text: str
    state: Float32
    text_mask: Float32

    @property
    def row_mask(self) -> Float32:
        """`[R]`: query rows are always seen, text rows where they are no padding."""
        queries = np.ones(len(self.state) - len(self.text_mask), np.float32)
        return np.concatenate([queries, self.text_mask])


class QFormer:
    """The graphs of a bundle and the visual bank that they read.

    Args:
        bundle: an opened bundle.
        memory: how both banks make room; `mbc` is MA-LMM's, and what the shipped weights were trained with. Another than the
            bundle was trained for, where it says so, is logged as a warning.
        threads: CPU threads of each graph.
        engines: the graphs, already loaded; by default ONNX Runtime on the CPU loads them. Closed with this.

    Raises:
        EngineError: a graph can't be loaded, or not on the provider asked for.
    """

    def __init__(
        self, bundle: Bundle, *, memory: Policy = "mbc", threads: int = 1, engines: Engines | None = None
    ) -> None:
        self.bundle, self.policy = bundle, memory
        dims = bundle.manifest.dims
        self.dims = dims
        trained = bundle.manifest.provenance.get("memory", memory)
        if trained != memory:
            _log.warning("%s was trained for the memory %s and runs with %s.", bundle.manifest.name, trained, memory)
        self._engines = open_engines(bundle, threads=threads) if engines is None else engines
        self.bank: Bank = visual_bank(dims, self._engines.memory, policy=memory)
        _log.info("the visual memory of %s is on the %s", bundle.manifest.name, self.bank_on)
        self._positions = position_policy(bundle.manifest)
        self._table = position_table(bundle)
        self._visual: dict[str, Tensor] = {}
        self.limit = dims.memory_length

    @property
    def bank_on(self) -> Literal["host", "device"]:
        """Where the visual bank is: on the GPU with TensorRT, if the bundle has the graph `memory`."""
        return "device" if isinstance(self.bank, DeviceMemoryBank) else "host"

    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Features float32 `[B, N, C]` of frames uint8 `[B, H, W, 3]`, after ln_vision.

        Where the encoder runs on a device they stay there until the next frame; np.asarray copies them.
        """
        return self._engines["vision"].enqueue({"frames": images})["features"]

    def remember(self, features: Tensor, time_s: float) -> None:
        """Put one frame's features `[N, C]` into the visual bank.

        Raises:
            EngineError: features that are not finite, or that a later frame has overwritten.
            UsageError: the stream is longer than the bundle's table of positions, if it has one.
        """
        if self._table is not None:  # on the host, also for a bank on a device
            features = self._table.added(features, self.bank.frames_seen)
        visual_kv = self._engines["visual_kv"]
        if self.bank_on == "device":  # the graph that updates the bank says whether all is finite
            self.bank.append(features, time_s=time_s, riders=visual_kv.enqueue({"features": features}))
            self._visual = {}
            return
        riders = visual_kv.run({"features": features})
        banked = np.asarray(features)
        check_finite("vision", {"features": banked})
        self.bank.append(banked, time_s=time_s, riders=riders)
        self._visual = {}

    def limit_to(self, length: int) -> None:
        """Store fewer slots than `memory_length`, or so many again: the visual bank, and those of questions to come.

        See `MemoryBank.limit_to`.

        Raises:
            UsageError: not 1 to `memory_length`; the bank is on a device, whose tensors have one size.
        """
        if not isinstance(self.bank, MemoryBank):
            raise UsageError("a memory bank on a device has one size.", fix="Leave its length as it is.")
        self.bank.limit_to(length)
        self.limit = length

    def bank_state(self, *, kv: bool) -> dict[str, NDArray[Any]]:
        """The visual bank's state; without keys and values `restore_bank` computes them again."""
        return self.bank.state(riders=kv)

    def restore_bank(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore the visual bank; keys and values that the state lacks are computed from its features.

        A merged key is the same mean of keys as its feature is of features, and a key is an affine image of a feature: so they
        are equal but for rounding.

        Raises:
            UsageError: it is no state of this bank, which is then unchanged.
        """
        kv = any(name.startswith(RIDER) for name in state)
        self.bank.check_state(state, riders=kv)
        self.bank.restore(state if kv else {**state, **self._riders_of(state["features"])})
        self._visual = {}

    def with_empty_bank(self) -> QFormer:
        """The same graphs over another visual bank, on the host, for a replay over other frames. Close the first one alone."""
        other = copy.copy(self)
        other.bank, other._visual, other.limit = visual_bank(self.dims, policy=self.policy), {}, self.dims.memory_length
        return other

    def beside(self) -> QFormer:
        """The same graphs over another visual bank of the same kind, for another stream. Close the first one alone.

        Raises:
            EngineError: the bank of this one is on a device, which has no room for another.
        """
        other = copy.copy(self)
        other.bank, other._visual = visual_bank(self.dims, self._engines.more_memory(), policy=self.policy), {}
        other.limit = self.dims.memory_length
        return other

    def prompt(self, text: str) -> Prompt:
        """Prepare a question (already in the Q-Former's template).

        Raises:
            UsageError: it is longer than the largest text bucket.
        """
        tokenizer = self.bundle.tokenizer
        if tokenizer is None:
            ids, mask = np.zeros(0, np.int64), np.zeros(0, np.float32)
        else:
            ids, mask = tokenizer.encode(text, self.dims.text_buckets)
        state = self._engines["prompt"].run({"text_ids": ids, "text_mask": mask})["prompt_state"]
        return Prompt(text, state, mask)

    def stand(self, prompt: Prompt) -> StandingQuestion:
        """A question that is carried along from the next frame on."""
        return StandingQuestion(self, prompt)

    def replay(self, prompt: Prompt, visible: NDArray[np.bool_] | None = None) -> SoftPrompt:
        """Ask now: the Q-Former over the bank's slots as if they were the frames, oldest first, in one pass.

        Args:
            prompt: the question.
            visible: `[S, N]`, the slots to read, for a question about an interval; None = all that are in use.

        Raises:
            UsageError: nothing has been seen yet, or nothing is visible.
        """
        self._check_not_empty()
        rank = ranks(self.bank, visible)
        if (rank < 0).all():
            raise UsageError("No slot is visible to this question.", fix="Ask about a time that is remembered.")
        outputs = self._engines["replay"].run(
            {
                "prompt_state": prompt.state, "cross_k": self.bank.riders["cross_k"],
                "cross_v": self.bank.riders["cross_v"], "rank": rank, "bucket": self._positions.replay(self.bank, visible),
                "step_mask": step_mask(rank), "text_mask": prompt.text_mask,
            }
        )  # fmt: skip
        return SoftPrompt(outputs["query_output"], outputs["soft_prompt"], outputs.get("attention"))

    def visual_inputs(self) -> dict[str, Tensor]:
        """What `step` reads of the visual bank, the newest frame included: made once a frame for all standing questions.

        Keys and values are those of the bank itself, not copies; a device that has no bank of its own gets its copy once a frame.
        """
        self._check_not_empty()
        if not self._visual:
            step = self._engines["step"]
            self._visual = {
                **{name: keys if self.bank_on == "device" else step.place(name, keys) for name, keys in self.bank.riders.items()},
                "visual_mask": self.bank.visible[0].astype(np.float32), "bucket": self._positions.step(self.bank),
            }  # fmt: skip
        return self._visual

    def answer_places(self) -> NDArray[np.int32] | None:
        """Position buckets `[S, N]` of a pass that makes an answer, if they are not those of `visual_inputs`."""
        return self._positions.answer(self.bank)

    def run(self, graph: str, feeds: Mapping[str, Tensor]) -> dict[str, Float32]:
        """Run one graph of the bundle."""
        if graph not in self._engines:
            raise BundleError(f"{self.bundle.path} has no graph {graph!r}; it has {', '.join(self._engines)}.")
        return self._engines[graph].run(feeds)

    def close(self) -> None:
        """Give the engines back."""
        self._engines.close()

    def _riders_of(self, features: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Keys and values `[X, used, N, H]` of banked features `[1, used, N, C]`, one slot at a time as they first came."""
        if not features.shape[1]:
            return {RIDER + name: np.asarray(values)[:, :0] for name, values in self.bank.riders.items()}
        runs = [self._engines["visual_kv"].run({"features": rows}) for rows in features[0]]
        return {RIDER + name: np.stack([run[name] for run in runs], axis=1) for name in self.bank.riders}

    def _check_not_empty(self) -> None:
        if not self.bank.used:
            raise UsageError("Nothing has been seen yet.", fix="Ask after the first frame.")


class StandingQuestion:
    """A question carried along frame by frame: at any moment exactly MA-LMM's online loop up to there.

    Made by `QFormer.stand`; call `step` after every `QFormer.remember`.
    """

    def __init__(self, qformer: QFormer, prompt: Prompt) -> None:
        self._qformer, self.prompt = qformer, prompt
        dims = qformer.dims
        rows = dims.queries + len(prompt.text_mask)
        self.bank = MemoryBank(
            length=dims.memory_length,
            tokens=rows,
            channels=dims.hidden,
            groups=dims.banked_layers,
            riders={name: Rider(dims.banked_layers, dims.hidden) for name in ("self_k", "self_v")},
            policy=qformer.policy,
            current_outside=True,
        )
        self.bank.limit_to(qformer.limit)
        self._newest: dict[str, Float32] | None = None
        self._visual: dict[str, Tensor] = {}

    def step(self, time_s: float) -> None:
        """Read the frame that was just remembered, then bank the rows that read it."""
        self.bank.settle()
        self._visual = self._qformer.visual_inputs()
        outputs = self._read(self._visual, self.bank.visible * self.prompt.row_mask)
        self._newest = outputs
        self.bank.append(
            outputs["rows"], time_s=time_s, riders={"self_k": outputs["row_k"], "self_v": outputs["row_v"]}
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """The query bank, keys and values always included: no graph makes them of banked rows. Take it after a `step`."""
        return self.bank.state()

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a state, over the visual bank of the same moment (restore that first).

        The newest frame's rows are those of the newest slots: a bank makes room only before its next reading.

        Raises:
            UsageError: it is no state of this question's bank, which is then unchanged.
        """
        self.bank.restore(state)
        self._newest, self._visual = None, {}
        if self.bank.used:
            arrays = {"rows": self.bank.features, "row_k": self.bank.riders["self_k"], "row_v": self.bank.riders["self_v"]}
            newest = self.bank.order[:, -1:]
            self._newest = {name: rows_in_order(array, newest)[:, 0] for name, array in arrays.items()}
            self._visual = self._qformer.visual_inputs()

    def answer(self, *, marked: bool = True) -> SoftPrompt:
        """The last layer for the newest frame.

        Args:
            marked: whether that frame gets the marker of the one that is answered at, where the bundle has one.

        Raises:
            UsageError: no frame has been read yet.
        """
        if self._newest is None:
            raise UsageError("Nothing has been seen since the question was put.", fix="Ask after the next frame.")
        last = -1
        past = self.bank.past * self.prompt.row_mask
        newest, visual = (self._marked(past) if marked else None) or (self._newest, self._visual)
        feeds: dict[str, Tensor] = {
            "rows_last": newest["rows"][last], "k_last": newest["row_k"][last], "v_last": newest["row_v"][last],
            "bank_k": self.bank.riders["self_k"][last], "bank_v": self.bank.riders["self_v"][last],
            "bank_mask": past[last], "text_mask": self.prompt.text_mask,
        }  # fmt: skip
        dims = self._qformer.dims
        if dims.layers - 1 in dims.cross_layers:
            feeds |= {
                "cross_k": visual["cross_k"][last], "cross_v": visual["cross_v"][last],
                "visual_mask": visual["visual_mask"], "bucket": visual["bucket"],
            }  # fmt: skip
        outputs = self._qformer.run("answer", feeds)
        return SoftPrompt(outputs["query_output"], outputs["soft_prompt"])

    def _read(self, visual: Mapping[str, Tensor], self_mask: Float32) -> dict[str, Float32]:
        """The layers before the last, for the newest frame: rows, keys and values `[Y, R, H]`."""
        return self._qformer.run(
            "step",
            {
                "prompt_state": self.prompt.state, **visual, "self_k": self.bank.riders["self_k"],
                "self_v": self.bank.riders["self_v"], "self_mask": self_mask, "text_mask": self.prompt.text_mask,
            },
        )  # fmt: skip

    def _marked(self, past: Float32) -> tuple[dict[str, Float32], dict[str, Tensor]] | None:
        """The newest frame read again with the marker that only an answer sees; its rows are not banked. None: no marker."""
        places = self._qformer.answer_places()
        if places is None:
            return None
        visual = {**self._visual, "bucket": places}
        return self._read(visual, past), visual

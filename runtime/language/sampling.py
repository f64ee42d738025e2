"""From logits to text: decoding options, the sampler chain, and a stream that never shows a stop string.

One chain serves one answer: grammar, repetition penalty over the tokens generated so far (never over the prompt, as
MA-LMM's reference has it), top-k, top-p, min-p, then temperature and a draw, or the most likely token.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.runtime.language.llama import C, Llama
from keepsight.streams.errors import LLMError, UsageError

__all__ = ["Decoding", "Sampler", "TextStream"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is generated.

    Args:
        max_tokens: most tokens an answer may have.
        stop: the answer ends before the first of these strings, which is not part of it.
        temperature: 0 takes the most likely token each time, and the three filters then change nothing.
        top_k: keep the k most likely tokens, 0 for all.
        top_p: keep the smallest set of tokens with this probability, 1 for all.
        min_p: keep tokens at least this times as likely as the most likely one, 0 for all.
        grammar: GBNF with a rule `root` that the answer must follow.
        json_schema: a JSON schema that the answer must follow; excludes `grammar`.
        repetition_penalty: divides positive logits (multiplies negative ones) of tokens generated before; 1 for none.
        seed: of the draws at a temperature above 0.
        beams: width of the beam search; 1 for none.
        length_penalty: a finished beam scores its log-probability / length ** length_penalty.

    Raises:
        UsageError: a value is out of its range, or two exclude each other.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, f"max_tokens={self.max_tokens}", "Ask for at least one token.")
        _require(all(self.stop), "An empty stop string", "Leave it out: it would end every answer at once.")
        _require(0 <= self.temperature < math.inf, f"temperature={self.temperature}", "Use 0 or more.")
        _require(self.top_k >= 0, f"top_k={self.top_k}", "Use 0 (off) or more.")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p}", "Use a share above 0, up to 1 (off).")
        _require(0 <= self.min_p <= 1, f"min_p={self.min_p}", "Use a share from 0 (off) to 1.")
        penalty = self.repetition_penalty
        _require(0 < penalty < math.inf, f"repetition_penalty={penalty}", "Use 1 for none.")
        _require(self.beams >= 1, f"beams={self.beams}", "Use 1 (off) or more.")
        _require(math.isfinite(self.length_penalty), f"length_penalty={self.length_penalty}", "Use a finite number.")
        both = self.grammar is not None and self.json_schema is not None
        _require(not both, "grammar and json_schema together", "Give one of them.")
        _require(self.grammar is None or bool(self.grammar.strip()), "An empty grammar", "Leave it out for none.")
        constrained = self.grammar is not None or self.json_schema is not None
        _require(self.beams == 1 or not constrained, "Beams with a grammar", "Use beams=1.")
        _require(self.beams == 1 or self.temperature == 0, "Beams with a temperature", "Use beams=1 or temperature=0.")

    def gbnf(self) -> str | None:
        """The grammar to follow, from `grammar` or `json_schema`.

        Raises:
            UsageError: the schema uses something that has no grammar.
        """
        if self.json_schema is None:
            return self.grammar
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        try:
            return str(json_schema_to_gbnf(json.dumps(self.json_schema)))
        except Exception as error:  # the converter raises whatever its recursion meets, assertions included
            raise UsageError(f"The JSON schema has no grammar ({error!r}).", fix="Use plain JSON schema.") from error


def _require(condition: bool, found: str, fix: str) -> None:
    if not condition:
        raise UsageError(f"{found} makes no sense for an answer.", fix=fix)


class Sampler:
    """Picks the next token of one answer, again and again. A context manager: the chain lives in C memory.

    Raises:
        UsageError: the grammar does not parse.
    """

    def __init__(self, llama: Llama, decoding: Decoding) -> None:
        grammar = self._grammar(llama, decoding.gbnf())
        self._chain: Any = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for part in [*grammar, *self._members(llama.n_vocab, decoding)]:
            C.llama_sampler_chain_add(self._chain, part)
        self._candidates = np.empty(llama.n_vocab, np.dtype(C.llama_token_data))
        self._ids = np.arange(llama.n_vocab, dtype=np.int32)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the chain and its members."""
        if self._chain is not None:
            C.llama_sampler_free(self._chain)
        self._chain = None

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, from logits float32 `[n_vocab]`; the chain remembers it.

        Raises:
            LLMError: no token is allowed, for example at a dead end of a grammar.
        """
        # The samplers reorder the candidates, so ids are written afresh each time.
        self._candidates["id"], self._candidates["logit"] = self._ids, logits
        data = ctypes.cast(self._candidates.ctypes.data, ctypes.POINTER(C.llama_token_data))
        array = C.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
        C.llama_sampler_apply(self._chain, ctypes.byref(array))
        if array.selected < 0 or array.data[array.selected].logit == -math.inf:
            raise LLMError("No token is allowed next.", fix="Check that the grammar can end wherever it may lead.")
        token = int(array.data[array.selected].id)
        C.llama_sampler_accept(self._chain, token)
        return token

    @staticmethod
    def _grammar(llama: Llama, gbnf: str | None) -> list[Any]:
        if gbnf is None:
            return []
        sampler = C.llama_sampler_init_grammar(llama.vocabulary, gbnf.encode(), b"root")
        if not sampler:
            raise UsageError(
                "llama.cpp cannot parse the grammar (its reason is on stderr).",
                fix="Check its GBNF: it needs a rule `root`, no left recursion, and every rule it names.",
            )
        return [sampler]

    @staticmethod
    def _members(n_vocab: int, decoding: Decoding) -> list[Any]:
        members = []
        if decoding.repetition_penalty != 1.0:
            window = decoding.max_tokens  # every generated token
            members.append(C.llama_sampler_init_penalties(n_vocab, window, decoding.repetition_penalty, 0.0, 0.0))
        if decoding.temperature == 0:
            return [*members, C.llama_sampler_init_greedy()]
        if decoding.top_k > 0:
            members.append(C.llama_sampler_init_top_k(decoding.top_k))
        if decoding.top_p < 1:
            members.append(C.llama_sampler_init_top_p(decoding.top_p, 1))
        if decoding.min_p > 0:
            members.append(C.llama_sampler_init_min_p(decoding.min_p, 1))
        return [*members, C.llama_sampler_init_temp(decoding.temperature), C.llama_sampler_init_dist(decoding.seed)]


class TextStream:
    """Turns token bytes into text that is safe to show: whole characters, and nothing that may become a stop string.

    >>> stream = TextStream(["END"])
    >>> stream.push(b"caf\\xc3"), stream.push(b"\\xa9 E"), stream.push(b"N"), stream.push(b"D ignored")
    ('caf', 'é ', '', '')
    >>> stream.stopped
    True
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Adds the bytes of one token and returns what may be shown now."""
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """The rest, once no more tokens come; a character that was cut in half shows as U+FFFD."""
        shown = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return shown + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        hits = [at for at in map(text.find, self._stop) if at >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

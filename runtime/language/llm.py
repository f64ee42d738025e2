"""The language model: prompts of text and soft-prompt rows in; streamed answers, rankings and logits out.

`LLM` is a thin layer over llama.cpp (`llama.py`). A prompt is a list of segments (`segments.py`); one that begins as
the last one did is only prefilled from there (`sequences.py`); every answer runs in a branch of its own, so several may
be read at once; beam search and option scoring branch the same way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from keepsight.runtime.language.beams import Hypothesis, beam_search, log_softmax
from keepsight.runtime.language.gguf_rows import GGUFMatrix, find_matrix
from keepsight.runtime.language.llama import Llama, Perf, physical_cores
from keepsight.runtime.language.prompt import Block, blocks_of, tokenise
from keepsight.runtime.language.sampling import Decoding, Sampler, TextStream
from keepsight.runtime.language.segments import Embeds, Segment, Special, Text, Tokens, render, verbatim
from keepsight.runtime.language.sequences import SEQUENCES, CancelledError, Prefill, Sequences
from keepsight.streams.errors import LLMError, UsageError

__all__ = [
    "LLM",
    "Answer",
    "Embeds",
    "Generation",
    "Perf",
    "Prefill",
    "RankedOption",
    "Score",
    "Segment",
    "Special",
    "Text",
    "Tokens",
    "render",
    "verbatim",
]

Float32 = npt.NDArray[np.float32]
Finish = Literal["stop", "eog", "length", "cancelled"]

# These multiply token embeddings by sqrt(n_embd) inside llama.cpp, but not rows that are fed as embeddings; gemma and
# gemma2 multiply both, the others neither. The self-check at load catches an architecture this does not know.
_CALLER_SCALES = frozenset({"gemma3", "gemma3n", "gemma4", "gemma-embedding"})
_SELF_CHECK_TEXT = "The camera saw 3 cats, and then a red ball."
# Of the logits' standard deviation. The difference is 0 when the embedding table is F16, F32 or Q8_0. Other types may
# be dequantised with another rounding of the last bit; a wrong scale is off by several standard deviations.
_SELF_CHECK_LIMIT = 0.05


Score = Literal["answer", "prefix", "mean"]
"""What options are ranked by, see `LLM.rank`."""


class RankedOption(NamedTuple):
    """An option, its log-probability after the prompt, its probability among the options given, and the tokens scored."""

    option: str
    logprob: float
    probability: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer and what it cost.

    Args:
        text: all of it.
        finish: a stop string, the model's own end token, max_tokens, or cancelled.
        tokens: tokens generated, the end token not counted.
        prompt_rows: rows of the prompt, of which `reused_rows` were not prefilled again.
        prefill_s: seconds of prefill.
        first_token_s: seconds from the start of the prefill until the first token was known (for beams: until the end).
        tokens_per_s: speed of the tokens after the first, the reader's own time left out; 0 if there were none.
        logprob: of the answer, for a beam search only.
        token_s: seconds that each token took to come, the first and the end token included; none for a beam search.
    """

    text: str
    finish: Finish
    tokens: int
    prompt_rows: int = 0
    reused_rows: int = 0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    tokens_per_s: float = 0.0
    logprob: float | None = None
    token_s: tuple[float, ...] = ()


class Generation(Iterator[str]):
    """An answer while it is written: iterate for pieces of text, then read `result`. Closing it early frees it."""

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces = pieces
        self._result: Answer | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._result = end.value or self._result
            raise

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the answer where it is; `result` is then only there if it had finished."""
        self._pieces.close()

    @property
    def result(self) -> Answer:
        """The whole answer with its timings.

        Raises:
            LLMError: it has not been read to its end.
        """
        if self._result is None:
            raise LLMError("The answer is not finished.", fix="Iterate to its end before reading the result.")
        return self._result


class LLM:
    """A causal language model in a GGUF file, on llama.cpp. A context manager; any thread may call any method.

    >>> with LLM("model.gguf", n_threads=1) as llm:                                      # doctest: +SKIP
    ...     llm.answer([Special("<|im_start|>user\\n"), Text("Hi"), Special("<|im_end|>\\n<|im_start|>assistant\\n")],
    ...                max_tokens=16).text
    'Hello! How can I help you today?'

    No token is added to a prompt: where a model wants its BOS token, the template spells it.

    Args:
        path: the GGUF file.
        n_ctx: positions of the context, shared by the prompt and all open answers.
        n_threads: CPU threads; by default one per physical core this process may use.
        n_batch: rows decoded by one call; between calls a cancelled prefill stops, and a cached prefix can end.
        n_gpu_layers: layers kept on the GPU, -1 for all; refused by a build without a GPU.
        seed: of the draws at a temperature above 0.
        self_check: feed one prompt as tokens and as embedding rows, and refuse the model if their logits differ.

    Raises:
        MissingModelError: there is no file at `path`.
        LLMError: llama.cpp refuses the file or the settings, or the self-check fails.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_ctx: int = 2048,
        n_threads: int | None = None,
        n_batch: int = 512,
        n_gpu_layers: int = 0,
        seed: int = 0,
        self_check: bool = True,
    ) -> None:
        threads = physical_cores() if n_threads is None else n_threads
        if threads < 1 or n_batch < 1:
            raise UsageError(f"n_threads={threads}, n_batch={n_batch}.", fix="Both must be at least 1.")
        self.path = Path(path)
        self._llama = Llama(
            self.path,
            n_ctx=n_ctx,
            n_threads=threads,
            n_batch=n_batch,
            n_gpu_layers=n_gpu_layers,
            n_sequences=SEQUENCES,
        )
        self._sequences = Sequences(self._llama)
        self._seed = seed
        self._table: GGUFMatrix | None = None
        self._pieces: dict[int, bytes] = {}
        if self_check:
            try:
                self.check_embeddings()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({str(self.path)!r}, n_ctx={self.n_ctx}, n_threads={self.n_threads}, n_batch={self.n_batch})"

    def close(self) -> None:
        """Frees the model; a second call does nothing, and an answer that is still open fails at its next piece."""
        self._sequences.close()

    @property
    def architecture(self) -> str:
        """The architecture's name in the GGUF file, such as `llama`."""
        return self._llama.architecture

    @property
    def n_embd(self) -> int:
        """Width of an embedding row."""
        return self._llama.n_embd

    @property
    def n_vocab(self) -> int:
        """Number of token ids."""
        return self._llama.n_vocab

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        return self._llama.n_ctx

    @property
    def n_batch(self) -> int:
        """Rows decoded by one call."""
        return self._llama.n_batch

    @property
    def n_threads(self) -> int:
        """CPU threads."""
        return self._llama.n_threads

    @property
    def position_bytes(self) -> int:
        """About what a position of the context takes."""
        return self._llama.position_bytes

    @property
    def newest_prefill(self) -> Prefill | None:
        """What the last prompt took; None before the first."""
        return self._sequences.newest

    # What may change while the model stays loaded

    def set_threads(self, count: int) -> None:
        """Computes with so many CPU threads from the next call of llama.cpp on, also in answers that are open.

        Raises:
            UsageError: fewer than 1.
        """
        if count < 1:
            raise UsageError(f"n_threads={count}.", fix="It must be at least 1.")
        with self._sequences.lock:
            self._sequences.check_open()
            self._llama.set_threads(count)

    def resize(self, n_ctx: int) -> bool:
        """Opens a context of another size over the loaded model: a smaller one gives memory back. The kept prompt is forgotten.

        Returns:
            False, and nothing has changed, if an answer is open: it has its state in the context. Try again when it is read.

        Raises:
            LLMError: the model was not trained for so many positions, or there is no memory; the context is then as large as
                it was, or, if there is no memory even for that, the model is closed.
        """
        return self._sequences.resize(n_ctx)

    # What a prompt is made of

    def tokenise(self, segments: Sequence[Text | Special | Tokens]) -> list[int]:
        """Token ids of segments that hold no embeddings.

        Neighbouring text is tokenised together, as a tokeniser of the whole prompt would, and only control tokens that
        a `Special` spells become control tokens.
        """
        with self._sequences.lock:
            self._sequences.check_open()
            return tokenise(self._llama, segments)

    def embedding_rows(self, token_ids: Sequence[int]) -> Float32:
        """The model's own embeddings, scaled as they must be fed: float32 `[n, n_embd]`.

        `Embeds(embedding_rows(ids))` and `Tokens(ids)` mean the same. Only the rows asked for are read from the file.
        """
        ids = np.asarray(token_ids, np.int64)
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= self.n_vocab:
            raise LLMError(f"Token ids {token_ids!r}, where 0..{self.n_vocab - 1} exist.", fix="Use tokenise().")
        if self._table is None:
            self._table = find_matrix(self.path, "token_embd.weight")
        scale = math.sqrt(self.n_embd) if self.architecture in _CALLER_SCALES else 1.0
        return self._table.read(ids.tolist()) * np.float32(scale)

    def check_embeddings(self) -> float:
        """Feeds one prompt as tokens and as embedding rows and returns the largest difference of their logits.

        Raises:
            LLMError: the difference is more than rounding: the model scales or changes token embeddings in a way that
                rows do not share, so a soft prompt would be misread.
        """
        ids = self.tokenise([Text(_SELF_CHECK_TEXT)])
        with self._sequences.lock:
            expected = self.logits([Tokens(ids)])
            found = self.logits([Embeds(self.embedding_rows(ids))])
            self.reset()
        difference = float(np.abs(expected - found).max())
        if not difference <= _SELF_CHECK_LIMIT * float(expected.std()):
            raise LLMError(
                f"Self-check of {self.path.name} failed: one prompt as tokens and as embedding rows gives logits that "
                f"differ by {difference:.3g}. The architecture {self.architecture!r} treats the two differently.",
                fix="Use a model of a known architecture (llama, qwen, gemma3, ...).",
            )
        return difference

    # Prefill

    def prefix(self, segments: Sequence[Segment]) -> Prefill:
        """Prefills the beginning of coming prompts, so that they start with these rows done.

        Sequence 0 keeps the last prompt; whatever a new one shares with it, by content, is not decoded again. What is
        shared is counted in whole blocks: rows of one kind (tokens, or embeddings), at most `n_batch` of them.
        """
        return self._sequences.prefill(self._blocks(segments))[1]

    def reset(self) -> None:
        """Forgets the prompt that is kept."""
        self._sequences.forget()

    def logits(self, segments: Sequence[Segment], *, all_positions: bool = False) -> Float32:
        """Logits after the prompt, float32 `[n_vocab]`, or after each of its rows, `[rows, n_vocab]`.

        The first may use the kept prompt, as `generate` does; the second decodes everything anew.
        """
        blocks = self._blocks(segments)
        if all_positions:
            return self._sequences.logits_everywhere(blocks)
        return self._sequences.prefill(blocks)[0].copy()

    def perf(self) -> Perf:
        """What llama.cpp itself has counted and timed since the last call, to compare with `Answer`'s times."""
        with self._sequences.lock:
            self._sequences.check_open()
            return self._llama.perf()

    def pace(self, segments: Sequence[Segment], tokens: int) -> Iterator[float]:
        """Decodes so many tokens after a prompt, the likeliest each, end tokens too; gives the seconds that each took.

        To measure with: other answers may be read between two of them.

        Raises:
            LLMError: the prompt and the tokens do not fit the context.
        """
        blocks = self._blocks(segments)
        self._sequences.check_room(blocks, tokens, f"{tokens} new tokens")
        with self._sequences.branches(1) as (branch,):
            logits, prefill = self._start(blocks, [branch], threading.Event())
            for position in range(prefill.rows, prefill.rows + tokens):
                started = perf_counter()
                row = np.array([logits.argmax()], np.int32)
                logits = self._sequences.decode(row, np.array([position]), np.array([branch]))[0]
                yield perf_counter() - started

    # Answers

    def generate(
        self,
        segments: Sequence[Segment],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        cancel: threading.Event | None = None,
    ) -> Generation:
        """Starts an answer: an iterator over pieces of its text, with `result` at its end.

        Arguments are checked now; the prefill runs with the first piece. A beam search gives its text in one piece. The
        options are those of `Decoding`; `seed` defaults to the model's; `cancel` is looked at between tokens and
        between the calls of a prefill.

        Raises:
            UsageError: an option is out of range.
            LLMError: the prompt and `max_tokens` do not fit the context; a row is not fit to feed.
        """
        decoding = Decoding(
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            grammar=grammar,
            json_schema=json_schema,
            repetition_penalty=repetition_penalty,
            seed=self._seed if seed is None else seed,
            beams=beams,
            length_penalty=length_penalty,
        )
        blocks = self._blocks(segments)
        self._sequences.check_room(blocks, max_tokens * beams, f"{beams} x {max_tokens} new tokens")
        if grammar is not None or json_schema is not None:
            self._sampler(decoding).close()  # so that a grammar that does not parse fails here
        write = self._write if beams == 1 else self._write_beams
        return Generation(write(blocks, decoding, cancel or threading.Event()))

    def answer(self, segments: Sequence[Segment], **options: Any) -> Answer:
        """The whole answer at once; the options are those of `generate`."""
        generation = self.generate(segments, **options)
        for _ in generation:
            pass
        return generation.result

    def rank(
        self, segments: Sequence[Segment], options: Sequence[str], *, end: str = "", score: Score = "prefix"
    ) -> list[RankedOption]:
        """Scores each option as the continuation of the prompt, the most likely first; equal ones stay in their order.

        Args:
            segments: the prompt.
            options: plain text each; a leading space belongs to it if the answer would start with one.
            end: template text such as `<|im_end|>` that must follow. Without it `no` also counts the likelihood of
                everything that begins with `no`.
            score: `prefix`, the sum of the log-probabilities of the option's tokens (and those of `end`), as LAVIS ranks
                candidates (`blip2_vicuna_instruct.py : _predict_class`, whose mean is over a length that all share);
                `answer`, the same and that of the model ending there with any of its end tokens: of the option being the
                whole answer; `mean`, that of `answer` for each token, which does not favour short options.

        Raises:
            UsageError: no option, an empty one, or one that is given twice.
            LLMError: there is no room for the prompt and the longest option.
        """
        blocks = self._blocks(segments)
        continuations = [self.tokenise([Text(option), Special(end)]) for option in options]
        if not continuations or not all(continuations) or len(set(options)) < len(options):
            raise UsageError(
                f"The options {list(options)!r} cannot be ranked.", fix="Give at least one; none empty, none twice."
            )
        start = sum(len(block.rows) for block in blocks)
        ending = score != "prefix"
        self._sequences.check_room(blocks, max(map(len, continuations)) + ending, "the longest option")
        with self._sequences.lock:
            first = log_softmax(self._sequences.prefill(blocks)[0])
            totals = [float(first[tokens[0]]) for tokens in continuations]
            for group in self._packed(continuations, ending=ending):
                for index, logprob in self._score(group, continuations, start, ending=ending):
                    totals[index] += logprob
        lengths = [len(tokens) + ending for tokens in continuations]
        scores = np.array(totals) / lengths if score == "mean" else np.array(totals)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        ranked = list(map(RankedOption, options, totals, shares.tolist(), lengths))
        return [ranked[index] for index in np.argsort(-scores, kind="stable")]

    # Writing an answer

    def _write(self, blocks: list[Block], decoding: Decoding, cancel: threading.Event) -> Generator[str, None, Answer]:
        stream = TextStream(decoding.stop)
        shown: list[str] = []
        seconds: list[float] = []
        finish: Finish | None = None
        with self._sequences.branches(1) as (branch,), self._sampler(decoding) as sampler:
            try:
                logits, prefill = self._start(blocks, [branch], cancel)
            except CancelledError:
                return Answer(text="", finish="cancelled", tokens=0)
            tokens = _timed(self._draws(logits, sampler, branch, prefill.rows), seconds)
            while finish is None:
                piece = self._next_piece(tokens)
                if piece is None:
                    finish = "eog"
                    break
                if text := stream.push(piece):
                    shown.append(text)
                    yield text
                finish = _finish(stream, len(seconds), decoding.max_tokens, cancel)
        if rest := stream.flush():
            shown.append(rest)
            yield rest
        return Answer(
            text="".join(shown),
            finish=finish,
            tokens=len(seconds) - (finish == "eog"),
            prompt_rows=prefill.rows,
            reused_rows=prefill.reused,
            prefill_s=prefill.seconds,
            first_token_s=prefill.seconds + seconds[0],
            tokens_per_s=(len(seconds) - 1) / sum(seconds[1:]) if len(seconds) > 1 else 0.0,
            token_s=tuple(seconds),
        )

    def _sampler(self, decoding: Decoding) -> Sampler:
        with self._sequences.lock:
            self._sequences.check_open()
            return Sampler(self._llama, decoding)

    def _draws(self, logits: Float32, sampler: Sampler, branch: int, position: int) -> Iterator[int]:
        """Token after token, each decoded only when the next one is wanted."""
        while True:
            token = sampler.sample(logits)
            yield token
            row = np.array([token], np.int32)
            logits = self._sequences.decode(row, np.array([position]), np.array([branch]))[0]
            position += 1

    def _next_piece(self, tokens: Iterator[int]) -> bytes | None:
        """The bytes of the next token, None at the end token; under the lock, so that nobody closes the model now."""
        with self._sequences.lock:
            self._sequences.check_open()
            token = next(tokens)
            return None if self._llama.ends(token) else self._piece(token)

    def _write_beams(
        self, blocks: list[Block], decoding: Decoding, cancel: threading.Event
    ) -> Generator[str, None, Answer]:
        with self._sequences.branches(2 * decoding.beams) as branches:
            started = perf_counter()
            try:
                logits, prefill = self._start(blocks, branches, cancel)
                best = beam_search(
                    logits,
                    self._advance(branches, prefill.rows, cancel),
                    lambda tokens: self._complete(tokens, decoding.stop),
                    beams=decoding.beams,
                    max_tokens=decoding.max_tokens,
                    length_penalty=decoding.length_penalty,
                    repetition_penalty=decoding.repetition_penalty,
                )
            except CancelledError:
                return Answer(text="", finish="cancelled", tokens=0)
            seconds = perf_counter() - started
            text, finish, count = self._read(best, decoding)
        if text:
            yield text
        return Answer(
            text=text,
            finish=finish,
            tokens=count,
            prompt_rows=prefill.rows,
            reused_rows=prefill.reused,
            prefill_s=prefill.seconds,
            first_token_s=seconds,
            tokens_per_s=count / (seconds - prefill.seconds),
            logprob=best.logprob,
        )

    def _start(self, blocks: list[Block], branches: Iterable[int], cancel: threading.Event) -> tuple[Float32, Prefill]:
        """Prefills the prompt and makes each branch continue it."""
        with self._sequences.lock:
            logits, prefill = self._sequences.prefill(blocks, cancel)
            self._sequences.continue_kept(branches)
        return logits, prefill

    def _advance(
        self, branches: Sequence[int], start: int, cancel: threading.Event
    ) -> Callable[[Sequence[int], Sequence[int]], Float32]:
        """The step of a beam search: one half of the branches holds the live beams, the other takes the next ones."""
        half = len(branches) // 2
        current, spare = list(branches[:half]), list(branches[half:])
        position = start

        def advance(parents: Sequence[int], tokens: Sequence[int]) -> Float32:
            nonlocal current, spare, position
            if cancel.is_set():
                raise CancelledError
            count = len(parents)
            for parent, target in zip(parents, spare, strict=False):
                self._sequences.move(current[parent], target)
            self._sequences.drop(current)
            current, spare = spare, current
            rows, positions = np.array(tokens, np.int32), np.full(count, position)
            logits = self._sequences.decode(rows, positions, np.array(current[:count]))
            position += 1
            return logits

        return advance

    def _complete(self, tokens: tuple[int, ...], stop: tuple[str, ...]) -> bool:
        with self._sequences.lock:
            self._sequences.check_open()
            if self._llama.ends(tokens[-1]):
                return True
            return bool(stop) and any(string in self._text(tokens) for string in stop)

    def _read(self, best: Hypothesis, decoding: Decoding) -> tuple[str, Finish, int]:
        """The text of a hypothesis up to its stop string, why it ended, and its number of tokens."""
        with self._sequences.lock:
            self._sequences.check_open()
            ended = self._llama.ends(best.tokens[-1])
            pieces = [self._piece(token) for token in best.tokens]
        stream = TextStream(decoding.stop)
        text = "".join(map(stream.push, pieces)) + stream.flush()
        finish: Finish = "stop" if stream.stopped else "eog" if ended else "length"
        return text, finish, len(best.tokens) - ended

    def _text(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self._piece, tokens)).decode(errors="replace")

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._llama.piece(token)
        return self._pieces[token]

    # Ranking options

    def _packed(self, continuations: Sequence[Sequence[int]], *, ending: bool) -> Iterator[list[int]]:
        """Groups of options, by index, whose rows fit one batch; one of one token needs no row if its end is not scored."""
        group: list[int] = []
        rows = 0
        for index, tokens in enumerate(continuations):
            needed = len(tokens) - 1 + ending
            if needed > self.n_batch:
                raise LLMError(f"An option has {len(tokens)} tokens.", fix=f"Raise n_batch, now {self.n_batch}.")
            if group and (rows + needed > self.n_batch or len(group) == SEQUENCES // 2):
                yield group
                group, rows = [], 0
            if needed:
                group.append(index)
                rows += needed
        if group:
            yield group

    def _score(
        self, group: Sequence[int], continuations: Sequence[Sequence[int]], start: int, *, ending: bool
    ) -> Iterator[tuple[int, float]]:
        """Log-probability of all but the first token of each option in the group, decoded as one batch of branches.

        With `ending`, of the model ending after it, too.
        """
        fed = [continuations[index][: None if ending else -1] for index in group]
        wanted = [continuations[index][1:] for index in group]
        with self._sequences.branches(len(group)) as branches:
            self._sequences.continue_kept(branches)
            rows = np.concatenate([np.array(tokens, np.int32) for tokens in fed])
            positions = np.concatenate([start + np.arange(len(tokens)) for tokens in fed])
            sequences = np.repeat(branches, [len(tokens) for tokens in fed])
            logprobs = log_softmax(self._sequences.decode(rows, positions, sequences))
        ends = np.cumsum([len(tokens) for tokens in fed])
        for index, tokens, part in zip(group, wanted, np.split(logprobs, ends[:-1]), strict=True):
            logprob = float(part[np.arange(len(tokens)), tokens].sum())
            yield index, logprob + (float(np.logaddexp.reduce(part[-1, self._end_tokens])) if ending else 0.0)

    @cached_property
    def _end_tokens(self) -> list[int]:
        """Every token that ends an answer."""
        return [token for token in range(self.n_vocab) if self._llama.ends(token)]

    def _blocks(self, segments: Sequence[Segment]) -> list[Block]:
        with self._sequences.lock:
            self._sequences.check_open()
            return blocks_of(self._llama, segments)


def _timed(tokens: Iterator[int], seconds: list[float]) -> Iterator[int]:
    """The same tokens; appends how long each took to come, without the time its reader spends on it."""
    while True:
        started = perf_counter()
        token = next(tokens)
        seconds.append(perf_counter() - started)
        yield token


def _finish(stream: TextStream, tokens: int, max_tokens: int, cancel: threading.Event) -> Finish | None:
    if stream.stopped:
        return "stop"
    if tokens == max_tokens:
        return "length"
    return "cancelled" if cancel.is_set() else None

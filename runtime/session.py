"""A session: frames in, questions at any moment, answers out. Capture and language run on threads of their own."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.answer import NOTHING_REMEMBERED, Answer, AnswerStream, FrameCost, LatencyTrace, Mode, Perceived
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.concat import ConcatQuestion, frames_that_fit
from keepsight.runtime.evidence import Evidence, evidence_of, moments_of
from keepsight.runtime.graphs.backends import Engines
from keepsight.runtime.graphs.engine import Tensor
from keepsight.runtime.keyframes import KeyFrames
from keepsight.runtime.language.bundle_llm import load_llm
from keepsight.runtime.language.llm import LLM, Score, Segment, render, verbatim
from keepsight.runtime.language.llm import Answer as Written
from keepsight.runtime.language.ranking import Ranking, checked_options
from keepsight.runtime.live.gate import FrameGate
from keepsight.runtime.live.watcher import Watcher
from keepsight.runtime.memory import Policy
from keepsight.runtime.moments import Calendar
from keepsight.runtime.qformer import Prompt, QFormer, SoftPrompt, StandingQuestion
from keepsight.runtime.storage.feature_history import FeatureHistory
from keepsight.runtime.storage.feature_log import FeatureLog
from keepsight.runtime.storage.logged import logging_to, newest_of, remember_again
from keepsight.runtime.storage.resume import Resume
from keepsight.runtime.storage.snapshot import Array, Part, Question, SavedFrame, Snapshot, fingerprint
from keepsight.runtime.timeline import Clock, Interval, remembered, seen_within
from keepsight.streams import Frame, LiveSource, Source
from keepsight.streams.branches import Branch
from keepsight.streams.errors import BundleError, EngineError, KeepsightError, UsageError
from keepsight.streams.many import Camera
from keepsight.streams.sampling import Sampler
from keepsight.streams.uri import SourceURI


class Standing:
    """A question that a session carries along; ask it with `Session.ask`."""

    def __init__(self, question: str, carried: StandingQuestion, prompt: str | None) -> None:
        self.question, self.carried, self.prompt = question, carried, prompt


class Session:
    """One stream, its memory, and the language model that talks about it.

    >>> with Session(Bundle.open("tiny")) as session:                                    # doctest: +SKIP
    ...     for frame in session.source("clip.mp4"):
    ...         session.see(frame)
    ...     print(session.ask("what shape was first?").result.text)

    Args:
        bundle: an opened bundle.
        memory: how the banks make room (`mbc`, or `fifo`, `average`, `last` to compare with); or `concat`, for clips and
            standing questions alone: every frame's rows go to the language model (`concat.py`).
        threads: CPU threads of each stage; by default one for the graphs and all cores for the LLM.
        llm: a language model that is already loaded, to share one between sessions; by default the bundle's is loaded.
        engines: the bundle's graphs, loaded on another backend than the CPU (`open_engines`); closed with the session.
        key_frames: where pictures are kept to show as evidence; by default 64 of 2 MiB together.
        gate: leaves frames that show nothing out of the memory; by default every frame goes in.

    Raises:
        EngineError, LLMError, MissingModelError: a part of the bundle can't be loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        memory: Policy | Literal["concat"] = "mbc",
        threads: int | None = None,
        llm: LLM | None = None,
        engines: Engines | None = None,
        key_frames: KeyFrames | None = None,
        gate: FrameGate | None = None,
    ) -> None:
        self.bundle = bundle
        self._close = ExitStack()
        self._concat = memory == "concat"
        self._qformer = QFormer(bundle, memory="last" if memory == "concat" else memory, threads=threads or 1, engines=engines)
        self._close.callback(self._qformer.close)
        self._llm = llm
        if llm is None and bundle.has_llm:
            self._llm = self._close.enter_context(load_llm(bundle, threads))
        if self._llm is not None and self._llm.n_embd != bundle.manifest.dims.n_embd:
            raise BundleError(
                f"the soft prompt is {bundle.manifest.dims.n_embd} wide, the language model {self._llm.n_embd}.",
                fix="Use the language model that the manifest names.",
            )
        self._memory_lock = threading.Lock()
        self._encoder_lock = threading.RLock()  # features on a device last until the next frame is encoded
        self._begin(Clock(), KeyFrames() if key_frames is None else key_frames, gate)

    def _begin(self, clock: Clock, key_frames: KeyFrames, gate: FrameGate | None) -> None:
        """What a stream has of its own, beside the visual bank: nothing yet."""
        self.clock, self.key_frames, self.gate = clock, key_frames, gate
        self._standing: list[Standing] = []
        self._newest: Frame | None = None
        self._cost = FrameCost(0.0, 0.0, 0.0)
        self._watcher: Watcher | None = None
        self.feed: Source | LiveSource | Camera | None = None  # what is watched for it, or was last
        self._observers: list[Callable[[Tensor, Frame], None]] = []
        self._parts: dict[str, Part] = {"clock": self.clock, "key frames": self.key_frames}
        self._unclaimed: dict[str, Mapping[str, Array]] = {}  # of a snapshot, until their owner comes
        self._resume = Resume()
        self._frame_s = 1 / self.bundle.manifest.sample_fps  # from one frame of the memory to the next
        self._every_s: float | None = None
        self._thinned: Sampler | None = None
        self.answer_tokens: int | None = None  # fewer than the bundle's, if given
        self.degraded: tuple[str, ...] = ()  # what is left out at present, and why; answers say so

    def _sharing(self, qformer: QFormer, clock: Clock, key_frames: KeyFrames, gate: FrameGate | None) -> Session:
        """Another stream's session with this one's graphs (those of `qformer`), language model and locks."""
        other = copy.copy(self)
        other._qformer, other._close = qformer, ExitStack()
        other._begin(clock, key_frames, gate)
        other.answer_tokens, other.degraded = self.answer_tokens, self.degraded
        return other

    def beside(self, *, key_frames: KeyFrames | None = None, gate: FrameGate | None = None) -> Session:
        """A session for another stream. Graphs, language model and lock are this one's; nothing that is remembered is.

        Its visual bank is where this one's is: on a device it takes as much room there again. It is closed with this one, or
        before. Frames of both may come from two threads, and are encoded one after another; questions come from one.
        `cameras.CameraWatcher` feeds several from one thread:

        >>> with Session(Bundle.open("tiny")) as door:                                    # doctest: +SKIP
        ...     yard = door.beside()
        ...     sessions, uris = {"door": door, "yard": yard}, {"door": "rtsp://10.0.0.5/door", "yard": "/dev/video1"}
        ...     with CameraWatcher(sessions, uris) as watcher:
        ...         watcher.wait()
        ...         print(yard.ask("what color is the shape?").result.text)

        Args:
            key_frames, gate: as of `Session`.

        Raises:
            EngineError: the visual bank is on a device, which has no room for another; or this bundle can have none there.
        """
        other = self._sharing(self._qformer.beside(), Clock(), KeyFrames() if key_frames is None else key_frames, gate)
        self._close.callback(other.close)
        return other

    def source(
        self, uri: str, *, realtime: bool = False, fps: float | None = None, branches: Sequence[Branch] = ()
    ) -> Source:
        """Open a source scaled and sampled as the bundle's manifest says; a file can play in real time as a camera."""
        return self.bundle.source(uri, realtime=realtime, fps=fps, branches=branches)

    # -- frames ----------------------------------------------------------------------------------------------------

    def see(self, frame: Frame, *, wall_s: float | None = None) -> FrameCost:
        """Encode one frame, put it into the memory, and let every standing question read it.

        A frame that the gate refuses, or that `thin` leaves out, changes nothing, and has cost nothing.

        Args:
            frame: later than all before.
            wall_s: what the wall clock said when it was captured, seconds since 1970 (`wall_time_of`); None = no such time.

        Raises:
            EngineError: the frame does not fit the vision graph, or a graph gave something that is not finite.
        """
        size = self.bundle.manifest.dims.image_size
        if frame.image.shape != (size, size, 3):
            raise EngineError(
                f"frame {frame.index} is {list(frame.image.shape)}, the vision graph takes [{size}, {size}, 3].",
                fix="Open it with Session.source, which scales.",
            )
        if self.gate is not None and not self.gate.admits(frame.image):
            return FrameCost(0.0, 0.0, 0.0)
        if self._thinned is not None and not self._thinned.take(frame.time_s):
            return FrameCost(0.0, 0.0, 0.0)
        with self._encoder_lock:
            start = perf_counter()
            features = self._qformer.encode(frame.image[None])[0]
            seen = perf_counter()
            return self.remember(frame, features, wall_s=wall_s, vision_ms=1000 * (seen - start))

    def remember(
        self, frame: Frame, features: Tensor, *, wall_s: float | None = None, vision_ms: float = 0.0
    ) -> FrameCost:
        """The part of `see` behind the encoder, for a frame that has been encoded (`QFormer.encode`): no gate is asked.

        Args:
            frame: later than all before.
            features: float32 `[N, C]`, of this frame.
            wall_s: as of `see`.
            vision_ms: what encoding has taken.

        Raises:
            EngineError: features of another shape, or not finite.
        """
        with self._memory_lock:
            locked = perf_counter()
            self._qformer.remember(features, frame.time_s)
            remembered = perf_counter()
            for standing in self._standing:
                standing.carried.step(frame.time_s)
            stepped = perf_counter()
            if wall_s is not None:
                self.clock.observe(frame.time_s, wall_s)
            if self.key_frames.wants(frame.time_s):
                self.key_frames.take(frame.image, np.asarray(features), frame.time_s)
            self._newest = frame
            cost = self._cost = FrameCost(vision_ms, *(1000 * t for t in (remembered - locked, stepped - remembered)))
        for observer in self._observers:
            observer(features, frame)
        return cost

    def thin(self, every_s: float | None) -> None:
        """Remember one frame every so many seconds from here on, of those that are seen; None: all of them again."""
        if every_s != self._every_s:
            self._every_s, self._thinned = every_s, None if every_s is None else Sampler(1 / every_s)
            # What is remembered lies so far apart, and stays so: times are told no closer than that until all is forgotten.
            self._frame_s = max(self._frame_s, every_s or 0.0)

    def remember_at_most(self, length: int) -> None:
        """Let the memory and that of every standing question store fewer slots, or so many again (`MemoryBank.limit_to`).

        Raises:
            UsageError: not 1 to the bundle's memory length; the memory is on a device.
        """
        with self._memory_lock:
            self._qformer.limit_to(length)
            for standing in self._standing:
                standing.carried.bank.limit_to(length)

    def observe(self, observer: Callable[[Tensor, Frame], None]) -> None:
        """Call this with the features `[N, C]` of every frame that was remembered, on the thread that sees it.

        Where the encoder runs on a device, the features stay there until the next frame: np.asarray copies them.
        """
        self._observers.append(observer)

    @property
    def frames_seen(self) -> int:
        return self._qformer.bank.frames_seen

    @property
    def newest(self) -> Frame | None:
        """The newest frame; None before the first."""
        return self._newest

    @property
    def time_s(self) -> float:
        """Stream time of the newest frame; -1 before the first."""
        return -1.0 if self._newest is None else self._newest.time_s

    # -- questions -------------------------------------------------------------------------------------------------

    def stand(self, question: str, *, prompt: str | None = None) -> Standing:
        """Carry a question along from the next frame on: exactly MA-LMM's online loop.

        `prompt` replaces both templates: the text goes verbatim to both tokenizers, the video's rows first.

        Raises:
            UsageError: the question is empty, or longer than the largest text bucket.
        """
        with self._memory_lock:
            read = self._qformer.prompt(self._qformer_text(question, prompt))
            carried = self._concatenated(read, question, prompt) if self._concat else self._qformer.stand(read)
            standing = Standing(question, carried, prompt)
            self._standing.append(standing)
        return standing

    @property
    def standing(self) -> tuple[Standing, ...]:
        """The questions that are carried along."""
        return tuple(self._standing)

    def drop(self, standing: Standing) -> None:
        """Stop carrying a question along."""
        with self._memory_lock:
            self._standing.remove(standing)

    def forget(self) -> None:
        """Start over with an empty memory and no standing questions; graphs and language model stay loaded."""
        with self._memory_lock:
            self._qformer.bank.reset()
            self._standing.clear()
            self._unclaimed.clear()
            self._newest, self._resume = None, Resume()
            self._frame_s = max(1 / self.bundle.manifest.sample_fps, self._every_s or 0.0)
            self.clock.reset()
            self.key_frames.reset()

    def ask(
        self, question: str | Standing, *, prompt: str | None = None, interval: Interval | None = None, evidence: bool = False
    ) -> AnswerStream:
        """Answer now: a text by replay over the memory, a `Standing` from what it has carried along.

        Returns at once with a stream of text; the perception has been done, the LLM writes as the stream is read.

        Args:
            question: a text, or what `stand` gave.
            prompt: replaces both templates, of a text.
            interval: only what overlaps it is read, each token of the memory by its own span. If nothing does, the answer says so
                without asking any model: its `finish` is `NOTHING_REMEMBERED`, and `remembered` says what there is.
            evidence: a replay's answer has it anyhow. With this, a `Standing`'s has that of a replay of the same question, since
                what it has carried along has no times any more.

        Raises:
            UsageError: nothing has been seen yet; the question is empty or too long; an interval for a `Standing`.
            BundleError: the bundle has no language model.
        """
        asked = perf_counter()
        llm, degraded = self.llm, self.degraded
        with self._memory_lock:
            visible = None
            if interval is not None and self.frames_seen:
                visible = self._visible(question, interval)
                if not visible.any():
                    return AnswerStream.of(self._nothing_from(interval, str(question), asked))
            seen = self._perceive(question, prompt, asked, visible)
            attention = seen.soft.attention
            if attention is None and evidence:
                attention = self._replayed(seen.question, seen.prompt).attention
            shown = None if attention is None else self._evidence(attention, interval)
            calendar = self.calendar
        decoding = self.bundle.manifest.decoding
        generation = llm.generate(
            self._segments(seen.question, seen.prompt, seen.soft.rows),
            max_tokens=min(decoding.max_tokens, self.answer_tokens or decoding.max_tokens),
            stop=decoding.stop,
            beams=decoding.beams,
            repetition_penalty=decoding.repetition_penalty,
        )
        before_llm_ms = 1000 * (perf_counter() - asked)

        def finish(written: Written) -> Answer:
            trace = seen.trace(
                prefill_ms=1000 * written.prefill_s,
                first_token_ms=before_llm_ms + 1000 * written.first_token_s,
                tokens=written.tokens,
                tokens_per_s=written.tokens_per_s,
            )
            return Answer(
                written.text.strip(), seen.question, seen.mode, seen.frame.time_s, seen.frames_seen, written.finish, trace,
                interval, (), shown, calendar, degraded,
            )  # fmt: skip

        return AnswerStream(generation, finish)

    def rank(
        self, question: str | Standing, options: Sequence[str], *, prompt: str | None = None, score: Score = "answer"
    ) -> Ranking:
        """Choose among given answers, now: by replay for a text, from what it has carried along for a `Standing`.

        Args:
            options: each as it would be answered.
            score: what the options are ranked by: `answer`, each as the whole answer; `prefix`, as LAVIS ranks candidates,
                where an option can't lose to one that it is the beginning of; `mean`, per token (`LLM.rank`).

        Raises:
            UsageError: nothing has been seen yet; the question is empty or too long; no option, an empty one, or one twice.
            BundleError: the bundle has no language model.
        """
        asked = perf_counter()
        options, llm, degraded = checked_options(options), self.llm, self.degraded
        with self._memory_lock:
            seen = self._perceive(question, prompt, asked)
        before_llm = perf_counter()
        ranked = llm.rank(self._segments(seen.question, seen.prompt, seen.soft.rows), options, score=score)
        scored = perf_counter()
        trace = seen.trace(prefill_ms=1000 * (scored - before_llm), first_token_ms=1000 * (scored - asked))
        return Ranking(
            tuple(ranked), score, seen.question, seen.mode, seen.frame.time_s, seen.frames_seen, trace, degraded
        )

    def perceive(self, question: str | Standing, *, prompt: str | None = None) -> SoftPrompt:
        """The Q-Former's part of an answer alone, without the language model."""
        with self._memory_lock:
            return self._soft(question, prompt)[0]

    @property
    def has_llm(self) -> bool:
        """Whether there is a language model to ask."""
        return self._llm is not None

    @property
    def watcher(self) -> Watcher | None:
        """What watches a source for this session; None before `watch`."""
        return self._watcher

    @property
    def cost(self) -> FrameCost:
        """What the newest frame took."""
        return self._cost

    @property
    def llm(self) -> LLM:
        """The language model.

        Raises:
            BundleError: the bundle has none.
        """
        if self._llm is None:
            raise BundleError(
                f"{self.bundle.path} has no language model.", fix="Export it with one: keepsight export --llm FILE."
            )
        return self._llm

    @property
    def qformer(self) -> QFormer:
        """The graphs and the visual bank, for tracing and for tests."""
        return self._qformer

    @property
    def calendar(self) -> Calendar:
        """Reads and writes times of this stream, as of now: with a camera that is this moment, else the newest frame's."""
        frame, now_s = self._newest, max(self.time_s, 0.0)
        if frame is not None and self.clock.dated:
            now_s += max(0.0, time.monotonic() - frame.captured_at)
        return Calendar(self.clock, now_s, self._frame_s)

    def _perceive(
        self, question: str | Standing, prompt: str | None, asked: float, visible: NDArray[np.bool_] | None = None
    ) -> Perceived:
        began = perf_counter()
        soft, text, mode, prompt = self._soft(question, prompt, visible)
        assert self._newest is not None
        return Perceived(
            soft, text, mode, prompt, self._newest, self.frames_seen, self._cost, asked, 1000 * (perf_counter() - began)
        )

    def _soft(
        self, question: str | Standing, prompt: str | None, visible: NDArray[np.bool_] | None = None
    ) -> tuple[SoftPrompt, str, Mode, str | None]:
        if isinstance(question, Standing):
            return question.carried.answer(), question.question, "standing", question.prompt
        if self._concat:
            raise UsageError(
                "the memory concat answers only questions that are known before the first frame.", fix="Use --mode standing."
            )
        return self._replayed(question, prompt, visible), question, "replay", prompt

    def _replayed(self, question: str, prompt: str | None, visible: NDArray[np.bool_] | None = None) -> SoftPrompt:
        return self._qformer.replay(self._qformer.prompt(self._qformer_text(question, prompt)), visible)

    def _visible(self, question: str | Standing, interval: Interval) -> NDArray[np.bool_]:
        if isinstance(question, Standing):
            raise UsageError(
                "A standing question has mixed all times it has seen, and can't be limited to some.",
                fix="Ask it by replay: the text itself, or --mode replay.",
            )
        return seen_within(self._qformer.bank, interval)

    def _nothing_from(self, interval: Interval, question: str, asked: float) -> Answer:
        calendar = self.calendar
        spans = tuple(remembered(self._qformer.bank, 2 * calendar.tolerance_s))
        total_ms = 1000 * (perf_counter() - asked)
        trace = LatencyTrace(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, total_ms, total_ms, 0, 0.0)
        return Answer(
            "nothing remembered from then", question, "replay", self.time_s, self.frames_seen, NOTHING_REMEMBERED, trace,
            interval, spans, None, calendar,
        )  # fmt: skip

    def _evidence(self, attention: NDArray[np.float32], interval: Interval | None) -> Evidence:
        bank, frame_s = self._qformer.bank, self._frame_s
        moments = moments_of(attention, bank.first_s[0], bank.last_s[0], frame_s=frame_s, interval=interval)
        return evidence_of(moments, self.key_frames, frame_s)

    def _concatenated(self, read: Prompt, question: str, prompt: str | None) -> ConcatQuestion:
        if self._llm is None:
            return ConcatQuestion(self._qformer, read)
        segments = self._segments(question, prompt, np.zeros((1, self._llm.n_embd), np.float32))
        return ConcatQuestion(self._qformer, read, frames_that_fit(self.bundle, self._llm, segments))

    def _qformer_text(self, question: str, prompt: str | None) -> str:
        if not (question if prompt is None else prompt).strip():
            raise UsageError("The question is empty.", fix="Ask something.")
        return self.bundle.manifest.templates.qformer_text(question) if prompt is None else prompt

    def _segments(self, question: str, prompt: str | None, rows: NDArray[np.float32]) -> Sequence[Segment]:
        if prompt is not None:
            return verbatim(prompt, video=rows)
        return render(self.bundle.manifest.templates.llm, video=rows, question=question)

    # -- restarts --------------------------------------------------------------------------------------------------

    def keep(self, name: str, part: Part) -> None:
        """Save something beside the memory under this name. If a snapshot that was restored has it, it is restored now.

        Raises:
            UsageError: the name is taken, or has a slash; what the part's `restore` raises.
        """
        if name in self._parts or "/" in name or not name:
            raise UsageError(f"a part can't be kept as {name!r}.", fix="Choose a name that is free, without a slash.")
        if name in self._unclaimed:
            part.restore(self._unclaimed[name])
            del self._unclaimed[name]
        self._parts[name] = part

    def snapshot(self, *, kv: bool = False) -> Snapshot:
        """The memory as it is now. Frames wait while it is copied, not while it is written.

        Args:
            kv: with the keys and values of the visual bank: larger, and restored bit for bit. Without, they are computed again
                from the features and are equal but for rounding.

        Raises:
            UsageError: the memory is `concat`, which is none.
        """
        self._refuse_concat()
        with self._memory_lock:
            return Snapshot(
                bundle=self.bundle.manifest.name,
                fingerprint=self._fingerprint,
                variant=self.bundle.variant,
                policy=self._qformer.policy,
                source=self._resume.source,
                saved_at=time.time(),
                newest=None if self._newest is None else SavedFrame.of(self._newest),
                visual=self._qformer.bank_state(kv=kv),
                questions=tuple(Question(one.question, one.prompt) for one in self._standing),
                standing=tuple(one.carried.state() for one in self._standing),
                parts={**self._unclaimed, **{name: part.state() for name, part in self._parts.items()}},
            )

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.bundle)

    def save(self, path: str | Path, *, kv: bool = False) -> int:
        """Save the memory to a file, atomically; bytes written. `kv` as in `snapshot`.

        Raises:
            SnapshotError: it can't be written; what was there is unchanged.
        """
        return self.snapshot(kv=kv).write(path)

    def restore(self, saved: Snapshot | str | Path) -> Snapshot:
        """Go on with a saved memory: its standing questions, too, found in `standing`. What this session remembers is forgotten.

        A live source that is watched from here on is dated behind it, the gap between them included; the file that it was
        taken in goes on from the saved position.

        Returns:
            What was restored, to say from when it is.

        Raises:
            SnapshotError: the file can't be read, is damaged, or of another bundle or policy.
            UsageError: the file is whole, and what is in it is no memory.
        """
        self._refuse_concat()
        snapshot = saved if isinstance(saved, Snapshot) else Snapshot.read(saved)
        snapshot.check_belongs_to(self.bundle, self._qformer.policy)
        prompts = [self._qformer.prompt(self._qformer_text(one.question, one.prompt)) for one in snapshot.questions]
        carried = [self._qformer.stand(prompt) for prompt in prompts]
        for one, state in zip(carried, snapshot.standing, strict=True):
            one.bank.check_state(state)
        with self._memory_lock:
            self._qformer.restore_bank(snapshot.visual)
            for one, state in zip(carried, snapshot.standing, strict=True):
                one.restore(state)
            self._standing = [
                Standing(asked.question, one, asked.prompt) for asked, one in zip(snapshot.questions, carried, strict=True)
            ]
            self._newest = None if snapshot.newest is None else snapshot.newest.as_frame()
            self._cost = FrameCost(0.0, 0.0, 0.0)
            self._resume.restored(snapshot.source, snapshot.time_s)
            self._unclaimed = {name: state for name, state in snapshot.parts.items() if name not in self._parts}
            for name in self._parts.keys() & snapshot.parts.keys():
                self._parts[name].restore(snapshot.parts[name])
        return snapshot

    def _refuse_concat(self) -> None:
        if self._concat:
            raise UsageError("the memory concat can't be saved or restored: it keeps every frame.", fix="Use mbc.")

    def continued(self, source: Source | LiveSource) -> Iterator[Frame]:
        """Frames of a source in this memory's time, which never goes back (see `resume`).

        A camera goes on behind the newest frame, as far behind it as it was captured after it. The file that a restored
        snapshot was taken in goes on from there, its earlier frames skipped; another file after a restore is dated as a camera.
        Without a restore, a file keeps its own time.
        """
        return self._resume.frames(source, self._newest)

    def dating(self, camera: SourceURI) -> Callable[[Frame], Frame]:
        """As `continued`, for a camera whose frames are handed over one by one: what puts each into this memory's time."""
        return self._resume.dating(camera, self._newest)

    def log_features(self, log: FeatureLog, *, on_error: Callable[[KeepsightError], None] | None = None) -> None:
        """Log features of every frame that is due from here on; cameras are dated behind what the log has.

        Args:
            log: open for writing; close it after the session.
            on_error: called where a record can't be written; by default the error stops what feeds the session.
        """
        if log.newest is not None:
            self._resume.follows = newest_of(log)
        self.observe(logging_to(log, on_error))

    def recall(self, log: FeatureLog | FeatureHistory, since_s: float, until_s: float) -> Session:
        """A session over an exact memory of an interval: as if its stream had begun there, one frame for each record.

        It shares graphs, language model and lock with this one, and is asked in words (a replay), not watched. Close this one
        alone.

        Raises:
            UsageError: the log has nothing from then.
            SnapshotError: a record of the interval is damaged.
        """
        clock = log.clock if isinstance(log, FeatureHistory) else self.clock
        recalled = self._sharing(self._qformer.with_empty_bank(), clock, self.key_frames, self.gate)
        recalled._parts = {}  # they are another's
        recalled._frame_s = max(self._frame_s, log.every_s)
        recalled._newest = remember_again(recalled._qformer, self._memory_lock, log, since_s, until_s)
        return recalled

    # -- live ------------------------------------------------------------------------------------------------------

    def watch(self, source: Source | LiveSource, *, on_frame: Callable[[Frame], None] | None = None) -> Watcher:
        """Watch a source on a thread of its own until it ends or the session closes; ask meanwhile."""
        if self._concat:
            raise UsageError(
                "the memory concat grows with every frame, and is for files alone.",
                fix="Use a memory that does not grow, such as mbc.",
            )
        if self._watcher is not None and self._watcher.running:
            raise UsageError("This session is already watching a source.", fix="Make a second one with Session.beside.")
        self.feed = source
        self._watcher = self._close.enter_context(Watcher(self, source, on_frame))
        return self._watcher

    def close(self) -> None:
        """Stop watching and give everything back."""
        self._close.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["Answer", "FrameCost", "Session", "Standing", "Watcher", "load_llm"]

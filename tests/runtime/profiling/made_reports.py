"""Reports as `profile` would write them, of made-up times: known stages, noise and changes. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.profiling.report import (
    Contention,
    Energy,
    Layer,
    Machine,
    MemoryUse,
    Moment,
    Phase,
    Profile,
    Question,
    Stage,
    Statistics,
)

FRAME_MS = {"decode": 2.1, "scale": 0.8, "copy": 0.15, "wait": 0.02, "vision": 18.0, "memory": 1.4, "step": 6.5, "other": 0.3}
QUESTION_MS = {"qformer": 9.0, "prefill": 120.0, "first_token": 1.5, "tokens": 310.0, "other": 0.9}


@dataclass(frozen=True)
class Noise:
    """Standard deviations of logarithms.

    Attributes:
        sample: from sample to sample within a run; `memory` is the correlation of neighbours.
        spikes: share of the samples that take twice as long.
        run: of a run, all its stages together; `stage`: of each stage of a run on its own.
        disturbed: share of the runs in which something else loads the machine, and everything takes 10 % longer.
        session: of all runs of a report together, which no interval can know of.
    """

    sample: float = 0.05
    memory: float = 0.3
    spikes: float = 0.02
    run: float = 0.02
    stage: float = 0.013
    disturbed: float = 0.0
    session: float = 0.0


@dataclass(frozen=True)
class Made:
    """What a report is made of. `factors`: of how much longer a stage takes than it should."""

    seed: int = 0
    runs: int = 5
    frames: int = 60
    questions: int = 10
    factors: dict[str, float] = field(default_factory=dict)
    noise: Noise = Noise()
    sensors: bool = False
    frame_ms: dict[str, float] = field(default_factory=lambda: dict(FRAME_MS))
    question_ms: dict[str, float] = field(default_factory=lambda: dict(QUESTION_MS))

    def profile(self, **changed: Any) -> Profile:
        """The report; `changed` replaces fields of it. `frames` and `questions` are of one run."""
        rng = np.random.default_rng(self.seed)
        session = rng.normal(0, self.noise.session)
        common = session + rng.normal(0, self.noise.run, self.runs) + 0.1 * (rng.random(self.runs) < self.noise.disturbed)
        frame = self._chain(rng, self.frame_ms, self.frames, common)
        question = self._chain(rng, self.question_ms, self.questions, common)
        stages = [_stage(name, "frame", values) for name, values in frame.items()]
        stages.append(_stage("frame", "frame", sum(frame.values(), np.zeros(1))))
        stages.append(_stage("visual_kv", "frame", 0.2 * frame["memory"], inside="memory") if "memory" in frame else stages[0])
        stages += [_stage(name, "question", values) for name, values in question.items()]
        if question:
            stages.append(_stage("answer", "question", sum(question.values(), np.zeros(1))))
            first = sum((question[name] for name in ("qformer", "prefill", "first_token")), np.zeros(1))
            stages.append(_stage("time_to_first_token", "question", first))
        whole = stages[len(frame)].statistics.mean
        fields: dict[str, Any] = {
            "keepsight": "0.1.0", "made_at": "2026-01-02T03:04:05Z", "command": "keepsight profile run tiny --runs 5",
            "bundle": "keepsight-tiny", "fingerprint": "0f1e2d3c4b5a69788796a5b4c3d2e1f0", "variant": "fp16", "backend": "cpu",
            "memory_policy": "mbc", "dims": {"frames": 10, "queries": 32}, "language_model": "SmolLM2-135M Q8_0",
            "machine": Machine(
                title="A made-up board", processor="Cortex-A78AE", cores=6, memory=8 * 2**30,
                system="Linux 5.15.148-tegra aarch64", power_mode="25W" if self.sensors else None,
                clocks_locked=True if self.sensors else None,
                gpu="Orin" if self.sensors else None, l4t="36.4.3" if self.sensors else None,
                jetpack="6.2" if self.sensors else None, versions={"onnxruntime": "1.20.1", "llama-cpp-python": "0.3.36"},
            ),
            "source": "clip.mp4", "frames": self.frames * self.runs, "fps": 1000 / whole, "runs": self.runs,
            "run_of_frame": tuple(np.repeat(range(self.runs), self.frames).tolist()),
            "run_of_question": tuple(np.repeat(range(self.runs), self.questions).tolist()),
            "cold_start": (
                Phase(name="open bundle", ms=41.0), Phase(name="load engines", ms=890.0),
                Phase(name="load language model", ms=1420.0), Phase(name="first frame", ms=73.0),
                Phase(name="first answer", ms=615.0),
            ),
            "stages": tuple(stages), "questions": _questions(question),
            "memory": (
                MemoryUse(component="process", steady=612_000_000, peak=655_000_000, basis="read"),
                MemoryUse(component="language model", steady=145_000_000, peak=145_000_000, basis="counted"),
                MemoryUse(component="memory bank", steady=2_600_000, peak=2_600_000, basis="counted"),
            ),
            "timeline": _timeline(rng, sensors=self.sensors),
        }  # fmt: skip
        if self.sensors:
            fields["energy"] = Energy(
                meter="INA3221 VDD_IN", idle_watts=4.6, per_frame=0.31, per_answer=4.4, marginal_per_frame=0.18,
                marginal_per_answer=2.5,
            )  # fmt: skip
            fields["layers"] = _layers()
            fields["contention"] = Contention(
                frames_per_s=(31.0, 21.4), tokens_per_s=(19.0, 14.2), vision_ms=(18.0, 26.3), token_ms=(52.6, 70.4)
            )
            fields["drops"] = {"late": 12, "queue full": 3}
        return Profile(**{**fields, **changed})

    def _chain(
        self, rng: np.random.Generator, means: dict[str, float], count: int, common: NDArray[np.float64]
    ) -> dict[str, NDArray[np.float64]]:
        noise, chain = self.noise, {}
        for name, mean in means.items() if count else ():
            own = common + rng.normal(0, noise.stage, self.runs)
            shocks = rng.normal(0, noise.sample * np.sqrt(1 - noise.memory**2), (self.runs, count))
            values = np.empty_like(shocks)
            values[:, 0] = rng.normal(0, noise.sample, self.runs)
            for index in range(1, count):
                values[:, index] = noise.memory * values[:, index - 1] + shocks[:, index]
            spikes = np.where(rng.random(values.shape) < noise.spikes, 2.0, 1.0)
            chain[name] = (mean * self.factors.get(name, 1.0) * np.exp(values + own[:, None]) * spikes).ravel()
        return chain


def _stage(name: str, path: Any, samples: NDArray[np.float64], inside: str | None = None) -> Stage:
    values = tuple(np.round(samples, 3).tolist())
    return Stage(name=name, path=path, inside=inside, samples=values, statistics=Statistics.of(values))


def _questions(chain: dict[str, NDArray[np.float64]]) -> tuple[Question, ...]:
    count = len(next(iter(chain.values()), ()))
    questions = []
    for index in range(min(count, 12)):
        lengths = [(name, float(values[index])) for name, values in chain.items()]
        starts = np.cumsum([0.0] + [length for _, length in lengths]).tolist()
        stages = tuple((name, round(start, 3), length) for (name, length), start in zip(lengths, starts, strict=False))
        text = ("what color is the shape?", "what shape is present?", "is there a circle?")[index % 3]
        questions.append(Question(text=text, answer="a green circle", mode="standing", stages=stages, tokens=5))
    return tuple(questions)


def _timeline(rng: np.random.Generator, *, sensors: bool, seconds: int = 90) -> tuple[Moment, ...]:
    moments = []
    for t in np.arange(0, seconds, 0.5).tolist():
        warm = 1 - np.exp(-t / 30)
        resident = int(3.1e8 + 3.0e8 * min(1.0, t / 8) + 4e6 * rng.random())
        if not sensors:
            moments.append(Moment(t=t, resident=resident))
            continue
        throttled = ("cpu-throttle-alert",) if 55 <= t < 62 else ()
        moments.append(
            Moment(
                t=t, resident=resident, watts=round(5 + 8 * min(1, t / 5) - (2.5 if throttled else 0) + rng.normal(0, 0.3), 3),
                rails={"VDD_CPU_GPU_CV": round(6 + rng.normal(0, 0.2), 3), "VDD_SOC": 2.4},
                celsius={"cpu-thermal": 45 + 38 * warm, "gpu-thermal": 43 + 40 * warm, "tj-thermal": 46 + 40 * warm},
                gpu_hz=6.1e8 if throttled else 1.02e9, gpu_load=0.7, cpu_hz=1.2e9 if throttled else 1.73e9, throttled=throttled,
            )
        )  # fmt: skip
    return tuple(moments)


def _layers() -> tuple[Layer, ...]:
    layers = []
    for block in range(12):
        for name, ms in (("attn/qkv", 0.22), ("attn/softmax+matmul", 0.31), ("attn/proj", 0.09), ("mlp/fc1+gelu", 0.35)):
            layers.append(Layer(engine="vision", name=f"/blocks.{block}/{name}", block=f"block {block}", ms=ms + 0.01 * block))
    layers.append(Layer(engine="step", name="__myl_Cast_Mul_MeanSubMulMeanAddSqrtDivMulMulAdd_0x7d1", block="(fused)", ms=0.7))
    return tuple(layers)

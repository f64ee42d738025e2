"""Lines of tegrastats of several boards and JetPacks; what each says was read by eye.

Recorded by nobody of this project: they are spelled as lines in public repositories' tests, logs and documents (2024 to 2026),
one of them https://github.com/wendylabsinc/WendyOS/pull/1316 for JetPack 7 on a Thor, with fields left out to keep them short.
"""

from __future__ import annotations

import pytest

from keepsight.runtime.sensors import Power, Reading, Temperature
from keepsight.runtime.sensors.tegrastats import completed, parse, parse_log

MIB = 2**20
# JetPack 6 on an Orin Nano, with root and without.
NANO = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) SWAP 369/3810MB (cached 8MB) "
    "CPU [38%@1497,2%@729,1%@729,off,1%@729,0%@729] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] "
    "NVDEC off NVJPG off VIC off OFA off APE 200 cpu@57.125C soc2@55.093C soc0@56.625C "
    "gpu@58.625C tj@58.312C soc1@55.937C VDD_IN 16321mW/11204mW VDD_CPU_GPU_CV 7104mW/4944mW VDD_SOC 3120mW/3659mW"
)
NANO_USER = (
    "03-09-2026 14:12:52 RAM 1905/7620MB (lfb 36x4MB) SWAP 320/12002MB (cached 20MB) CPU [0%@729,0%@729,1%@729] GR3D_FREQ 0% "
    "cpu@46.125C tj@46C VDD_IN 4742mW/4742mW VDD_CPU_GPU_CV 482mW/482mW VDD_SOC 1446mW/1446mW"
)
# JetPack 5 on an Orin Nano and on an AGX Orin: capital names, two GPU clocks or two entries, a zone that is off.
NANO5 = (
    "01-24-2024 09:17:09 RAM 3503/7337MB (lfb 7x1MB) SWAP 430/3668MB (cached 1MB) CPU [11%@729,13%@729,off,off] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 0%@305 GR3D2_FREQ 0%@0 VIC_FREQ 115 APE 174 CV0@-256C CPU@44.093C SOC2@42.625C GPU@41.343C tj@46.968C "
    "VDD_IN 4915mW/4915mW VDD_CPU_GPU_CV 449mW/449mW VDD_SOC 1431mW/1431mW"
)
ORIN5 = (
    "11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) CPU [90%@2201,100%@2201] EMC_FREQ 1%@2133 "
    "GR3D_FREQ 14%@[407,407] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CPU@77.281C Tboard@62C GPU@69.125C tj@77.281C "
    "VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
XAVIER = (
    "RAM 6334/15388MB (lfb 1x4MB) CPU [6%@729] GR3D_FREQ 0%@611 AUX@41.5C "
    "VDD_IN 4067/4067 VDD_CPU_GPU_CV 738/738 VDD_SOC 1353/1353"
)
# JetPack 7 on an Orin Nano: two temperatures, three powers.
NANO7 = (
    "09-01-2026 09:25:18 RAM 5739/7546MB (lfb 1x2MB) SWAP 2047/2048MB (cached 209MB) CPU [72%@1728,75%@1728] GR3D_FREQ 33% "
    "cpu@50C/51.5C soc2@47.937C/47.937C VDD_IN 9761mW/9761mW/9761mW "
    "VDD_CPU_GPU_CV 4238mW/4238mW/4238mW VDD_SOC 1825mW/1825mW/1825mW"
)
# JetPack 7 on a Thor: clocks without a load, then with, then neither; a rail below zero when idle.
THOR = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972] EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] "
    "NVENC0_FREQ @314 OFA_FREQ @315 PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C "
    "VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
)
THOR_BUSY = "RAM 9000/125772MB GR3D_FREQ 99%@[1098,1098,1098] VDD_GPU 36196mW/36393mW VIN 68862mW/56658mW"
THOR_IDLE = "05-14-2026 21:36:35 RAM 26063/125772MB (lfb 35x4MB) CPU [2%@972] VDD_GPU -392mW/-392mW VIN 15004mW/15096mW"


def read(line: str) -> Reading:
    reading = parse(line)
    assert reading is not None
    return reading


def test_an_orin_nano_on_jetpack_6() -> None:
    assert read(NANO) == Reading(
        time_s=0.0,
        temperatures=tuple(
            Temperature(*zone)
            for zone in [("cpu", 57.125), ("soc2", 55.093), ("soc0", 56.625), ("gpu", 58.625), ("tj", 58.312), ("soc1", 55.937)]
        ),
        powers=(Power("VDD_IN", 16.321, True), Power("VDD_CPU_GPU_CV", 7.104), Power("VDD_SOC", 3.12)),
        gpu_hz=612e6,
        gpu_load=0.99,
        cpu_hz=(1497e6, 729e6, 729e6, 729e6, 729e6),
        emc_hz=2133e6,
        memory_total=7620 * MIB,
        memory_available=(7620 - 6712) * MIB,
        swap_total=3810 * MIB,
        swap_free=(3810 - 369) * MIB,
    )


@pytest.mark.parametrize(
    ("line", "load", "gpu", "emc", "watts", "cores"),
    [
        (NANO_USER, 0.0, None, None, 4.742, 3),
        (NANO5, 0.0, 305e6, 2133e6, 4.915, 2),
        (ORIN5, 0.14, 407e6, 2133e6, 3.15 + 14.312 + 4.968, 2),
        (XAVIER, 0.0, 611e6, None, 4.067, 1),
        (NANO7, 0.33, None, None, 9.761, 2),
        (THOR, None, 314e6, 2750e6, 19.78, 2),
        (THOR_BUSY, 0.99, 1098e6, None, 68.862, 0),
        (THOR_IDLE, None, None, None, 15.004, 1),
    ],
)
def test_load_clocks_and_power_of_each(
    line: str, load: float | None, gpu: float | None, emc: float | None, watts: float, cores: int
) -> None:
    reading = read(line)
    assert (reading.gpu_load, reading.gpu_hz, reading.emc_hz, len(reading.cpu_hz)) == (load, gpu, emc, cores)
    assert reading.watts == pytest.approx(watts)


def test_zones_of_jetpack_5_and_7() -> None:
    assert [zone.zone for zone in read(NANO5).temperatures] == ["CPU", "SOC2", "GPU", "tj"], "CV0 is switched off"
    assert [(zone.zone, zone.celsius) for zone in read(NANO7).temperatures] == [("cpu", 50.0), ("soc2", 47.937)]
    assert [power.watts for power in read(THOR_IDLE).powers] == [-0.392, 15.004]


@pytest.mark.parametrize("line", ["", "tegrastats: command not found", "# R36 (release)", "RAM", "RAM x/yMB", "CPU [1%@2]"])
def test_what_is_no_line_of_tegrastats_is_none(line: str) -> None:
    assert parse(line) is None


@pytest.mark.parametrize("cut", range(5, len(NANO), 7))
def test_a_line_that_was_cut_off_is_read_as_far_as_it_goes(cut: int) -> None:
    reading = parse(NANO[:cut])
    if reading is not None:
        whole = read(NANO)
        assert {power.rail for power in reading.powers} <= {power.rail for power in whole.powers}
        assert reading.gpu_load in (None, 0.09, 0.99)


def test_a_log_counts_from_its_first_line() -> None:
    later = NANO.replace("04:35:02", "04:35:04")
    assert [reading.time_s for reading in parse_log(["tegrastats started", NANO, later])] == [0.0, 2.0]
    assert [reading.time_s for reading in parse_log([XAVIER, "", XAVIER], interval_s=0.5)] == [0.0, 0.5]


def test_completing_takes_only_what_lacks() -> None:
    reading = Reading(time_s=7.0, gpu_load=0.0, memory_total=1)
    full = completed(reading, read(NANO))
    assert (full.time_s, full.gpu_load, full.memory_total) == (7.0, 0.0, 1), "a load of 0 is known"
    assert (full.gpu_hz, full.watts) == (612e6, 16.321)

"""Sensors of five machines, whose files were written from documentation and public logs (their heads say which)."""

from __future__ import annotations

import math
from pathlib import Path
from time import sleep

import pytest

from keepsight.runtime.sensors import PowerMode, Reading, Sensors
from keepsight.runtime.sensors.board import JETPACKS, identity
from keepsight.runtime.sensors.meminfo import swaps
from keepsight.runtime.sensors.modes import modes, parse_query

from . import fake_root as fake

NANO, ORIN5, ORIN6, THOR, PC = fake.BOARDS


@pytest.fixture
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return fake.unfold(request.param, tmp_path)


def zones(reading: Reading) -> dict[str, tuple[float, float | None]]:
    return {zone.zone: (zone.celsius, zone.throttles_at) for zone in reading.temperatures}


def rails(reading: Reading) -> dict[str, tuple[float, bool]]:
    return {power.rail: (round(power.watts, 3), power.whole_board) for power in reading.powers}


def test_an_orin_nano_super(tmp_path: Path) -> None:
    sensors = Sensors(fake.unfold(NANO, tmp_path))
    reading = sensors.read()
    # cv0 to cv2 are switched off. 70 C of hot-surface-alert is no throttling; 99 C is. tj has no passive trip of its own.
    assert zones(reading) == {
        "cpu-thermal": (48.562, 99.0), "gpu-thermal": (49.625, 99.0), "soc0-thermal": (48.625, 99.0),
        "soc1-thermal": (47.937, 99.0), "soc2-thermal": (46.593, 99.0), "tj-thermal": (49.625, None),
    }  # fmt: skip
    # 4.968 V x 1.52 A; neither shunt voltages nor sums of channels are rails.
    assert rails(reading) == {"VDD_IN": (7.551, True), "VDD_CPU_GPU_CV": (0.516, False), "VDD_SOC": (1.448, False)}
    assert reading.watts == pytest.approx(7.55136)
    assert (reading.gpu_hz, reading.gpu_max_hz, reading.gpu_load) == (306e6, 918e6, 0.12)
    assert (reading.cpu_hz, reading.cpu_max_hz) == ((729.6e6,) * 6, (1344e6,) * 6)
    assert reading.emc_hz is None, "debugfs is root's"
    assert (reading.memory_total, reading.memory_available) == (7802844 * 1024, 5023972 * 1024)
    assert (reading.swap_total, reading.swap_free) == (3901408 * 1024, 3901408 * 1024)
    assert reading.throttled == ()
    assert sensors.power_mode() == PowerMode("25W", 1)
    assert sensors.clocks_locked() is False


def test_an_agx_orin_on_jetpack_5_has_rails_at_nvidias_path_and_a_gpu_of_another_name(tmp_path: Path) -> None:
    sensors = Sensors(fake.unfold(ORIN5, tmp_path))
    reading = sensors.read()
    assert "CV0-therm" not in zones(reading), "-256 C is a zone that is switched off"
    assert rails(reading) == {
        "VDD_GPU_SOC": (3.205, True), "VDD_CPU_CV": (0.973, True), "VIN_SYS_5V0": (4.531, True),
        "VDDQ_VDD2_1V8AO": (0.397, False),
    }  # fmt: skip
    assert reading.watts == pytest.approx(4.992 * 0.642 + 4.992 * 0.195 + 4.968 * 0.912)
    assert (reading.gpu_hz, reading.gpu_load, reading.emc_hz) == (1300.5e6, 0.457, 2133e6)
    assert len(reading.cpu_hz) == 8, "four cores are off"
    assert sensors.power_mode() == PowerMode("MODE_30W", 2)
    assert sensors.clocks_locked() is False


def test_an_agx_orin_on_jetpack_6_at_locked_clocks(tmp_path: Path) -> None:
    sensors = Sensors(fake.unfold(ORIN6, tmp_path))
    reading = sensors.read()
    assert (reading.gpu_load, len(reading.cpu_hz)) == (0.99, 12)
    assert sensors.power_mode() == PowerMode("MAXN", 0)
    assert sensors.clocks_locked() is True


def test_an_agx_thor(tmp_path: Path) -> None:
    sensors = Sensors(fake.unfold(THOR, tmp_path))
    reading = sensors.read()
    assert zones(reading)["gpu-thermal"] == (84.8, 109.0)
    assert rails(reading) == {
        "VDD_GPU": (32.387, False), "VDD_CPU_SOC_MSS": (14.223, False), "VIN_SYS_5V0": (6.548, False), "VIN": (68.862, True),
    }  # fmt: skip
    assert reading.watts == pytest.approx(68.862)
    assert (reading.gpu_hz, reading.gpu_max_hz, reading.gpu_load, reading.emc_hz) == (1098e6, 1386e6, None, 4266e6)
    assert reading.throttled == ("gpu-throttle-alert", "devfreq-gpu-gpc-0")
    assert (reading.swap_total, reading.swap_free) == (0, 0), "the kernel says that there is no swap: that zero is known"
    assert sensors.power_mode() == PowerMode("120W", 1)


def test_a_thor_without_its_input_meter_is_the_sum_of_its_modules_rails(tmp_path: Path) -> None:
    root = fake.unfold(THOR, tmp_path)
    fake.put(root, "/sys/class/hwmon/hwmon6/name", "!gone")
    assert Sensors(root).read().watts == pytest.approx(32.3868 + 14.2234 + 6.547824)


def test_a_pc(tmp_path: Path) -> None:
    root = fake.unfold(PC, tmp_path)
    sensors = Sensors(root)
    sleep(0.005)  # an energy counter gives power over the time since it was read
    reading = sensors.read()
    assert zones(reading) == {"acpitz": (27.8, None), "x86_pkg_temp": (52.0, None), "coretemp Package id 0": (52.0, None)}
    assert [(power.rail, power.whole_board) for power in reading.powers] == [("package-0", False)], "a package is no board"
    assert (reading.watts, reading.gpu_hz, reading.gpu_load) == (None, None, None)
    assert sensors.power_mode() is None
    assert sensors.clocks_locked() is False


def test_power_from_an_energy_counter_is_what_was_used_over_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, now = fake.unfold(PC, tmp_path), [100.0]
    monkeypatch.setattr("keepsight.runtime.sensors.power.monotonic", lambda: now[0])
    sensors = Sensors(root)
    place = "/sys/class/powercap/intel-rapl:0/energy_uj"
    # From 262,143,000,000 on; the second one goes over the counter's end, at 262,143,328,850.
    for energy, seconds, joules in ((262143300000, 2.0, 0.3), (1000000, 0.5, 1.02885), (3000000, 4.0, 2.0)):
        fake.put(root, place, str(energy))
        now[0] += seconds
        assert [power.watts for power in sensors.read().powers] == [pytest.approx(joules / seconds)]


def test_what_lies_beyond_the_third_channel_is_no_rail(tmp_path: Path) -> None:
    root = fake.unfold(NANO, tmp_path)
    fake.put(root, "/sys/class/hwmon/hwmon1/in4_label", "sum of currents")  # in4 is a shunt's voltage, curr4 a sum of currents
    assert list(rails(Sensors(root).read())) == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]


def test_over_current_counts_between_two_readings_alone(tmp_path: Path) -> None:
    root = fake.unfold(NANO, tmp_path)
    sensors = Sensors(root)
    place = "/sys/devices/platform/soctherm-oc-event/hwmon/hwmon3/oc3_event_cnt"
    assert sensors.read().throttled == (), "27 events since the boot are not now"
    fake.put(root, place, "29")
    assert sensors.read().throttled == ("oc3 (instantaneous over-current)",)
    assert sensors.read().throttled == ()


def test_a_hot_surface_is_no_throttling_and_a_cooling_device_is(tmp_path: Path) -> None:
    root = fake.unfold(NANO, tmp_path)
    places = {path.read_text().strip(): path.parent for path in root.glob("sys/class/thermal/cooling_device*/type")}
    (places["hot-surface-alert"] / "cur_state").write_text("1\n")
    (places["pwm-fan"] / "cur_state").write_text("3\n")
    assert Sensors(root).read().throttled == ()
    (places["cpu-throttle-alert"] / "cur_state").write_text("1\n")
    assert Sensors(root).read().throttled == ("cpu-throttle-alert",)


def test_a_zone_of_which_nothing_is_bound_takes_its_lowest_passive_trip(tmp_path: Path) -> None:
    root = fake.unfold(NANO, tmp_path)
    for path in root.glob("sys/class/thermal/thermal_zone*/cdev*_trip_point"):
        path.unlink()
    assert zones(Sensors(root).read())["cpu-thermal"] == (48.562, 70.0)


@pytest.mark.parametrize("root", fake.BOARDS, indirect=True)
@pytest.mark.parametrize("value", ["!unreadable", "!gone", "", "garbage", "-1", "99999999999999999999999", "1.5", "\x00\x01"])
def test_whatever_the_files_say_a_reading_is_made_and_nothing_is_zero(root: Path, value: str) -> None:
    sensors = Sensors(root)
    places = [path for path in root.rglob("*") if path.is_file()]
    for path in places:
        fake.put(root, str(path.relative_to(root)), value)
    for machine in (sensors, Sensors(root)):  # gone between two readings, and from the beginning
        reading = machine.read()
        numbers = [reading.gpu_hz, reading.gpu_max_hz, reading.emc_hz, *reading.cpu_hz, *reading.cpu_max_hz, reading.memory_total]
        assert all(number is None or number > 0 for number in numbers)
        assert reading.memory_total is None and reading.gpu_load is None
        # Frost is possible, and a Thor's GPU rail is below zero when it idles.
        assert value == "-1" or (not reading.temperatures and reading.watts is None)
        machine.power_mode(), machine.clocks_locked(), swaps(root), identity(root)


@pytest.mark.parametrize("root", fake.BOARDS, indirect=True)
def test_each_file_may_be_missing_alone(root: Path) -> None:
    for path in [path for path in root.rglob("*") if path.is_file()]:
        content, place = path.read_bytes(), str(path.relative_to(root))
        fake.put(root, place, "!gone")
        reading = Sensors(root).read()
        assert all(math.isfinite(zone.celsius) for zone in reading.temperatures)
        path.write_bytes(content)


def test_a_rail_that_fails_makes_no_smaller_board(tmp_path: Path) -> None:
    root = fake.unfold(ORIN6, tmp_path)
    sensors = Sensors(root)
    fake.put(root, "/sys/class/hwmon/hwmon3/curr1_input", "!unreadable")
    reading = sensors.read()
    assert reading.watts is None, "the sum of what is left is not the board"
    assert "VDD_CPU_CV" in rails(reading)


def test_an_empty_root_gives_an_empty_reading(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path)
    reading = sensors.read()
    assert reading == Reading(time_s=reading.time_s)
    assert (sensors.power_mode(), sensors.clocks_locked()) == (None, None)
    assert not identity(tmp_path).is_jetson


def test_this_machine_can_be_read() -> None:
    reading = Sensors().read()
    assert reading.memory_total is not None and reading.memory_available is not None
    assert 0 < reading.memory_available <= reading.memory_total


def test_a_mode_that_the_configuration_lacks_is_called_by_its_number(tmp_path: Path) -> None:
    root = fake.unfold(NANO, tmp_path)
    fake.put(root, "/var/lib/nvpmodel/status", "pmode:0007")
    assert Sensors(root).power_mode() == PowerMode("mode 7", 7)
    assert modes(root) == {0: "15W", 1: "25W", 2: "MAXN_SUPER", 3: "7W"}, "a comment names no mode"
    fake.put(root, "/var/lib/nvpmodel/status", "!gone")
    assert Sensors(root).power_mode() is None, "another root's nvpmodel is not asked"


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", PowerMode("MAXN_SUPER", 2)),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: 15W\n0\n", PowerMode("15W", 0)),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_30W\n2\n", PowerMode("MODE_30W", 2)),
        ("NV Power Mode: 25W\n", PowerMode("25W", None)),
        ("NVPM ERROR: failed to read PARAM GPU\n", None),
        ("", None),
    ],
)
def test_what_nvpmodel_prints(said: str, mode: PowerMode | None) -> None:
    assert parse_query(said) == mode


def test_identities(tmp_path: Path) -> None:
    found = {name: identity(fake.unfold(name, tmp_path / name)) for name in fake.BOARDS}
    told = {name: (one.l4t, one.jetpack, one.chip, one.sm, one.cores, one.processor) for name, one in found.items()}
    assert told == {
        NANO: ("36.4.3", "6.2", "tegra234", 87, 6, "Arm Cortex-A78AE"),
        ORIN5: ("35.4.1", "5.1.2", "tegra234", 87, 12, "Arm Cortex-A78AE"),
        ORIN6: ("36.4.0", "6.1", "tegra234", 87, 12, "Arm Cortex-A78AE"),
        THOR: ("38.4.0", "7.1", "tegra264", 110, 14, "Arm Neoverse-V3AE"),
        PC: (None, None, None, None, 4, "Intel(R) Core(TM) i5-9600 CPU @ 3.10GHz"),
    }
    assert found[NANO].title == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert found[NANO].system == "Ubuntu 22.04.5 LTS, Linux 5.15.148-tegra"
    assert found[PC].title == "Example Computers Desk 7"
    assert [one.is_jetson for one in found.values()] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("revision", "jetpack"),
    [(("36", "4.7"), "6.2.1"), (("36", "5.0"), "6.2.2"), (("38", "2.0"), "7.0"), (("39", "2.0"), "7.2"), (("37", "1.0"), None),
     (("32", "7.1"), None)],
)  # fmt: skip
def test_jetpack_of_a_release(tmp_path: Path, revision: tuple[str, str], jetpack: str | None) -> None:
    major, minor = revision
    fake.put(tmp_path, "/etc/nv_tegra_release", f"# R{major} (release), REVISION: {minor}, GCID: 1, BOARD: generic")
    assert identity(tmp_path).jetpack == jetpack
    assert "6.2" in JETPACKS.values()


def test_swaps(tmp_path: Path) -> None:
    nano, pc = (swaps(fake.unfold(name, tmp_path / name)) for name in (NANO, PC))
    assert (len(nano), nano[0].compressed, nano[0].bytes) == (6, True, 650234 * 1024)
    assert [(swap.device, swap.compressed) for swap in pc] == [("/swapfile", False)]

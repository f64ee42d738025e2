"""Every scaler against the description of its kernel, pixel by pixel in float64; colorimetry and conversion of YUV."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from keepsight.streams import Source, UsageError, write_video
from keepsight.streams.bicubic import bicubic
from keepsight.streams.view import Scaler

SIZES = [((53, 41), (24, 20)), ((53, 41), (80, 70)), ((60, 44), (8, 8)), ((40, 40), (24, 40))]


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Blobs, hard edges from black to white, and some noise, uint8 `[H, W, 3]`."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[1], : size[0]]
    waves = np.stack([np.sin(rows / (3 + k)) + np.cos(columns / (4 + k)) for k in range(3)], axis=-1)
    image = 128 + 55 * waves + rng.normal(0, 4, waves.shape)
    image[size[1] // 3 : size[1] // 2, size[0] // 4 : size[0] // 2] = 255
    image[: size[1] // 6, size[0] // 2 :] = 0
    return image.clip(0, 255).astype(np.uint8)


def sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


def cubic(x: float, a: float) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


# Weight of a pixel at a distance, and how far the kernel reaches.
KERNELS: dict[str, tuple[Callable[[float], float], int]] = {
    "sinc-4tap": (sinc, 2),
    "bilinear": (lambda x: max(0.0, 1 - abs(x)), 1),
    "bilinear-antialias": (lambda x: max(0.0, 1 - abs(x)), 1),
    "bicubic-antialias": (lambda x: cubic(x, -0.5), 2),
    "lanczos": (lambda x: sinc(x) * sinc(x / 2) if abs(x) < 2 else 0.0, 2),
    "bicubic": (lambda x: cubic(x, -0.75), 2),
    "bicubic-wrap": (lambda x: cubic(x, -0.75), 2),
}
ANTIALIASED = {"bilinear-antialias", "bicubic-antialias", "lanczos"}


def weights(scaler: str, stored: int, wanted: int, *, corners: bool = False) -> np.ndarray:
    """`[wanted, stored]`: what each pixel of a row is made of; `corners` lays the outermost pixels on each other."""
    matrix = np.zeros((wanted, stored))
    for index in range(wanted):
        place = index * (stored - 1) / (wanted - 1) if corners else (index + 0.5) * stored / wanted - 0.5
        if scaler == "nearest":
            matrix[index, min(stored - 1, math.floor(place + 0.5))] = 1
            continue
        kernel, reach = KERNELS[scaler]
        # An antialiased kernel is stretched, to a whole number of pixels.
        stretch = max(1, stored / wanted) if scaler in ANTIALIASED else 1
        taps = math.ceil(2 * reach * stretch)
        first = math.floor(place - (taps - 1) // 2)
        row = {pixel: kernel((place - pixel) * 2 * reach / taps) for pixel in range(first, first + taps)}
        for pixel, weight in row.items():
            matrix[index, min(max(pixel, 0), stored - 1)] += weight / sum(row.values())
    return matrix


def slow(image: np.ndarray, scaler: str, size: tuple[int, int], *, corners: bool = False) -> np.ndarray:
    """Scaled in float64 `[H, W, 3]`, neither rounded nor cut."""
    down, across = weights(scaler, image.shape[0], size[1]), weights(scaler, image.shape[1], size[0], corners=corners)
    return np.einsum("yi,xj,ijc->yxc", down, across, image.astype(np.float64))


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., np.ndarray]:
    """One picture through a source that has to scale it."""

    def one(image: np.ndarray, **options: Any) -> np.ndarray:
        np.save(tmp_path / "frames.npy", image[None])
        return next(Source(tmp_path / "frames.npy", **options)).image

    return one


@pytest.mark.parametrize(("stored", "size"), SIZES)
@pytest.mark.parametrize("scaler", get_args(Scaler))
def test_a_scaler_computes_what_its_kernel_says(
    read: Callable[..., np.ndarray], scaler: Scaler, stored: tuple[int, int], size: tuple[int, int]
) -> None:
    image = picture(stored)
    wanted, shown = slow(image, scaler, size), read(image, size=size, scaler=scaler).astype(int)
    if scaler == "bicubic-wrap":
        near = np.abs((shown - np.floor(wanted) + 128) % 256 - 128)
    elif scaler == "bicubic":
        near = np.abs(shown - np.floor(wanted.clip(0, 255)))
    else:
        near = np.abs(shown - wanted.clip(0, 255))
    # GStreamer's weights have few bits, and it rounds and cuts off after the first axis: the more taps, the more it adds up.
    limit = 1.0 if scaler in ("bicubic", "bicubic-wrap") else 5.0
    assert np.quantile(near, 0.98) <= limit and near.mean() < 1.3


def test_scalers_that_are_much_alike_are_told_apart(read: Callable[..., np.ndarray]) -> None:
    """Of noise that nothing overshoots; they differ by less than the tolerance above."""
    image, size = np.random.default_rng(3).integers(60, 196, (53, 41, 3)).astype(np.uint8), (80, 70)
    for mine, other in (("lanczos", "bicubic-antialias"), ("bicubic-antialias", "lanczos")):
        shown = read(image, size=size, scaler=mine)
        near, far = (np.abs(shown - slow(image, name, size)).mean() for name in (mine, other))
        assert near < 0.9 * far


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_pictures_and_videos_get_the_scaler_that_arrays_get(
    tmp_path: Path, save_image: Callable[[Path, np.ndarray], Path], read: Callable[..., np.ndarray], suffix: str
) -> None:
    image = np.repeat(picture((60, 44))[..., :1], 3, axis=2)  # grey, so that a video's halved colours change nothing
    path = tmp_path / f"clip{suffix}"
    if suffix == ".png":
        save_image(path, image)
    else:
        write_video(path, [image] * 2, fps=10)
    full = next(Source(path)).image
    for scaler in set(get_args(Scaler)) - ({"bilinear"} if suffix == ".mp4" else set()):
        of_file = next(Source(path, size=(24, 20), scaler=scaler)).image.astype(int)
        of_array = read(full, size=(24, 20), scaler=scaler).astype(int)
        apart = np.abs((of_file - of_array + 128) % 256 - 128) if scaler == "bicubic-wrap" else np.abs(of_file - of_array)
        assert apart.mean() < 1.5 and np.quantile(apart, 0.99) <= 3, scaler


def test_bilinear_lays_a_videos_columns_corner_on_corner(tmp_path: Path) -> None:
    """Not its rows, and not the columns of a picture in RGB: GStreamer has another quick way there."""
    image = np.repeat(picture((200, 60))[..., :1], 3, axis=2)
    write_video(tmp_path / "clip.mp4", [image] * 2, fps=10)
    full, shown = (next(Source(tmp_path / "clip.mp4", size=size)).image.astype(int) for size in (None, (30, 24)))
    near, centred = (np.abs(shown - slow(full, "bilinear", (30, 24), corners=corners)) for corners in (True, False))
    assert np.quantile(near, 0.98) <= 3 and near.mean() < 1
    assert centred.mean() > 2 * near.mean()


def test_bicubic_is_pytorchs_wrap_included() -> None:
    """Bit for bit, but where the value is a whole number up to a rounding error; there, too, where PyTorch rounds as on x86."""
    fused = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for stored, size in [*SIZES, ((640, 272), (224, 224)), ((100, 90), (224, 224))]:
        image = picture(stored)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float().contiguous()
        values = F.interpolate(pixels, size=size[::-1], mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
        sure = ((values - values.round()).abs() > 1e-3).numpy()
        assert sure.mean() > 0.5
        for wrap, wanted in ((True, values.to(torch.uint8)), (False, values.clamp(0, 255).to(torch.uint8))):
            apart = bicubic(image, size, wrap=wrap).astype(int) - wanted.numpy()
            assert not apart[sure].any()
            assert np.abs((apart + 128) % 256 - 128).max() <= 1
            assert not fused or not apart[1:, 1:].any()


def test_overshoot_is_cut_off_or_wraps() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    values = slow(image, "bicubic", (24, 40))
    over, under = values > 256, values < 0
    assert over.any() and under.any()
    cut, wrapped = bicubic(image, (24, 40)), bicubic(image, (24, 40), wrap=True)
    assert (cut[over] == 255).all() and (cut[under] == 0).all()
    assert np.array_equal(wrapped[over], np.floor(values[over]).astype(int) - 256)
    assert np.array_equal(wrapped[under], np.ceil(values[under]).astype(int) % 256)


def test_letterbox_has_the_same_place_whichever_scaler(read: Callable[..., np.ndarray]) -> None:
    image = np.full((45, 80, 3), 255, np.uint8)
    for scaler in get_args(Scaler):
        white = read(image, size=(64, 64), aspect="letterbox", scaler=scaler).min(axis=2) > 128
        assert (white.any(axis=1).sum(), white.any(axis=0).sum()) == (36, 64) and white[14:50].all(), scaler


def test_pixels_that_are_not_square_count_in_a_letterbox(tmp_path: Path, gst_run: Callable[[str, Path], Path]) -> None:
    path = gst_run(
        "videotestsrc pattern=white num-buffers=2 "
        "! video/x-raw,format=I420,width=320,height=180,pixel-aspect-ratio=1/2,framerate=25/1 "
        "! x264enc ! h264parse ! mp4mux ! filesink name=out",
        tmp_path / "white.mp4",
    )
    white = next(Source(path, size=(224, 224), aspect="letterbox", scaler="bicubic")).image.min(axis=2) > 128
    assert (white.any(axis=1).sum(), white.any(axis=0).sum()) == (224, pytest.approx(199, abs=2))


# Limited-range Y, Cb, Cr to R, G, B (ITU-R BT.601 and BT.709).
MATRICES = {
    "bt601": np.array([[1.164384, 0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0]]),
    "bt709": np.array([[1.164384, 0, 1.792741], [1.164384, -0.213249, -0.532909], [1.164384, 2.112402, 0]]),
}


def as_rgb(yuv: tuple[int, int, int], matrix: str) -> np.ndarray:
    return (MATRICES[matrix] @ (np.array(yuv) - [16, 128, 128])).clip(0, 255)


@pytest.fixture(scope="module", params=[(64, 48), (80, 592)], ids=["standard", "high"])
def yuv_clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A clip of one colour, Y 110, Cb 90, Cr 170, stored as it is, and the matrix that GStreamer takes it for."""
    width, height = request.param
    pixels = width * height
    planes = (np.full(count, level, np.uint8) for count, level in ((pixels, 110), (pixels // 4, 90), (pixels // 4, 170)))
    path = tmp_path_factory.mktemp("yuv") / "clip.y4m"
    header = f"YUV4MPEG2 W{width} H{height} F5:1 Ip A1:1 C420jpeg\n".encode()
    path.write_bytes(header + (b"FRAME\n" + b"".join(map(bytes, planes))) * 2)
    return path, "bt709" if height > 576 else "bt601"


def test_scaling_does_not_change_the_colours_of_a_video_that_says_nothing_of_them(
    yuv_clip: tuple[Path, str], gst_run: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    path = gst_run(f"filesrc location={yuv_clip[0]} ! y4mdec ! avenc_mpeg4 ! avimux ! filesink name=out", tmp_path / "clip.avi")
    full, small = (next(Source(path, size=size)).image for size in (None, (32, 32)))
    assert np.array_equal(full[:32, :32], small)


@pytest.mark.parametrize("colorimetry", [None, "bt601", "bt709"])
@pytest.mark.parametrize("scaler", ["bilinear", "bicubic"])
def test_yuv_is_read_with_the_matrix_asked_for(yuv_clip: tuple[Path, str], colorimetry: Any, scaler: Scaler) -> None:
    path, own = yuv_clip
    image = next(Source(path, size=(32, 32), colorimetry=colorimetry, scaler=scaler)).image
    wanted = as_rgb((110, 90, 170), colorimetry or own)
    assert np.abs(image - wanted).max() <= 2
    assert np.abs(image - as_rgb((110, 90, 170), "bt601" if (colorimetry or own) == "bt709" else "bt709")).max() > 5


def test_the_full_range_of_a_jpeg_survives_another_matrix(
    tmp_path: Path, save_image: Callable[[Path, np.ndarray], Path], gst_run: Callable[[str, Path], Path]
) -> None:
    grey = save_image(tmp_path / "grey.png", np.full((64, 64, 3), 250, np.uint8))
    path = gst_run(
        f"filesrc location={grey} ! pngdec ! videoconvert ! video/x-raw,format=I420,colorimetry=(string)1:4:0:0 "
        "! jpegenc quality=100 ! filesink name=out",
        tmp_path / "grey.jpg",
    )
    for colorimetry in (None, "bt601", "bt709"):
        image = next(Source(path, colorimetry=colorimetry)).image  # type: ignore[arg-type]
        assert np.abs(image.astype(int) - 250).max() <= 2


def test_pictures_in_rgb_have_no_matrix(tmp_path: Path, save_image: Callable[[Path, np.ndarray], Path]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = save_image(tmp_path / "one.png", image)
    for colorimetry in ("bt601", "bt709"):
        assert np.array_equal(next(Source(path, colorimetry=colorimetry)).image, image)  # type: ignore[arg-type]


def test_the_8_bit_conversion_is_darker_than_the_exact_one(yuv_clip: tuple[Path, str]) -> None:
    path, own = yuv_clip
    wanted = as_rgb((110, 90, 170), own)
    exact, quick = (next(Source(path, size=(32, 32), conversion=way)).image for way in ("exact", "8-bit"))  # type: ignore[arg-type]
    assert np.abs(exact - wanted).mean() < 1
    assert (quick - wanted).mean() < -1


@pytest.mark.parametrize("option", [{"scaler": "area"}, {"colorimetry": "bt2020"}, {"conversion": "quick"}])
def test_what_is_not_known_is_refused_at_once(option: dict[str, Any]) -> None:
    (name, value), = option.items()
    with pytest.raises(UsageError, match=f"{name}='{value}' is not known"):
        Source("test://ball", **option)

"""Corruptions against the formulas of the paper's script, and folders of arrays whole, damaged and incomplete."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from art_saliency.errors import CheckpointError, InputError
from art_saliency.evaluation.accuracy import accuracy, binomial_interval
from art_saliency.evaluation.corruption_arrays import array_corruption_accuracy, open_corruption_arrays
from art_saliency.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_accuracy
from art_saliency.files import sha256_of_tensors

GREY = [name for name, kind in CORRUPTIONS.items() if not kind.needs_colour]
RISING = [name for name in CORRUPTIONS if name != "saturate"]
"""The paper's saturation takes colour away at severities 1 and 2 and adds some at 3 to 5."""


def pictures(count=4, side=32, channels=3):
    """Smooth coloured pictures with some detail, in steps of 1/255."""
    ramp = torch.linspace(0, 1, side)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    waves = [
        torch.stack([0.5 + 0.35 * torch.sin(6 * (rows * (i + 1) + columns * (c + 1))) for c in range(channels)])
        for i in range(count)
    ]
    return (torch.stack(waves) * 255).round() / 255


# ---- made on the spot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_severity_0_is_the_image_and_all_others_are_images(name, channels):
    x = pictures(2, channels=channels)
    if channels == 1 and CORRUPTIONS[name].needs_colour:
        with pytest.raises(
            InputError, match=f"^corruption: got '{name}' for grey images, expected images of 3 channels"
        ):
            corrupt(x, name, 1)
        return
    same = corrupt(x, name, 0)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()
    before = x.clone()
    for severity in SEVERITIES:
        changed = corrupt(x, name, severity)
        assert changed.shape == x.shape
        assert changed.dtype == x.dtype
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        assert not torch.equal(changed, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", RISING)
def test_every_severity_moves_images_farther_than_the_one_before(name, channels):
    x = pictures(4, channels=channels)
    distances = [float((corrupt(x, name, severity) - x).norm()) for severity in (0, *SEVERITIES)]
    assert distances == sorted(distances)
    assert len(set(distances)) == 6


def drawn(name, place, seed=0):
    import zlib

    return np.random.default_rng([seed, zlib.crc32(name.encode()), place])


def test_noise_is_the_papers_formula():
    x, shape = pictures(3), (32, 32, 3)
    for name, levels, formula in (
        ("gaussian_noise", [0.04, 0.06, 0.08, 0.09, 0.10], lambda x, c, r: x + r.normal(size=shape, scale=c)),
        ("shot_noise", [500, 250, 100, 75, 50], lambda x, c, r: r.poisson(x * c) / c),
        ("speckle_noise", [0.06, 0.1, 0.12, 0.16, 0.2], lambda x, c, r: x + x * r.normal(size=shape, scale=c)),
    ):
        for severity in SEVERITIES:
            found = corrupt(x, name, severity)
            for place in range(3):
                image = x[place].permute(1, 2, 0).double().numpy()
                expected = np.clip(formula(image, levels[severity - 1], drawn(name, place)), 0, 1)
                assert np.allclose(found[place].permute(1, 2, 0).numpy(), expected, atol=1e-6), name


def test_noise_has_the_strength_that_its_level_says():
    grey = torch.full((40, 3, 32, 32), 0.5)
    for severity, scale in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(grey, "gaussian_noise", severity) - grey
        assert float(noise.std()) == pytest.approx(scale, rel=0.02)
        assert abs(float(noise.mean())) < 0.002
    for severity, rate in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        assert float(corrupt(grey, "shot_noise", severity).std()) == pytest.approx((0.5 / rate) ** 0.5, rel=0.02)
    for severity, share in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        found = corrupt(grey, "impulse_noise", severity)
        for extreme in (0.0, 1.0):  # half salt, half pepper
            assert float((found == extreme).float().mean()) == pytest.approx(share / 2, rel=0.1)
        assert bool(((found == 0) | (found == 1) | (found == 0.5)).all())


def test_blur_is_a_gaussian_mean_of_the_neighbours():
    x = torch.zeros(1, 1, 15, 15)
    x[0, 0, 7, 7] = 1
    sigma = 1.0
    line = torch.exp(-torch.arange(-4.0, 5.0).square() / (2 * sigma**2))
    line = line / line.sum()
    found = corrupt(x, "gaussian_blur", 5)[0, 0]
    assert torch.allclose(found[3:12, 3:12], torch.outer(line, line), atol=1e-6)
    assert torch.allclose(corrupt(torch.full((1, 3, 9, 9), 0.3), "gaussian_blur", 5), torch.tensor(0.3))


def test_contrast_brings_pixels_to_the_mean_of_their_channel():
    x = pictures(2)
    mean = x.mean((2, 3), keepdim=True)
    for severity, level in zip(SEVERITIES, (0.75, 0.5, 0.4, 0.3, 0.15), strict=True):
        torch.testing.assert_close(corrupt(x, "contrast", severity), mean + level * (x - mean))


def test_brightness_adds_to_the_value_and_saturation_scales_the_distance_to_grey():
    """By colorsys of the standard library, pixel by pixel."""
    import colorsys

    x = pictures(1, side=6)
    for severity in SEVERITIES:
        add = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
        scale, shift = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
        bright, coloured = corrupt(x, "brightness", severity), corrupt(x, "saturate", severity)
        for row in range(6):
            for column in range(6):
                h, s, v = colorsys.rgb_to_hsv(*x[0, :, row, column].tolist())
                expected = colorsys.hsv_to_rgb(h, s, min(v + add, 1))
                assert bright[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)
                expected = colorsys.hsv_to_rgb(h, min(max(s * scale + shift, 0), 1), v)
                assert coloured[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)
    grey = pictures(1, channels=1)
    torch.testing.assert_close(corrupt(grey, "brightness", 2), (grey + 0.1).clamp(0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_and_pixelation_are_pillows(channels):
    x = pictures(1, channels=channels)
    pixels = (x[0] * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)

    def tensor(picture):
        return torch.from_numpy(np.asarray(picture).reshape(32, 32, channels).copy()).permute(2, 0, 1) / 255

    for severity in SEVERITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
        torch.testing.assert_close(corrupt(x, "jpeg_compression", severity)[0], tensor(Image.open(file)))
        side = int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
        small = image.resize((side, side), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
        torch.testing.assert_close(corrupt(x, "pixelate", severity)[0], tensor(small))


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(CORRUPTIONS)),
    severity=st.integers(0, 5),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    colour=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_any_size_is_taken(name, severity, height, width, colour, seed):
    colour = colour or CORRUPTIONS[name].needs_colour
    x = torch.rand(2, 3 if colour else 1, height, width)
    found = corrupt(x, name, severity, seed=seed)
    assert found.shape == x.shape
    assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"])
def test_an_images_noise_hangs_on_the_seed_and_its_place_alone(name):
    x = pictures(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    whole = corrupt(x, name, 3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(corrupt(x, name, 3, seed=7), whole)
    assert torch.equal(corrupt(x[3:], name, 3, seed=7, first=3), whole[3:])
    assert not torch.equal(corrupt(x[3:], name, 3, seed=7), whole[3:])
    assert not torch.equal(corrupt(x, name, 3, seed=8), whole)
    assert not torch.equal(corrupt(x[:1].repeat(2, 1, 1, 1), name, 3)[0], corrupt(x[:1].repeat(2, 1, 1, 1), name, 3)[1])


def test_bytes_and_numbers_are_the_same_pictures():
    x = pictures(2)
    assert torch.allclose(
        corrupt((x * 255).round().byte(), "gaussian_noise", 2), corrupt(x, "gaussian_noise", 2), atol=1e-6
    )
    assert corrupt(x.double(), "contrast", 2).dtype == torch.float64


# ---- accuracy -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits):
    """An honest small network for digits, in train mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(digits[0]), digits[1]).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model


@pytest.fixture(scope="module")
def sample(digits):
    return digits[2][:150], digits[3][:150]


def test_figures_are_accuracies_on_the_corrupted_images(trained, sample):
    x, y = sample
    weights, modes = sha256_of_tensors(trained.state_dict()), [module.training for module in trained.modules()]
    result = corruption_accuracy(trained, x, y, severities=(5, 1), seed=3, batch_size=64)
    assert list(result.correct) == GREY, "all that suit a grey image"
    for name in GREY:
        assert list(result.correct[name]) == [1, 5]
        for severity in (1, 5):
            expected = accuracy(trained, corrupt(x, name, severity, seed=3), y)
            assert result.accuracy(name, severity) == expected
    cells = [result.accuracy(name, severity) for name in GREY for severity in (1, 5)]
    assert result.mean_accuracy == pytest.approx(sum(cells) / len(cells))
    assert result.clean_correct == round(150 * accuracy(trained, x, y))
    assert sha256_of_tensors(trained.state_dict()) == weights
    assert [module.training for module in trained.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trained.parameters())
    again = corruption_accuracy(trained, x, y, severities=(1, 5), seed=3, batch_size=7)
    assert again == result, "batches make no difference"


def test_an_honest_network_does_worse_the_harsher_the_corruption(trained, digits):
    result = corruption_accuracy(trained, digits[2], digits[3], seed=0)
    by_severity = [np.mean([result.accuracy(name, severity) for name in GREY]) for severity in SEVERITIES]
    assert by_severity == sorted(by_severity, reverse=True)
    assert result.clean_correct / result.count > by_severity[0] > by_severity[-1] + 0.03


def test_the_interval_is_that_of_the_images_not_of_images_times_corruptions(trained, sample):
    result = corruption_accuracy(trained, *sample, corruptions=["contrast", "pixelate"], severities=[2])
    right = round(result.mean_accuracy * 150)
    assert result.interval == binomial_interval(right, 150)
    page = json.loads(json.dumps(result.to_json()))
    assert page["interval_95"] == list(result.interval)
    assert page["count"] == 150
    assert page["seed"] == 0
    assert page["source"] == "made on the spot"
    assert set(page["versions"]) == {"numpy", "skimage", "PIL"}
    cell = page["corruptions"]["pixelate"]["2"]
    assert cell["accuracy"] == cell["correct"] / 150 == result.accuracy("pixelate", 2)
    assert cell["interval_95"] == list(binomial_interval(cell["correct"], 150))
    assert page["clean"]["correct"] == result.clean_correct


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corruptions": []}, "corruptions: got no name"),
        ({"corruptions": "contrast"}, r"corruptions: got 'contrast', expected a sequence of names"),
        ({"corruptions": ["snow"]}, "corruptions: got 'snow', expected one of 'gaussian_noise'"),
        ({"corruptions": ["saturate"]}, "corruption: got 'saturate' for grey images"),
        ({"severities": []}, "severities: got none"),
        ({"severities": [0]}, "severities: got 0, expected a whole number, 1 <= severities <= 5"),
        ({"severities": [6]}, "severities: got 6"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"x": torch.rand(150, 2, 8, 8)}, "x: got images of 2 channels, expected 1 or 3"),
        ({"x": torch.rand(150, 1, 8, 8) * 255}, "x: got values from"),
        ({"y": torch.full((150,), 11)}, "y: got labels from 11 to 11"),
    ],
)
def test_bad_arguments_are_refused(trained, sample, change, message):
    arguments = {"x": sample[0], "y": sample[1], **change}
    with pytest.raises(InputError, match=f"^{message}"):
        corruption_accuracy(trained, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rain"}, "corruption: got 'rain', expected one of"),
        ({"severity": 6}, "severity: got 6, expected a whole number, 0 <= severity <= 5"),
        ({"severity": 1.0}, "severity: got 1.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"first": -1}, "first: got -1"),
        ({"x": torch.rand(3, 8, 8)}, "x: got shape"),
        ({"x": torch.rand(1, 4, 8, 8)}, "x: got images of 4 channels"),
    ],
)
def test_bad_corruptions_are_refused(change, message):
    with pytest.raises(InputError, match=f"^{message}"):
        corrupt(**{"x": pictures(1), "name": "contrast", "severity": 1, **change})


# ---- arrays -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, sample):
    """The sample under two corruptions as bytes, in the manner of CIFAR-10-C."""
    x, y = sample
    for name in ("contrast", "gaussian_noise"):
        stacked = torch.cat([corrupt(x, name, severity) for severity in SEVERITIES])
        np.save(tmp_path / f"{name}.npy", (stacked * 255).round().byte().permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "labels.npy", np.tile(y.numpy(), 5).astype(np.uint8))
    return tmp_path


def test_arrays_give_the_accuracy_of_every_block(trained, sample, folder):
    x, y = sample
    result = array_corruption_accuracy(trained, folder)
    assert list(result.correct) == ["contrast", "gaussian_noise"]
    for name in result.correct:
        for severity in SEVERITIES:
            rounded = (corrupt(x, name, severity) * 255).round() / 255
            assert result.accuracy(name, severity) == accuracy(trained, rounded, y)
    assert (result.clean_correct, result.seed, result.source) == (None, None, folder.name)
    assert json.loads(json.dumps(result.to_json()))["clean"] is None
    some = array_corruption_accuracy(trained, folder, corruptions=["contrast"], severities=[4], count=40, batch_size=7)
    assert some.correct == {"contrast": {4: round(40 * accuracy(trained, *first(folder, "contrast", 4, 40)))}}
    assert some.count == 40


def first(folder, name, severity, count):
    x = np.load(folder / f"{name}.npy")[(severity - 1) * 150 : (severity - 1) * 150 + count]
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(np.load(folder / "labels.npy")[:count]).long()


def test_labels_once_and_images_without_channels_will_do(trained, folder):
    expected = array_corruption_accuracy(trained, folder).correct
    np.save(folder / "labels.npy", np.load(folder / "labels.npy")[:150].astype(np.int32))
    for name in expected:
        np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[..., 0])
    assert array_corruption_accuracy(trained, folder).correct == expected


def test_arrays_of_colour_and_any_size(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5 * 3, 6, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", x)
    np.save(tmp_path / "labels.npy", np.tile([2, 0, 1], 5))
    arrays = open_corruption_arrays(tmp_path)
    for severity in SEVERITIES:
        block = arrays.block("fog", severity)
        assert block.shape == (3, 3, 6, 9)
        assert np.array_equal(block.permute(0, 2, 3, 1).numpy(), x[3 * severity - 3 : 3 * severity])
    assert arrays.labels.tolist() == [2, 0, 1]


def test_a_file_of_0_and_1_alone_is_named(tmp_path):
    np.save(tmp_path / "fog.npy", np.ones((10, 4, 4, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(10, np.int64))
    with pytest.raises(InputError, match=r"fog\.npy: got uint8 of 0 and 1 alone, .* multiply it by 255$"):
        open_corruption_arrays(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_file_is_not_read_into_memory(tmp_path):
    """All blocks of a gigabyte are there to be read, and a fresh process grows by little."""
    array = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint8, shape=(350_000, 32, 32, 3))
    array[::70_000, 0, 0, 0] = 255  # sparse, but pixels all the same
    np.save(tmp_path / "labels.npy", np.zeros(70_000, np.uint8))
    code = f"""
import resource, torch
from torch import nn
from art_saliency.evaluation.accuracy import accuracy
from art_saliency.evaluation.corruption_arrays import array_corruption_accuracy
network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
accuracy(network, torch.rand(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
array_corruption_accuracy(network, {str(tmp_path)!r}, count=512, batch_size=64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout) < 150_000, "kilobytes"


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "contrast.npy"), r"contrast\.npy: got a damaged file \(ValueError"),
        (lambda f: cut(f / "contrast.npy", 0), r"contrast\.npy: got a damaged file"),
        (lambda f: (f / "contrast.npy").write_bytes(b"not an array"), r"contrast\.npy: got a damaged file"),
        (lambda f: cut(f / "labels.npy"), r"labels\.npy: got a damaged file"),
        (lambda f: np.save(f / "contrast.npy", np.array([{}], dtype=object)), r"contrast\.npy: got a damaged file"),
        (
            lambda f: (f / "labels.npy").unlink(),
            r"labels\.npy: no such file, expected it beside contrast, gaussian_noise",
        ),
        (lambda f: [file.unlink() for file in f.glob("*.npy")], r"no CORRUPTION\.npy in it"),
        (lambda f: [file.unlink() for file in f.glob("[cg]*.npy")], r"no CORRUPTION\.npy in it"),
    ],
)
def test_damaged_and_missing_files_are_named(trained, folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        array_corruption_accuracy(trained, folder)


def test_a_folder_or_a_corruption_that_is_not_there_is_named(trained, folder):
    with pytest.raises(CheckpointError, match=r"nowhere: no CORRUPTION\.npy in it"):
        array_corruption_accuracy(trained, folder / "nowhere")
    with pytest.raises(CheckpointError, match=r"contrst\.npy: no such file.*did you mean 'contrast'"):
        array_corruption_accuracy(trained, folder, corruptions=["contrst"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((750, 8, 8, 1), np.float32), r"contrast\.npy: got float32 of shape \(750, 8, 8, 1\), expected uint8"),
        (np.zeros((750, 1, 8, 8), np.uint8), r"contrast\.npy: got uint8 of shape \(750, 1, 8, 8\)"),
        (np.zeros((750, 64), np.uint8), r"contrast\.npy: got uint8 of shape \(750, 64\)"),
        (np.zeros((749, 8, 8, 1), np.uint8), r"contrast\.npy: got 749 images, expected five times"),
        (np.zeros((0, 8, 8, 1), np.uint8), r"contrast\.npy: got (0 images|a damaged file)"),
        (np.zeros((745, 8, 8, 1), np.uint8), r"gaussian_noise\.npy: got images of shape \(750, 1, 8, 8\)"),
        (np.zeros((750, 8, 8, 3), np.uint8), r"gaussian_noise\.npy: got images of shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(trained, folder, array, message):
    np.save(folder / "contrast.npy", array)
    with pytest.raises((InputError, CheckpointError), match=message):
        array_corruption_accuracy(trained, folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(749, np.uint8), r"labels\.npy: got uint8 of shape \(749,\), expected 750 or 150 whole numbers"),
        (np.zeros(750, np.float32), r"labels\.npy: got float32"),
        (np.arange(750) % 7, r"labels\.npy: got labels that differ between severities"),
        (np.full(750, 10), r"^y: got labels from 10 to 10, expected labels from 0 to 9"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(trained, folder, labels, message):
    np.save(folder / "labels.npy", labels)
    with pytest.raises(InputError, match=message):
        array_corruption_accuracy(trained, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 151}, "count: got 151, expected a whole number, 1 <= count <= 150"),
        ({"severities": [0]}, "severities: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"corruptions": "contrast"}, "corruptions: got 'contrast', expected a sequence"),
        ({"corruptions": []}, "corruptions: got no name"),
    ],
)
def test_bad_arguments_for_arrays_are_refused(trained, folder, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        array_corruption_accuracy(trained, folder, **options)

"""Images made while they are scored: by number and seed alone, kept whole or not at all."""

import pathlib
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.data import datasets, sources
from tokgen.evaluation import made_images, validation
from tokgen.interfaces import UserError
from tokgen.sampling import sampler

LAYOUT = interfaces.TokenLayout((256,), ((4, 4),))
CLASSES = ("cat", "dog", "owl")


class Dice(nnx.Module):
    """A generator of one masked step: its logits are flat but for the class, or the text."""

    layout, cond = LAYOUT, "label"
    knobs = ("steps", "schedule")

    def check(self, cond):
        """Whatever is told."""

    def unstacked(self):
        return self

    def plan(self):
        return (interfaces.Phase(0, 1, 0, 16),)

    def start(self, cond, codec=None, *, keys_B, given):
        order_BL = jnp.broadcast_to(jnp.arange(16), (len(keys_B), 16))
        return interfaces.DecodeState(*given, order_BL=order_BL, cond=cond, keys_B=keys_B)

    def step(self, state, phase, index, codec, draw):
        label_B = state.cond
        near_BV = -0.001 * jnp.square(jnp.arange(256)[None] - 80 * label_B[:, None])
        logits_BlGV = jnp.broadcast_to(near_BV[:, None, None], (len(label_B), 16, 1, 256))
        return state.write(state.order_BL, draw(logits_BlGV)[0])


class Painter(nnx.Module):
    """Gray squares of four pixels a side, one a token."""

    layout, quantizer = LAYOUT, None

    def decode(self, tokens_BLG):
        image_BHW = tokens_BLG[..., 0].reshape(-1, 4, 4).repeat(4, 1).repeat(4, 2) / 255
        return jnp.broadcast_to(image_BHW[..., None], (*image_BHW.shape, 3))


def loaded(module, **more) -> types.SimpleNamespace:
    """What loading.load gives, as far as it is read."""
    config = ml_collections.ConfigDict(
        {
            "view": {"size": (16, 16), "channels": 3},
            "precision": {"compute": "float32"},
            "presets": {"default": {}},
        }
    )
    about = {
        "config": config,
        "layout": LAYOUT,
        "classes": CLASSES,
        "step": pathlib.Path("runs/dice/checkpoints/7"),
        "meta": {"step": 7, "kind": "generator", "config": {"presets": {"default": {}}}},
        "fingerprint": "d" * 64,
    }
    return types.SimpleNamespace(module=module, **(about | more))


def drawn(folder: pathlib.Path, count: int = 24, seed: int = 5, **more) -> made_images.Drawn:
    cond = made_images.balanced(count, len(CLASSES), seed)
    options = dict(settings={"weight": 1.0}, preset="default", seed=seed, batch=8, each=24) | more
    prepared = (Dice(), sampler.Sampler())
    return made_images.Drawn(
        *(loaded(Dice()), loaded(Painter(), fingerprint="p" * 64), prepared, cond),
        folder=folder / "images",
        **options,
    )


@pytest.mark.parametrize(("count", "classes"), [(30, 10), (37, 10), (5, 10), (1000, 7), (12, 1)])
def test_every_class_as_often_as_the_others_in_a_mixed_order(count, classes):
    label_N = made_images.balanced(count, classes, 3)
    times_K = np.bincount(label_N, minlength=classes)
    assert len(label_N) == count and len(times_K) == classes and np.ptp(times_K) <= 1
    np.testing.assert_array_equal(made_images.balanced(count, classes, 3), label_N)
    if classes > 1:
        assert (np.diff(label_N) < 0).any()
        assert (made_images.balanced(count, classes, 4) != label_N).any()
    assert made_images.balanced(4, 0, 0).tolist() == [0] * 4  # without classes


def test_an_image_depends_on_seed_number_and_class_only(tmp_path):
    whole = drawn(tmp_path / "a").part(0, 24)
    assert whole["image"].shape == (24, 16, 16, 3) and whole["image"].dtype == np.uint8
    assert len({image.tobytes() for image in whole["image"]}) == 24
    np.testing.assert_array_equal(whole["label"], made_images.balanced(24, 3, 5))
    parts = drawn(tmp_path / "b")
    for bounds in ((16, 24), (0, 5), (5, 16)):
        part = parts.part(*bounds)
        for name, array in part.items():
            np.testing.assert_array_equal(array, whole[name][slice(*bounds)])
    other = drawn(tmp_path / "c", seed=6)
    other.cond = whole["label"]
    assert not (other.part(0, 8)["image"] == whole["image"][:8]).all((1, 2, 3)).any()
    # images follow their class: gray grows with it
    mean_K = [whole["image"][whole["label"] == k].mean() for k in range(3)]
    assert mean_K[0] < mean_K[1] < mean_K[2]


def test_one_program_draws_every_part(tmp_path, monkeypatch):
    """The last one too, which is longer than a batch and shorter than the others."""
    real, seen = made_images.drawing.draw_tokens, []

    def counted(generator, codec, cond_B, keys_B, *words, **static):
        seen.append(len(keys_B))
        return real(generator, codec, cond_B, keys_B, *words, **static)

    monkeypatch.setattr(made_images.drawing, "draw_tokens", counted)
    images = drawn(tmp_path, count=104, batch=32, each=64)
    parts = [images.part(*bounds) for bounds in ((0, 64), (64, 104))]
    assert seen == [32] * 4 and [len(part["image"]) for part in parts] == [64, 40]
    one = drawn(tmp_path / "other", count=104, batch=32, each=64)
    np.testing.assert_array_equal(one.part(64, 104)["image"], parts[1]["image"])


def test_a_finished_archive_is_looked_for_when_images_are(tmp_path):
    """One that another seed left half written is none of this score, which empties the folder."""
    whole = tmp_path / "samples.npz"
    whole.write_bytes(b"cut off")
    images = drawn(tmp_path)
    whole.unlink()
    assert len(images.part(0, 8)["image"]) == 8 and images.archive is None


def test_what_was_drawn_is_kept_and_not_drawn_again(tmp_path, monkeypatch):
    images = drawn(tmp_path)
    first = images.part(0, 8)
    monkeypatch.setattr(made_images.drawing, "draw", None)  # a second draw would fail
    for name, array in drawn(tmp_path).part(0, 8).items():
        np.testing.assert_array_equal(array, first[name])
    (file,) = (tmp_path / "images").iterdir()
    whole = file.read_bytes()
    place = len(whole) // 2
    for broken in (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], whole[:place]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=f"{file.name} is damaged.*made again"):
            drawn(tmp_path).part(0, 8)


def test_a_part_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "parts" / "a.npz"
    with monkeypatch.context() as dying:
        dying.setattr(made_images.os, "fsync", lambda number: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made_images.save_part(file, {"a": np.arange(3)})
    assert made_images.loaded_part(file) is None and len(list(file.parent.iterdir())) == 1
    made_images.save_part(file, {"a": np.arange(4)})
    np.testing.assert_array_equal(made_images.loaded_part(file)["a"], np.arange(4))
    assert [path.name for path in file.parent.iterdir()] == ["a.npz"]


def test_identity_names_whatever_changes_an_image(tmp_path):
    one = drawn(tmp_path).identity
    assert one == drawn(tmp_path).identity
    assert one["checkpoint"].startswith("/") and one["step"] == 7
    for more in (
        {"seed": 6},
        {"preset": "paper"},
        {"settings": {"weight": 2.0}},
        {"count": 23},
        {"batch": 4},
    ):
        assert drawn(tmp_path, **more).identity != one
    text = interfaces.Text(np.zeros((2, 3, 4), np.float32), np.ones((2, 3), bool))
    other = interfaces.Text(np.ones((2, 3, 4), np.float32), np.ones((2, 3), bool))
    assert made_images.conditions(text) != made_images.conditions(other)


class Codes(nnx.Module):
    """64 grays."""

    def encode(self, latents_BPC):
        return jnp.round(latents_BPC * 63).astype(jnp.int32)

    def decode(self, tokens_BLG):
        return tokens_BLG / 63


class Halver(nnx.Module):
    """A tokenizer whose tokens are the grays of squares: every fourth gray is one token."""

    layout = interfaces.TokenLayout((64,), ((4, 4),))

    def __init__(self):
        self.quantizer = Codes()

    def latents(self, image_BHW3):
        return image_BHW3.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4, 5)).reshape(-1, 16, 1)

    def decode_latents(self, codes_BPC, cond=None):
        image_BHW = codes_BPC.reshape(-1, 4, 4).repeat(4, 1).repeat(4, 2)
        return jnp.broadcast_to(image_BHW[..., None], (*image_BHW.shape, 3))


class Pictures(sources.RandomAccess):
    """Random images in memory, of two classes."""

    holds, classes, fingerprint = "pixels", ("cat", "dog"), "f" * 64

    def __init__(self, count: int):
        self.image_NHW3 = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)

    def __len__(self):
        return len(self.image_NHW3)

    def __getitems__(self, indices):
        return [{"image": self.image_NHW3[i], "label": int(i) % 2} for i in indices]


def test_reconstructions_and_their_metrics_are_those_of_held_out_evaluation():
    network, source = Halver(), Pictures(40)
    images = made_images.Reconstructed(
        loaded(network, layout=network.layout), source, count=30, distances={}
    )
    assert len(images) == 30 and images.classes == source.classes
    parts = [images.part(start, min(start + 10, 30)) for start in range(0, 30, 10)]
    view = datasets.view_of(loaded(network).config)
    figures, shown = validation.reconstruction(network, source, view, count=30, batch=10)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name in ("psnr_db", "ssim"):
        value_N = joined[f"values/{name}"].astype(np.float64)
        np.testing.assert_allclose(value_N.mean(), figures[name], rtol=1e-12)
        error = value_N.std(ddof=1) / 30**0.5
        np.testing.assert_allclose(error, figures[f"{name}_error"], rtol=1e-9)
    count_V = sum(part["counts/0"] for part in parts)
    assert count_V.sum() == 30 * 16
    np.testing.assert_allclose(np.mean(count_V > 0), figures["codebook_usage"])
    np.testing.assert_array_equal(joined["original"][:10], shown[0])
    np.testing.assert_array_equal(joined["image"][:10], shown[1])
    np.testing.assert_array_equal(joined["original"], source.image_NHW3[validation.spread(40, 30)])
    np.testing.assert_array_equal(joined["label"], validation.spread(40, 30) % 2)


def test_other_weights_of_a_distance_are_another_measure():
    def identity(factor):
        far = Far(factor)
        options = dict(count=8, distances={"lpips_vgg": far})
        return made_images.Reconstructed(loaded(Halver()), Pictures(8), **options).identity

    assert identity(1.0) == identity(1.0) != identity(2.0)


class Far(nnx.Module):
    """A distance with one weight."""

    def __init__(self, factor):
        self.factor = interfaces.Statistic(jax.numpy.float32(factor))


def test_gray_images_get_three_channels():
    gray_NHW1 = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    found = made_images.coloured(gray_NHW1)
    assert found.shape == (3, 2, 2, 3) and (found == gray_NHW1).all()
    assert made_images.coloured(found) is found

"""What is asked of arrays where they enter and leave the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import boundary, interfaces

LAYOUT = interfaces.TokenLayout((4, 300), ((2, 3),))
GOOD = np.zeros((2, 6, 2), np.int32)
IMAGE = np.full((2, 4, 6, 3), 0.5, np.float32)


def with_value(array, value):
    array = array.copy()
    array.reshape(-1)[-1] = value
    return array


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (
            IMAGE[0],
            r"\[images, rows, columns, channels\]; found the shape \(4, 6, 3\).*image\[None\]",
        ),
        ((IMAGE * 255).astype(np.uint8), r"float32 in \[0, 1\]; found uint8; .*from_uint8"),
        (IMAGE * 255, r"lie in \[0, 1\]; found 127.5 to 127.5: divide by 255"),
        (with_value(IMAGE, -0.7), r"found -0.7 to 0.5"),
        (IMAGE.transpose(0, 2, 1, 3), r"4 x 6 x 3 .*; found 6 x 4 x 3: cut or resize"),
        (IMAGE[..., :1], r"found 4 x 6 x 1"),
        (IMAGE.tolist(), r"found list"),
    ],
)
def test_images_that_are_none(image, words):
    with pytest.raises(interfaces.UserError, match=words):
        boundary.images(image, (4, 6, 3))


def test_images_of_a_wrong_form_are_refused_while_tracing_and_values_are_not_asked_for():
    traced = jax.jit(lambda image: boundary.images(image, (4, 6, 3)) or image)
    traced(IMAGE * 255)
    for image in (IMAGE[0], IMAGE[:, :3], IMAGE.astype(np.int32)):
        with pytest.raises(interfaces.UserError, match="must be"):
            traced(image)
    # what resizing and rounding leave is no other range, and NaN is the business of another check
    boundary.images(with_value(with_value(IMAGE, 1.0005), np.nan), (4, 6, 3))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (GOOD[..., 0], r"\[images, positions, symbols\]; found the shape \(2, 6\)"),
        (GOOD.astype(np.float32), r"integers; found float32"),
        (GOOD[:, :5], r"6 positions of 2 symbols each.*found 5 of 2"),
        (GOOD[..., :1], r"found 6 of 1"),
        (with_value(GOOD, 300), r"0 to 299, the alphabet of symbol 1; found 0 to 300"),
        (np.full_like(GOOD, 4), r"0 to 3, the alphabet of symbol 0; found 4 to 4"),
        (with_value(GOOD, -1), r"found -1 to 0"),
    ],
)
def test_tokens_that_are_none(tokens, words):
    with pytest.raises(interfaces.UserError, match=words):
        boundary.tokens(tokens, LAYOUT)


def test_tokens_come_out_wide_enough_for_every_alphabet():
    layout = interfaces.TokenLayout((256,), ((1, 2),))
    for kind in (np.uint8, np.uint16, np.int64):
        found = boundary.tokens(np.full((1, 2, 1), 255, kind), layout)
        assert found.dtype == jnp.int32 and int(found.max()) == 255
    # "nothing here" belongs to no alphabet, and is refused where it has no meaning
    absent = np.full((1, 2, 1), 256)
    assert int(boundary.tokens(absent, layout, absent=True).max()) == 256
    with pytest.raises(interfaces.UserError, match="found 256"):
        boundary.tokens(absent, layout)


@pytest.mark.parametrize("label", [11, 999, -1])
def test_labels_outside_the_classes(label):
    with pytest.raises(interfaces.UserError, match=rf"0 to 9; found .*{label}"):
        boundary.labels(np.array([3, label]), 10)


def test_labels():
    assert boundary.labels(np.array([0, 9, 10], np.int64), 10).dtype == jnp.int32
    with pytest.raises(interfaces.UserError, match="found 10 to 10"):
        boundary.labels(np.array([10]), 10, nulls=0)
    with pytest.raises(interfaces.UserError, match="unconditional"):
        boundary.labels(np.array([1]), 0)
    for wrong in (np.array(3), np.array([[3]]), np.array([3.0]), 3):
        with pytest.raises(interfaces.UserError, match="labels must be"):
            boundary.labels(wrong, 10)


def test_orders():
    layout = interfaces.TokenLayout((4,), ((1, 3),))
    boundary.orders(np.array([[2, 0, 1], [0, 1, 2]]), layout)
    for wrong in ([[0, 0, 1]], [[1, 2, 3]], [[0, 1]], [0, 1, 2], [[0.0, 1.0, 2.0]]):
        with pytest.raises(interfaces.UserError, match="orders must be"):
            boundary.orders(np.array(wrong), layout)


def test_all_must_be_of_as_many_images():
    boundary.rows(tokens=GOOD, conditions=np.zeros(2), orders=None)
    with pytest.raises(interfaces.UserError, match="tokens of 2, conditions of 3"):
        boundary.rows(tokens=GOOD, conditions=np.zeros(3))


def test_what_is_not_finite_is_named():
    x = with_value(np.zeros((9, 2, 2)), np.inf)
    assert boundary.not_finite(jnp.asarray(x)).tolist() == [False] * 8 + [True]
    boundary.refuse(np.zeros(3, bool), "pixels")
    with pytest.raises(interfaces.UserError, match=r"pixels .* 1 of 9 images: 8; "):
        boundary.refuse(boundary.not_finite(jnp.asarray(x)), "pixels")
    with pytest.raises(interfaces.UserError, match=r"9 of 9 images: a.png, .*, a.png and 4 more;"):
        boundary.refuse(np.ones(9, bool), "pixels", lambda row: "a.png")


def test_a_module_is_damaged_by_one_number():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.int32), "c": jnp.zeros((), jnp.bfloat16)}
    assert not boundary.damaged(tree) and not boundary.damaged({"b": tree["b"]})
    assert boundary.damaged(tree | {"c": jnp.asarray(jnp.nan, jnp.bfloat16)})

"""What of a forward pass is kept for the backward one, and what is computed again, by name.

Of a block, a skip or a stage its inputs are always kept. "none" computes nothing again and keeps
all that the backward pass reads; "dots" keeps the outputs of linear maps and convolutions, which
cost the most to compute, and computes again what lies between them, attention's scores among it;
"full" keeps nothing more, and runs the whole forward pass twice. XLA on a CPU undoes both but in
loops (jax 0.10.2): the stages of a convolutional tokenizer take as much memory as before there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from tokgen import choices

CONVOLUTION, PRODUCT = "convolution", "product"


def none(function: Callable) -> Callable:
    """The function, of which all is kept."""
    return function


def dots(function: Callable) -> Callable:
    """The function, of which products with weights are kept."""
    policies = jax.checkpoint_policies
    kept = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,  # an attention's products are batched
        policies.save_only_these_names(CONVOLUTION, PRODUCT),
    )
    return jax.checkpoint(function, policy=kept)


def full(function: Callable) -> Callable:
    """The function, of which only arguments are kept."""
    return jax.checkpoint(function)


KINDS = {"none": none, "dots": dots, "full": full}


def named(name: str) -> Callable[[Callable], Callable]:
    """The policy that a config names."""
    return choices.named(KINDS, name, "remat")


def convolution(x_BHWC: jax.Array) -> jax.Array:
    """The array, known to `dots` as the output of a convolution."""
    return checkpoint_name(x_BHWC, CONVOLUTION)


def product(y: jax.Array) -> jax.Array:
    """The array, known to `dots` as a product with weights that has a derivative of its own."""
    return checkpoint_name(y, PRODUCT)

"""A quotient that XLA leaves alone."""

import jax


def quotient(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """`x / y` rounded once, for finite x, whatever is compiled beside it.

    XLA would multiply by the rounded reciprocal of a y that it sees to be constant or broadcast, and then values half
    way between two codes would go either way.
    """
    return x / (y + 0 * x)

"""The tensor contract of the whole package, stated and checked in one place, and the two errors
that a user meets.

Images are in [-1, 1] inside the package and uint8 at its edges (files, data sets, grids). A
denoiser is any callable `eps_model(x_t, t) -> eps` whose output has the shape of x_t. A loss is the
squared L2 norm per image, summed over pixels and averaged over the batch.
"""

from collections.abc import Callable

from jaxtyping import Float, Int, UInt8
from torch import Tensor

Images = Float[Tensor, "b c h w"]  # [-1, 1]
Pixels = UInt8[Tensor, "n c h w"]  # 0 .. 255
Steps = Int[Tensor, " b"]  # t, 0 <= t < T
Loss = Float[Tensor, ""]
EpsModel = Callable[[Tensor, Tensor], Tensor]


class InputError(ValueError):
    """A flag, a file or a data set is wrong; the message names it and says what to do."""


class NonFiniteError(RuntimeError):
    """A loss, weight or model output is NaN or infinite; the message says where."""


def check_floats(**images: Tensor) -> None:
    """Raise a ValueError for integers: gamma and sigma, cast to their dtype, would be 0."""
    for name, tensor in images.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: must be floats, see to_float and q_sample")


def check_same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError if the shapes differ, where arithmetic would broadcast."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first, *others = shapes.values()
    if any(shape != first for shape in others):
        raise ValueError(f"shapes differ: {', '.join(f'{n} {s}' for n, s in shapes.items())}")

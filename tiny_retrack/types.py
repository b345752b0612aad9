"""The tensor contract of the whole package, stated once, and the two errors that a user meets.

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

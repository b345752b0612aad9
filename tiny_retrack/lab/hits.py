"""Hits: how near a sample must be to a forgotten image to count, and which samples come nearest."""

import math
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from tiny_retrack.data import Split, to_uint8
from tiny_retrack.lab.checkpoint import atomic
from tiny_retrack.lab.plots import save_nearest
from tiny_retrack.metrics import nearest_reference
from tiny_retrack.posterior import nearest_neighbors
from tiny_retrack.types import Images


@dataclass(frozen=True)
class HitThreshold:
    """When a sample counts as a hit.

    Attributes:
        value: a hit is nearer than this to a forgotten image: L2 norm, pixels in [0, 1]. None if
            hits are not counted.
        about: how the value was chosen, or why there is none.
    """

    value: float | None
    about: str


def choose_threshold(split: Split, own: float, given: float | None = None) -> HitThreshold:
    """The threshold of a hit. It never reaches a remain image: those would count as hits.

    Args:
        own: the data set's threshold; 0 if it has none. If it is 0, or would reach a remain image,
            the threshold is half the distance to the nearest remain image, but at most the papers'
            10 at 28x28 pixels, scaled by the root of the number of pixels.
        given: the user's threshold; None or 0 if there is none. If it would reach a remain image,
            hits are not counted.
    """
    if not len(split.forget):
        return HitThreshold(None, "nothing was to be forgotten")
    _, distances = nearest_neighbors(split.targets, split.remain, 1)
    nearest = distances.min().item() / 2  # from [-1, 1] to pixels in [0, 1]
    at = f"the nearest remain image is at {nearest:.2f}"
    if nearest == 0:
        return HitThreshold(None, "a remain image equals a forgotten one")
    if given and given >= nearest:
        return HitThreshold(None, f"{at}, within the given threshold {given:g}")
    if given:
        return HitThreshold(given, f"as given; {at}")
    if 0 < own < nearest:
        return HitThreshold(own, f"the data set's own; {at}")
    scaled = 10 * math.sqrt(split.remain[0].numel() / 784)
    if scaled < nearest / 2:
        return HitThreshold(scaled, f"10 at 28x28, scaled to the number of pixels; {at}")
    return HitThreshold(nearest / 2, f"half of the distance to a remain image; {at}")


def draw_nearest(
    path: Path,
    samples: Images,
    targets: Float[Tensor, "m c h w"],
    threshold: HitThreshold,
    num: int = 12,
) -> None:
    """A PNG of the `num` samples that come nearest to a forgotten image, above that image.

    Args:
        samples: in [-1, 1].
        targets: the forgotten images, in [-1, 1].
        threshold: of the hits, which are outlined.
    """
    distances, indices = nearest_reference(samples, targets)
    order = distances.argsort(stable=True)[:num]
    with atomic(path) as temporary:
        save_nearest(
            temporary,
            to_uint8(samples[order]),
            to_uint8(targets[indices[order]]),
            (distances[order] / 2).tolist(),  # from [-1, 1] to pixels in [0, 1]
            threshold.value,
        )

"""Which image is behind x_t, and which noise does that make the optimal denoiser predict?

For data a_1 .. a_N, where duplicates count as often as they occur, and q_t(x | a) = N(gamma_t a,
sigma_t^2 I), the answers are known in closed form (docs/theory.md, sections 1 and 2):

    p(a_n | x_t) = softmax_n( -||x_t - gamma_t a_n||^2 / (2 sigma_t^2) )
    eps*(x_t, t) = sum_n p(a_n | x_t) v_n,    v_n = (x_t - gamma_t a_n) / sigma_t    (2)

That is attention over the data set: x_t is the query, the images are keys and values, so eps*
costs two matrix products. ReTrack (arXiv 2509.13007) regresses a model onto eps* of the images
that remain, with the sum approximated by the k images nearest to the forgotten one
(`knn_target`). `exact_target` takes the whole sum, `topk_target` the k images nearest to x_t.
`gaussian_target`, `local_target` and `combined_target` generalise beyond the images, (9) to (11).

Images are in [-1, 1]; data may also be uint8 in 0..255, and is then cast chunk by chunk. The
arithmetic is float64, which neither autocast nor TF32 touches: at t = 0 the logits reach 1e7,
where float32 moves in steps of 1. Memory of a function of the whole data set is O(b N) plus a chunk
of the data; the others say what they take. Functions of x_t are differentiable in it, and raise a
ValueError if it does not hold floats.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from tiny_retrack.data import scale_pixels
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, Images, InputError, Steps, check_floats

Data = Float[Tensor, "n c h w"] | UInt8[Tensor, "n c h w"]

MAX_COVARIANCE = 4096  # numbers per image: 128 MiB of covariance
LOCAL_BELOW = 300  # `ClosedForms` uses the local denoiser only below this t


def log_posterior(
    x_t: Images, t: Steps, data: Data, schedule: NoiseSchedule
) -> Float[Tensor, "b n"]:
    """log p(a_n | x_t), in the dtype of x_t; the exponentials of a row sum to 1.

    Raises:
        ValueError: if `data` is empty or its images have another shape than x_t.
    """
    logits = _all_logits(x_t, t, data, schedule)
    return torch.log_softmax(logits, dim=1).to(x_t.dtype)


def ideal_eps(
    x_t: Images,
    t: Steps,
    data: Data,
    schedule: NoiseSchedule,
    weights: Float[Tensor, " n"] | None = None,
) -> Images:
    """eps*(x_t, t) of (2): the denoiser that minimises the DDPM loss over `data`.

    `weights` says how often each image counts (default: once): 2 is the same as a second copy, 0
    the same as leaving it out.

    Raises:
        ValueError: if `data` is empty or its images have another shape than x_t; or if `weights` is
            not one finite number for each image, none negative and at least one positive.
    """
    logits = _all_logits(x_t, t, data, schedule)
    if weights is not None:
        is_valid = bool((weights >= 0).all()) and 0 < weights.sum() < math.inf  # NaN is not >= 0
        if weights.shape != (len(data),) or not is_valid:
            raise ValueError(
                f"weights of shape {list(weights.shape)} for {len(data)} images: must be one for "
                f"each, finite, none negative and at least one positive"
            )
        logits = logits + weights.double().log()
    return _mixture_eps(x_t, t, torch.softmax(logits, dim=1), data, schedule)


def ideal_denoiser(data: Data, schedule: NoiseSchedule) -> EpsModel:
    """`ideal_eps` of the data, as a denoiser: the oracle of metrics."""
    return lambda x_t, t: ideal_eps(x_t, t, data, schedule)


def exact_target(x_t: Images, t: Steps, remain: Data, schedule: NoiseSchedule) -> Images:
    """eps* of the whole remain set (2): the target of the loss that ReTrack approximates.

    Raises:
        ValueError: if `remain` is empty or its images have another shape than x_t.
    """
    return ideal_eps(x_t, t, remain, schedule)


def knn_target(
    x_t: Images,
    t: Steps,
    neighbors: Float[Tensor, "b k c h w"] | UInt8[Tensor, "b k c h w"],
    schedule: NoiseSchedule,
) -> Images:
    """eps* of the k images given for each x_t: ReTrack's target (arXiv 2509.13007, section 4).

    ReTrack gives the k remain images nearest to the forgotten one: `nearest_neighbors` finds them,
    and `remain[indices]` gathers them. Memory is O(b k D), in float64.

    Raises:
        ValueError: if there are no neighbours or their shape does not fit x_t.
    """
    check_neighbors(x_t, neighbors)
    a = _pixels(neighbors.flatten(2))  # [b, k, d]
    logits = _logits(x_t.flatten(1).double(), t, a, schedule)
    p = torch.softmax(logits, dim=1)
    x0 = (p[:, None] @ a).view(x_t.shape)
    eps = schedule.predict_eps(x_t.double(), t, x0)
    return eps.to(x_t.dtype)


def topk_target(x_t: Images, t: Steps, remain: Data, schedule: NoiseSchedule, k: int) -> Images:
    """eps* of the k images nearest to x_t / gamma_t.

    Of all sets of k images this one drops the least posterior mass (docs/theory.md, section 5).

    Raises:
        InputError: if k is not in 1..N.
        ValueError: if `remain` is empty or its images have another shape than x_t.
    """
    check_k(k, len(remain))
    logits, index = _all_logits(x_t, t, remain, schedule).topk(k, dim=1)
    p = logits.new_zeros(len(x_t), len(remain))
    p = p.scatter(1, index, torch.softmax(logits, dim=1))
    return _mixture_eps(x_t, t, p, remain, schedule)


def tail_mass(
    x_t: Images, t: Steps, data: Data, schedule: NoiseSchedule, kept: Int[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """The posterior mass of all images but the kept ones, in [0, 1]: tau of (6).

    It equals the total-variation distance between the posterior and the kept part renormalised.

    Raises:
        ValueError: if `data` is empty or its images have another shape than x_t; or if `kept` has
            not one row for each x_t.
    """
    if kept.ndim != 2 or len(kept) != len(x_t):
        raise ValueError(f"kept of shape {list(kept.shape)}: must be [{len(x_t)}, k]")
    p = torch.softmax(_all_logits(x_t, t, data, schedule), dim=1)
    # Not 1 minus the kept mass: that would round small tails away.
    return p.scatter(1, kept, 0.0).sum(1).to(x_t.dtype)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a data set, the covariance as U diag(eigenvalues) U^T."""

    mean: Float64[Tensor, " d"]
    eigenvalues: Float64[Tensor, " d"]  # ascending, none below 0
    eigenvectors: Float64[Tensor, "d d"]  # U, one per column


@torch.no_grad()
def gaussian_moments(data: Data) -> Moments:
    """Mean and covariance (over N - 1) of the pixels, for `gaussian_target`. Time O(N D^2 + D^3).

    Raises:
        InputError: as `check_covariance`.
        ValueError: if `data` is empty.
    """
    if not len(data):
        raise ValueError("data is empty: it has no mean")
    dim = data[0].numel()
    check_covariance(dim)
    mean = torch.zeros(dim, dtype=torch.float64, device=data.device)
    for a in _chunks(data):
        mean += a.sum(0) / len(data)
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=data.device)
    for a in _chunks(data):
        centred = a - mean
        covariance += centred.T @ centred
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance / max(len(data) - 1, 1))
    return Moments(mean, eigenvalues.clamp_min(0), eigenvectors)  # rounding may leave some below 0


def check_covariance(dim: int) -> None:
    """Raise InputError for images of more than MAX_COVARIANCE numbers."""
    if dim > MAX_COVARIANCE:
        raise InputError(
            f"images of {dim} numbers: the covariance of more than {MAX_COVARIANCE} takes too much "
            f"memory; take smaller images or another target"
        )


def gaussian_target(x_t: Images, t: Steps, moments: Moments, schedule: NoiseSchedule) -> Images:
    """The ideal denoiser of N(mean, covariance): the Wiener filter, here (9).

    It is the best linear denoiser of any data with these moments, and it is what networks follow at
    high noise (arXiv 2412.09726).

    Raises:
        ValueError: if the moments are of images of another size, or if x_t are not floats.
    """
    check_floats(x_t=x_t)
    if x_t[0].numel() != len(moments.mean):
        raise ValueError(f"moments of {len(moments.mean)} numbers do not fit {list(x_t.shape)}")
    x = x_t.flatten(1).double()
    gamma, sigma = schedule.scales(t, x)
    coefficients = (x - gamma * moments.mean) @ moments.eigenvectors  # [b, d]
    variance = moments.eigenvalues
    gain = gamma * variance / (gamma.square() * variance + sigma.square())
    x0 = moments.mean + (gain * coefficients) @ moments.eigenvectors.T
    return schedule.predict_eps(x_t.double(), t, x0.view(x_t.shape)).to(x_t.dtype)


def local_target(
    x_t: Images, t: Steps, remain: Data, schedule: NoiseSchedule, patch: int
) -> Images:
    """The eps whose x0 is, pixel by pixel, the posterior mean given only a window around it: (10).

    At pixel i the image a_n has weight softmax_n( -||x_t[P_i] - gamma a_n[P_i]||^2 / (2 sigma^2) ),
    with P_i the patch x patch window around i, cut at the border; its value there is a_n[i]. A
    window that covers the image gives `exact_target`; patch 1 is the posterior of each pixel by
    itself. Networks, whose layers see windows, are near to it at low noise (arXiv 2412.20292,
    arXiv 2411.19339).

    It is attention over the data set with one head per pixel: b queries and N keys. The heads are
    computed one after the other, in O(N (b + patch^2 c)) memory.

    Raises:
        InputError: if patch is not an odd number from 1 up.
        ValueError: if `remain` is empty or its images have another shape than x_t.
    """
    check_patch(patch)
    check_floats(x_t=x_t)
    _check_shapes(x_t, remain)
    x = x_t.double()
    height, width = x.shape[2:]
    radius = patch // 2
    means = []
    for row, column in itertools.product(range(height), range(width)):
        rows = slice(max(0, row - radius), row + radius + 1)
        columns = slice(max(0, column - radius), column + radius + 1)
        query = x[:, :, rows, columns].flatten(1)  # [b, m], m = patch^2 c unless cut
        keys = _pixels(remain[:, :, rows, columns].flatten(1))  # [n, m]
        values = _pixels(remain[:, :, row, column])  # [n, c]
        p = torch.softmax(_logits(query, t, keys, schedule), dim=1)  # [b, n]
        means.append(p @ values)
    x0 = torch.stack(means, dim=2).view(x.shape)
    return schedule.predict_eps(x, t, x0).to(x_t.dtype)


ONLY_GAUSSIAN = (0.0, 1.0, 0.0, 0.0, 0.0)  # weights of `ClosedForms`


@dataclass(frozen=True)
class ClosedForms:
    """Predictions in closed form, each as gamma_t x0: x_t itself; those of the Gaussian, the local
    and the exact denoiser; and a constant.

    Attributes:
        remain: the data.
        subset: some of the data, for the local denoiser, which takes the most time.
        moments: of the data.
        patch: of the local denoiser.
    """

    remain: Data
    subset: Float[Tensor, "some c h w"] | UInt8[Tensor, "some c h w"]
    moments: Moments
    schedule: NoiseSchedule
    patch: int

    def scaled_x0(self, x_t: Images, t: Steps) -> Float[Tensor, "b forms c h w"]:
        """All closed forms at x_t, stacked. From t = LOCAL_BELOW on, the local one is 0."""
        gamma, sigma = self.schedule.scales(t, x_t)
        gaussian = x_t - sigma * gaussian_target(x_t, t, self.moments, self.schedule)
        exact = x_t - sigma * exact_target(x_t, t, self.remain, self.schedule)
        local = torch.zeros_like(x_t)
        low = (t < LOCAL_BELOW).nonzero()[:, 0]
        if len(low):
            eps = local_target(x_t[low], t[low], self.subset, self.schedule, self.patch)
            local = local.index_copy(0, low, x_t[low] - sigma[low] * eps)
        return torch.stack([x_t, gaussian, local, exact, gamma.expand_as(x_t)], dim=1)


@torch.no_grad()
def fit_forms(
    eps_model: EpsModel,
    forms: ClosedForms,
    images: Images,
    times: Sequence[int],
    generator: torch.Generator,
) -> Float64[Tensor, "times forms"]:
    """At each t, the weights of the closed forms whose sum is nearest to the network: (11).

    Least squares over all pixels of x_t made from `images`; a form that is 0 gets weight 0.
    """
    weights = []
    for time in times:
        t = torch.full((len(images),), time, device=images.device)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        x_t = forms.schedule.q_sample(images, t, noise)
        eps = eps_model(x_t, t).double()
        x_t = x_t.double()
        _, sigma = forms.schedule.scales(t, x_t)
        model_x0 = (x_t - sigma * eps).flatten()  # times gamma, as the forms
        forms_x0 = forms.scaled_x0(x_t, t).transpose(0, 1).flatten(1)  # [forms, b c h w]
        # Normal equations with a pseudo-inverse: at high noise, some forms are nearly equal.
        inverse = torch.linalg.pinv(forms_x0 @ forms_x0.T, hermitian=True)
        weights.append(inverse @ (forms_x0 @ model_x0))
    return torch.stack(weights)


def combined_target(
    x_t: Images,
    t: Steps,
    forms: ClosedForms,
    times: Sequence[int],
    weights: Float64[Tensor, "times forms"],
) -> Images:
    """eps of the closed forms, weighted as `fit_forms` found; between its times, linearly.

    Args:
        times: of the fit, ascending; among them LOCAL_BELOW, where the local form ends.

    Raises:
        ValueError: if the times are fewer than two, or not ascending.
    """
    if len(times) < 2 or [*times] != sorted({*times}):
        raise ValueError(f"times {[*times]}: must be two or more, ascending")
    forms_x0 = forms.scaled_x0(x_t.double(), t)
    at = torch.tensor(times, dtype=torch.float64, device=t.device)
    above = torch.searchsorted(at, t.double(), right=True).clamp(1, len(at) - 1)
    below = above - 1
    share = ((t - at[below]) / (at[above] - at[below])).clamp(0, 1)[:, None]
    w = torch.lerp(weights[below], weights[above], share)  # [b, forms]
    _, sigma = forms.schedule.scales(t, forms_x0[:, 0])
    denoised = torch.einsum("bf,bfchw->bchw", w, forms_x0)  # gamma x0
    return ((x_t.double() - denoised) / sigma).to(x_t.dtype)


@torch.no_grad()
def nearest_neighbors(
    query: Float[Tensor, "q c h w"] | UInt8[Tensor, "q c h w"], data: Data, k: int
) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    """The k images of `data` nearest to each query, nearest first.

    Exact; of equally distant images the one with the lower index comes first.

    Returns:
        Indices into `data`, and L2 distances in pixels of [-1, 1].

    Raises:
        InputError: if k is not in 1..N.
        ValueError: if `data` is empty or its images have another shape than the queries.
    """
    _check_shapes(query, data)
    check_k(k, len(data))
    # Between integers float64 is exact, and equal distances come out equal.
    both_integers = query.dtype == data.dtype == torch.uint8
    to_float64 = Tensor.double if both_integers else _pixels
    unit = 127.5 if both_integers else 1.0

    # A forget set often is many copies of few images.
    distinct, copy_of = torch.unique(query, dim=0, return_inverse=True)
    indices, distances = [], []
    for some in distinct.split(64):
        index, distance = _nearest(to_float64(some).flatten(1), data, k, to_float64)
        indices.append(index)
        distances.append((distance / unit).float())
    return torch.cat(indices)[copy_of], torch.cat(distances)[copy_of]


def _nearest(
    query: Float[Tensor, "q d"], data: Data, k: int, to_float64: Callable[[Tensor], Tensor]
) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    """Indices and distances of the k nearest, kept up to date chunk by chunk."""
    index = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    distance = query.new_empty(len(query), 0)
    start = 0
    for part in data.split(_rows(data)):
        a = to_float64(part).flatten(1)
        # Not by matrix products, which give copies of one image slightly different distances.
        here = torch.cdist(query, a, compute_mode="donot_use_mm_for_euclid_dist")
        numbers = torch.arange(start, start + len(a), device=query.device)
        start += len(a)
        distance = torch.cat([distance, here], dim=1)
        index = torch.cat([index, numbers.expand(len(query), -1)], dim=1)
        # The sort is stable and earlier chunks stand first: lower indices win ties.
        distance, order = distance.sort(dim=1, stable=True)
        distance = distance[:, :k]
        index = index.gather(1, order)[:, :k]
    return index, distance


def check_patch(patch: int) -> None:
    """Raise an InputError unless a window of this side has a middle."""
    if patch < 1 or patch % 2 == 0:
        raise InputError(f"patch = {patch}: must be an odd number, 1 or more")


def check_k(k: int, n: int) -> None:
    """Raise an InputError unless there are k images to take."""
    if not 1 <= k <= n:
        raise InputError(f"k = {k}: must be from 1 to the number of images, {n}")


def check_neighbors(x_t: Images, neighbors: Tensor) -> None:
    """Raise a ValueError unless each x_t has its k images, at least one, and x_t are floats."""
    check_floats(x_t=x_t)
    if neighbors.ndim != 5 or len(neighbors) != len(x_t):
        raise ValueError(
            f"neighbors of shape {list(neighbors.shape)} do not fit x_t of shape "
            f"{list(x_t.shape)}: must be [b, k, c, h, w], k images for each x_t. Gather them with "
            f"remain[nearest_neighbors(x0_forget, remain, k)[0]]"
        )
    _check_shapes(x_t, neighbors[0])


# --- The arithmetic -------------------------------------------------------------------------------


def _logits(
    x: Float64[Tensor, "b d"],
    t: Steps,
    a: Float64[Tensor, "n d"] | Float64[Tensor, "b n d"],
    schedule: NoiseSchedule,
) -> Float64[Tensor, "b n"]:
    """-||x - gamma a||^2 / (2 sigma^2) without the term in x alone, which no softmax sees.

    (gamma / sigma^2) (<x, a> - gamma / 2 ||a||^2): an inner product with a bias.
    """
    gamma, sigma = schedule.scales(t, x)
    # [b, 1, d] @ [d, n], or @ [b, d, n] if each x has images of its own; then without the 1.
    inner = (x[:, None] @ a.mT)[:, 0]  # [b, n]
    norm_squared = torch.linalg.vector_norm(a, dim=-1).square()  # [n] or [b, n]
    return gamma / sigma.square() * (inner - gamma / 2 * norm_squared)


def _all_logits(
    x_t: Images, t: Steps, data: Data, schedule: NoiseSchedule
) -> Float64[Tensor, "b n"]:
    check_floats(x_t=x_t)
    _check_shapes(x_t, data)
    x = x_t.flatten(1).double()
    return torch.cat([_logits(x, t, a, schedule) for a in _chunks(data)], dim=1)


def _mixture_eps(
    x_t: Images, t: Steps, p: Float64[Tensor, "b n"], data: Data, schedule: NoiseSchedule
) -> Images:
    """sum_n p_n v_n, for p that sum to 1."""
    x0 = torch.zeros_like(x_t, dtype=torch.float64).flatten(1)
    for p_chunk, a in zip(p.split(_rows(data), dim=1), _chunks(data), strict=True):
        x0 = x0 + p_chunk @ a
    eps = schedule.predict_eps(x_t.double(), t, x0.view(x_t.shape))
    return eps.to(x_t.dtype)


def _chunks(data: Data) -> Iterator[Float64[Tensor, "rows d"]]:
    for part in data.split(_rows(data)):
        yield _pixels(part.flatten(1))


def _rows(data: Data) -> int:
    """Images per chunk: on a CPU a chunk should stay in the cache, a GPU wants few launches."""
    numbers = 2**25 if data.is_cuda else 2**19
    return max(64, numbers // data[0].numel())


def _pixels(images: Tensor) -> Float64[Tensor, "..."]:
    """In [-1, 1]. uint8 goes through float32, as the model's own input does."""
    if images.dtype == torch.uint8:
        images = scale_pixels(images)
    return images.double()


def _check_shapes(x_t: Tensor, data: Tensor) -> None:
    if not len(data) or data.shape[1:] != x_t.shape[1:]:
        raise ValueError(
            f"data of shape {tuple(data.shape)} does not fit x_t of shape {tuple(x_t.shape)}"
        )

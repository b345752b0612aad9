"""Which image of a finite data set is behind x_t, and what noise does that make the optimal
denoiser predict?

For data a_1 .. a_N, duplicates counting as often as they occur, and q_t(x | a) = N(gamma_t a,
sigma_t^2 I):

    p(a_n | x_t) = softmax_n( -||x_t - gamma_t a_n||^2 / (2 sigma_t^2) )
    eps*(x_t, t) = sum_n p(a_n | x_t) v_n,    v_n = (x_t - gamma_t a_n) / sigma_t

That is attention over the data set: x_t is the query, the images are keys and values, so eps* costs
two matrix products. ReTrack (arXiv 2509.13007) regresses a model onto eps* of the images that
remain, and approximates the sum by the k images nearest to the forgotten one (`knn_target`). Here
are also the whole sum (`exact_target`) and the k images nearest to x_t itself (`topk_target`).

Images are in [-1, 1], or uint8 in 0..255, which a chunk at a time is cast where it lies. The
arithmetic is float64: at t = 0 the logits reach 1e7, where float32 moves in steps of 1; and neither
autocast nor TF32 reaches it. Memory is O(b N) beside a chunk of the data. Functions of x_t are
differentiable in it.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import InputError

Images = Float[Tensor, "b c h w"]
Steps = Int[Tensor, " b"]
Data = Float[Tensor, "n c h w"] | UInt8[Tensor, "n c h w"]


def _pixels(images: Tensor) -> Float[Tensor, "..."]:
    """In [-1, 1], as float64. uint8 goes through float32, as the model's own input does: equal
    images stay equal.
    """
    return (images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images).double()


def _chunks(data: Data) -> Iterator[Float[Tensor, "rows d"]]:
    for part in data.split(_rows(data)):
        yield _pixels(part.flatten(1))


def _rows(data: Data) -> int:
    """How many images a chunk holds: on a CPU it should stay in the cache, a GPU wants few
    launches.
    """
    return max(64, (2**25 if data.is_cuda else 2**19) // data[0].numel())


def _check_shapes(x_t: Tensor, data: Tensor) -> None:
    if not len(data) or data.shape[1:] != x_t.shape[1:]:
        raise ValueError(
            f"data of shape {tuple(data.shape)} does not fit x_t of shape {tuple(x_t.shape)}"
        )


def _logits(
    x: Float[Tensor, "b d"], t: Steps, a: Float[Tensor, "*b n d"], schedule: NoiseSchedule
) -> Tensor:
    """-||x - gamma a||^2 / (2 sigma^2) without the term in x alone, float64 "b n"."""
    gamma, sigma = schedule.scales(t, x)
    inner = (x[:, None] @ a.mT)[:, 0]  # [b, n]
    return (
        gamma / sigma.square() * (inner - gamma / 2 * torch.linalg.vector_norm(a, dim=-1).square())
    )


def _all_logits(x_t: Images, t: Steps, data: Data, schedule: NoiseSchedule) -> Float[Tensor, "b n"]:
    _check_shapes(x_t, data)
    x = x_t.flatten(1).double()
    return torch.cat([_logits(x, t, a, schedule) for a in _chunks(data)], dim=1)


def _mixture_eps(
    x_t: Images, t: Steps, weights: Float[Tensor, "b n"], data: Data, schedule: NoiseSchedule
) -> Images:
    """sum_n weights_n v_n, for weights that sum to 1."""
    x0 = torch.zeros_like(x_t, dtype=torch.float64).flatten(1)
    for w, a in zip(weights.split(_rows(data), dim=1), _chunks(data), strict=True):
        x0 = x0 + w @ a
    return schedule.predict_eps(x_t.double(), t, x0.view(x_t.shape)).to(x_t.dtype)


def log_posterior(
    x_t: Images, t: Steps, data: Data, schedule: NoiseSchedule
) -> Float[Tensor, "b n"]:
    """log p(a_n | x_t), in the dtype of x_t; the exponentials of a row sum to 1.

    Raises:
        ValueError: if `data` is empty or its images have another shape than x_t.
    """
    return torch.log_softmax(_all_logits(x_t, t, data, schedule), dim=1).to(x_t.dtype)


def ideal_eps(
    x_t: Images,
    t: Steps,
    data: Data,
    schedule: NoiseSchedule,
    weights: Float[Tensor, " n"] | None = None,
) -> Images:
    """eps*(x_t, t): the denoiser that minimises the DDPM loss over `data`.

    `weights` says how often each image counts (default: once); 2 is the same as a second copy, 0 as
    taking it out.

    Raises:
        ValueError: if `data` is empty or its images have another shape than x_t.
    """
    logits = _all_logits(x_t, t, data, schedule)
    if weights is not None:
        logits = logits + weights.double().log()
    return _mixture_eps(x_t, t, torch.softmax(logits, dim=1), data, schedule)


def exact_target(x_t: Images, t: Steps, remain: Data, schedule: NoiseSchedule) -> Images:
    """The target of the loss that ReTrack approximates: eps* of the whole remain set.

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
    """eps* of the k images given for each x_t: ReTrack's target, with the nearest to the forgotten
    image (section 4).

    Raises:
        ValueError: if there are no neighbours or their shape does not fit x_t.
    """
    if neighbors.ndim != 5 or len(neighbors) != len(x_t):
        raise ValueError(
            f"neighbours of shape {tuple(neighbors.shape)} do not fit x_t of shape {tuple(x_t.shape)}"
        )
    _check_shapes(x_t, neighbors[0])
    a = _pixels(neighbors.flatten(2))  # [b, k, d]
    weights = torch.softmax(_logits(x_t.flatten(1).double(), t, a, schedule), dim=1)
    x0 = (weights[:, None] @ a).view(x_t.shape)
    return schedule.predict_eps(x_t.double(), t, x0).to(x_t.dtype)


def topk_target(x_t: Images, t: Steps, remain: Data, schedule: NoiseSchedule, k: int) -> Images:
    """eps* of the k images nearest to x_t / gamma_t: of all sets of k images the one that drops the
    least mass.

    Raises:
        InputError: if k is not in 1..N.
        ValueError: if `remain` is empty or its images have another shape than x_t.
    """
    check_k(k, len(remain))
    logits, index = _all_logits(x_t, t, remain, schedule).topk(k, dim=1)
    weights = logits.new_zeros(len(x_t), len(remain)).scatter(
        1, index, torch.softmax(logits, dim=1)
    )
    return _mixture_eps(x_t, t, weights, remain, schedule)


def tail_mass(
    x_t: Images, t: Steps, data: Data, schedule: NoiseSchedule, kept: Int[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """The posterior mass of all images but the kept ones, in [0, 1].

    It equals the total-variation distance between the posterior and the kept part renormalised.

    Raises:
        ValueError: if `data` is empty or its images have another shape than x_t.
    """
    posterior = torch.softmax(_all_logits(x_t, t, data, schedule), dim=1)
    return (
        posterior.scatter(1, kept, 0.0).sum(1).to(x_t.dtype)
    )  # not 1 - kept: that loses small masses


@torch.no_grad()
def nearest_neighbors(
    query: Float[Tensor, "q c h w"] | UInt8[Tensor, "q c h w"], data: Data, k: int
) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
    """The k images of `data` nearest to each query, nearest first: (indices, L2 distances in pixels
    of [-1, 1]).

    Exact; of equally far images the one with the lower index comes first.

    Raises:
        InputError: if k is not in 1..N.
        ValueError: if `data` is empty or its images have another shape than the queries.
    """
    _check_shapes(query, data)
    check_k(k, len(data))
    integers = query.dtype == data.dtype == torch.uint8  # then float64 is exact and ties are ties
    unit = 127.5 if integers else 1.0
    distinct, position = torch.unique(
        query, dim=0, return_inverse=True
    )  # forget sets are often copies of an image
    found = []
    for q in distinct.split(64):
        q = (q.double() if integers else _pixels(q)).flatten(1)
        best, index = q.new_empty(len(q), 0), position.new_empty(len(q), 0)
        for start, part in zip(
            range(0, len(data), _rows(data)), data.split(_rows(data)), strict=True
        ):
            a = (part.double() if integers else _pixels(part)).flatten(1)
            # not by matrix products, which give copies of an image slightly different distances
            distance = torch.cdist(q, a, compute_mode="donot_use_mm_for_euclid_dist")
            best = torch.cat([best, distance], dim=1)
            index = torch.cat(
                [index, torch.arange(start, start + len(a), device=q.device).expand(len(q), -1)],
                dim=1,
            )
            best, order = best.sort(
                dim=1, stable=True
            )  # earlier chunks stand first, so lower indices win ties
            best, index = best[:, :k], index.gather(1, order)[:, :k]
        found.append((index, (best / unit).float()))
    index, best = (torch.cat(parts) for parts in zip(*found, strict=True))
    return index[position], best[position]


def check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise InputError(f"k = {k}: must be from 1 to the number of images, {n}")

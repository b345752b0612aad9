"""Metrics over samples and denoisers: is the image forgotten, is the rest intact?

Everything here takes tensors and callables. docs/evaluation.md says which metric is computed over
which images, and in which unit.
"""

import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from tiny_retrack.data import to_uint8
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, Images, InputError, NonFiniteError, Steps

PerImage = Float[Tensor, " b"]
Batches = Iterable[Float[Tensor, "_ c h w"]]  # each of its own size

# --- Hits ---------------------------------------------------------------------------------------


def nearest_reference(
    images: Images, references: Float[Tensor, "m c h w"]
) -> tuple[PerImage, Int[Tensor, " b"]]:
    """For each image, the L2 distance to the nearest reference, in their pixel units, and the index
    of that reference.
    """
    a = images.flatten(1)
    b = references.flatten(1).to(a.dtype)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # [b, m]
    nearest = distances.min(1)
    return nearest.values, nearest.indices


def is_hit(
    samples: Float[Tensor, "b c h w"], target: Float[Tensor, "*m c h w"], threshold: float
) -> Bool[Tensor, " b"]:
    """Whether ||sample - target||_2 < threshold for any of the targets (SISS, arXiv 2503.01034).

    Samples and targets have pixels in [0, 1], not in [-1, 1] as elsewhere: (images + 1) / 2.

    Raises:
        ValueError: if they have not the same shape or are not floats, or if a target has pixels
            outside [0, 1].
        NonFiniteError: if a sample is NaN or infinite, which would count as no hit.
    """
    are_floats = samples.is_floating_point() and target.is_floating_point()
    if target.shape[-3:] != samples.shape[1:] or not are_floats:
        raise ValueError(
            f"samples {list(samples.shape)} of {samples.dtype} and target {list(target.shape)} of "
            f"{target.dtype}: must be images of one shape, floats in [0, 1]"
        )
    rounding = 1e-3
    if bool(((target < -rounding) | (target > 1 + rounding)).any()):
        raise ValueError("target must have pixels in [0, 1]: (images + 1) / 2")
    if not bool(samples.isfinite().all()):
        raise NonFiniteError("the samples are not finite: their hits cannot be counted")
    targets = target.reshape(-1, *samples.shape[1:])
    distances, _ = nearest_reference(samples, targets)
    return distances < threshold


def hit_frequency(
    samples: Float[Tensor, "b c h w"], target: Float[Tensor, "*m c h w"], threshold: float
) -> float:
    """The share of samples, in [0, 1], that are hits.

    Pixels are in [0, 1]; samples that leave this range are clipped to it.

    Raises:
        ValueError: if there are no samples; and as `is_hit`.
        NonFiniteError: as `is_hit`.
    """
    if not len(samples):
        raise ValueError("no samples: there is no share of them")
    return is_hit(samples.clamp(0, 1), target, threshold).double().mean().item()


# --- Feature networks -----------------------------------------------------------------------------


class FeatureNetwork(nn.Module):
    """What FID and the Inception Score need: a network over images in [-1, 1].

    Attributes:
        num_features: f, the length of a feature vector.
        has_classes: whether the logits are for image classes, as the Inception Score requires.
    """

    num_features: int
    has_classes: bool = True

    def forward(self, x: Images) -> Float[Tensor, "b f"]:
        """The features of each image."""
        raise NotImplementedError

    def logits(self, x: Images) -> Float[Tensor, "b k"]:
        """The logits of k classes."""
        raise NotImplementedError


class Classifier(FeatureNetwork):
    """A small convolutional classifier; its last hidden layer gives the features.

    `fit_classifier` trains one per data set.

    Args:
        has_classes: False if the logits are for `quarter_turns`.
    """

    num_features = 64

    def __init__(self, channels: int, num_classes: int, has_classes: bool = True) -> None:
        super().__init__()
        self.has_classes = has_classes
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(512, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Images) -> Float[Tensor, "b f"]:
        return self.body(x)

    def logits(self, x: Images) -> Float[Tensor, "b k"]:
        return self.head(self.body(x))


class Inception(FeatureNetwork):
    """The Inception v3 of published FIDs: torchmetrics' network with torch-fidelity's weights.

    2,048 features, and the 1,008 logits without bias that the published Inception Score takes.

    Args:
        weights: the state dict of torch-fidelity's file weights-inception-2015-12-05-6726825d.pth
            (the same file as pytorch-fid's pt_inception-2015-12-05-6726825d.pth).

    Raises:
        InputError: if torch-fidelity is not installed.
        RuntimeError: if the weights are of another network.
    """

    num_features = 2048
    batch_size = 50  # at 299 x 299 pixels, activations of more would not fit in a small memory

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        require_torch_fidelity()
        from torchmetrics.image.fid import NoTrainInceptionV3

        # The constructor unpickles a file without restriction, so it is only given this buffer.
        buffer = io.BytesIO()
        torch.save(dict(weights), buffer)
        buffer.seek(0)
        self.body = NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=["2048"],
            feature_extractor_weights_path=buffer,  # pyright: ignore[reportArgumentType]
        )

    def forward(self, x: Images) -> Float[Tensor, "b f"]:
        """The features. Images are converted to uint8, and grey ones repeated to 3 channels."""
        rgb = to_uint8(x).expand(-1, 3, -1, -1)
        return torch.cat([self.body(batch) for batch in rgb.split(self.batch_size)])

    def logits(self, x: Images) -> Float[Tensor, "b k"]:
        return self(x) @ self.body.get_parameter("fc.weight").T


def require_torch_fidelity() -> None:
    """Check that the optional dependency of `Inception` is there.

    Raises:
        InputError: if it is not installed.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise InputError(
            "the Inception features need torch-fidelity: "
            'install it with pip install "tiny-retrack[fid]"'
        )


def quarter_turns(x: Images) -> tuple[Images, Int[Tensor, " b"]]:
    """The four quarters of a batch of square images, turned by 0, 90, 180 and 270 degrees; and
    which turn each got.

    Telling the turns apart needs no labels (RotNet, arXiv 1803.07728).

    Raises:
        ValueError: if the images are not square.
    """
    if x.shape[2] != x.shape[3]:
        raise ValueError(f"images of shape {list(x.shape)}: only square ones can be turned")
    turned = []
    classes = []
    for turns, quarter in enumerate(x.chunk(4)):
        turned.append(quarter.rot90(turns, (2, 3)))
        classes.append(torch.full((len(quarter),), turns, device=x.device))
    return torch.cat(turned), torch.cat(classes)


def fit_classifier(
    images_at: Callable[[Int[Tensor, " b"]], Images],
    labels: Int[Tensor, " n"],
    *,
    seed: int,
    steps: int | None = None,
    batch_size: int = 128,
    progress: str = "",
) -> tuple[Classifier, float]:
    """Train the small feature network.

    Args:
        images_at: gives the images, in [-1, 1], to which `labels[index]` belong.
        labels: classes from 0. With fewer than two of them, the network learns to tell
            `quarter_turns` apart.
        steps: None for three passes through the images, and at least 400.
        progress: the label of a progress bar; none if empty.

    Returns:
        The network, in eval mode; and its accuracy, in [0, 1], on a tenth that was held out (with
        fewer than ten images, on one that was also trained on).
    """
    unlabelled = len(labels.unique()) < 2

    def batch_at(index: Tensor) -> tuple[Images, Int[Tensor, " b"]]:
        index = index.to(labels.device)
        if unlabelled:
            return quarter_turns(images_at(index))
        return images_at(index), labels[index]

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    tenth = len(order) // 10
    held_out = order[: max(1, tenth)]
    kept = order[tenth:]
    if steps is None:
        steps = max(400, 3 * len(kept) // batch_size)
    channels = images_at(held_out[:1].to(labels.device)).shape[1]
    num_classes = 4 if unlabelled else int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(channels, num_classes, not unlabelled).to(labels.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), progress, unit="step", disable=not progress, leave=False):
        index = torch.randint(len(kept), (batch_size,), generator=generator)
        x, y = batch_at(kept[index])
        optimizer.zero_grad()
        F.cross_entropy(model.logits(x), y).backward()
        optimizer.step()
        lr_schedule.step()
    model.eval()
    correct = []
    with torch.no_grad():
        for index in held_out.split(500):
            x, y = batch_at(index)
            correct.append(model.logits(x).argmax(1) == y)
    return model, torch.cat(correct).float().mean().item()


# --- Quality of samples ---------------------------------------------------------------------------


@torch.no_grad()
def inception_score(samples: Images, network: FeatureNetwork, batch_size: int = 500) -> float:
    """exp E_x KL(p(y|x) || p(y)) over the classes of `network` (arXiv 1606.03498), in one split.

    Samples are in [-1, 1].

    Raises:
        ValueError: if there are no samples.
    """
    if not len(samples):
        raise ValueError("no samples: they have no Inception Score")
    device = next(network.parameters()).device
    batches = []
    for x in samples.split(batch_size):
        logits = network.logits(x.to(device)).double()
        batches.append(F.log_softmax(logits, 1))
    log_p = torch.cat(batches)  # [b, k]
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    kl = (log_p.exp() * (log_p - log_marginal)).sum(1)
    return kl.mean().exp().item()


@torch.no_grad()
def fid(samples: Batches, reference: Batches, network: FeatureNetwork) -> float | None:
    """Frechet distance between the features of samples and reference (arXiv 1706.08500).

    Figures over two feature networks, or over two numbers of samples, do not compare.

    Args:
        samples: batches of images in [-1, 1].
        reference: likewise.

    Returns:
        The distance; None, with a warning, if either side has fewer images than there are features:
        the covariance is then singular.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    device = next(network.parameters()).device
    metric = FrechetInceptionDistance(feature=network).to(device)
    counts = {"samples": 0, "reference": 0}
    for name, batches in (("samples", samples), ("reference", reference)):
        for batch in batches:
            if len(batch):
                metric.update(batch.to(device), real=name == "reference")
                counts[name] += len(batch)
    if min(counts.values()) >= network.num_features:
        return metric.compute().item()
    warnings.warn(
        f"no FID: {counts['samples']} samples and {counts['reference']} images cannot span "
        f"{network.num_features} features: {_fid_advice(counts['reference'], network)}",
        stacklevel=3,  # torch.no_grad() is between
    )
    return None


def _fid_advice(num_reference: int, network: FeatureNetwork) -> str:
    """What gives an FID where images are too few."""
    if num_reference >= network.num_features:
        return f"take at least {network.num_features} samples that are no hits"
    if network.num_features > Classifier.num_features:
        return f"take the data set's own features, of which there are {Classifier.num_features}"
    return "the data set is too small for one"


# --- Denoisers ------------------------------------------------------------------------------------


@torch.no_grad()
def injection_similarity(
    x0: Images, denoised: Images, network: FeatureNetwork
) -> tuple[PerImage, PerImage]:
    """How close `denoised`, made from a noised x0, came back to x0 (SISS, arXiv 2503.01034).

    Args:
        x0: in [-1, 1].
        denoised: likewise; what leaves this range is clipped.
        network: takes the place of the paper's SSCD.

    Returns:
        For each image the L2 norm of the difference, pixels in [0, 1], and the cosine of the
        features.
    """
    denoised = denoised.clamp(-1, 1)
    distance = (denoised - x0).flatten(1).norm(dim=1) / 2
    return distance, F.cosine_similarity(network(denoised), network(x0))


@torch.no_grad()
def eps_distance(eps_model: EpsModel, other: EpsModel, x_t: Images, t: Steps) -> PerImage:
    """Mean over pixels of (eps - eps')^2, the difference of two denoisers' outputs at x_t.

    ReTrack minimises it at x_t of the forget images, to `ideal_eps` of the remain set.
    """
    return (eps_model(x_t, t) - other(x_t, t)).square().flatten(1).mean(1)


def to_x0_units(distance: PerImage, t: Steps, schedule: NoiseSchedule) -> PerImage:
    """An `eps_distance` as the mean over pixels of (x0 - x0')^2, images in [-1, 1].

    x0 = (x_t - sigma_t eps) / gamma_t, so the factor is sigma_t^2 / gamma_t^2: in these units a
    difference at low noise does not dominate the mean over t.
    """
    gamma, sigma = schedule.scales(t, distance)
    return distance * (sigma / gamma) ** 2

"""The feature networks behind FID and the Inception Score: the data set's own, or Inception."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_retrack.data import NO_LABEL, ImageSet, to_float
from tiny_retrack.lab import runs
from tiny_retrack.lab.checkpoint import read_json, read_tensors, write_json, write_tensors
from tiny_retrack.metrics import (
    Classifier,
    FeatureNetwork,
    Inception,
    fit_classifier,
    require_torch_fidelity,
)
from tiny_retrack.types import Images, InputError


def own_features(
    load: Callable[[], ImageSet], digest: str, channels: int, folder: Path, device: torch.device
) -> tuple[FeatureNetwork, str]:
    """The data set's own classifier, trained once and kept in `folder`; and its name.

    It is trained on all images that have a label, whatever is to be forgotten: figures of different
    forget sets are then over the same network.

    Args:
        load: gives the data set; called only if there is no network of it yet.
        digest: of the data set, as of `ImageSet.digest`.
        channels: of its images.
        device: to train on. The network is on the CPU if it was read from the folder.

    Raises:
        InputError: if what is in the folder is damaged, or it cannot be written to.
    """
    weights, path = folder / "classifier.safetensors", folder / "classifier.json"
    card = read_json(path) if weights.exists() and path.exists() else {}
    if card.get("digest") == digest and _is_complete(card):
        network = _read_classifier(weights, channels, card["has_classes"])
    else:
        runs.check_writable(folder, "the feature network of FID is kept there; run elsewhere")
        network, accuracy = _train_classifier(load(), device)
        card = {"digest": digest, "accuracy": accuracy, "has_classes": network.has_classes}
        path.unlink(missing_ok=True)  # it must never lie beside the weights of another data set
        write_tensors(weights, network.state_dict(), {})
        write_json(path, card)
    kind = "classifier" if network.has_classes else "classifier of quarter turns"
    return network, f"own {kind}, held-out accuracy {card['accuracy']:.3f}"


def _train_classifier(image_set: ImageSet, device: torch.device) -> tuple[Classifier, float]:
    is_labelled = image_set.labels != NO_LABEL
    images, labels = image_set.images[is_labelled], image_set.labels[is_labelled]

    def images_at(index: Tensor) -> Images:
        return to_float(images[index.cpu()].to(device))

    return fit_classifier(images_at, labels.to(device), seed=0, progress="feature network")


def _is_complete(card: Mapping[str, Any]) -> bool:
    return isinstance(card.get("accuracy"), float) and isinstance(card.get("has_classes"), bool)


def _read_classifier(path: Path, channels: int, has_classes: bool) -> Classifier:
    tensors, _ = read_tensors(path)
    try:
        network = Classifier(channels, len(tensors["head.bias"]), has_classes)
        network.load_state_dict(tensors)
    except (KeyError, RuntimeError):
        raise InputError(f"{path} is not a feature network: delete {path.parent}") from None
    if not all(bool(weight.isfinite().all()) for weight in tensors.values()):
        raise InputError(f"{path} holds values that are not finite: delete {path.parent}")
    return network


def inception_features(name: str, download: bool) -> tuple[FeatureNetwork, str]:
    """The Inception network of published FIDs; and its name.

    Args:
        name: a file of torch-fidelity's weights; or "inception", for that file in torch.hub's
            cache.
        download: fetch the file into the cache if it is not there.

    Raises:
        InputError: if torch-fidelity is missing, or the file is missing, damaged or of another
            network.
    """
    require_torch_fidelity()
    path = Path(name)
    if name == "inception":
        path = _cached_inception_weights(download)
    if not path.exists():
        raise InputError(
            f"--features {name}: no weights at {path}; "
            "fetch them with --features inception --download"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network = Inception(weights)
    except Exception as error:  # torch raises many types for a damaged or untrusted file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not torch-fidelity's Inception: {reason:.80}") from None
    return network, f"FID Inception, {path.name}"


def _cached_inception_weights(download: bool) -> Path:
    """Where torch.hub keeps the file, once fetched."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if download and not path.exists():
        try:
            torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # no network, or a file of another hash
            raise InputError(f"--features inception: {url} cannot be fetched ({error})") from None
    return path

"""The feature networks behind FID and the Inception Score: the data set's own, or Inception."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tiny_retrack.data import Split, to_float
from tiny_retrack.lab.checkpoint import read_json, read_tensors, write_json, write_tensors
from tiny_retrack.metrics import (
    Classifier,
    FeatureNetwork,
    Inception,
    fit_classifier,
    require_torch_fidelity,
)
from tiny_retrack.types import InputError


def own_features(split: Split, data: Mapping[str, Any], folder: Path) -> tuple[FeatureNetwork, str]:
    """The data set's own classifier, trained once and kept in `folder`; and its name.

    Raises:
        InputError: if what is in the folder is damaged.
    """
    about = {"data": dict(data), "images": len(split.remain)}
    weights, card = folder / "classifier.safetensors", folder / "classifier.json"
    if weights.exists() and card.exists() and read_json(card).get("about") == about:
        network = _read_classifier(weights, split.remain.shape[1])
        accuracy = read_json(card)["accuracy"]
    else:
        labels = split.labels - split.labels.min()  # images without a label are a class
        network, accuracy = fit_classifier(
            lambda index: to_float(split.remain[index]), labels, seed=0
        )
        card.unlink(missing_ok=True)  # it must never lie beside the weights of another data set
        write_tensors(weights, network.state_dict(), {})
        write_json(card, {"about": about, "accuracy": accuracy})
    return network, f"own classifier, held-out accuracy {accuracy:.3f}"


def _read_classifier(path: Path, channels: int) -> Classifier:
    tensors, _ = read_tensors(path)
    try:
        network = Classifier(channels, len(tensors["head.bias"]))
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

"""Evaluation of models with prompts: what was unlearned, asked for in several ways, and every other
prompt.

docs/results/prompts.md says what the figures are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from tiny_retrack.data import to_float, to_uint8
from tiny_retrack.lab.checkpoint import atomic, write_json
from tiny_retrack.lab.evaluation import (
    Evaluator,
    Metrics,
    cache_key,
    describe_samples,
    draw_samples,
    load_checkpoint,
)
from tiny_retrack.lab.plots import GRAY, save_rows, table
from tiny_retrack.lab.unlearning import forgotten_prompt
from tiny_retrack.metrics import Classifier, fid, is_hit
from tiny_retrack.prompts import PromptModel, at_prompt, guided
from tiny_retrack.training import denoiser
from tiny_retrack.types import EpsModel, InputError, Pixels

GUIDANCE = 2.0  # the weight of guided samples
BATCH = 16  # samples that a user looks at, as in the papers: a success has no hit among them
PICTURES = 20  # in a row of prompts.png, of all models together
NO_PROMPT = "no prompt"


def ways_to_ask(
    model: PromptModel, forgotten: int, no_prompt: int
) -> dict[str, dict[int, EpsModel]]:
    """By name, denoisers by prompt: every prompt plain and guided; for what was unlearned also no
    prompt, and guidance away from another prompt (a "negative prompt") in place of none.
    """
    plain = {prompt: at_prompt(model, prompt) for prompt in range(no_prompt)}
    none = at_prompt(model, no_prompt)
    other = 1 if forgotten == 0 else 0
    away = guided(plain[forgotten], plain[other], GUIDANCE)
    return {
        "plain": plain,
        "guided": {prompt: guided(plain[prompt], none, GUIDANCE) for prompt in plain},
        f"away from {other}": {forgotten: away},
        NO_PROMPT: {forgotten: none},
    }


def evaluate_checkpoint(folder: Path, evaluator: Evaluator) -> tuple[Metrics, list[Tensor]]:
    """The figures of every prompt by the way to ask, and of all prompts that were not unlearned
    together ("others"), written into prompts.json; and the first plain samples of each prompt.

    Prompts that were not unlearned are sampled a quarter as often. The noise is the same for all.

    Raises:
        InputError: as `load_checkpoint`; or for a data set without prompts.
    """
    split = evaluator.split
    forgotten = forgotten_prompt(split)
    if split.prompts is None or forgotten is None:
        raise InputError(f"{evaluator.data['dataset']} has no prompts")
    model, schedule = load_checkpoint(folder, evaluator)
    no_prompt = int(split.prompts.max()) + 1
    ways = ways_to_ask(denoiser(model, evaluator.bf16), forgotten, no_prompt)
    is_forgotten = split.prompts[: len(split.remain)] == forgotten
    num = evaluator.settings.num_samples
    figures: dict[str, Metrics] = {}
    pictures = []
    for way, models in ways.items():
        drawn = {}
        for prompt, eps_model in models.items():
            count = num if prompt == forgotten else max(1, num // 4)
            label = f"{folder.name}, prompt {prompt}, {way}"
            drawn[prompt] = draw_samples(
                eps_model, count, evaluator.seed, schedule, evaluator, label
            )
        if way == "plain":
            pictures = [to_uint8(samples[:PICTURES]) for samples in drawn.values()]
        own = {forgotten: drawn.pop(forgotten)}
        reference = split.remain if way == NO_PROMPT else split.remain[is_forgotten]
        figures[way] = {f"{forgotten}": sample_metrics(own, reference, evaluator)}
        for prompt, samples in drawn.items():
            figures[way][f"{prompt}"] = sample_metrics({prompt: samples}, None, evaluator)
        if drawn:
            figures[way]["others"] = sample_metrics(drawn, split.remain[~is_forgotten], evaluator)
    metrics = {**cache_key(folder, evaluator), "forgotten": f"{forgotten}", "prompts": figures}
    write_json(folder / "prompts.json", metrics)
    return metrics, pictures


def sample_metrics(
    drawn: Mapping[int, Tensor], reference: Pixels | None, evaluator: Evaluator
) -> Metrics:
    """Hits with their 95% interval (Wilson's), and successes; the share of samples that the data
    set's own classifier takes for their prompt's; FID of the samples that are no hits.

    None where a figure does not exist.

    Args:
        drawn: the samples by prompt, in [-1, 1].
        reference: of FID; None for no FID.
    """
    samples = torch.cat([*drawn.values()])
    targets = evaluator.split.targets.cpu() / 255
    threshold = evaluator.threshold.value or 0  # None is refused by `evaluate_all`
    hits = is_hit((samples + 1) / 2, targets, threshold)
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    batches = hits[: len(hits) // BATCH * BATCH].view(-1, BATCH)
    network = evaluator.network
    accuracy = distance = None
    if isinstance(network, Classifier):
        asked = torch.cat([torch.full((len(drawn[prompt]),), prompt) for prompt in drawn])
        with torch.no_grad():
            classes = network.logits(samples.to(evaluator.device)).argmax(1).cpu()
        accuracy = (classes == asked).double().mean().item()
    if reference is not None:
        distance = fid(samples[~hits].split(500), map(to_float, reference.split(500)), network)
    return {
        "num_samples": len(samples),
        "hit_frequency": hits.double().mean().item(),
        "hit_interval": [interval.low, interval.high],
        "success": (~batches.any(1)).double().mean().item() if len(batches) else None,
        "accuracy": accuracy,
        "fid": distance,
    }


def rows(model: str, metrics: Metrics) -> list[dict[str, Any]]:
    """A table's rows, one for each way to ask: what was unlearned, then the other prompts."""
    forgotten = metrics["forgotten"]
    found = []
    for way, figures in metrics["prompts"].items():
        own = figures[forgotten]
        others = figures.get("others", {})
        low, high = own["hit_interval"]
        found.append(
            {
                "model": model,
                f"prompt {forgotten}": way,
                "hits": own["hit_frequency"],
                "95% interval": f"{low:.3f} to {high:.3f}",
                "success": own["success"],
                "fid": own["fid"],
                "other prompts: hits": others.get("hit_frequency"),
                "their accuracy": others.get("accuracy"),
                "their fid": others.get("fid"),
            }
        )
    return found


def evaluate_all(folders: Sequence[Path], evaluator: Evaluator) -> str:
    """Evaluate checkpoints; returns a table with a row for each and each way to ask.

    Prints what a hit is. Writes prompts.json into each folder, and into the last one prompts.png, a
    row for each prompt: samples of all models, side by side, from the same noise.

    Raises:
        InputError: as `evaluate_checkpoint`; or if hits are not counted.
    """
    threshold = evaluator.threshold
    if threshold.value is None:
        raise InputError(f"--threshold: hits are not counted: {threshold.about}")
    describe_samples(evaluator)
    print(f"success: no hit in {BATCH} samples; guided: by weight {GUIDANCE:g}")
    found = []
    pictures = []
    for folder in folders:
        metrics, of_model = evaluate_checkpoint(folder, evaluator)
        found += rows(str(folder), metrics)
        pictures.append(of_model)
    with atomic(folders[-1] / "prompts.png") as path:
        draw_prompts(path, [folder.name for folder in folders], pictures)
    return table(found)


def draw_prompts(path: Path, models: Sequence[str], pictures: Sequence[Sequence[Tensor]]) -> None:
    """A PNG with a row for each prompt: samples of the first model, of the second, and so on.

    Args:
        pictures: by model, by prompt, uint8.
    """
    each = max(1, PICTURES // len(models))
    columns = []
    for name in models:
        columns += [""] * (each // 2) + [name] + [""] * (each - each // 2)
    labelled = {}
    for prompt, of_models in enumerate(zip(*pictures, strict=True)):
        parts = []
        for images in of_models:
            parts += [images[:each], images.new_full((1, *images.shape[1:]), GRAY)]
        labelled[f"prompt {prompt}"] = torch.cat(parts[:-1])  # a gap only in between
    save_rows(path, labelled, "each prompt, from the same noise", columns[:-1])

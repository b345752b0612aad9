"""How the command line describes an evaluation or a comparison: flags, and names of models."""

import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_retrack.attacks import ATTACKERS
from tiny_retrack.data import Split
from tiny_retrack.lab.checkpoint import fingerprint
from tiny_retrack.lab.flags import Parser, add_settings, one_of, positive, seed
from tiny_retrack.lab.presets import EvalSettings, UnlearnSettings, configure
from tiny_retrack.methods import METHODS, TARGETS, Method
from tiny_retrack.types import InputError


def method_names() -> list[str]:
    """What --methods takes: every method, retrack once per target, and the retrained model."""
    names = [name for name in METHODS if name != "retrack"]
    names += [f"retrack-{target}" for target in TARGETS]
    return [*names, "retrain"]


def add_evaluation(parser: Parser) -> None:
    """The flags of `evaluate.py`, besides those of every script."""
    add_settings(parser, "evaluate", EvalSettings)
    features = (
        "the network behind FID and IS: the data set's own classifier (default), or the Inception "
        "of published FIDs, fetched by --download or from a file of its weights"
    )
    attack = (
        f"also try to bring the images back, as attackers: {', '.join(ATTACKERS)} "
        "(without names: all)"
    )
    attack_steps = (
        "steps of the attack after which to measure the model; the attack ends at the largest "
        "(default: 15 60)"
    )
    retrained = (
        "two or more checkpoints trained with --remain-only: also report the distance to them, in "
        "units of their distance to each other"
    )
    tolerance = "rtol and atol of the likelihood's ODE (default: 1e-3; published: 1e-5)"
    add = parser.add_argument
    add("--features", default="own", metavar="own|inception|FILE", help=features)
    add("--attack", type=one_of(ATTACKERS), nargs="*", help=attack)
    add("--attack-steps", nargs="+", type=positive, metavar="STEP", help=attack_steps)
    add("--attack-lr", type=float, help="learning rate of the attack (default: 5e-4)")
    add("--attack-samples", type=positive, help="samples per measurement (default: 100)")
    add("--nll-tolerance", type=float, default=1e-3, help=tolerance)
    add("--retrained", nargs="+", type=Path, default=[], metavar="DIR", help=retrained)


def add_comparison(parser: Parser) -> None:
    """The flags of `evaluate.py compare`, besides those of an evaluation."""
    methods = (
        f"{', '.join(method_names())}; such as retrack-knn:k=1,lam=0.05 or "
        "siss:steps=300,batch-size=64 (default: all, but vdu only if the base was trained with "
        "--keep, and retrain only with one base that can be trained anew as run.json records, and "
        "without --retrained)"
    )
    base = (
        "checkpoint to unlearn (default: runs/DATASET/base); with several, every method and seed "
        "runs on each, and intervals are over the bases"
    )
    each = (
        "images, as for --forget, to forget one at a time, each by separate models; figures are "
        "averaged (retrain only if named: it trains one model per image)"
    )
    add = parser.add_argument
    add("--base", nargs="+", type=Path, default=[], metavar="DIR", help=base)
    add("--methods", nargs="+", default=[], metavar="METHOD[:SETTING=VALUE,...]", help=methods)
    add("--seeds", nargs="+", type=seed, help="default: 0 1 2 3 4; with --forget-each 0")
    add("--forget-each", nargs="+", default=[], metavar="IMAGE", help=each)
    add("--curve-every", type=positive, help="also evaluate the first seed's runs every N steps")
    add("--jobs", type=positive, default=1, help="runs at a time; on a CPU, one per core")
    add("--out", type=Path, help="folder of runs and tables (default: runs/DATASET/compare)")


def evaluation_options(args: Namespace) -> dict[str, Any]:
    """The arguments of `evaluation.build_evaluator` that are flags of their own.

    Raises:
        InputError: as `attack_overrides`.
    """
    return {
        "threshold": args.threshold,
        "features": args.features,
        "nll_tolerance": args.nll_tolerance,
        "attackers": args.attack,
        "attack": attack_overrides(args),
        "seed": args.seed,
        "download": args.download,
    }


def attack_overrides(args: Namespace) -> dict[str, Any]:
    """What the flags say of `evaluation.AttackSettings`, by its field.

    Raises:
        InputError: for a flag of the attack without --attack, or a learning rate that is not above
            0.
    """
    given = {"at": args.attack_steps, "lr": args.attack_lr, "samples": args.attack_samples}
    given = {name: value for name, value in given.items() if value is not None}
    if given and args.attack is None:
        raise InputError("--attack-steps, --attack-lr and --attack-samples need --attack")
    if "lr" in given and not 0 < given["lr"] < math.inf:
        raise InputError(f"--attack-lr {given['lr']}: must be above 0")
    if "at" in given:
        given["at"] = tuple(sorted(set(given["at"])))
    return given


def check_retrained(folders: Sequence[Path]) -> None:
    """Raise InputError unless there are two different networks or more, or none."""
    if not folders:
        return
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError(
            "--retrained: give at least two different networks, as their distance to each other is "
            "the unit"
        )
    if len({fingerprint(folder) for folder in folders}) < len(folders):
        raise InputError("--retrained: two of the folders hold the same network")


def check_comparison(args: Namespace) -> None:
    """Raise InputError for flags that exclude each other."""
    if args.forget and args.forget_each:
        raise InputError("--forget and --forget-each exclude each other: give one")
    if args.retrained and args.forget_each:
        raise InputError("--retrained: --forget-each needs other retrained models for each image")


def check_evaluation(args: Namespace, split: Split) -> None:
    """Raise InputError for `compare`, --attack or --retrained with a data set that has prompts, for
    --retrained without anything that was forgotten, and as `check_retrained`.
    """
    asked = {
        "compare": "methods" in args,
        "--attack": args.attack is not None,
        "--retrained": bool(args.retrained),
    }
    for name, is_asked in asked.items():
        if is_asked and split.prompts is not None:
            raise InputError(f"{name}: not for models with prompts, use evaluate.py DIR ... alone")
    if args.retrained and not len(split.forget):
        raise InputError("--retrained: say with --forget what the networks have never seen")
    check_retrained(args.retrained)


@dataclass(frozen=True)
class Spec:
    """A model of a comparison, as text "METHOD" or "METHOD:SETTING=VALUE,...".

    Attributes:
        method: one of `method_names`, or "base".
        overrides: (setting, value) in the place of the preset's, as they were written.
    """

    method: str
    overrides: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """The inverse of `str`.

        Raises:
            InputError: for an unknown method, a setting without a value, or one that is given
                twice.
        """
        method, colon, settings = text.partition(":")
        try:
            one_of(["base", *method_names()])(method)
        except ArgumentTypeError as error:
            raise InputError(f"--methods: {error}") from None
        overrides = []
        for setting in settings.split(",") if colon else []:
            name, equals, value = setting.partition("=")
            if not (name and equals and value):
                raise InputError(f"--methods {text:.80}: write METHOD:SETTING=VALUE,...")
            if name in dict(overrides):
                raise InputError(f"--methods {text:.80}: {name} is given twice")
            overrides.append((name, value))
        return cls(method, tuple(overrides))

    def __str__(self) -> str:
        if not self.overrides:
            return self.method
        settings = ",".join(f"{name}={value}" for name, value in self.overrides)
        return f"{self.method}:{settings}"

    @property
    def method_name(self) -> str:
        """The key in METHODS."""
        return "retrack" if self.method.startswith("retrack-") else self.method

    @property
    def is_unlearned(self) -> bool:
        return self.method not in ("base", "retrain")

    def configure(self, preset: str) -> tuple[UnlearnSettings, Method]:
        """The loop's and the method's settings.

        Raises:
            InputError: for a setting that the method does not have, or a value out of its bounds.
        """
        given = {name.replace("-", "_"): value for name, value in self.overrides}
        if self.method_name == "retrack":
            if "target" in given:
                raise InputError(f"--methods {self}: write the target as {self.method}")
            given["target"] = self.method.removeprefix("retrack-")
        try:
            return configure(preset, self.method_name, given)
        except InputError as error:
            raise InputError(f"--methods {self}: {error}") from None

    def check(self, preset: str) -> None:
        """Raise InputError, as `configure`, for what cannot be run."""
        if self.is_unlearned:
            self.configure(preset)
        elif self.overrides:
            names = ", ".join(name for name, _ in self.overrides)
            raise InputError(f"--methods {self}: {names} cannot be set here")


BASE = Spec("base")
RETRAIN = Spec("retrain")

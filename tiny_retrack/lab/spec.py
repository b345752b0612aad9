"""How the command line names the models of a comparison."""

from argparse import ArgumentTypeError
from dataclasses import dataclass

from tiny_retrack.lab.flags import one_of
from tiny_retrack.lab.presets import UnlearnSettings, configure
from tiny_retrack.methods import METHODS, TARGETS, Method
from tiny_retrack.types import InputError


def method_names() -> list[str]:
    """What --methods takes: every method, retrack once per target, and the retrained model."""
    names = [name for name in METHODS if name != "retrack"]
    names += [f"retrack-{target}" for target in TARGETS]
    return [*names, "retrain"]


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

    def configure(self, dataset: str) -> tuple[UnlearnSettings, Method]:
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
            return configure(dataset, self.method_name, given)
        except InputError as error:
            raise InputError(f"--methods {self}: {error}") from None

    def check(self, dataset: str) -> None:
        """Raise InputError, as `configure`, for what cannot be run."""
        if self.is_unlearned:
            self.configure(dataset)
        elif self.overrides:
            names = ", ".join(name for name, _ in self.overrides)
            raise InputError(f"--methods {self}: {names} cannot be set here")


BASE = Spec("base")
RETRAIN = Spec("retrain")

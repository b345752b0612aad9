"""The flags that the scripts share: types that explain themselves, and which data to load."""

import argparse
import difflib
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from tiny_retrack.data import DATASETS
from tiny_retrack.types import InputError

DATA_DEFAULTS: dict[str, Any] = {
    "dataset": "digits-tshirt",
    "data_dir": "data",
    "forget": [],
    "tshirt": None,
    "size": 32,
    "channels": 3,
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def one_of(options: Collection[str]) -> Callable[[str], str]:
    """A flag's type: one of the names; for a misspelt one the complaint suggests the nearest."""

    def parse(name: str) -> str:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"take one of {', '.join(options)}"
            raise argparse.ArgumentTypeError(f"unknown '{name}', {hint}")
        return name

    return parse


def positive(text: str) -> int:
    """A flag's type: a whole number from 1 up, of at most 9 digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"'{text:.80}' is not a whole number from 1 up, of at most 9 digits"
        )
    return int(text)


def seed(text: str) -> int:
    """A flag's type: what torch takes as a seed."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"'{text:.80}' is not a whole number from 0 to 10^18 - 1")
    return int(text)


def make_parser(doc: str | None) -> Parser:
    """A parser with the flags every script has."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--dataset",
        type=one_of(DATASETS),
        help=f"one of {', '.join(DATASETS)} (default: digits-tshirt, or the checkpoint's)",
    )
    add(
        "--data-dir",
        help="where torchvision's files lie; for 'folder', the folder of images (default: data)",
    )
    add("--download", action="store_true", help="fetch what is missing of the data set")
    add(
        "--tshirt",
        metavar="PNG",
        help="mnist-tshirt: the picture to memorise (default: DATA_DIR/tshirt.png)",
    )
    add("--size", type=positive, help="folder: height and width to resize to (default: 32)")
    add(
        "--channels", type=int, choices=(1, 3), help="folder: 1 for grey, 3 for colour (default: 3)"
    )
    add(
        "--forget",
        nargs="+",
        metavar="IMAGE",
        help="indices or file names to forget (default: the data set's own)",
    )
    add("--device", type=one_of(("auto", "cpu", "cuda")), default="auto", help="auto, cpu or cuda")
    add(
        "--bf16",
        type=one_of(("auto", "on", "off")),
        default="auto",
        help="bfloat16 autocast (auto: where fast)",
    )
    add("--seed", type=seed, default=0)
    return parser


def data_settings(
    args: argparse.Namespace, recorded: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Which data: the flags, over what a checkpoint's run.json recorded, over the defaults."""
    given = {name: getattr(args, name) for name in DATA_DEFAULTS if getattr(args, name) is not None}
    return {**DATA_DEFAULTS, **(recorded or {}), **given}


def data_flags(data: dict[str, Any]) -> list[str]:
    """The flags that `data_settings` would read as `data`."""
    flags = []
    for name, value in data.items():
        if value:
            flags += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, list) else [value]),
            ]
    return flags

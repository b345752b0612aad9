"""Models with prompts. `at_prompt` fixes the prompt, so that losses and samplers can call
`eps_model(x_t, t)` as for any model.

A prompt is a class. The network's last class means "no prompt"; in training it replaces each prompt
with probability DROP_PROBABILITY, for classifier-free guidance (arXiv 2207.12598).
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from tiny_retrack.types import EpsModel

Prompts = Int[Tensor, " b"]
PromptModel = Callable[..., Tensor]  # (x_t, t, prompts) -> eps, such as a `UNet` with classes

DROP_PROBABILITY = 0.1


def drop_prompts(prompts: Prompts, no_prompt: int, generator: torch.Generator) -> Prompts:
    """The prompts of a batch, each replaced by `no_prompt` with DROP_PROBABILITY."""
    coin = torch.rand(prompts.shape, generator=generator, device=prompts.device)
    return prompts.where(coin >= DROP_PROBABILITY, no_prompt)


def at_prompt(model: PromptModel, prompt: int | Prompts) -> EpsModel:
    """The model under one prompt, or under one for each image of the batch.

    Raises:
        ValueError: when called with another number of images than there are prompts.
    """

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        prompts = torch.as_tensor(prompt, device=x_t.device)
        if prompts.ndim and len(prompts) != len(x_t):
            raise ValueError(f"{len(prompts)} prompts for {len(x_t)} images: give one for each")
        return model(x_t, t, prompts.expand(len(x_t)))

    return eps_model


def guided(eps_prompt: EpsModel, eps_none: EpsModel, weight: float) -> EpsModel:
    """eps_none + weight (eps_prompt - eps_none): classifier-free guidance (arXiv 2207.12598).

    Weight 1 is `eps_prompt` itself, in one pass; larger weights move further from `eps_none`.
    """
    if weight == 1:
        return eps_prompt

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        eps = eps_none(x_t, t)
        return eps + weight * (eps_prompt(x_t, t) - eps)

    return eps_model

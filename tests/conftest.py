"""Shared by all tests: a derandomised hypothesis profile, and two threads for torch."""

import os

import hypothesis
import torch

hypothesis.settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)  # HYPOTHESIS_PROFILE=long pytest
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(min(2, torch.get_num_threads()))

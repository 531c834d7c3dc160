"""Lets every test import `reference` (random reference models, made for the tests) wherever pytest is started from."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")                                    # the tests never reach for the network
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", params=["dev", "schnell"])
def small_folder(request, tmp_path_factory) -> Path:
    """A complete small FluxPipeline folder, once with and once without guidance; read it, do not write to it."""
    from reference import small_pipeline
    return small_pipeline(tmp_path_factory.mktemp("small") / request.param, guidance=request.param == "dev")

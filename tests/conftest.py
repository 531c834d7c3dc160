"""Lets every test import `reference`, the random reference models, wherever pytest is started."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")                # the tests need no network
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", params=["dev", "schnell"])
def small_folder(request, tmp_path_factory) -> Path:
    """A complete small FluxPipeline folder, once with and once without guidance; only read it."""
    from reference import small_pipeline
    folder = tmp_path_factory.mktemp("small") / request.param
    return small_pipeline(folder, guidance=request.param == "dev")

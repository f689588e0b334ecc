"""What tests of the engine share: runners of tiny networks, and what each request gets alone."""

from __future__ import annotations

import random

import pytest
from helpers.random_models import hf_mixtral
from helpers.traffic import (
    ARGS,
    alone,
    random_wishes,
    tiny_decoder,
    tiny_runner,
)


@pytest.fixture(scope="session")
def oracle():
    return hf_mixtral(ARGS, std=0.2)


@pytest.fixture(scope="session", params=[pytest.param("base", marks=pytest.mark.slow), "sparse"])
def runner(request):
    return tiny_runner(tiny_decoder(request.param))


@pytest.fixture(scope="session")
def singles(runner):
    """Wishes of all kinds, and what each gets alone."""
    wishes = random_wishes(random.Random(1), 48)
    return wishes, alone(runner, wishes)

"""Fixtures for tests of merging and its certificate; they import late, because making a base imports transformers."""

import pytest


@pytest.fixture
def base(tmp_path):
    from helpers.merging import write_base

    return write_base(tmp_path)


@pytest.fixture
def exact_base(tmp_path):
    from helpers.merging import write_exact_base

    return write_exact_base(tmp_path)


@pytest.fixture
def adapter(tmp_path):
    from helpers.merging import write_adapter

    return write_adapter(tmp_path)

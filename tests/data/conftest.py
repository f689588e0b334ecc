"""One tokenizer of each kind, made once."""

import pytest
from helpers.small_tokenizers import byte_level_folder, mixtral_json_folder

from accessory.data.tokenizer import MIXTRAL_TOKENIZER, Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def mixtral() -> Tokenizer:
    return load_tokenizer(MIXTRAL_TOKENIZER)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(byte_level_folder(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="session")
def mixtral_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(mixtral_json_folder(tmp_path_factory.mktemp("mixtral_json")))


@pytest.fixture(params=["mixtral", "mixtral_json", "byte_level"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)

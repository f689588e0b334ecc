import json

import pytest

from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.tools.splitting import _add_tokenizer


@pytest.mark.parametrize(("vocab_size", "brought"), [(32000, True), (32768, False)])
def test_a_release_without_a_tokenizer_gets_mixtrals_where_it_fits(tmp_path, capsys, vocab_size, brought):
    target = tmp_path / "converted"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    _add_tokenizer(tmp_path, target)
    put = target / "tokenizer.model"
    assert put.exists() == brought
    if brought:
        assert put.read_bytes() == MIXTRAL_TOKENIZER.read_bytes()
    assert capsys.readouterr().out.startswith("note: there is no tokenizer.model")

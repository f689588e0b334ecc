import json

import pytest
from helpers import checkpoints as make
from helpers.checkpoints import random_tensors
from helpers.small_tokenizers import byte_level_folder

from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.tools.splitting import _add_tokenizer, split


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


def test_a_release_with_a_tokenizer_json_lacks_nothing(tmp_path, capsys, monkeypatch):
    folder = byte_level_folder(make.write_torrent(tmp_path / "release", random_tensors()))
    monkeypatch.setattr("sys.argv", ["split.py"])
    assert split(str(folder / "split.py"), to="base", folder_name="converted") == 0
    assert (folder / "converted" / "tokenizer.json").exists()
    said = capsys.readouterr().out
    assert "note" not in said
    assert "tokenizer.json" in said

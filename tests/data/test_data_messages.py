"""Messages of a dialogue, as people spell them."""

import pytest
from helpers.dialogues import dialogue

from accessory.data.messages import read_messages
from accessory.data.templates import get_template
from accessory.errors import InputError


def test_messages_in_the_spellings_people_have():
    wanted = dialogue("q", "a", system="s")
    assert read_messages(wanted) == wanted
    assert read_messages({"messages": wanted}) == wanted
    for answer in ("gpt", "assistant"):
        turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": answer, "value": "a"}]
        assert read_messages({"conversations": turns}) == read_messages(turns) == wanted
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}]
    assert read_messages(parts) == dialogue("q!")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the list is empty"),
        ("hi", "got a str"),
        ({"texts": []}, "neither messages nor conversations among texts"),
        (["hi"], r"messages\[0\]: got a str"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]: unknown role 'robot'; known are system, user, human"),
        ([{"content": "x"}], "unknown role None"),
        ([{"role": "user"}], r"messages\[0\]: content: got None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content: got"),
    ],
)
@pytest.mark.parametrize("name", ["default", "chatml"])
def test_messages_that_cannot_be_read(mixtral, name, messages, message):
    with pytest.raises(InputError, match=message):
        get_template(name).prompt_ids(messages, mixtral)

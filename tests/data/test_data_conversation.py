"""A dialogue in progress."""

import pytest
from helpers.dialogues import dialogue, learnt

from accessory.data.conversation import Conversation
from accessory.data.detokenizer import StreamDecoder
from accessory.data.templates import get_template


@pytest.mark.parametrize("name", ["default", "mistral"])
def test_a_streamed_reply_goes_back_into_the_dialogue_as_the_same_ids(mixtral, name):
    talk = Conversation(name).add("user", "Hi")
    prompt = talk.prompt_ids(mixtral)
    generated = mixtral.encode(" Hello there", bos=False, prefix=False)
    decoder = StreamDecoder(mixtral, prompt)
    reply = "".join(decoder.push(t) for t in generated)
    assert reply == " Hello there"
    assert talk.template.reply(reply) == "Hello there"
    talk.add("assistant", talk.template.reply(reply)).add("user", "More")
    assert talk.prompt_ids(mixtral)[: len(prompt) + 2] == prompt + generated


def test_conversation_holds_system_and_turns(mixtral):
    talk = Conversation(get_template("chatml"), system="S").add("human", "a")
    assert talk.messages == dialogue("a", system="S")
    assert talk.text(prompt=True).endswith("<|im_start|>assistant\n")
    talk.add("gpt", "b")
    assert learnt(*talk.encode(mixtral), mixtral) == ["b<|im_end|>"]

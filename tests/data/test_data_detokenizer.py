import pytest
import sentencepiece
from helpers.examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accessory.data.detokenizer import StopScanner, StreamDecoder
from accessory.errors import InputError

# Emoji with modifiers and joiners, CJK, combining marks, right-to-left, rare planes, white space, then any text.
TRICKY = st.sampled_from(
    [
        "🙂",
        "👩\u200d👩\u200d👧",
        "👍🏽",
        "🇫🇷",
        "你好",
        "日本語",
        "e\u0301",
        "ก็",
        "שלום",
        "مرحبا",
        "𝔘",
        *"\u200f \n\t\ufffd",
        "  ",
    ]
)
# To Mixtral's tokenizer the character U+2581 is a space, and no text gets it back.
BLANK = "\u2581"
ANY = st.characters(exclude_characters=BLANK, exclude_categories=["Cs"])
TEXT = st.lists(st.one_of(TRICKY, st.text(ANY, max_size=6)), max_size=8).map("".join)
PROPERTY = settings(
    max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stream(tokenizer, ids, prompt_ids=()):
    decoder = StreamDecoder(tokenizer, prompt_ids)
    return [decoder.push(token) for token in ids] + [decoder.flush()]


@PROPERTY
@given(text=TEXT)
def test_streamed_text_is_the_text(any_tokenizer, text):
    ids = any_tokenizer.encode(text, bos=True)
    pieces = stream(any_tokenizer, ids)
    assert "".join(pieces) == any_tokenizer.decode(ids) == text
    assert pieces[-1] == ""
    for piece in pieces:  # half a character would add a replacement character
        assert piece.count("\ufffd") <= text.count("\ufffd")


def test_the_blank_of_sentencepiece_is_a_space_as_in_sentencepiece_itself(mixtral):
    ids = mixtral.encode(f"a{BLANK}b", bos=False)
    processor = sentencepiece.SentencePieceProcessor(str(mixtral.path))
    assert ids == processor.encode(f"a{BLANK}b")
    assert "".join(stream(mixtral, ids)) == processor.decode(ids) == "a b"


@PROPERTY
@given(data=st.data())
def test_any_ids_stream_as_they_decode(any_tokenizer, data):
    ids = data.draw(st.lists(st.integers(-1, any_tokenizer.vocab_size + 2), max_size=25))
    prompt = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=6))
    assert "".join(stream(any_tokenizer, ids)) == any_tokenizer.decode(ids)
    assert "".join(stream(any_tokenizer, ids, prompt)) == any_tokenizer.decode(ids, after=prompt)


@PROPERTY
@given(raw=st.binary(max_size=24))
def test_random_bytes_read_as_utf8_reads_them(any_tokenizer, raw):
    if any_tokenizer.vocab_size < 1000:  # byte-level: each byte has a token
        byte_of = {any_tokenizer.token_bytes(i): i for i in range(any_tokenizer.vocab_size)}
    else:
        byte_of = {bytes([b]): 3 + b for b in range(256)}
    ids = [byte_of[bytes([b])] for b in raw]
    pieces = stream(any_tokenizer, ids)
    assert "".join(pieces) == any_tokenizer.decode(ids) == raw.decode("utf-8", "replace")
    valid = raw.decode("utf-8", "ignore")
    assert "".join(pieces).replace("\ufffd", "") == valid.replace("\ufffd", "")


@PROPERTY
@given(text=TEXT, cut=st.integers(0, 30))
def test_prompt_and_continuation_join_without_seam(any_tokenizer, text, cut):
    ids = any_tokenizer.encode(text, bos=True)
    prompt, rest = ids[:cut], ids[cut:]
    before = StreamDecoder(any_tokenizer)
    shown = "".join(before.push(token) for token in prompt)
    assert shown + "".join(stream(any_tokenizer, rest, prompt)) == text


def test_first_generated_word_keeps_its_space(mixtral):
    prompt = mixtral.encode("The capital of France is", bos=True)
    paris = mixtral.encode("Paris", bos=False)
    assert "".join(stream(mixtral, paris, prompt)) == " Paris"
    assert "".join(stream(mixtral, paris)) == "Paris"
    assert "".join(stream(mixtral, paris, [mixtral.bos_id])) == "Paris"  # after BOS alone it is a first word


def test_an_emoji_in_bytes_appears_whole(mixtral):
    ids = [3 + b for b in "🫠".encode()]  # has no piece, so four byte tokens
    assert stream(mixtral, ids, mixtral.encode("a", bos=True)) == ["", "", "", "🫠", ""]
    assert stream(mixtral, ids[:3], [1]) == ["", "", "", "\ufffd"]


def test_a_long_stream_stays_linear(mixtral):
    calls = 0

    class Counting:
        def __getattr__(self, name):
            return getattr(mixtral, name)

        def token_bytes(self, token, begun=True):
            nonlocal calls
            calls += 1
            return mixtral.token_bytes(token, begun)

    decoder = StreamDecoder(Counting())
    for token in [22557, 3 + 0xFF] * 2000:
        decoder.push(token)
    assert calls <= 4000 + 2


# ---- stop strings

STOPS = st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3)


def first_stop(text, stops):
    """(text before the stop string, stop string) as a search after every single character finds them."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=examples(400), deadline=None)
@given(pieces=st.lists(st.text("ab#\n", max_size=4), max_size=10), stops=STOPS)
def test_text_is_cut_at_the_first_stop(pieces, stops):
    scanner = StopScanner(stops)
    shown = ""
    so_far = ""
    for piece in pieces:
        so_far += piece
        shown += scanner.push(piece)
        cut, found = first_stop(so_far, stops)
        assert cut.startswith(shown)
        assert scanner.found == found
    shown += scanner.flush()
    assert (shown, scanner.found) == first_stop("".join(pieces), stops)


def test_a_stop_across_token_borders():
    scanner = StopScanner(["\n###"])
    assert [scanner.push(t) for t in ["Paris.", "\n", "##", "#", " Human"]] == ["Paris.", "", "", "", ""]
    assert scanner.stopped
    assert scanner.found == "\n###"
    assert scanner.flush() == ""


def test_a_beginning_that_comes_to_nothing_is_let_through():
    scanner = StopScanner("\n###")
    assert [scanner.push(t) for t in ["a\n", "\n#", "b"]] == ["a", "\n", "\n#b"]
    assert not scanner.stopped


def test_no_stops_hold_nothing_back():
    scanner = StopScanner()
    assert scanner.push("anything\n") == "anything\n"
    assert scanner.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["ok", ""], [3]])
def test_a_stop_string_needs_a_character(stops):
    with pytest.raises(InputError, match="stop"):
        StopScanner(stops)

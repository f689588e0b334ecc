"""The fields of a page that say how an answer's tokens are drawn, and by which adapter; names and ranges are those of
`SamplingParams`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# In the order of `sampling_fields`. All but "stop" are keywords of `stream_generate`. A model without adapters has no
# field for the last one.
NAMES = (
    "max_gen_len", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "adapter",
)  # fmt: skip


def sampling_fields(gr: Any, max_seq_len: int, adapters: Sequence[str] = ()) -> list[Any]:
    """The components, the seldom ones in a part of the page that is closed at first. gr: Gradio."""
    choices = [("none: the model itself", ""), *((name, name) for name in adapters)]
    adapter = [gr.Dropdown(choices, value="", label="Adapter", elem_id="adapter")] if adapters else []
    length = gr.Number(
        min(512, max_seq_len // 2), label="Max length", precision=0, elem_id="max_gen_len",
        info=f"Tokens an answer may have; with its prompt at most {max_seq_len}",
    )  # fmt: skip
    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy", elem_id="temperature")
    top_p = gr.Slider(0.01, 1, 0.95, step=0.01, label="Top-p", info="Nucleus of sampling", elem_id="top_p")
    with gr.Accordion("More", open=False, elem_id="more"):
        top_k = gr.Number(0, label="Top-k", info="Only the k likeliest tokens; 0: all", precision=0, elem_id="top_k")
        about = "Only tokens at least so many times as likely as the likeliest"
        min_p = gr.Slider(0, 1, 0, step=0.01, label="Min-p", info=about, elem_id="min_p")
        about = "More than 1 makes tokens of prompt and answer less likely"
        repetition = gr.Slider(
            0.5, 2, 1, step=0.05, label="Repetition penalty", info=about, elem_id="repetition_penalty"
        )
        about = "Subtracted from the logits of tokens that the answer has"
        presence = gr.Slider(-2, 2, 0, step=0.1, label="Presence penalty", info=about, elem_id="presence_penalty")
        about = "The same, each time that the answer has the token"
        frequency = gr.Slider(-2, 2, 0, step=0.1, label="Frequency penalty", info=about, elem_id="frequency_penalty")
        seed = gr.Number(None, label="Seed", info="Makes sampling repeat; empty: none", precision=0, elem_id="seed")
        about = "End before one of these texts, a line each"
        stop = gr.Textbox(label="Stop", info=about, lines=1, max_lines=5, elem_id="stop_texts")
    return [length, temperature, top_p, top_k, min_p, repetition, presence, frequency, seed, stop, *adapter]


def sampling_of(values: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """The keywords of `stream_generate`, and the texts that end an answer."""
    how = dict(zip(NAMES, values, strict=False))
    if "adapter" in how:
        how["adapter"] = how["adapter"] or None
    stops = [line for line in (how.pop("stop") or "").splitlines() if line]
    return how, stops

"""`accessory generate` and `accessory chat`: what they print, and the prompts that reach the model."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from helpers.adapters import peft_args, random_adapter, save_adapter
from helpers.command_line import convert_to_base, program, standard_input, write_hf

from accessory.cli import main
from accessory.data.conversation import Conversation
from accessory.data.templates import get_template
from accessory.data.tokenizer import MIXTRAL_TOKENIZER
from accessory.errors import NonFiniteError
from accessory.model.meta import MetaModel
from accessory.model.text_model import TextModel
from accessory.progress import progress_bar

PROMPT = "The best programming language in the world is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("text") / "hf")


@pytest.fixture(scope="module")
def base(folder):
    return convert_to_base(folder)


@pytest.fixture(scope="module")
def model(folder):
    return MetaModel.from_pretrained(folder, dtype=torch.float32, device="cpu", max_seq_len=128)


@pytest.fixture
def generate(folder, capsys):
    """Run `accessory generate` in this process; returns what it printed."""

    def run(*options: str) -> str:
        assert main(["generate", str(folder), "--dtype", "fp32", "--max_seq_len", "128", *options]) == 0
        return capsys.readouterr().out

    return run


# --------------------------------------------------------------------------- generate


def test_each_prompt_may_have_its_adapter(generate, folder, tmp_path):
    args = MetaModel.from_pretrained(folder, dtype=torch.float32, device="cpu", max_seq_len=128).args
    for name, seed in (("a", 1), ("b", 2)):
        save_adapter(tmp_path / name, random_adapter(args, std=0.3, seed=seed), peft_args(args))
    named = [f"--adapter={name}={tmp_path / name}" for name in "ab"]
    how = {"dtype": torch.float32, "device": "cpu", "max_seq_len": 128}
    models = (MetaModel.from_pretrained(path, **how) for path in (folder, [folder, tmp_path / "b"]))
    plain, with_b = (model.generate([PROMPT], max_gen_len=8)[0] for model in models)
    used = [part for name in ("none", "b") for part in ("--prompt", PROMPT, "--use-adapter", name)]
    out = generate(*named, *used, "--max-gen-len", "8", "--json")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [plain, with_b]
    assert plain != with_b
    assert generate(*named, *used[:2], "--use-adapter=b", "--max-gen-len", "8") == with_b + "\n"


def test_generate_prints_what_the_model_writes(generate, model):
    assert generate("--prompt", PROMPT, "--max-gen-len", "8") == model.generate([PROMPT], max_gen_len=8)[0] + "\n"


def test_several_prompts_are_numbered_and_each_gets_what_it_gets_alone(generate, model):
    texts = model.generate([PROMPT, "A"], max_gen_len=6)
    out = generate("--prompt", PROMPT, "--prompt", "A", "--max_gen_len", "6")
    assert out == f"# 1/2: {PROMPT}\n{texts[0]}\n# 2/2: A\n{texts[1]}\n"
    assert generate("--prompt", "A", "--prompt", " \n ", "--max-gen-len", "1").startswith("# 1/2: A\n")


def test_prompts_come_from_files_and_standard_input(generate, model, tmp_path, monkeypatch):
    expected = model.generate([PROMPT], max_gen_len=4)[0]
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert generate("--prompt-file", str(tmp_path / "prompt.txt"), "--max-gen-len", "4") == expected + "\n"
    for options in ([], ["--prompt-file", "-"]):
        standard_input(monkeypatch, PROMPT + "\n")
        assert generate(*options, "--max-gen-len", "4") == expected + "\n"


def test_lines_and_json(generate, model, monkeypatch):
    standard_input(monkeypatch, f"{PROMPT}\n\nZwei Wörter\n")
    lines = generate("--lines", "--json", "--max-gen-len", "4").splitlines()
    texts = model.generate([PROMPT, "Zwei Wörter"], max_gen_len=4)
    how = {"tokens": 4, "finish_reason": "length"}
    asked = [len(model.tokenizer.encode(prompt, bos=True)) for prompt in (PROMPT, "Zwei Wörter")]
    assert [json.loads(line) for line in lines] == [
        {"prompt": PROMPT, "text": texts[0], "prompt_tokens": asked[0], **how},
        {"prompt": "Zwei Wörter", "text": texts[1], "prompt_tokens": asked[1], **how},
    ]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_log_probabilities_come_with_the_tokens(generate, model, stream):
    words = ["--prompt", PROMPT, "--max-gen-len", "4", "--json", "--logprobs", "2", *stream]
    told = json.loads(generate(*words).splitlines()[-1])["logprobs"]
    prompt = model.tokenizer.encode(PROMPT, bos=True)
    ids = [token["id"] for token in told]
    logits_TV = model.compute_logits([prompt + ids])[0][len(prompt) - 1 : -1]
    for token, logprobs_V in zip(told, logits_TV.log_softmax(-1), strict=True):
        assert token["token"] == model.tokenizer.decode([token["id"]])
        best = logprobs_V.topk(2)
        assert [top["id"] for top in token["top"]] == best.indices.tolist()
        assert [top["logprob"] for top in token["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert token["logprob"] == pytest.approx(logprobs_V[token["id"]].item(), abs=1e-4)


@pytest.mark.parametrize("option", ["--top-k=1", "--min_p=1", "--repetition-penalty=100", "--presence_penalty=2"])
def test_every_option_of_sampling_reaches_the_model(generate, model, option):
    name, value = option.removeprefix("--").replace("-", "_").split("=")
    how = {"max_gen_len": 12, "temperature": 2.0, "seed": 3, name: int(value)}
    out = generate("--prompt", PROMPT, "--max-gen-len", "12", "--temperature", "2", "--seed", "3", option)
    assert out == model.generate([PROMPT], **how)[0] + "\n"
    assert out != generate("--prompt", PROMPT, "--max-gen-len", "12", "--temperature", "2", "--seed", "3")


@pytest.mark.parametrize("name", ["alpaca", "default", "mistral", "chatml"])
def test_prompts_are_messages_in_a_template(generate, model, name):
    template = get_template(name)
    asked = [
        Conversation(template, "Be brief.").add("user", text).prompt_ids(model.tokenizer) for text in ("One", "Two")
    ]
    stops = [*template.stop_strings, "xx"]
    texts = map(template.reply, model.generate(asked, max_gen_len=12, additional_stop_symbols=stops))
    words = ["--template", name, "--system", "Be brief.", "--max-gen-len", "12", "--stop", "xx"]
    told = [json.loads(line) for line in generate("--prompt", "One", "--prompt", "Two", *words, "--json").splitlines()]
    assert [(t["prompt"], t["text"]) for t in told] == [*zip(("One", "Two"), texts, strict=True)]
    assert generate("--prompt", "Two", *words, "--stream") == told[1]["text"] + "\n"


def test_stream_prints_the_same_text(generate, model):
    assert generate("--prompt", PROMPT, "--max-gen-len", "20", "--stream") == generate(
        "--prompt", PROMPT, "--max-gen-len", "20"
    )


def test_a_short_context_leaves_room_for_prompt_and_answer(generate, model):
    assert generate("--prompt", PROMPT) == model.generate([PROMPT], max_gen_len=64)[0] + "\n"


def test_stream_as_json_is_pieces_and_then_the_whole(generate, model):
    words = ["--prompt", PROMPT, "--max-gen-len", "20", "--json"]
    *pieces, whole = map(json.loads, generate(*words, "--stream").splitlines())
    assert whole == json.loads(generate(*words))
    assert len(pieces) > 1
    assert all(list(piece) == ["piece"] for piece in pieces)
    assert "".join(piece["piece"] for piece in pieces) == whole["text"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_ctrl_c_ends_the_text_and_prints_what_there_is(folder, model, capsys, monkeypatch, form):
    step = model.llma.__class__.forward
    calls = []

    def interrupted(self, *args, **how):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **how)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(model.llma.__class__, "forward", interrupted)
    command = ["generate", str(folder), "--dtype", "fp32", "--max_seq_len", "128", "--prompt", PROMPT, *form]
    assert main([*command, "--max-gen-len", "100"]) == 130
    captured = capsys.readouterr()
    monkeypatch.undo()
    expected = model.generate([PROMPT], max_gen_len=5)[0]  # the step in which Ctrl-C came is the last
    got = json.loads(captured.out)["text"] if form else captured.out.removesuffix("\n")
    assert got
    assert expected.startswith(got)
    assert captured.err == "\ninterrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_shows_how_many_tokens_there_are(folder, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(
        "accessory.commands.text.progress_bar", lambda *args, **how: seen.append(args) or progress_bar(*args, **how)
    )
    steps = []
    write = MetaModel.complete

    def counted(self, *args, on_step, **how):
        return write(self, *args, on_step=lambda n: (steps.append(n), on_step(n)), **how)

    monkeypatch.setattr(MetaModel, "complete", counted)
    command = ["generate", str(folder), "--dtype", "fp32", "--max_seq_len", "128", "--prompt", PROMPT, "--prompt", "A"]
    assert main([*command, "--max-gen-len", "4"]) == 0
    assert seen == [(4, "writing", True)]
    assert steps == [1, 2, 3, 4]


def test_stop_ends_the_text_before_it(generate, model):
    whole = model.generate([PROMPT], max_gen_len=20)[0]
    stop = whole[len(whole) // 2 :][:3]
    for stream in ([], ["--stream"]):
        out = generate("--prompt", PROMPT, "--max-gen-len", "20", "--stop", "\x00", "--stop", stop, *stream)
        assert out == whole[: whole.index(stop)] + "\n"


def test_a_seed_makes_sampling_repeat(generate):
    hot = ["--prompt", PROMPT, "--max-gen-len", "12", "--temperature", "1.5", "--top_p", "0.9"]
    first, again, other = (generate(*hot, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_either_implementation_and_later_config_files(folder, base, capsys, tmp_path):
    outs = []
    for kind in ("mixtral", "mixtral_sparse"):
        main(["generate", str(base), "--llama_type", kind, "--dtype", "float32", "--prompt", PROMPT, "--max-gen-len=6"])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    (tmp_path / "theta.json").write_text('{"rope_theta": 100}')
    tokenizer = ["--tokenizer_path", str(MIXTRAL_TOKENIZER)]
    options = ["--llama_config", str(tmp_path / "theta.json"), *tokenizer, "--prompt", PROMPT, "--max-gen-len=6"]
    assert main(["generate", str(base), "--dtype", "fp32", *options]) == 0


# --------------------------------------------------------------------------- chat


@pytest.fixture
def chat(folder, model, capsys, monkeypatch):
    """Type lines into `accessory chat`; returns exit status, output, and the prompts that reached the model."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, list[str]]:
        standard_input(monkeypatch, "".join(line + "\n" for line in lines))
        prompts = []
        stream = MetaModel.stream

        def recorded(self, prompt, **how):
            prompts.append(self.tokenizer.decode(prompt))
            return stream(self, prompt, **how)

        monkeypatch.setattr(MetaModel, "stream", recorded)
        monkeypatch.setattr(MetaModel, "from_pretrained", lambda *args, **how: model)
        status = main(["chat", str(folder), "--max-gen-len", "3", *options])
        monkeypatch.setattr(MetaModel, "stream", stream)
        return status, capsys.readouterr().out, prompts

    return run


def test_chat_remembers_earlier_turns_until_the_input_ends(chat):
    status, out, prompts = chat("Hello", "", "And now?")
    assert status == 0
    assert out.startswith("Template default.")
    assert len(prompts) == 2
    assert prompts[0].endswith("### Human: Hello\n### Assistant:")
    assert prompts[1].startswith(prompts[0])
    assert prompts[1].endswith("\n### Human: And now?\n### Assistant:")
    answer = prompts[1].removeprefix(prompts[0]).partition("\n###")[0].strip()
    assert answer
    assert answer in out


def test_undo_takes_a_round_back_and_clear_all_of_them(chat):
    status, out, prompts = chat(
        "One", "Two", "/undo", "Three", "/clear", "Four", "/undo", "/undo", "Five", "/quit", "Six"
    )
    assert status == 0
    assert len(prompts) == 5
    assert out.count("(forgotten)") == 4
    assert [("One" in p, "Two" in p) for p in prompts[:3]] == [(True, False), (True, True), (True, False)]
    assert all("One" not in p for p in prompts[3:])
    assert "Four" not in prompts[4]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("mistral", "[INST] Be brief.\n\nHi [/INST]"),
        ("none", "Be brief.\nHi"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("alpaca", "Be brief.\n\n### Instruction:\nHi\n\n### Response:"),
    ],
)
def test_chat_takes_a_template_and_a_system_message(chat, template, prompt):
    status, _, prompts = chat("Hi", "/clear", "Hi", options=("--template", template, "--system", "Be brief."))
    assert (status, prompts) == (0, [prompt, prompt])


def test_ctrl_c_stops_an_answer_and_forgets_its_round(chat, monkeypatch):
    original = TextModel._read
    calls = iter(range(10))

    def interrupted(self, *args):
        first = next(calls) == 0
        for item in original(self, *args):
            yield item
            if first:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TextModel, "_read", interrupted)
    status, out, prompts = chat("One", "Two")
    assert status == 0
    assert "(stopped; the round is forgotten)" in out
    assert len(prompts) == 2
    assert "One" not in prompts[1]


def test_an_error_in_an_answer_forgets_its_round_and_the_chat_goes_on(chat, monkeypatch):
    original = TextModel._read
    calls = iter(range(10))

    def broken(self, *args):
        yield from original(self, *args)
        if next(calls) == 0:
            raise NonFiniteError("prompts[0]: the logits are not finite")

    monkeypatch.setattr(TextModel, "_read", broken)
    status, out, prompts = chat("One", "Two")
    assert status == 0
    assert "(prompts[0]: the logits are not finite; the round is forgotten)" in out
    assert len(prompts) == 2
    assert "One" not in prompts[1]


def test_ctrl_c_between_answers_ends_the_program(chat, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert chat()[0] == 130


def test_chat_in_a_pipe(folder):
    done = program("chat", str(folder), "--max-gen-len", "2", "--template", "mistral", input="Hello\n/undo\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "Template mistral." in done.stdout
    assert "(forgotten)" in done.stdout
    assert "Traceback" not in done.stderr

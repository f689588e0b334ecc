"""The options of a model, as the command line and the demos both read them."""

from __future__ import annotations

import argparse
import inspect

import pytest
import torch

from accessory.data.transform import TRANSFORMS
from accessory.errors import InputError
from accessory.formats import Quant
from accessory.model.meta import MetaModel
from accessory.model.options import (
    DTYPES,
    IMAGE_TRANSFORMS,
    QUANT,
    add_image_transform,
    add_model_options,
    loading_arguments,
    torch_dtype,
)

GIVEN = "--llama_type mixtral --llama-config c d --tokenizer_path t --max_seq_len 9 --dtype fp16 --quant int8 "
GIVEN = [*GIVEN.split(), "--cache-dtype", "fp8", "--cache_gb", "1.5", "--deterministic"]
EXPECTED = {
    "pretrained_path": ["a", "b"], "llama_type": "mixtral", "llama_config": ["c", "d"], "tokenizer_path": "t",
    "max_seq_len": 9, "dtype": torch.float16, "quant": "int8", "quant_attention": None, "quant_output": None,
    "cache_dtype": "fp8", "cache_gb": 1.5, "deterministic": True, "progress": True,
}  # fmt: skip


def parsed(words, demo):
    parser = argparse.ArgumentParser()
    add_model_options(parser, demo=demo)
    add_image_transform(parser)
    return parser.parse_args(["--pretrained_path", "a", "b", *words] if demo else ["a", "b", *words])


def test_commands_and_demos_load_alike():
    assert loading_arguments(parsed(GIVEN, demo=True), with_visual=False) == EXPECTED
    assert loading_arguments(parsed(GIVEN, demo=False), with_visual=False) == EXPECTED | {"device": None}


@pytest.mark.parametrize("demo", [True, False])
def test_every_argument_is_one_of_from_pretraineds_and_a_default_is_its_default(demo):
    signature = inspect.signature(MetaModel.from_pretrained).parameters
    arguments = loading_arguments(parsed([], demo), with_visual=True)
    assert set(arguments) <= set(signature)
    ours = {"pretrained_path", "progress", "with_visual"}
    assert {n: v for n, v in arguments.items() if n not in ours} == {
        n: signature[n].default for n in arguments if n not in ours
    }


def test_a_format_that_stands_alone_is_for_demos():
    assert loading_arguments(parsed(["--quant"], demo=True), with_visual=False)["quant"] is True
    with pytest.raises(SystemExit):
        parsed(["--quant"], demo=False)


@pytest.mark.parametrize("option", ["--quant", "--quant-attention", "--quant_output"])
def test_a_wrong_format_is_refused_by_the_parser_of_a_command_and_by_a_demos_model(option, capsys):
    with pytest.raises(SystemExit):
        parsed([option, "int3"], demo=False)
    assert "int3" in capsys.readouterr().err
    arguments = loading_arguments(parsed([option, "int3"], demo=True), with_visual=False)
    assert arguments[option.strip("-").replace("-", "_")] == "int3"


def test_the_names_are_those_that_the_code_behind_them_knows():
    assert set(QUANT) == {"nf4", "nf4-dq", "int4", "int8", "fp8", "none"}
    assert all(Quant.parse(name) is not None for name in QUANT if name != "none")
    assert set(IMAGE_TRANSFORMS) < set(TRANSFORMS)
    assert [torch_dtype(name) for name in DTYPES] == 2 * [torch.bfloat16, torch.float16, torch.float32]
    assert torch_dtype(None) is None


@pytest.mark.parametrize("size", ["nan", "-1", "0", "inf", "x", ""])
def test_a_cache_of_no_size_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        parsed([f"--cache-gb={size}"], demo=False)
    assert f"got {size!r}, but it must be a number of GB above 0, or free" in capsys.readouterr().err
    assert parsed(["--cache-gb", "free"], demo=False).cache_gb == "free"


@pytest.mark.parametrize("port", ["70000", "-1", "x"])
def test_a_port_that_is_none_is_refused(port, capsys):
    with pytest.raises(SystemExit):
        parsed([f"--master-port={port}"], demo=False)
    assert f"got {port!r}, but a port lies in 0 … 65535" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="--device: got 'tpu'"):
        loading_arguments(parsed(["--device", "tpu"], demo=False), with_visual=False)

"""`accessory completion`: bash itself completes commands, options, values and paths with the script."""

import shutil
import subprocess
import sys
import time

import pytest

from accessory.cli import main

# Asks bash's completion function about a line, as a press of the tab key does, and prints what it offers.
ASK = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
function=$(complete -p accessory | sed -n 's/.* -F \\([^ ]*\\).*/\\1/p')
COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
"$function" accessory "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    pytest.importorskip("shtab")
    path = tmp_path_factory.mktemp("completion") / "accessory"
    command = [sys.executable, "-m", "accessory", "completion", "bash"]
    path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return path


@pytest.fixture
def offered(script):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not here")

    def ask(*words):
        done = subprocess.run([bash, "-c", ASK, "-", script, *words], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return ask


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("accessory fin", ["finetune"]),
        ("accessory c", ["chat", "convert", "completion"]),
        ("accessory data ch", ["check"]),
        ("accessory generate --max-s", ["--max-seq-len"]),
        ("accessory generate --max_", []),
        ("accessory generate model --top-", ["--top-p", "--top-k"]),
        ("accessory verify --js", ["--json"]),
        ("accessory convert --to to", ["torrent"]),
        ("accessory completion z", ["zsh"]),
    ],
)
def test_bash_completes(offered, line, words):
    assert offered(*line.split()) == words


def test_bash_completes_paths(offered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "more.json").write_text("")
    assert sorted(offered("accessory", "info", "mo")) == ["model", "more.json"]
    assert sorted(offered("accessory", "generate", "x", "--llama-config", "mo")) == ["model", "more.json"]
    assert offered("accessory", "report", "mo") == ["model"], "a run is a folder"


def test_bash_completes_at_once(offered):
    def seconds():
        begin = time.perf_counter()
        offered("accessory", "fin")
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.1


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_scripts_of_their_own(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert {"zsh": "#compdef accessory", "tcsh": "complete accessory"}[shell] in out
    assert "max-seq-len" in out


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("accessory: error: completion: needs shtab: pip install 'mixtral-accessory[completion]'\n")


def test_an_unknown_shell_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", "fisch"])
    assert end.value.code == 2
    assert "got 'fisch'" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1

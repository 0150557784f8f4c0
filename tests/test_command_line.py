"""Whatever goes wrong in a command is one line on stderr and one of four exit statuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lipguide import commands
from lipguide.__main__ import main
from lipguide.deadline import OutOfTime

COMMANDS = {  # how each is called, and the function that it runs
    "build": ("", commands.build_book),
    "data svhn": ("--root there", commands.download_svhn),
    "data synthetic": ("", commands.write_synthetic),
    "data compare": ("--svhn there", commands.compare_data),
    "train": ("classification-vgg", commands.train),
    "study": ("", commands.run_study),
    "certify": ("", commands.certify),
    "why": ("", commands.find_why),
    "compare": ("", commands.compare_bricks),
    "losses": ("", commands.sweep_losses),
}


def fails_with(error):
    def command(options):
        raise error

    return command


@pytest.fixture(params=COMMANDS)
def command(request, monkeypatch):
    """A command that fails with an error: its name, and a function that runs it."""

    def run(error):
        options, function = COMMANDS[request.param]
        monkeypatch.setattr(commands, function.__name__, fails_with(error))
        return main([*request.param.split(), *options.split()])

    return request.param, run


@pytest.mark.parametrize(
    "error, status, says",
    [
        (ValueError("no such thing"), 1, "no such thing"),
        (RuntimeError("Error(s) in loading state_dict:\n\tMissing key(s)"), 1, "state_dict: Missing key(s)"),
        (FloatingPointError("step 3: the loss is nan"), 1, "step 3"),
        (ZeroDivisionError(), 1, "ZeroDivisionError"),
        (FileNotFoundError(2, "No such file", "x.mat"), 1, "x.mat"),
        (ModuleNotFoundError("No module named 'papermill'"), 1, "papermill"),
        (commands.WrongCall("unknown chapter 'x'"), 2, "unknown chapter 'x'"),
        (KeyboardInterrupt(), 130, "the same command goes on from there"),
        (OutOfTime("two are left"), 75, "not finished: two are left; the same command goes on from there"),
    ],
)
def test_every_command_says_what_went_wrong_in_one_line(command, capsys, error, status, says):
    name, run = command
    assert run(error) == status
    line = capsys.readouterr().err
    assert line.startswith(f"python -m lipguide {name}: ") and says in line and line.count("\n") == 1


def test_a_mistake_of_the_package_keeps_its_traceback(command):
    """An error that no reader can mend should be seen whole."""
    with pytest.raises(AttributeError):
        command[1](AttributeError("x"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bake"],
        ["build", "--profil", "full"],
        ["build", "--dev", "cpu"],
        ["build", "--device", "tpu"],
        ["train"],
        ["train", "classification-vgg", "--step", "3"],
        ["train", "classification-vgg", "--steps", "many"],
        ["data"],
        ["data", "svhn"],
        ["data", "synthetic", "--split", "extra"],
        ["study", "--fold", "x"],
        ["study", "--minutes", "0"],
        ["build", "--minutes", "soon"],
        ["train", "classification-vgg", "--minutes", "inf"],
    ],
)
def test_a_wrong_call_is_one_line_and_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--plan", "huge"], ["--only", "naive", "big"]])
def test_the_study_names_what_there_is(arguments, capsys):
    assert main(["study", "--device", "cpu", *arguments]) == 2
    assert "valid: " in capsys.readouterr().err


def test_the_parser_waits_for_no_tool():
    """`--help` needs neither torch nor the tools of the book."""
    code = "import sys, lipguide.__main__ as m; m._parser(); print(*(x for x in sys.modules if '.' not in x))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "papermill", "jupytext"} & set(done.stdout.split())


def test_a_stop_by_the_system_ends_like_ctrl_c(tmp_path):
    code = """
import sys, time
from lipguide import commands
from lipguide.__main__ import main
def slow(options):
    print("began", flush=True)
    time.sleep(60)
commands.build_book = slow
sys.exit(main(["build"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, **streams)
    assert process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("python -m lipguide build: interrupted")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handler goes with the command"

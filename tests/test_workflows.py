"""What runs on machines of others, in workflows and in the container, is what the Makefile offers."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from lipguide.__main__ import _parser
from lipguide.book.build import Book
from lipguide.tasks import FULL

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands() -> list[tuple[str, str, dict[str, str]]]:
    """Where a command stands, the command, and the variables that are set for it."""
    found = []
    for path in WORKFLOWS:
        for job in jobs(path).values():
            runs = [step["run"] for step in job["steps"] if "run" in step]
            found += [(path.name, line, job.get("env", {})) for run in runs for line in run.splitlines()]
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    found += [("Dockerfile", line, {}) for line in re.findall(r"^RUN (make .*)$", docker, re.M)]
    found += [
        ("Dockerfile", " ".join(yaml.safe_load(line)), {}) for line in re.findall(r"^CMD (\[.*\])$", docker, re.M)
    ]
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    return found + [(".ci/run", line, {}) for line in re.findall(r"^make .*$", local, re.M)]


COMMANDS = [pytest.param(command, env, id=f"{where}: {command}") for where, command, env in commands()]


@pytest.mark.parametrize("command, env", COMMANDS)
def test_each_command_is_one_of_the_makefile_and_lipguide_understands_it(command, env):
    program, target, *settings = shlex.split(command)
    assert program == "make" and target in re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M).group(1).split()
    for name in [setting.split("=")[0] for setting in settings] + list(env):
        assert re.search(rf"^{name} \?=", MAKEFILE, re.M), f"the Makefile has no {name}"
    # A value that GitHub puts in is a number, as the only one is that there is today.
    environment = os.environ | {name: re.sub(r"\$\{\{.*\}\}", "340", value) for name, value in env.items()}
    shown = subprocess.run(
        ["make", "-n", target, *settings], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    for call in re.findall(r"python -m lipguide (.*)$", shown, re.M):
        options = _parser().parse_args(shlex.split(call))
        assert options.minutes == (340 if "MINUTES" in env else None)
        assert (options.profile, options.device) == (
            ("full", "cuda") if "PROFILE=full" in settings else ("quick", "cpu")
        )


def test_there_are_commands_to_look_at():
    places = {param.id.split(":")[0] for param in COMMANDS}
    assert places == {"book.yml", "full.yml", "Dockerfile", ".ci/run"}


def test_what_is_kept_lies_where_the_build_writes_it():
    book = Book(ROOT)
    written = [book.notebooks, book.failed, book.out / "logs", book.html]
    written = {str(path.relative_to(ROOT)) for path in written} | {
        str(FULL),
        "book/results",
        "book/results/*.full.json",
    }
    steps = [step for path in WORKFLOWS for job in jobs(path).values() for step in job["steps"]]
    kept = {line for step in steps for line in step.get("with", {}).get("path", "").splitlines()}
    assert kept == written


def test_every_action_has_a_version():
    steps = [step for path in WORKFLOWS for job in jobs(path).values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_what_a_machine_makes_anew_does_not_travel_into_the_container():
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", "_build", "study", "data"} <= set(left_out)

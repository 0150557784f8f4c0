"""Python processes that need not import large libraries anew.

Code runs here as `python -W error -c` runs it, or with another filter: in a process and a folder of its own,
in an empty namespace, with its own standard output and errors. What libraries say to each other about names that will
go is no error, what they say to the code or to lipguide is. The process is the child of one that has imported some
modules and nothing else: no module of lipguide and no name of any module. So what the code does not import itself it
does not have. What goes unnoticed: code that names a part of these modules in full without having imported it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import types
import warnings
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["Forked"]

ROOT = Path(__file__).parents[1]


class Forked:
    """The process whose children run code; it has imported the modules."""

    def __init__(self, *modules: str, on_warning: str = "error") -> None:
        command = [sys.executable, "-W", on_warning, "-m", "tests.forked", *modules]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """How code has ended in a folder, and what it has written."""
        return self._run(code, folder, True, {}, arguments=arguments)[0]

    def ranks(self, code: str, folder: Path, ranks: int = 2) -> list[subprocess.CompletedProcess[str]]:
        """The same for several processes side by side, told of each other as `torchrun` does it.

        Tests are there to be imported, and a warning is no error.
        """
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        shared["LOCAL_WORLD_SIZE"] = str(ranks)
        own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return self._run(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", folder, False, *own)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _run(
        self, code: str, folder: Path, strict: bool, *environments: dict[str, str], arguments: tuple[str, ...] = ()
    ) -> list[subprocess.CompletedProcess[str]]:
        with TemporaryDirectory() as written:
            files = [[f"{written}/{name}.{rank}" for name in ("out", "err")] for rank in range(len(environments))]
            common = {"code": code, "folder": str(folder), "strict": strict, "arguments": arguments}
            tasks = [
                common | {"environment": os.environ | environment, "files": pair}
                for environment, pair in zip(environments, files, strict=True)
            ]
            self._process.stdin.write(json.dumps(tasks) + "\n")
            self._process.stdin.flush()
            ended = self._process.stdout.readline()
            assert ended, "the process that has imported the modules has ended"
            return [
                subprocess.CompletedProcess(code, status, *(Path(file).read_text() for file in pair))
                for status, pair in zip(json.loads(ended), files, strict=True)
            ]


def served() -> str:
    """In a child: the code that it shall run. The process that has imported the modules never returns."""
    for request in sys.stdin:
        children = []
        for task in json.loads(request):
            children.append(os.fork())
            if not children[-1]:
                return entered(**task)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(ended), flush=True)
    sys.exit()


def entered(
    code: str, folder: str, strict: bool, arguments: list[str], environment: dict[str, str], files: list[str]
) -> str:
    """The code, after the process has been made what `python -c` would start."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    if not strict:
        warnings.resetwarnings()
    sys.argv[:] = ["-c", *arguments]
    sys.path[0] = ""
    del sys.modules["tests"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    return code


if __name__ == "__main__":
    if "error" in sys.warnoptions:
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", category=DeprecationWarning, module=r"(lipguide|__main__)\b")
    for module in sys.argv[1:]:
        importlib.import_module(module)
    # By torch's own, each child would take all operators apart at its end.
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    gc.freeze()  # the children share what is there
    code = served()
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to take all of torch apart first is a second for nothing, and torch 2.15 complains meanwhile

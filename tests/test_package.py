"""The wheel and what it carries; the console program, its help and its exit codes."""

import ast
import errno
import importlib
import pathlib
import re
import signal
import subprocess
import sys
import tomllib
import zipfile

import pytest

import tokgen
from tokgen import cli, interfaces, runtime

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def program(*words: str) -> subprocess.CompletedProcess:
    """`tokgen WORDS` in a process of its own."""
    command = [sys.executable, "-m", "tokgen.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def requirement_name(line: str) -> str:
    """The normalized name of a requirement: `jax[cuda12]>=1` is `jax`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", line)[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel as built from this tree, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("tokgen-*-py3-none-any.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def files(folder: str) -> set[str]:
    """The Python files below a folder of the repository, by their paths from its root."""
    return {str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*.py")}


def test_wheel_carries_package_configs_and_training_programs(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    outside = files("configs") | {"train_tokenizer.py", "train_generator.py"}
    expected = files("tokgen") | {f"tokgen/programs/{name}" for name in outside}
    assert {name for name in names if name.endswith(".py")} == expected
    assert all(name.startswith("tokgen/") for name in names)
    assert "tokgen/py.typed" in names  # so that type checkers believe its annotations
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_carries_the_texts_of_this_tree(wheel):
    for name in ("train_tokenizer.py", "train_generator.py", *sorted(files("configs"))):
        assert wheel.read(f"tokgen/programs/{name}") == (ROOT / name).read_bytes()
    (licence,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert b"Apache License" in wheel.read(licence)


def test_wheel_metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    lines = wheel.read(name).decode().split("\n\n")[0].splitlines()
    assert "Name: tokgen" in lines
    assert "Requires-Python: >=3.11" in lines
    assert "License-Expression: Apache-2.0" in lines
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra")}
    assert extras == {"cuda12", "cuda13", "tpu", "fastdata", "gcs", "app"}
    required = [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist")]
    core = {requirement_name(line) for line in required if "extra ==" not in line}
    assert {"jax", "flax", "optax", "matplotlib", "tensorboardx", "huggingface-hub"} <= core
    assert not core & {"torch", "tensorflow", "keras"}
    (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert b"tokgen = tokgen.cli:main" in wheel.read(points)


def test_every_core_dependency_and_test_tool_has_its_tested_version():
    """For Python 3.11 and for later ones; names, versions and markers, no places."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pattern = r'[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*( ; python_version (<|>=) "3\.12")?'
    stated = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in stated if not re.fullmatch(pattern, line)] == []
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    needed = {
        requirement_name(line)
        for line in [*PROJECT["dependencies"], *sum(groups.values(), []), "pip"]
    }
    for other in ('python_version < "3.12"', 'python_version >= "3.12"'):
        pinned = [requirement_name(line) for line in stated if not line.endswith(other)]
        assert len(pinned) == len(set(pinned))
        assert needed <= set(pinned)


def test_extras_of_the_error_message_exist():
    for package, extra in runtime.EXTRAS.items():
        assert requirement_name(package) in map(
            requirement_name, PROJECT["optional-dependencies"][extra]
        )


def test_commands_are_the_files_of_the_folder():
    folder = ROOT / "tokgen" / "commands"
    assert {cli.file(name) for name in cli.COMMANDS} == {
        file.stem for file in folder.glob("*.py")
    } - {"__init__"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_has_its_three_parts(name):
    file = ROOT / "tokgen" / "commands" / f"{cli.file(name)}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = {
        node.name: len(node.args.args) for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    assert ast.get_docstring(tree)
    assert functions.get("arguments") == 1
    assert functions.get("run") == 1


def test_help_names_every_command():
    done = program("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, line in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", done.stdout, re.MULTILINE)


def test_help_and_version_import_no_jax():
    code = (
        "import sys; from tokgen import cli\n"
        "assert cli.main(['--version']) == 0\n"
        "assert cli.main(['smaple']) == 2\n"
        "sys.exit(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_help_text_waits_for_a_network_or_a_picture():
    """`import tokgen` and the help of every command, in one process: none is imported by them."""
    code = (
        "import contextlib, io, sys, tokgen; from tokgen import cli\n"
        "heavy = {'jax', 'flax', 'orbax', 'optax', 'grain', 'tensorflow_datasets', 'matplotlib'}\n"
        "heavy |= {'numpy', 'scipy', 'PIL', 'ml_collections', 'tqdm', 'yaml', 'huggingface_hub'}\n"
        "for name in ('', *cli.COMMANDS):\n"
        "    quiet = contextlib.redirect_stdout(io.StringIO())\n"
        "    with quiet as said, contextlib.suppress(SystemExit):\n"
        "        cli.main([name, '--help'] if name else ['--help'])\n"
        "    assert 'usage: tokgen' in said.getvalue(), name\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_user_calls_is_named_once_for_python_and_once_for_type_checkers():
    file = ROOT / "tokgen" / "__init__.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        for alias in node.names
    }
    assert typed == tokgen._HOMES and sorted(tokgen.__all__) == sorted(typed)
    assert set(typed) <= set(dir(tokgen))
    for name, (module, attribute) in typed.items():
        found = getattr(tokgen, name)
        assert found is getattr(importlib.import_module(module), attribute) and found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        tokgen.smaple  # noqa: B018


def test_version_names_what_figures_depend_on():
    done = program("--version")
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["tokgen", "python", *cli.REPORTED]
    import jax

    assert f"jax {jax.__version__}" in done.stdout.splitlines()


def test_no_arguments_print_the_help():
    done = program()
    assert done.returncode == 2
    assert done.stdout == ""
    assert "commands:" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["smaple", "runs/x"],
            "tokgen: error: the command must be one of demo, data, pretokenize, sample, ",
        ),
        (["xyzzy"], "tokgen: error: the command must be one of demo, data"),
        (["--verison"], "tokgen: error: unrecognized arguments: --verison"),
    ],
)
def test_unknown_word_ends_with_exit_code_2(words, said):
    done = program(*words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr


def raising(error: BaseException):
    """A function that raises."""

    def run():
        raise error

    return run


def test_user_error_is_one_message(capsys):
    assert runtime.call("tokgen x", raising(interfaces.UserError("need a, found b; use c"))) == 2
    assert capsys.readouterr().err == "tokgen x: error: need a, found b; use c\n"


def test_missing_extra_is_one_line_with_the_install_command(capsys):
    error = ModuleNotFoundError("No module named 'simplejpeg'", name="simplejpeg")
    assert runtime.call("tokgen x", raising(error)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert 'pip install "tokgen[fastdata]"' in message


def test_interrupt_ends_with_exit_code_130(capsys):
    assert runtime.call("tokgen x", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "tokgen x: interrupted\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ModuleNotFoundError("no tokgen.nothing", name="tokgen.nothing")]
)
def test_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        runtime.call("tokgen x", raising(error))
    assert caught.value is error


ENDS = {
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device", "/data/a"),
        "/data/a: no space",
    ),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
    "a read-only disk": (
        PermissionError(errno.EROFS, "Read-only file system", "/a"),
        "/a: read-only",
    ),
    "open files": (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    "no memory": (MemoryError("Unable to allocate 8 GiB"), "Unable to allocate 8 GiB"),
    "no memory, unsaid": (MemoryError(), "more memory than there is"),
    "a device's memory": (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
        "smaller --batch",
    ),
    "a store's disk": (
        RuntimeError("RESOURCE_EXHAUSTED: a: No space left on device"),
        "disk is full",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_the_machine_lacks_is_one_message(end, capsys):
    error, words = ENDS[end]

    def run():
        raise error

    assert runtime.call("tokgen sample", run, lambda: cli._fewer("sample")) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("tokgen sample: error: ")
    if "memory" in end:
        assert "--batch" in said
        assert runtime.call("train_tokenizer.py", run) == 2
        assert "--config.batch_size" in capsys.readouterr().err
        assert (
            runtime.call("tokgen matrix", run, lambda: cli._fewer("matrix")) == 2
        )  # which has no such option
        assert "--batch" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "none"),
        RuntimeError("INTERNAL: ours"),
        RecursionError("deep"),
    ],
)
def test_errors_of_ours_keep_their_traceback(error):
    def run():
        raise error

    with pytest.raises(type(error)):
        runtime.call("tokgen sample", run)


def test_a_reader_that_goes_away_ends_a_command_quietly():
    script = (
        "import sys; from tokgen import runtime; "
        "sys.exit(runtime.call('tokgen matrix', lambda: [print('x' * 9999) for _ in range(99)]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGPIPE and said == b""

"""The house itself: which room may import which, what no module may do, and what the wheel holds."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("stepjax", "sharding", "infer", "train")  # a room imports itself and rooms before it
LAZY = {"stepjax/__init__.py", "stepjax/cli.py"}  # these name later rooms, but load them only on use

UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "yaml.load", "yaml.unsafe_load"}
MACHINE = re.compile(r"(?<![\w.~}$])/(?:root|home|Users|opt|work)/\w|pypi\.org|files\.pythonhosted|index[-]url")


def tracked() -> list[Path]:
    """Files and links of the repository, without what git ignores."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        return sorted(ROOT / name for name in names if name)
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        ignored = {".git", ".venv", "__pycache__", "build", "dist"}
        return sorted(path for path in ROOT.rglob("*") if not ignored & set(path.relative_to(ROOT).parts))


LINKS = [path for path in tracked() if path.is_symlink()]
FILES = [path for path in tracked() if path.is_file() and path == path.resolve()]  # none through a link
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in FILES if path.suffix == ".py"}
PACKAGE = [name for name in SOURCES if name.split("/")[0] in ROOMS]


def module_name(name: str) -> str:
    """The name a package file is imported by: infer/sampling/sampler.py is stepjax.infer.sampling.sampler."""
    parts = Path(name).with_suffix("").parts
    return ".".join((*(() if parts[0] == "stepjax" else ("stepjax",)), *parts)).removesuffix(".__init__")


def parse(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"), filename=name)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, also inside functions: "from a import b" as a.b, a relative one as .b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from (f"{source}.{alias.name}" for alias in node.names)


def quoted_modules(tree: ast.AST) -> Iterator[str]:
    """Strings that name a module of ours, as import_module takes them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"stepjax(\.\w+)+(:\w+)?", str(node.value)):
            yield str(node.value).partition(":")[0]


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else parts[0]


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute, "" of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("name", [name for name in PACKAGE if name not in LAZY])
def test_nothing_imports_to_its_right(name):
    tree = parse(name)
    own = ROOMS.index(room_of(module_name(name)))
    ours = [module for module in (*imports(tree), *quoted_modules(tree)) if module.split(".")[0] == "stepjax"]
    assert [module for module in ours if ROOMS.index(room_of(module)) > own] == []


def test_lazy_files_load_no_room():
    """The command's table and the public names know later rooms as strings, or for type checkers only."""
    for name in LAZY & set(PACKAGE):
        tree = parse(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING":
                node.body = []
        assert [module for module in imports(tree) if room_of(module) in ROOMS[1:]] == [], name


@pytest.mark.parametrize("name", SOURCES)
def test_imports_are_absolute_and_name_the_package(name):
    """A plain `train` would be whatever train.py lies in the user's folder."""
    assert [
        module for module in imports(parse(name)) if module.startswith(".") or module.split(".")[0] in ROOMS[1:]
    ] == []


@pytest.mark.parametrize("name", PACKAGE)
def test_no_file_or_string_becomes_code(name):
    tree = parse(name)
    assert {module.split(".")[0] for module in imports(tree)} & UNSAFE_MODULES == set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = dotted(call.func)
        assert called not in UNSAFE_CALLS, f"{name}:{call.lineno} calls {called}"
        if called in {"np.load", "numpy.load", "jnp.load"}:
            # Third argument or keyword; only a literal False is refused by numpy itself when the file holds objects.
            allow = [
                *call.args[2:3],
                *(keyword.value for keyword in call.keywords if keyword.arg in {"allow_pickle", None}),
            ]
            safe = all(isinstance(value, ast.Constant) and value.value is False for value in allow)
            assert safe, f"{name}:{call.lineno} may unpickle"


@pytest.mark.parametrize("name", SOURCES)
def test_files_stay_readable(name):
    lines = len(SOURCES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{name} has {lines} lines: look for its seam"


def test_folders_stay_readable():
    """Without `__init__`, which holds a sentence."""
    sizes = Counter(Path(name).parent.as_posix() for name in PACKAGE if Path(name).name != "__init__.py")
    assert {folder: size for folder, size in sizes.items() if size > 20} == {}


def test_a_public_class_name_stands_for_one_thing():
    homes = defaultdict(list)
    for name in PACKAGE:
        for node in parse(name).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def file_imports() -> dict[str, set[str]]:
    """For each file of the package, the files that it imports, also for type checkers only and inside functions."""
    files = {module_name(name): name for name in PACKAGE}
    graph: dict[str, set[str]] = {}
    for name in PACKAGE:
        modules = set()
        for module in imports(parse(name)):
            parent = module.rpartition(".")[0]
            modules |= {module} if module in files else {parent} & files.keys()
        graph[name] = {files[module] for module in modules if not files[module].endswith("__init__.py")} - {name}
    return graph


def test_no_circle_of_imports():
    graph = file_imports()
    for name in LAZY:  # the public names and the table of verbs are above all rooms
        graph.pop(name, None)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        weakest = min(pairwise(circle), key=lambda edge: len(graph[edge[0]]))
        pytest.fail(
            f"these files import each other: {' → '.join(circle)}; move what {weakest[0]} takes from {weakest[1]} "
            "into a file below both"
        )


ORDER = re.compile(r"^## Order of imports$.*?^```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def order_of(room: str) -> list[list[str]]:
    """The lines of the room's order, lowest first: each names folders and files of the room."""
    block = ORDER.search((ROOT / room / "README.md").read_text(encoding="utf-8"))
    assert block, f"{room}/README.md has no section 'Order of imports' with a ```text block"
    return [line.split() for line in block[1].splitlines()]


def part_of(name: str) -> str:
    """The folder or file inside a room that a file belongs to: infer/serve/app.py is `serve`, infer/load.py `load`."""
    return Path(name).parts[1].removesuffix(".py")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_its_order(room):
    """A folder or file imports what stands on lines above its own in the README of the room."""
    level = {part: index for index, line in enumerate(order_of(room)) for part in line}
    here = [name for name in PACKAGE if Path(name).parts[0] == room and Path(name).parts[1] != "__init__.py"]
    assert {part_of(name) for name in here} == set(level), "the order names other parts than the room has"
    for name, targets in file_imports().items():
        if name not in here or name in LAZY:
            continue
        for target in targets & set(here):
            same, below = part_of(name) == part_of(target), level[part_of(target)] < level[part_of(name)]
            assert same or below, (
                f"{name} imports {target}, which is not below it in {room}/README.md: move one of them"
            )


def requirement_name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return found[0].lower().replace("-", "_")


def test_dependencies_are_few_and_all_that_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {requirement_name(requirement) for requirement in project["dependencies"]}
    assert len(declared) <= 16
    importable = {"orbax" if name == "orbax_checkpoint" else name for name in declared}
    importable.add("ml_dtypes")  # whose dtypes are jax's own: jax requires it
    extras = project["optional-dependencies"]
    asked_for = {"tensorboardX"} | {
        requirement_name(each)
        for name in ("plots", "tensorboard", "wandb", "grain", "parquet", "hub", "zstd")
        for each in extras[name]
    }
    for name in PACKAGE:
        tree = parse(name)
        used = {module.split(".")[0] for module in imports(tree)} - sys.stdlib_module_names - {"stepjax"}
        assert used - importable <= asked_for, f"{name} imports what pyproject.toml does not declare"
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        at_once = {module.split(".")[0] for module in imports(tree)}
        assert at_once & asked_for == set(), f"{name} needs an extra as soon as it is imported"


def test_types_of_every_room_are_checked():
    """pyright follows no link in stepjax/ by itself, so a room that is not listed is not read."""
    included = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]["include"]
    assert {"stepjax", *(f"stepjax/{room}" for room in ROOMS[1:]), "tests", "benchmarks"} == set(included)


def test_text_names_no_machine_and_no_registry():
    for path in FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = MACHINE.search(text)
        assert not found, f"{path.relative_to(ROOT)} holds {found[0]!r}"


def test_import_loads_nothing_else():
    """Beside the standard library, so that `stepjax --help` is quick and settings of jax can still be made."""
    script = "import sys; old = {*sys.modules}; import stepjax; dir(stepjax); print(*{*sys.modules} - old)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert {name for name in loaded.split() if name.split(".")[0] not in sys.stdlib_module_names} == {
        "stepjax",
        "stepjax._version",
    }


def test_help_of_every_command_appears_without_jax():
    """It takes a second to import, and more for other libraries of arrays and servers."""
    script = """
import contextlib, io, sys
from stepjax.cli import VERBS, main

for verb in VERBS:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert "example:" in text.getvalue(), verb
    loaded = {"jax", "flax", "optax", "orbax", "fastapi", "pydantic", "transformers", "torch"} & {*sys.modules}
    assert not loaded, f"stepjax {verb} --help loads {loaded}"
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_public_names_have_a_home():
    import stepjax

    assert set(stepjax.__all__) == set(stepjax._HOME)
    for name in stepjax.__all__:
        assert getattr(stepjax, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = stepjax.nothing


def test_wheel_holds_every_module_once(tmp_path):
    tree = tmp_path / "tree"
    for path in (*FILES, *LINKS):
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy, follow_symlinks=False)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, check=True)

    (wheel,) = (tree / "dist").glob("*.whl")
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = [module_name(name) for name in PACKAGE]
    assert sorted(module_name(name) for name in held if name.endswith(".py")) == sorted(expected)
    assert len(held) == len(set(held))
    assert all(name.startswith("stepjax/") for name in held)

    assets = {path.relative_to(ROOT).as_posix() for path in FILES if ROOT / "stepjax/assets" in path.parents}
    assert {name for name in assets if not name.endswith(".py")} | {"stepjax/py.typed"} <= set(held)

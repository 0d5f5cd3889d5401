"""Promise: rooms import one way only, lazy imports included, and no files import each other in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("engine", "tokenizer", "generator", "eval", "tokenloom")  # each may import those before it


def files() -> Iterator[tuple[str, Path]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Our own modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        for target in found:
            if target in known and target != name:
                yield target


def arrows() -> dict[str, set[str]]:
    modules = dict(files())
    return {name: set(imported(name, path, set(modules))) for name, path in modules.items()}


def test_rooms_import_one_way_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in arrows().items()
        for target in targets
        if ROOMS.index(target.split(".")[0]) > ROOMS.index(name.split(".")[0])
    ]
    assert not wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: targets - set(ROOMS) for name, targets in arrows().items()}  # a room's __init__ holds no code
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_builtin_eval_is_never_shadowed() -> None:
    for name, path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "eval" or alias.asname for alias in node.names), name


def test_the_judges_mathematics_knows_nothing_of_what_it_judges() -> None:
    graph = arrows()
    for name in ("eval.distances", "eval.statistics", "eval.probe", "eval.reconstruction"):
        assert not {target for target in graph[name] if target.split(".")[0] in ("tokenizer", "generator")}, name


def test_configuration_files_import_no_torch() -> None:
    graph = arrows()
    for name, path in files():
        if name.endswith((".config", "_config", ".experiment", ".checks")) and name != "tokenloom.study_config":
            tops = {
                (alias.name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }
            assert not tops & {"torch", "numpy", "timm", "torchvision"}, name
            light = (".config", "_config", ".checks")
            assert all(target.endswith(light) or target == "engine" for target in graph[name]), name

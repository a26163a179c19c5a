"""How the files of the package hang together: imports point one way, those inside functions too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for path in sorted((ROOT / "narvid").rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports when it runs: not those under TYPE_CHECKING, nor those looked up by name."""
    found = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in FILES else node.module
                         for alias in node.names)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_no_file_of_the_package_imports_itself_by_way_of_others():
    graph = {name: (imported(path) & FILES.keys()) - {name} for name, path in FILES.items()}
    assert graph["narvid.model"] and graph["narvid.search.engine"]  # that anything is seen
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import circle: {' <- '.join(error.args[1])}")


def test_folders_import_one_way():
    rooms = {"data", "methods", "narration", "report", "run", "search", "towers"}
    graph = {room: set() for room in rooms}
    for name, path in FILES.items():
        room = name.split(".")[1] if "." in name else None
        if room in rooms:
            graph[room] |= {of.split(".")[1] for of in imported(path) if of.startswith("narvid.")} & (rooms - {room})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import circle of folders: {' <- '.join(error.args[1])}")


def test_nothing_in_the_package_imports_the_trainer_or_a_script():
    for path in FILES.values():
        above = {name.split(".")[0] for name in imported(path)} & {"main_task_retrieval", "scripts", "tests", "data"}
        assert not above, f"{path} imports {above}"

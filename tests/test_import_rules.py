"""Arrows between the package's parts point one way, and its files import one another in no circle."""

import ast
from functools import cache
from pathlib import Path

import timerome as tr

ROOT = Path(tr.__file__).parent
# A part may import from itself and from lines further down; parts on one line know nothing of one another.
LAYERS = (
    ("cli",),
    ("demo", "lightning", "integrations"),
    ("report",),
    ("evaluation",),
    ("memory", "tracing", "inspection"),
    ("splits",),
    ("datasets", "diffusion", "hooks"),
    ("backbones",),
    ("functional",),
    ("ops",),
)
# Without a model, a hook or an array: these may be imported from everywhere, and import one another alone.
PLAIN = {
    "_backend", "_files", "_json", "_text", "_version", "coordinates", "errors", "facts", "page", "progress",
}  # fmt: skip
LEVEL = {part: n for n, line in enumerate(LAYERS) for part in line}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def nodes(tree: ast.AST):
    """All nodes but those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (inner for part in node.orelse for inner in nodes(part))
        else:
            yield node
            yield from nodes(node)


@cache
def imports(name: str) -> frozenset[str]:
    """Files of the package that a file imports, at its top or inside a function."""
    file, found = FILES[name], set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            # "from .a import b" is of the file a.b where there is one.
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
    return frozenset(found & FILES.keys() - {name})


def circles() -> list[list[str]]:
    """Sets of files of which each reaches each other (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(imports(name)):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in FILES:
        if name not in order:
            visit(name)
    return found


def part_of(name: str) -> str:
    return (name.split(".") + [""])[1]


def test_every_part_has_its_place():
    parts = {part_of(name) for name in FILES} - {""}
    assert parts == LEVEL.keys() | PLAIN


def test_arrows_point_one_way():
    wrong = []
    for name in FILES:
        for other in imports(name):
            here, there = part_of(name), part_of(other)
            if here == there or there in PLAIN or (here == "" and name == "timerome"):
                continue
            if here in PLAIN or there == "" or LEVEL[there] <= LEVEL[here]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_circles():
    assert circles() == []


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("def f():\n    from . import b\n")
    (tmp_path / "c.py").write_text("from p.b import f\n")
    (tmp_path / "b.py").write_text("if TYPE_CHECKING:\n    import p.c\nfrom .a import f\n")
    monkeypatch.setattr("tests.test_import_rules.FILES", {f"p.{n}": tmp_path / f"{n}.py" for n in "abc"})
    imports.cache_clear()
    try:
        assert circles() == [["p.a", "p.b"]]
    finally:
        imports.cache_clear()

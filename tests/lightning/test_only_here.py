"""What needs Lightning is in one folder."""

import ast
from pathlib import Path

import timerome


def test_no_other_folder_imports_lightning() -> None:
    root, found = Path(timerome.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            if any(name.split(".")[0] in ("lightning", "pytorch_lightning") for name in names):
                found.add(path.relative_to(root).parts[0])
    assert found == {"lightning"}

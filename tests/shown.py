"""Code that docs/extending.md shows, for the tests that run it."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def shown(name: str) -> Any:
    """The class or function of this name in a block of Python on the page, or in a file that a command writes."""
    blocks = re.findall(
        r"^(?:```python|cat > \w+\.py <<'END')\n(.*?)^(?:```|END)$", _PAGE.read_text("utf-8"), re.S | re.M
    )
    (code,) = [block for block in blocks if re.search(rf"^(?:class|def) {name}\b", block, re.M)]
    module = types.ModuleType(f"shown_{name}")
    sys.modules[module.__name__] = module  # dataclasses and annotations look there
    exec(code, vars(module))
    return getattr(module, name)

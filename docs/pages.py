"""What all generated pages share: parts between two comments, and Markdown tables."""

import re
from collections.abc import Callable, Mapping
from typing import Any


def fill(text: str, parts: Mapping[str, Callable[..., str]], *measured: Any) -> str:
    """A page with its generated parts, between ``<!-- name -->`` and ``<!-- end -->``."""
    for name, part in parts.items():
        if f"<!-- {name} -->" not in text:
            continue
        new = part(*measured)
        pattern = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
        # Once: after an empty part the pattern would match again, up to the end of the next one.
        text = re.sub(pattern, lambda _, new=new: f"{new}\n", text, count=1, flags=re.DOTALL)
    return text


def table_row(*values: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(values)} |"


def table_rule(n_left: int, n_right: int) -> str:
    """The line below a table's titles: columns of words, then of numbers."""
    return "|" + "---|" * n_left + "---:|" * n_right

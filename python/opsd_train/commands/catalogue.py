"""What `opsd methods` shows."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from opsd_kernels import get_method
from opsd_kernels.methods import names
from opsd_kernels.methods.needs import columns
from opsd_kernels.methods.table import describe, state_of, target_of
from opsd_kernels.recipes import Term


def all_methods() -> Group:
    """Every method by its name: its paper, what it minimises, whether it runs, and its teacher."""
    shown: list[RenderableType] = []
    for key in sorted(names()):
        method = get_method(key)
        shown.append(Text(key, style="cyan").append(f"  {method.arxiv}", style="default"))
        shown.append(Padding(Text(method.note), (0, 0, 0, 4), expand=False))
        shown.append(Padding(Text(state_of(method)), (0, 0, 0, 4), expand=False))
        if method.teacher:
            shown.append(Padding(Text(f"teacher: {method.teacher}"), (0, 0, 0, 4), expand=False))
    return Group(*shown)


def one_method(key: str) -> Table:
    """What one method minimises, reads and can be told. ValueError for a name that is none."""
    method = get_method(key)
    recipe = method.recipe()
    shown = Table(title=f"{method.title} ({method.arxiv})", show_header=False, title_justify="left")
    options = [f"{name} = {default!r}" for name, default in method.options.items()]
    rows = {
        "minimises": [method.note],
        "terms": [_in_words(term) for term in recipe.terms],
        "teachers": list(recipe.roles),
        "columns of data": list(columns(recipe)),
        "options": options,
        "teacher": [method.teacher],
        "driver": list(method.driver),
        "opsd train": [state_of(method)],
        "published with": [method.published],
        "scope": [method.scope],
        "paper and code": [method.differs],
    }
    for name, lines in rows.items():
        if any(lines):
            shown.add_row(name, escape("\n".join(lines)))
    return shown


def _in_words(term: Term) -> str:
    target = target_of(term.teacher)
    return describe(term) + (f", to {target}" if target and isinstance(term.teacher, str) else "")

"""What `opsd methods` shows."""

from rich.markup import escape
from rich.table import Table

from opsd_kernels import get_method
from opsd_kernels.methods import names
from opsd_kernels.methods.needs import columns
from opsd_kernels.methods.table import describe, target_of
from opsd_kernels.recipes import Term


def all_methods() -> Table:
    """Every method in one line."""
    shown = Table("method", "minimises", "teacher", "paper")
    for key in names():
        method = get_method(key)
        shown.add_row(key, escape(method.note), escape(method.teacher), method.arxiv)
    return shown


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

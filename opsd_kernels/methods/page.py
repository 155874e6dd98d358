"""`docs/methods.md`: every method of the table, and what is out of scope."""

import sys

from opsd_kernels.methods.out_of_scope import OUT_OF_SCOPE
from opsd_kernels.methods.registry import MODULES, names
from opsd_kernels.methods.table import table
from opsd_kernels.tokens import DATA

HEAD = """# Methods

{count} methods, each a short entry in [`opsd_kernels/methods/`](../opsd_kernels/methods). This page is made
from the entries by `python -m opsd_kernels.methods`; a test keeps it true. A name is an objective of the
library and a method of the driver:

```python
opsd_kernels.loss(h_s, {{"privileged": t, "plain": p}}, W, objective="demopsd", token_ids=ids, data=known)
opsd_kernels.loss(h_s, h_t, W, objective=opsd_kernels.get_method("pw_opsd").recipe(least=0.5), mask=mask)
```

```sh
opsd train --method pw_opsd --method-options '{{"least": 0.5}}' --model ... --data ...
```

The test of an entry compares its loss and gradients with a definition written from the paper's formula, in
fp64. Empty cells are the plain case: the teacher itself, the whole vocabulary, no clip, the mean over all
tokens. Columns of `data=` that functions read are at the end.

`opsd train` refuses a method before the first step unless it has what makes the loss the method's. A method
"runs as published" or "runs with the columns it names", with what is named behind the colon; of one that is
"library only", the colon is followed by what the driver does not have.

"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD.format(count=len(names()))]
    for module in MODULES:
        heading = (sys.modules[f"opsd_kernels.methods.{module}"].__doc__ or "").split("\n")[0].rstrip(".")
        parts.append(f"## {heading}\n\n{table(module)}\n")
    parts.append("## Out of scope\n\nSystems of the same literature without a loss of text tokens:\n\n")
    parts += [f"- {name}: {reason}\n" for name, reason in OUT_OF_SCOPE]
    parts.append("\n## Columns of `data=`\n\n| name | one value per | meaning |\n|---|---|---|\n")
    per = {"token": "token", "sequence": "sequence", "teachers": "token and teacher"}
    parts += [f"| `{name}` | {per[kind]} | {meaning} |\n" for name, (kind, meaning) in DATA.items()]
    return "".join(parts)

"""One module per stage; each has `checks(setting)`, the list of its `Check`s."""

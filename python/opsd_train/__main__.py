"""`python -m opsd_train`, for launchers that start modules: the command `opsd`."""

from opsd_train.commands.main import main

if __name__ == "__main__":
    main()

"""The `shoal` command: one file per command, and what they share.

The only place that wires the parts together and reads the environment. `main.py` is the
entry, `app.py` registers the commands and turns errors into one line and an exit code.
A new command is a module with `register(app)`, named in `app.COMMANDS`.
"""

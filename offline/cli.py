"""The offline commands, as `headrace ...` and as `python -m offline ...`.

Invariant: nothing heavy is imported before the command that needs it runs; results go to stdout, progress to stderr;
known errors leave as core.errors types, for whoever runs `app` to say in one line.
"""

import typer

from offline import data_cli, store_cli, train_cli

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order of --help.
for commands in (data_cli, train_cli, store_cli):
    app.add_typer(commands.app)

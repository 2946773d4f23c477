"""The command `qjax`: `main` holds the table of its subcommands, one file each."""

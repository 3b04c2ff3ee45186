"""The sub-commands of `sterna`, one module each with `main(arguments) -> exit code`, imported when chosen."""

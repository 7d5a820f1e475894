"""The script `zerowake`: the command line (cli.py), once what it imports is known to be there."""

from zerowake_shared import program_end, server_extra


def main() -> None:
    """Runs `zerowake` with the arguments of this process."""
    with program_end.ends_at_once("zerowake"):
        with server_extra.needed_by("zerowake"):
            from scaler.programs import cli  # noqa: PLC0415
        cli.main()

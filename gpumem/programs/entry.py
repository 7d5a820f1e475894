"""The script `gpumem`: its commands (commands.py), once what they import is known to be there."""

from zerowake_shared import server_extra


def main() -> None:
    """Runs `gpumem` with the arguments of this process."""
    with server_extra.needed_by("gpumem"):
        from gpumem.programs import commands  # noqa: PLC0415
    commands.main()

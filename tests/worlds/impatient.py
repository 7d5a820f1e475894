"""zerowake, giving an engine a second to let go of its weights instead of ten: `python -m tests.worlds.impatient agent --state …`."""

from restore_agent.sequences import transitions
from scaler.programs.cli import main

if __name__ == "__main__":
    transitions._DEMOTE_SECONDS = 1.0
    main()

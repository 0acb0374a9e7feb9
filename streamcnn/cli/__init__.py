"""The command line: parses arguments and prints results; everything is decided elsewhere.

Results go to standard output, errors to standard error. Exit status 0 is success, 1 a run that
failed, 2 wrong usage, and 130, 143 and 129 are SIGINT (Ctrl-C), SIGTERM and SIGHUP. Commands import
what they need when they run, so that ``--help`` and wrong usage answer at once, without PyTorch. They do so
before they begin anything that a signal would have to clean up. This module imports next to nothing,
so that signals are set up first.
"""

from typing import NoReturn

from streamcnn.support.signals import leave_to_system


def main() -> NoReturn:
    """Run the command line and exit.

    Before and after a command there is nothing to clean up, so signals end the process.
    """
    leave_to_system()
    from streamcnn.cli.command_line import run

    run()

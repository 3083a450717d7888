"""Checks a run before it starts: `accelerate launch pipeline/doctor.py [--KEY VALUE ...] [--checksums sampled|all]`.

Use the launcher and the settings of the training, before it is submitted or at the beginning of its job. Prints a line
`ok|warning|error  subject: finding; fix` for each finding, and exits with 2 if one is an error. It neither makes nor
changes a run: it only makes a file for a moment in the nearest existing folder above the run. It takes less than ten
seconds, unless all checksums of a large dataset are asked for.
"""

import dataclasses
from itertools import chain
from typing import Literal

from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.errors import EXIT_USER_ERROR, LocalError

PATIENCE_SECONDS = 60
"""Longest wait for another rank, which reads data for a few seconds at most between two collectives."""


def main() -> int:
    parser = make_parser("Check a run before it starts: ranks, data, features, folder, disk, time limit.")
    help_text = "verify a few seconds' worth, or all"
    parser.add_argument("--checksums", type=Literal["sampled", "all"], default="sampled", help=help_text)
    config, arguments = parse(parser)

    # Imported here, so that `--help` and mistakes need no torch.
    from pipeline.checks.machine import Finding, check_ranks, examine, run_check_on_all_ranks
    from pipeline.distributed.failures import closing
    from pipeline.distributed.process import Runtime

    timeout_seconds = config.runtime.timeout_seconds
    if arguments.checksums == "sampled":
        timeout_seconds = min(timeout_seconds, PATIENCE_SECONDS)
    try:
        runtime = Runtime(dataclasses.replace(config.runtime, timeout_seconds=timeout_seconds))
        communication = run_check_on_all_ranks(runtime.ranks, "ranks", lambda: check_ranks(runtime))
    except (RuntimeError, LocalError) as error:
        fix = "name the interface that the nodes share (NETWORK_INTERFACE in launch/slurm/site.sh)"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(Finding("error", "ranks", f"they can't talk to each other ({reason}); {fix}"), flush=True)
        return EXIT_USER_ERROR
    code = 0
    with closing(runtime, config):
        for finding in chain(communication, examine(config, runtime.ranks, arguments.checksums == "all")):
            code = EXIT_USER_ERROR if finding.level == "error" else code
            if runtime.ranks.is_main and finding.text:
                print(finding, flush=True)
    return code


if __name__ == "__main__":
    run_program(main)

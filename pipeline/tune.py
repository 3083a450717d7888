"""Works on a study of settings: `accelerate launch pipeline/tune.py STUDY.yaml [--config FILE] [--KEY VALUE ...]`."""

import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config, make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError


def main() -> None:
    parser = make_parser("Search settings for the best score; several of these work on one study.")
    parser.usage = "%(prog)s STUDY.yaml [--config FILE] [--KEY VALUE ...]"
    parser.add_argument("study", type=Path, help="YAML file like those in configs/studies/")
    config, arguments = parse(parser)

    def configure(settings: Mapping[str, str]) -> Config:
        return parse(parser, [*sys.argv[1:], *(f"--{key}={value}" for key, value in settings.items())])[0]

    # Imported here, so that `--help` and mistakes need no torch.
    from pipeline.distributed.failures import closing
    from pipeline.distributed.process import Runtime

    try:
        from pipeline.tuning.tuner import Tuner, read_study
    except ModuleNotFoundError as error:
        raise UserError(f"a study needs {error.name}: pip install 'gan-pipeline[tune]'") from None

    study = read_study(arguments.study)
    with closing(Runtime(config.runtime), config) as runtime:
        Tuner(study, configure, runtime).run()


if __name__ == "__main__":
    run_program(main)

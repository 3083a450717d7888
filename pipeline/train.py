"""Trains a run: `accelerate launch pipeline/train.py [--config FILE] [--KEY VALUE ...]`."""

from pipeline import train
from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.storage.run_folder import RunFolder


def main() -> None:
    parser = make_parser("Train a GAN. The same command again goes on from the newest checkpoint.")
    parser.add_argument("--print_folder", action="store_true", help="Print the run's folder and exit.")
    config, arguments = parse(parser)
    if arguments.print_folder:
        print(config.folder)
        return
    # Imported here, so that `--help` and mistakes need no torch.
    from pipeline.distributed.failures import record_collectives

    record_collectives(RunFolder(config.folder).collectives)
    train(config)


if __name__ == "__main__":
    run_program(main)
